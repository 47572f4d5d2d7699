"""Checkpoint formats for other software."""
