"""The pictures of a run, of a frontier, of the published comparison."""
