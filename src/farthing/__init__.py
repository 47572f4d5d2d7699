"""Farthing: DeepSeek-V3/R1-class mixture-of-experts models at the lowest cost per token."""

__version__ = "0.1.0"
