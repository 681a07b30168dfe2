"""A model's graph: who makes, passes on and reads each unit, and whether two models agree."""
