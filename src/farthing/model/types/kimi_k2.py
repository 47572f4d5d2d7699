"""Kimi K2: DeepSeek-V3 with one group of 384 experts and 64 heads; only sizes differ."""

from farthing.model.types.base import ModelType

TYPE = ModelType("kimi_k2", "Kimi K2")
