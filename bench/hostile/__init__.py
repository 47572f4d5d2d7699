"""Measures how much one hostile client delays others."""
