"""Sarvam 105B: V3 without a query latent and with different names for a few config fields."""

from farthing.model.fields import optional_section
from farthing.model.types.base import Fields, ModelType

_ALIASES = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}


def _fields(raw: Fields) -> Fields:
    fields = dict(raw)
    fields |= {ours: raw[theirs] for theirs, ours in _ALIASES.items() if raw.get(theirs) is not None}
    rope = optional_section(raw, "rope_scaling")
    if "deepseek_yarn" in (rope.get("type"), rope.get("rope_type")):
        fields["rope_scaling"] = {**rope, "type": "yarn", "rope_type": "yarn"}
    return fields


TYPE = ModelType(
    "sarvam_mla",
    "Sarvam 105B",
    _fields,
    own_words={ours: theirs for theirs, ours in _ALIASES.items()},
    defaults={"n_shared_experts": 1, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1},
)
