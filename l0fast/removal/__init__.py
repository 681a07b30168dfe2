"""What may go from a model, and the smaller model."""
