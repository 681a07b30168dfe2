"""Gated layers, and the one draw that serves a whole model."""
