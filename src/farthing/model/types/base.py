"""Description of a model type: how its files differ from DeepSeek-V3's.

Farthing uses DeepSeek-V3's config fields and tensor names internally. A type translates to them once, when a
checkpoint is opened; no later code depends on the type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from farthing.model.fields import flag, in_range, integer, optional_section, wrong
from farthing.model.forms.base import Mixer
from farthing.model.forms.latent import latent_layers

_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = "model.layers.0.mlp.experts.0.down_proj."  # with what files of toolkits have of a matrix
_PROBES = (
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.mlp.gate.weight",
    *(_EXPERT + part for part in ("weight", "weight_packed", "qweight")),
)
Fields = Mapping[str, Any]  # a config.json, or the part of it that describes the language model
INTERLEAVED: dict[str, Any] = {"rope_interleave": True}  # of types that ignore the field, as in transformers


@dataclass(frozen=True, slots=True)
class Names:
    """Tensor names of a checkpoint; module names translate as their tensors' do."""

    stored: Callable[[str], str] = lambda name: name  # from V3's name to the checkpoint's
    skipped: tuple[str, ...] = ()  # fnmatch patterns of stored tensors that are not computed here
    skipped_because: str = ""  # logged once if any of them is present
    variants: tuple[Callable[[str], str], ...] = ()  # other names that some writers of this type use
    # From an MTP layer's number, the first being 0, and the rest of V3's name to the checkpoint's name.
    drafts: Callable[[int, str], str] | None = None

    @classmethod
    def under(cls, prefix: str, skipped: tuple[str, ...] = (), because: str = "") -> Names:
        """V3's names under a prefix, as in checkpoints with a vision tower."""
        return cls(lambda name: prefix + name, skipped, because)

    def in_model(self, layers: int) -> Names:
        """These names in a model with so many hidden layers, which MTP layers follow."""
        stored, drafts = self.stored, self.drafts
        if drafts is None:
            return self

        def own(name: str) -> str:
            match = _IN_LAYER.match(name)
            if match is None or int(match[1]) < layers:
                return stored(name)
            return drafts(int(match[1]) - layers, name[match.end() :])

        return replace(self, stored=own)

    def used_in(self, has: Callable[[str], bool]) -> Names:
        """These names, or those of the variant that a checkpoint uses. has: whether it has a tensor."""

        def uses(variant: Callable[[str], str]) -> bool:
            return any(has(variant(probe)) and not has(self.stored(probe)) for probe in _PROBES)

        variant = next(filter(uses, self.variants), None)
        return self if variant is None else replace(self, stored=variant)


@dataclass(frozen=True, slots=True)
class ModelType:
    """One value of config.json's model_type."""

    name: str
    models: str  # released models of this type, for messages and documentation
    fields: Callable[[Fields], Fields] = lambda raw: raw  # to V3's fields
    names: Names = Names()
    own_words: Mapping[str, str] = field(default_factory=dict)  # V3's field -> the file's, for messages
    # What an absent field means in files of this type, where that is not what the engine takes it for.
    defaults: Fields = field(default_factory=dict)
    # The first half of every hidden layer and of MTP layers, from the fields above and the number of layers.
    mixers: Callable[[Fields, int], tuple[Mixer, ...]] = latent_layers
    may_lack_router_bias: bool = False  # some checkpoints of this type have no e_score_correction_bias

    def in_own_words(self, message: str) -> str:
        """A message about V3's fields with the names that config.json uses."""
        for ours, theirs in self.own_words.items():
            message = re.sub(rf"\b{ours}\b", theirs, message)
        return message


def present(raw: Fields) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in raw.items() if value is not None}


def half_split(raw: Fields, theta: float = 10000.0) -> dict[str, Any]:
    """Rotation of whole heads by halves, as in Llama; theta: of types whose default is not 10,000."""
    own = raw.get("rope_theta")
    return {
        "rope_interleave": False,
        "rope_theta": theta if own is None else own,
        "partial_rotary_factor": None,  # ignored, as in transformers
    }


def rotated_share(raw: Fields, default: float) -> dict[str, Any]:
    """partial_rotary_factor of a type that rotates only a part of each head, for use after `half_split`."""
    name = next((n for n in ("rope_parameters", "rope_scaling") if raw.get(n)), "rope_scaling")
    shares = (section.get("partial_rotary_factor") for section in (optional_section(raw, name), raw))
    return {"partial_rotary_factor": next((share for share in shares if share is not None), default)}


def sliding(raw: Fields, switch: bool = False, layers: Callable[[int], bool] | None = None) -> dict[str, Any]:
    """The window of each layer. switch: whether the type has `use_sliding_window`, false by default; layers:
    which ones have the window if `layer_types` is missing; None: all, whatever it says."""
    window = raw.get("sliding_window")
    used = not switch or flag("use_sliding_window", raw.get("use_sliding_window") or False)
    if window is None or not used:
        return {}
    in_range("sliding_window", window, 1)
    slides = [layers is None or layers(i) for i in range(layer_count(raw))]
    if layers is not None and (kinds := per_layer(raw, "layer_types", _ATTENTION)):
        slides = [kind == "sliding_attention" for kind in kinds]
    return {"windows": [window if each else 0 for each in slides]}


_ATTENTION = ("full_attention", "sliding_attention")


def tied(raw: Fields, text: Fields, default: bool) -> Fields:
    """tie_word_embeddings of a multimodal wrapper: its own wins over text_config's; default: of neither."""
    given = (each.get("tie_word_embeddings") for each in (raw, text))
    value = next((value for value in given if value is not None), default)
    return {"tie_word_embeddings": flag("tie_word_embeddings", value)}


def layer_count(raw: Fields, name: str = "num_hidden_layers") -> int:
    """The number of layers. Raises ValueError if the field is no positive integer."""
    return integer(raw, name)


def per_layer(raw: Fields, name: str, accepted: tuple[str, ...]) -> list[str]:
    """A list or text with one entry per hidden layer, MTP layers optional; empty if the field is absent.

    Raises ValueError for other entries or another length.
    """
    value = raw.get(name)
    if value is None or value == "" or value == []:
        return []
    if not isinstance(value, list | str) or not all(entry in accepted for entry in value):
        raise wrong(name, value, "one of " + ", ".join(map(repr, accepted)) + " per hidden layer")
    layers = layer_count(raw)
    drafts = raw.get("num_nextn_predict_layers")
    most = layers + (drafts if isinstance(drafts, int) else 0)
    if not layers <= len(value) <= most:
        raise ValueError(f"{name} has {len(value)} entries; expected one per hidden layer, {layers}")
    return list(value)


def dense_prefix(raw: Fields) -> dict[str, int]:
    """first_k_dense_replace and moe_layer_freq from `mlp_layer_types`, the list in newer files.

    Raises ValueError if no such pair describes the list.
    """
    kinds = per_layer(raw, "mlp_layer_types", ("dense", "sparse"))
    if not kinds:
        return {}
    moe = [kind == "sparse" for kind in kinds]
    layers = len(moe)
    for freq in range(1, layers + 1):
        for first in range(layers + 1):
            if moe == [i >= first and i % freq == 0 for i in range(layers)]:
                return {"first_k_dense_replace": first, "moe_layer_freq": freq}
    raise ValueError(
        f"mlp_layer_types: got {kinds!r}; expected dense layers followed by sparse ones, "
        "or a sparse layer every n"
    )
