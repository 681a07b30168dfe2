"""The trainer: its settings, its steps, and what a run measures, goes on from and leaves."""
