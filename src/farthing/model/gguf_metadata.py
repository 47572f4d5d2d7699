"""The metadata of a model's GGUF file, which `farthing.model.gguf` reads back as the same configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.gguf import ARCHITECTURES
from farthing.lazy import np
from farthing.model.attention import frequencies
from farthing.model.config import ModelConfig
from farthing.model.fields import ConfigError, RopeConfig
from farthing.model.forms import Experts, GroupedHeads
from farthing.model.gguf import Metadata, config_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GATING = {"softmax": 1, "sigmoid": 2}  # values of expert_gating_func


def architecture_of(config: ModelConfig) -> str:
    """The architecture under which a model is written. Raises ConfigError for others, with those that are."""
    for name, names in ARCHITECTURES.items():
        if config.model_type in names.types:
            return name
    types = ", ".join(kind for names in ARCHITECTURES.values() for kind in names.types)
    raise ConfigError(
        f"model_type: got {config.model_type!r}, which is not written as GGUF; expected {types}"
    )


def metadata_of(c: ModelConfig, architecture: str) -> dict[str, Any]:
    """The architecture's own fields, under their full names."""
    own = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size or c.moe_intermediate_size,
        "vocab_size": c.vocab_size,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        **_mixers(c),
        **_rope(c.rope),
        **(_experts(c, c.experts) if c.experts else {}),
        **(_multipliers(c) if architecture.startswith("granite") else {}),
    }
    if windows := [mixer.window for mixer in c.mixers if mixer.window]:
        own["attention.sliding_window"] = max(windows)
    if architecture in (
        "qwen35",
        "qwen35moe",
    ):  # pairs take turns at three axes of a position, which are equal in text
        pairs = c.attention.rotary_width // 2
        own["rope.dimension_sections"] = [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0]
    return {f"{architecture}.{name}": value for name, value in own.items()}


def _multipliers(c: ModelConfig) -> dict[str, Any]:
    """Granite's, as for branches of the residual that are not scaled: see `farthing.model.types.llama`."""
    assert isinstance(c.attention, GroupedHeads), "as every type that is written so has"
    return {
        "embedding_scale": c.embedding_scale,
        "residual_scale": 1.0,
        "attention.scale": c.attention.scale,
        "logit_scale": 1.0 / c.head.logit_scale,
    }


def _mixers(c: ModelConfig) -> dict[str, Any]:
    found = dict(item for mixer in dict.fromkeys(c.mixers) for item in mixer.gguf().items())
    if any(mixer.states for mixer in c.mixers):
        hidden = range(c.num_hidden_layers)
        found["attention.recurrent_layers"] = [bool(c.mixer(i).states) for i in hidden]
    return found | c.attention.gguf()


def _rope(rope: RopeConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"rope.freq_base": rope.theta}
    if rope.factor is None or rope.kind == "llama3":  # whose factors are a tensor
        return found
    found |= {
        "rope.scaling.type": rope.kind,
        "rope.scaling.factor": rope.factor,
        "rope.scaling.original_context_length": rope.original_max_position,
    }
    if rope.kind == "yarn":
        found |= {f"rope.scaling.yarn_{n}": getattr(rope, n) for n in ("beta_fast", "beta_slow")}
    if rope.mscale_all_dim:
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope.mscale_all_dim
    return found


def _experts(c: ModelConfig, e: Experts) -> dict[str, Any]:
    found: dict[str, Any] = {
        "expert_count": e.count,
        "expert_used_count": e.router.top_k,
        "expert_feed_forward_length": e.width,
        "expert_shared_count": e.shared_count,
        "expert_weights_scale": e.router.scale,
        "expert_weights_norm": e.router.normalize,
        "expert_gating_func": _GATING[e.router.scoring],
        "leading_dense_block_count": c.dense_prefix,
    }
    if e.router.num_groups > 1:
        groups = e.router.num_groups, e.router.top_k_groups
        found |= dict(zip(("expert_group_count", "expert_group_used_count"), groups, strict=True))
    if e.shared_gate:
        found["expert_shared_feed_forward_length"] = e.shared
    return found


def rotary_factors(rope: RopeConfig, width: int) -> NDArray[np.float32] | None:
    """The tensor of factors by which Llama 3 scales the frequencies of pairs; None for other scalings."""
    if rope.factor is None or rope.kind != "llama3":
        return None
    factors: NDArray[np.float32] = frequencies(replace(rope, factor=None), width) / frequencies(rope, width)
    return factors


# Not compared: what the tokenizer's fields have, and a head that the file has rounded; the fields of
# the head are compared by themselves.
_UNCOMPARED = ("model_type", "head", "bos_token_id", "eos_token_ids", "rounded_head")


def _difference(name: str, own: Any, read: Any) -> tuple[str, Any, Any]:
    """What differs in a field, of the forms of layers the first size; projections of recurrences are compared
    as if they were not fused, and numbers as the file's are: float32."""
    if isinstance(own, float) and isinstance(read, float) and np.float32(own) == np.float32(read):
        return name, own, own
    if name != "mixers":
        return name, own, read
    for a, b in zip(own, read, strict=True):
        a, b = a.apart(), b.apart()
        if a != b:
            sizes = [each.name for each in fields(a)] if type(a) is type(b) else []
            size = next((each for each in sizes if getattr(a, each) != getattr(b, each)), None)
            return (size, getattr(a, size), getattr(b, size)) if size else (name, a, b)
    return name, own, own


def read_back(
    config: ModelConfig, out: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]],
    factors: NDArray[np.float32] | None,
) -> ModelConfig:  # fmt: skip
    """The configuration that a reader of the file will find. Raises ConfigError if it is another one.

    tensors: Hugging Face's names and shapes of what the file will have.
    """
    described = Metadata(out, {name: partial(metadata.get, name) for name in metadata})
    found = ModelConfig.from_json(config_of(described, tensors, factors))
    of: dict[Any, tuple[Any, Any]] = {each: (config, found) for each in fields(config)}
    of |= {each: (config.head, found.head) for each in fields(config.head)}
    for field, both in of.items():
        name, own, read = _difference(field.name, *(getattr(each, field.name) for each in both))
        if own != read and field.name not in _UNCOMPARED:
            raise ConfigError(
                f"model: its {name} is {str(own)[:200]}, and GGUF of the architecture "
                f"{described.architecture!r} can only say {str(read)[:200]}"
            )
    return found
