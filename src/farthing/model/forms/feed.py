"""What a layer's second half is: an MLP, a mixture of experts, or both (DeepSeek-V3 section 2.1.2).

As the forms of first halves do, it holds one layer's own sizes and says what tensors the half has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from farthing.model import fields as checked
from farthing.model.fields import absent, wrong
from farthing.model.spec import Tensor, Tensors, gated
from farthing.ops.specs import SILU, Gate, RouterSpec


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts of which a router chooses some for each token, and one that every token has."""

    router: RouterSpec
    width: int  # I of a routed expert
    corrected: bool = True  # the router has e_score_correction_bias
    biased: bool = False  # matrices and the router's logits have biases
    scaled: bool = False  # the router's input has learned scales, not the norm's; experts' weights too
    hashed: bool = False  # experts are looked up by the token, not chosen by the router
    shared: int = 0  # columns of the shared expert; 0: there is none
    shared_gate: bool = False  # its output x sigmoid of a learned product with its input

    @property
    def count(self) -> int:
        """Routed experts, without those that return their input."""
        return self.router.num_experts - self.router.identities

    @property
    def shared_count(self) -> int:
        """The shared expert in experts of a routed one's width, as config.json counts it."""
        return -(-self.shared // self.width)

    @property
    def per_token(self) -> float:
        """Routed experts per token: fewer than top_k if a balanced router picks identities."""
        return self.router.top_k * self.count / self.router.num_experts

    def tensors(self, p: str, d: int, vocabulary: int) -> Tensors:
        """The parameters, of routed experts those of the first alone; p: prefix of the half."""
        size, gate = (self.router.num_experts,), p + "gate."
        yield Tensor(gate + "weight", (*size, d), "router", part="router")
        if self.hashed:
            yield Tensor(gate + "tid2eid", (vocabulary, self.router.top_k), "table", part="router")
        elif self.corrected:
            yield Tensor(gate + "e_score_correction_bias", size, "bias", part="router")
        if self.biased:
            yield Tensor(gate + "bias", size, "bias", part="router")
        if self.scaled:
            yield Tensor(gate + "input_scale", (d,), "scale", part="router")
            yield Tensor(gate + "expert_scale", size, "scale", part="router")
        yield from gated(p + "experts.0.", d, self.width, "expert", self.biased, expert=0)
        if self.shared:
            yield from gated(p + "shared_experts.", d, self.shared, "shared")
            if self.shared_gate:
                yield Tensor(p + "shared_expert_gate.weight", (1, d), "linear", part="router")

    def check(self) -> None:
        """Raise ValueError for a rule by which no router can choose."""
        r = self.router
        if not 1 <= r.top_k <= r.num_experts:
            raise ValueError(
                f"num_experts_per_tok: got {r.top_k}; expected 1…{r.num_experts}, the number of experts"
            )
        if r.num_groups < 1 or r.num_experts % r.num_groups:
            raise ValueError(
                f"n_group: got {r.num_groups}; expected a divisor of n_routed_experts = {r.num_experts}"
            )
        if r.group_score == "top2_sum" and r.num_experts == r.num_groups > 1:
            raise ValueError(
                f"n_group: got {r.num_groups}; expected at most {r.num_experts // 2}, half of "
                "n_routed_experts: a group's score is the sum of its two best experts"
            )
        reachable = r.top_k_groups * (r.num_experts // r.num_groups)
        if not 1 <= r.top_k_groups <= r.num_groups or reachable < r.top_k:
            raise ValueError(
                f"topk_group: got {r.top_k_groups}; expected 1…{r.num_groups}, the n_group, with at least "
                f"num_experts_per_tok = {r.top_k} experts in the kept groups"
            )


@dataclass(frozen=True, slots=True)
class Feed:
    """A layer's second half."""

    width: int = 0  # I of the MLP; 0: there is none
    experts: Experts | None = None
    gate: Gate = SILU  # the activation of the MLP
    # Beside an MLP: experts read its input, and their output is added a layer later. Without, both have norms
    # of their own of input and output.
    delayed: bool = False
    post_norm: bool = False  # of the output, before it is added
    scaled: bool = False  # the layer's output is multiplied by a learned number

    @property
    def both(self) -> bool:
        """Whether there is an MLP beside experts."""
        return self.width > 0 and self.experts is not None

    @property
    def parallel(self) -> bool:
        """Whether an MLP and experts have norms of their own and are added."""
        return self.both and not self.delayed

    @property
    def alone(self) -> bool:
        """Whether the half is either an MLP or experts whose output is added as it is."""
        return not (self.both or self.scaled or (self.experts and self.experts.router.identities))

    def tensors(self, p: str, d: int, vocabulary: int) -> Tensors:
        """The parameters, of routed experts those of the first alone; p: prefix, d: hidden size."""
        if self.width:
            yield from gated(p, d, self.width, "dense")
        if self.post_norm:
            yield Tensor(p + "post_mlp_layernorm.weight", (d,), "norm", part="layer")
        for name in ("expert_norm", "dense_post_norm", "expert_post_norm") if self.parallel else ():
            yield Tensor(f"{p}{name}.weight", (d,), "norm", part="layer")
        if self.experts is not None:
            yield from self.experts.tensors(p, d, vocabulary)

    def check(self) -> None:
        """Raise ValueError for a rule by which no router can choose."""
        if self.experts is not None:
            self.experts.check()


@dataclass(frozen=True, slots=True)
class _Words:
    """What a config.json says of feed-forwards, in V3's words. Sizes are those of layers without others."""

    intermediate_size: int
    n_shared_experts: int = 0
    n_identity_experts: int = 0  # router outputs after the routed experts, which return their input
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    router_bias: bool = True  # noaux_tc only
    scoring_func: Literal["sigmoid", "softmax", "sqrtsoftplus"] = "sigmoid"
    expert_bias: bool = False
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    shared_gate: bool = False
    shared_intermediate_size: int | None = None  # None: n_shared_experts * moe_intermediate_size
    post_mlp_norm: bool = False  # of experts' outputs
    post_norms: bool = False  # of every half's output
    parallel_mlp: bool = False
    scaled_router: bool = False
    layer_scalar: bool = False
    shortcut_experts: bool = False

    def feed(self, experts: int | None, hashed: bool, gate: Gate) -> Feed:
        """The half with so many routed experts; None: an MLP."""
        if experts is None:
            return Feed(
                self.intermediate_size, None, gate, post_norm=self.post_norms, scaled=self.layer_scalar
            )
        both = self.shortcut_experts or self.parallel_mlp
        return Feed(
            self.intermediate_size if both else 0,
            self._experts(experts, hashed, gate),
            gate,
            delayed=self.shortcut_experts,
            post_norm=self.post_norms or self.post_mlp_norm,
            scaled=self.layer_scalar,
        )

    def _experts(self, count: int, hashed: bool, gate: Gate) -> Experts:
        grouped, corrected = self.topk_method != "greedy", self.topk_method == "noaux_tc"
        shared = self.shared_intermediate_size
        router = RouterSpec(
            num_experts=count + self.n_identity_experts,
            top_k=self.num_experts_per_tok,
            num_groups=self.n_group if grouped else 1,
            top_k_groups=self.topk_group if grouped else 1,
            scoring=self.scoring_func,
            group_score="top2_sum" if corrected else "max",
            normalize=self.norm_topk_prob,
            scale=self.routed_scaling_factor,
            identities=self.n_identity_experts,
            gate=gate,
        )
        return Experts(
            router,
            self.moe_intermediate_size,
            corrected=corrected and self.router_bias and not hashed,
            biased=self.expert_bias,
            scaled=self.scaled_router,
            hashed=hashed,
            shared=self.n_shared_experts * self.moe_intermediate_size
            if shared is None or not self.n_shared_experts
            else shared,
            shared_gate=self.shared_gate,
        )


# Of one layer, if pruning made layers differ: "layer_sizes" has one object per layer, MTP layers included.
SIZES = ("intermediate_size", "n_routed_experts", "moe_intermediate_size", "shared_intermediate_size")
_EXPERT_COUNTS = ("n_routed_experts", "num_local_experts")
_OF_EXPERTS = ("num_experts_per_tok", "moe_intermediate_size")  # required with experts
_POSITIVE = {"intermediate_size", "moe_layer_freq", "n_group", "topk_group", "shared_intermediate_size"}
_NULLABLE = {"n_shared_experts", "n_group", "topk_group", "shared_intermediate_size"}
_UNUSED_IF_DENSE = {
    *_OF_EXPERTS,
    *("first_k_dense_replace", "moe_layer_freq", "topk_method", "scoring_func", "norm_topk_prob"),
    "routed_scaling_factor",
}


def feed_layers(raw: Mapping[str, Any], hidden: int, drafts: int) -> tuple[Feed, ...]:
    """The second half of every hidden layer, then of MTP layers, of which there is at least one: it may be
    used although config.json does not tell. Raises ValueError naming the field of V3's config.json."""
    dense = all(raw.get(name) is None for name in _EXPERT_COUNTS)
    nullable = _NULLABLE | (_UNUSED_IF_DENSE if dense else set())
    found = checked.values(_Words, raw, _POSITIVE, nullable)
    experts, gate = _routed(raw), raw.get("gate") or SILU
    if experts is not None:
        found |= {name: checked.integer(raw, name) for name in _OF_EXPERTS}
    words = _Words(**found)
    without, hashed = (frozenset(raw.get(name) or ()) for name in ("dense_layers", "hashed_layers"))
    sizes = _layer_sizes(raw.get("layer_sizes"), hidden + drafts)

    def feed(layer: int) -> Feed:
        first, every = words.first_k_dense_replace, words.moe_layer_freq
        moe = layer >= first and layer % every == 0 and layer not in without
        own = dict(sizes[layer]) if layer < len(sizes) else {}
        count = own.pop("n_routed_experts", experts)
        return _Words(**(found | own)).feed(count if moe else None, layer in hashed, gate)

    return tuple(map(feed, range(hidden + max(1, drafts))))


def _routed(raw: Mapping[str, Any]) -> int | None:
    """Experts of every layer that has some; None: no layer has."""
    name = next((n for n in _EXPERT_COUNTS if n in raw), None)
    if name is None:
        raise absent("n_routed_experts", "a positive integer, or null for a model without experts")
    return None if raw[name] is None else checked.integer(raw, name)


def _layer_sizes(value: Any, layers: int) -> list[Mapping[str, int]]:
    if value is None or value == []:
        return []
    if not isinstance(value, list) or not all(isinstance(v, dict) and set(v) <= {*SIZES} for v in value):
        raise wrong("layer_sizes", value, f"a list of objects with {sorted(SIZES)}")
    if len(value) != layers:
        raise ValueError(f"layer_sizes has {len(value)} entries; expected one per layer, {layers}")
    for i, sizes in enumerate(value):
        for name, size in sizes.items():
            checked.in_range(f"layer_sizes[{i}].{name}", size, 1)
    return value
