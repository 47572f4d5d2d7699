"""Formats for others to load."""
