"""What a model hands to the packing ops: sizes and constants of its layers, and their parameters.

Legend: see `farthing.ops.api`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from farthing.ops.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Gate:
    """The activation of a gated MLP: (up + shift) g sigmoid(alpha g (1 + cubic g^2)), where g is at most
    `limit` and up within it on both sides. By default SiLU; GELU's approximation by tanh is another."""

    alpha: float = 1.0
    cubic: float = 0.0
    limit: float = math.inf
    shift: float = 0.0


SILU = Gate()


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """The routing rule (DeepSeek-V3 section 2.1.2; V2 section 2.1.3)."""

    num_experts: int  # identities included
    top_k: int
    num_groups: int = 1
    top_k_groups: int = 1
    scoring: Literal["sigmoid", "softmax", "sqrtsoftplus"] = "sigmoid"
    group_score: Literal["top2_sum", "max"] = "top2_sum"  # noaux_tc | group_limited_greedy
    normalize: bool = True
    scale: float = 1.0
    # Adaptive experts: the smallest number in [min_experts, top_k] whose normalized weights reach `mass`.
    mass: float | None = None
    min_experts: int = 2
    identities: int = 0  # the last experts, absent from MoEWeights: they return n, the normed input
    gate: Gate = SILU  # of every expert, the shared one included


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Head layout of multi-head latent attention (DeepSeek-V2 section 2.1)."""

    num_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    latent_dim: int
    scale: float  # score scale, including YaRN's factor
    interleaved: bool = True  # rotary pairs are (x0, x1), (x2, x3), …; else (x_i, x_{i + r/2})
    norm_eps: float = 1e-6  # of the latent's norm


@dataclass(frozen=True, slots=True)
class GroupedSpec:
    """Head layout of grouped-query attention; G = kv_heads, each shared by num_heads / G query heads."""

    num_heads: int
    kv_heads: int
    head_dim: int  # d
    rope_dim: int  # the first rope_dim of d are rotated
    scale: float
    # Keys are values with k_norm's weights, but for so many elements that turn, the first ones of each half:
    # only these are cached besides values. None: keys are cached whole.
    turning: int | None = None
    interleaved: bool = False  # as in AttentionSpec
    whole_norm: bool = False  # norms are of all heads together, not of each
    norm_eps: float = 1e-6  # of the norms of queries and keys
    gated: bool = False  # the output is multiplied by the sigmoid of further H d columns of the input
    window: int | None = None  # how many tokens up to its own one attends to; None: all of them
    # Calibrated scales of values and keys in an FP8 cache; None: every row has its own.
    cache_scales: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class GroupedParts:
    """What queries, keys and values pass through before rotation, float32; None: nothing."""

    bias: Tensor | None = None  # [(H + 2 G) d], and H d of the gates
    q_norm: Tensor | None = None  # [d], or [H d] of all heads together
    k_norm: Tensor | None = None  # [d], or [G d]
    sinks: Tensor | None = None  # [H], a score of each head that takes part in its softmax without a value
    v_norm: Tensor | None = None  # [d], of each head's value


@dataclass(frozen=True, slots=True)
class IndexerSpec:
    """Layout of the lightning indexer, which selects attention's keys (DeepSeek-V3.2-Exp section 2.1)."""

    num_heads: int
    head_dim: int
    rope_dim: int  # the first rope_dim of head_dim
    top_k: int
    interleaved: bool = False
    norm_eps: float = 1e-6  # of the keys' LayerNorm


@dataclass(frozen=True, slots=True)
class DeltaSpec:
    """Layout of Gated DeltaNet (Yang et al. 2024): each of Hk key heads is shared by Hv / Hk value heads."""

    key_heads: int  # Hk
    value_heads: int  # Hv
    key_dim: int  # dk
    value_dim: int  # dv
    width: int  # tokens under the causal convolution, whose C channels are all queries, keys and values
    norm_eps: float = 1e-6  # of the output's norm

    @property
    def channels(self) -> int:
        """C."""
        return 2 * self.key_heads * self.key_dim + self.values

    @property
    def values(self) -> int:
        """Columns of the output."""
        return self.value_heads * self.value_dim

    @property
    def state(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of a sequence's slot: [Hv, dk, dv] and [width - 1, C]."""
        return (self.value_heads, self.key_dim, self.value_dim), (self.width - 1, self.channels)


@dataclass(frozen=True, slots=True)
class DeltaParts:
    """Gated DeltaNet's parameters that are no matrices, float32. Decay is exp(rate softplus(a + shift))."""

    conv: Tensor  # [width, C], the oldest token first
    rate: Tensor  # [Hv]
    shift: Tensor  # [Hv]
    norm: Tensor  # [dv], of the output


@dataclass(frozen=True, slots=True)
class CompressedSpec:
    """Attention to a window and to a compressed past (DeepSeek-V4 section 2.3): one head is the key and the
    value of all queries, and every `rate` tokens become one more of those, an entry."""

    num_heads: int  # H
    head_dim: int  # d
    rope_dim: int  # the last r of d are rotated, in adjacent pairs
    window: int  # tokens up to its own one attends to
    rate: int = 0  # 0: there are no entries
    # What selects among entries, which then pool the tokens of two windows; its keys are entries, too.
    index: IndexerSpec | None = None
    norm_eps: float = 1e-6

    @property
    def pooled(self) -> tuple[int, ...]:
        """Columns of the values that entries pool, attention's and the indexer's; as many are gates."""
        if not self.rate:
            return ()
        return (self.head_dim,) if self.index is None else (2 * self.head_dim, 2 * self.index.head_dim)

    @property
    def open_tokens(self) -> int:
        """Tokens of which an entry is made."""
        return self.rate * (1 if self.index is None else 2)


@dataclass(frozen=True, slots=True)
class PoolParts:
    """How tokens become an entry, float32: values times the softmax, per column, of gates + bias; then a
    norm."""

    bias: Tensor  # [rate, d], or [rate, 2 d]
    norm: Tensor  # [d]


@dataclass(frozen=True, slots=True)
class CompressedParts:
    """The parameters of `CompressedSpec` that are no matrices, float32."""

    norm: Tensor  # [d], of keys
    sinks: Tensor  # [H], as in GroupedParts
    pools: tuple[PoolParts, ...] = ()  # of attention's entries, and of the indexer's


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """Hyper-connections (DeepSeek-V4 section 2.2): a residual of several streams that are mixed."""

    count: int  # n
    steps: int  # of Sinkhorn's normalization of what mixes them
    eps: float  # of that
    norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class StreamParts:
    """How coefficients follow from the streams, float32: scale (weight x) + base of their normed x."""

    weight: Tensor  # [n (n + 2), n D]: in, out, and how streams mix; or [n, n D] where they end
    base: Tensor  # [n (n + 2)] or [n]
    scale: Tensor  # [3] or [1]


@dataclass(frozen=True, slots=True)
class MoEWeights:
    """The input of `pack_moe`. Experts are read one at a time, so that they need not all fit in memory."""

    gate: Tensor  # [E, D] float32
    bias: Tensor | None  # [E] float32, e_score_correction_bias
    # gate [I, D], up [I, D], down [D, I] of each; None: an identity, or on another rank: skipped here
    experts: Sequence[Callable[[], tuple[Weight, Weight, Weight]] | None]
    shared: Callable[[], tuple[Weight, Weight, Weight]] | None
    shared_gate: Tensor | None = None  # [1, D] float32: the shared expert's output x sigmoid(shared_gate n)
    logit_bias: Tensor | None = None  # [E] float32, added to the router's logits
    expert_scale: Tensor | None = None  # [E] float32, of an expert's weight, after normalization
