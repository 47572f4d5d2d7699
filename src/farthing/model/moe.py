"""The feed-forward half of a layer: dense, or a mixture of experts (DeepSeek-V3 section 2.1.2).

Legend: T tokens; D hidden size; I intermediate size; E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from farthing.model.config import ModelConfig
from farthing.model.source import WeightSource
from farthing.ops import MoEWeights, Ops, RouterSpec, Weight
from farthing.ops.api import Handle
from farthing.ops.arrays import as_float32

if TYPE_CHECKING:
    from torch import Tensor

Gated = tuple[Weight, Weight, Weight]


def router_spec(config: ModelConfig) -> RouterSpec:
    """The routing rule of a config: noaux_tc, group_limited_greedy or greedy."""
    assert config.n_routed_experts is not None
    grouped = config.topk_method != "greedy"
    return RouterSpec(
        num_experts=config.router_size,
        top_k=config.num_experts_per_tok,
        num_groups=config.n_group if grouped else 1,
        top_k_groups=config.topk_group if grouped else 1,
        scoring=config.scoring_func,
        group_score="top2_sum" if config.topk_method == "noaux_tc" else "max",
        normalize=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        identities=config.n_identity_experts,
    )


class FeedForward:
    """One layer's MLP or mixture of experts, with its norm and residual."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        weights: WeightSource,
        layer: int,
        router: RouterSpec | None,
    ) -> None:
        config = config.at(layer)
        self.ops, self.eps = ops, config.rms_norm_eps
        self.norm = as_float32(
            weights.tensor(f"model.layers.{layer}.post_attention_layernorm.weight", (config.hidden_size,))
        )
        p = f"model.layers.{layer}.mlp"
        self.is_moe = router is not None
        if router is None:
            self.packed = ops.pack_mlp(p, gated(weights, p, config.hidden_size, config.intermediate_size))
        else:
            self.packed = ops.pack_moe(p, router, lambda: moe_weights(config, weights, p, router))
        self.beside: Handle | None = None  # a dense MLP on the experts' input (`apart`)
        if self.is_moe and config.shortcut_experts:
            dense = gated(weights, p, config.hidden_size, config.intermediate_size)
            self.beside = ops.pack_mlp(f"{p}_beside", dense)
        self.post_norm: Tensor | None = None
        if self.is_moe and config.post_mlp_norm:
            name = f"{p}.post_mlp_layernorm.weight"
            self.post_norm = as_float32(weights.tensor(name, (config.hidden_size,)))

    def __call__(self, h: Tensor, counts: Tensor | None = None) -> Tensor:
        """h [T, D] -> h + feed_forward(norm(h)) [T, D]; adds the tokens per expert to counts [E]."""
        if self.post_norm is not None:
            added = self.ops.moe(h, self.packed, self.norm, self.eps, counts, residual=False)
            return h + self.ops.rms_norm(added, self.post_norm, self.eps)
        if self.is_moe:
            return self.ops.moe(h, self.packed, self.norm, self.eps, counts)
        return self.ops.mlp(h, self.packed, self.norm, self.eps)

    def apart(self, h: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h [T, D] -> (h + mlp(norm(h)), experts(norm(h))); the next layer adds the second."""
        experts = self.ops.moe(h, self.packed, self.norm, self.eps, counts, residual=False)
        return self.ops.mlp(h, self.beside, self.norm, self.eps), experts


def gated(weights: WeightSource, prefix: str, d: int, i: int) -> Callable[[], Gated]:
    """A loader of gate [I, D], up [I, D] and down [D, I]."""
    return lambda: (
        weights.weight(f"{prefix}.gate_proj", (i, d)),
        weights.weight(f"{prefix}.up_proj", (i, d)),
        weights.weight(f"{prefix}.down_proj", (d, i)),
    )


def moe_weights(config: ModelConfig, weights: WeightSource, prefix: str, router: RouterSpec) -> MoEWeights:
    """Router and experts of one layer; experts are read one at a time."""
    e, d, i = router.num_experts, config.hidden_size, config.moe_intermediate_size
    routed = e - router.identities
    shared_size = config.shared_size
    shared_here = shared_size > 0 and weights.holds(f"{prefix}.shared_experts")
    return MoEWeights(
        gate=as_float32(weights.tensor(f"{prefix}.gate.weight", (e, d))),
        bias=as_float32(weights.tensor(f"{prefix}.gate.e_score_correction_bias", (e,)))
        if config.has_router_bias
        else None,
        experts=[
            gated(weights, f"{prefix}.experts.{j}", d, i)
            if j < routed and weights.holds(f"{prefix}.experts.{j}")
            else None
            for j in range(e)
        ],
        shared=gated(weights, f"{prefix}.shared_experts", d, shared_size) if shared_here else None,
    )
