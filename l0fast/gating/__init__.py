"""Gates for any model: where they go, and the retrofit."""
