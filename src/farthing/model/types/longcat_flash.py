"""LongCat-Flash: layers with two attentions and two dense MLPs, and experts parallel to the second half.

Each of its layers becomes two of ours. Both have attention and a dense MLP. The first also has the experts,
which read the MLP's input; their output is added after the second. Some experts are the identity, and the
latents are scaled after their norms.
"""

import re

from farthing.model.fields import flag, integer, wrong
from farthing.model.types.base import INTERLEAVED, Fields, ModelType, Names, layer_count

_RENAMED = {
    "ffn_hidden_size": "intermediate_size",
    "expert_ffn_hidden_size": "moe_intermediate_size",
    "moe_topk": "num_experts_per_tok",
    "zero_expert_num": "n_identity_experts",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.([a-z_]+)(.*)")


def _fields(raw: Fields) -> Fields:
    if (kind := raw.get("zero_expert_type", "identity")) != "identity":
        raise wrong("zero_expert_type", kind, "'identity'")
    if raw.get("router_bias") not in (None, False):
        raise wrong("router_bias", raw["router_bias"], "false: matrices have no bias")
    width, query, latent = (integer(raw, name) for name in ("hidden_size", "q_lora_rank", "kv_lora_rank"))
    scaled = {name: flag(name, raw.get(name, True)) for name in ("mla_scale_q_lora", "mla_scale_kv_lora")}
    return {
        **raw,
        **{
            ours: integer(raw, theirs, least=int(theirs != "zero_expert_num"))
            for theirs, ours in _RENAMED.items()
        },
        "num_hidden_layers": 2 * layer_count(raw, "num_layers"),
        **INTERLEAVED,
        "num_nextn_predict_layers": 0,
        "moe_layer_freq": 2,
        "first_k_dense_replace": 0,
        "n_shared_experts": 0,
        "shortcut_experts": True,
        "scoring_func": "softmax",
        "topk_method": "noaux_tc",
        "router_bias": True,
        "norm_topk_prob": raw.get("norm_topk_prob", False),
        "query_latent_scale": (width / query) ** 0.5 if scaled["mla_scale_q_lora"] else 1.0,
        "latent_scale": (width / latent) ** 0.5 if scaled["mla_scale_kv_lora"] else 1.0,
    }


def _stored(name: str) -> str:
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    half, part, rest = int(match[1]) % 2, match[2], match[3]
    if part != "mlp":
        part = f"{part}.{half}"
    elif rest.startswith(".gate."):
        weight = rest.removeprefix(".gate.").replace("weight", "classifier.weight")
        rest = f".router.{weight}"
    elif not rest.startswith(".experts."):
        part = f"mlps.{half}"
    return f"model.layers.{int(match[1]) // 2}.{part}{rest}"


TYPE = ModelType(
    "longcat_flash",
    "LongCat-Flash",
    _fields,
    Names(_stored, ("model.mtp.*",), "the MTP layer of this type is not supported"),
    own_words={ours: theirs for theirs, ours in _RENAMED.items()},
    defaults={"rms_norm_eps": 1e-5, "routed_scaling_factor": 6.0, "rope_theta": 1e7},
)
