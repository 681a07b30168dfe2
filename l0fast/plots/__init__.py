"""The pictures of a run and of a frontier."""
