"""The trainer: its settings and steps, and the metrics, checkpoints and results of a run."""
