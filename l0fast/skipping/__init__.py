"""Where closed units can be left out of a training step, and the leaving out."""
