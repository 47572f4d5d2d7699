"""Models: what config.json says, what tensors and caches its layers have, and how they are computed."""

from farthing.model.attention import CACHE_SCALES
from farthing.model.config import ConfigError, ModelConfig, RopeConfig
from farthing.model.decoder import DecoderModel, routers_of
from farthing.model.deepseek import FeedForward, MTPLayer, moe_weights
from farthing.model.forms import DeltaHeads, Mixer
from farthing.model.kinds import CacheKind, CacheSizes, Sizing, cache_kinds
from farthing.model.load import (
    IGNORED,
    AdaptiveExperts,
    claim,
    config_of,
    form_of,
    load,
    model_of,
    names_in,
    random_model,
    routers_for,
    source_of,
    stores_head,
    unstacked,
)
from farthing.model.parameters import (
    Parameters,
    each_kind,
    layer_of,
    parameter_shapes,
    tensors_of,
)
from farthing.model.source import LayerSource, MemorySource, WeightSource, stack_of
from farthing.model.types import Names

__all__ = [
    "CACHE_SCALES",
    "IGNORED",
    "AdaptiveExperts",
    "CacheKind",
    "CacheSizes",
    "ConfigError",
    "DecoderModel",
    "DeltaHeads",
    "FeedForward",
    "LayerSource",
    "MTPLayer",
    "MemorySource",
    "Mixer",
    "ModelConfig",
    "Names",
    "Parameters",
    "RopeConfig",
    "Sizing",
    "WeightSource",
    "cache_kinds",
    "claim",
    "config_of",
    "each_kind",
    "form_of",
    "layer_of",
    "load",
    "model_of",
    "moe_weights",
    "names_in",
    "parameter_shapes",
    "random_model",
    "routers_for",
    "routers_of",
    "source_of",
    "stack_of",
    "stores_head",
    "tensors_of",
    "unstacked",
]
