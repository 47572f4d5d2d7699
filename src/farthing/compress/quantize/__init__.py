"""Quantization of float matrices."""
