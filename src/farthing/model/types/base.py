"""Description of a model type: how its files differ from DeepSeek-V3's.

Farthing uses DeepSeek-V3's config fields and tensor names internally. A type translates to them once, when a
checkpoint is opened; no later code depends on the type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Fields = Mapping[str, Any]  # a config.json, or the part of it that describes the language model
INTERLEAVED: dict[str, Any] = {"rope_interleave": True}  # of types that ignore the field, as in transformers


@dataclass(frozen=True, slots=True)
class Names:
    """Tensor names of a checkpoint; module names translate as their tensors' do."""

    stored: Callable[[str], str] = lambda name: name  # from V3's name to the checkpoint's
    skipped: tuple[str, ...] = ()  # fnmatch patterns of stored tensors that are not computed here
    skipped_because: str = ""  # logged once if any of them is present
    variants: tuple[Callable[[str], str], ...] = ()  # other names that some writers of this type use

    @classmethod
    def under(cls, prefix: str, skipped: tuple[str, ...] = (), because: str = "") -> Names:
        """V3's names under a prefix, as in checkpoints with a vision tower."""
        return cls(lambda name: prefix + name, skipped, because)

    def used_in(self, has: Callable[[str], bool]) -> Names:
        """These names, or those of the variant that a checkpoint uses. has: whether it has a tensor."""
        probe = "model.layers.0.input_layernorm.weight"
        found = next((v for v in self.variants if has(v(probe)) and not has(self.stored(probe))), None)
        return self if found is None else replace(self, stored=found)


@dataclass(frozen=True, slots=True)
class ModelType:
    """One value of config.json's model_type."""

    name: str
    models: str  # released models of this type, for messages and documentation
    fields: Callable[[Fields], Fields] = lambda raw: raw  # to V3's fields
    names: Names = Names()
    may_lack_router_bias: bool = False  # some checkpoints of this type have no e_score_correction_bias


def tied(raw: Fields) -> Fields:
    """tie_word_embeddings of a multimodal wrapper, where present: it wins over text_config's."""
    value = raw.get("tie_word_embeddings")
    return {} if value is None else {"tie_word_embeddings": value}


def layer_count(raw: Fields, name: str = "num_hidden_layers") -> int:
    """The number of layers. Raises ValueError if the field is no positive integer."""
    layers = raw.get(name)
    if not isinstance(layers, int) or layers < 1:
        raise ValueError(f"{name} is {layers!r}; expected a positive integer")
    return layers


def per_layer(raw: Fields, name: str) -> list[Any]:
    """A list or text with one entry per hidden layer, MTP layers optional; empty if the field is absent.

    Raises ValueError for another length.
    """
    entries, layers = list(raw.get(name) or ()), layer_count(raw)
    most = layers + (raw.get("num_nextn_predict_layers") or 0)
    if entries and not layers <= len(entries) <= most:
        raise ValueError(f"{name} has {len(entries)} entries; expected one per hidden layer, {layers}")
    return entries


def dense_prefix(raw: Fields) -> dict[str, int]:
    """first_k_dense_replace and moe_layer_freq from `mlp_layer_types`, the list in newer files.

    Raises ValueError if no such pair describes the list.
    """
    kinds = per_layer(raw, "mlp_layer_types")
    if not kinds:
        return {}
    moe = [kind == "sparse" for kind in kinds]
    layers = len(moe)
    for freq in range(1, layers + 1):
        for first in range(layers + 1):
            if moe == [i >= first and i % freq == 0 for i in range(layers)]:
                return {"first_k_dense_replace": first, "moe_layer_freq": freq}
    raise ValueError(
        f"mlp_layer_types is {kinds!r}; expected dense layers followed by sparse ones, "
        "or a sparse layer every n"
    )
