"""The Lagrangian term, how its multiplier moves and its target comes down."""
