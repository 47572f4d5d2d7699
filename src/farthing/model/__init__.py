"""The DeepSeek-V3 model, one concept per file."""

from farthing.model.config import ConfigError, ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.load import load, random_model

__all__ = ["ConfigError", "DecoderModel", "ModelConfig", "load", "random_model"]
