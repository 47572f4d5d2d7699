"""Incremental parsers: a model's output in pieces, deltas out. Every one is linear in its input."""
