"""DeepSeek-V3, V3.1, R1 and Moonlight: the base that other types are described against."""

from farthing.model.types.base import ModelType

TYPE = ModelType("deepseek_v3", "DeepSeek-V3, V3.1, R1; Moonlight")
