"""The DeepSeek-V3 model, one concept per file."""

from farthing.model.config import ConfigError, ModelConfig
from farthing.model.deepseek import DeepseekModel
from farthing.model.load import load, random_model

__all__ = ["ConfigError", "DeepseekModel", "ModelConfig", "load", "random_model"]
