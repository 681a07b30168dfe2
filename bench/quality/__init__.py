"""Which method makes the fewest errors at the same size: `python -m bench.quality`."""
