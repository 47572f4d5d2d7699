"""The engine's interface to a model, implemented by `DecoderModel` and `ParallelModel`.

Legend: T tokens of a step; D hidden size; V vocabulary; L cache layers; E routed experts.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import TYPE_CHECKING, Protocol

from farthing.model import ModelConfig
from farthing.ops import Batch, LatentCache, Ops
from farthing.ops.api import ALL, CacheDtype

if TYPE_CHECKING:
    from torch import Tensor


class Layered(Protocol):
    """A model whose layers can be computed a few at a time."""

    config: ModelConfig

    def embed(self, ids: Tensor) -> Tensor:
        """ids [T] int64 -> the first layer's input [T, D]."""

    def run_layers(
        self, h: Tensor, batch: Batch, cache: LatentCache, counts: Tensor | None = None, span: slice = ALL
    ) -> Tensor:
        """The layers `span`: h [T, D] -> [T, D]."""


class Model(Protocol):
    """A language model over a paged latent cache."""

    config: ModelConfig
    ops: Ops

    @property
    def mtp(self) -> Sized:
        """The multi-token prediction layers; empty: the model cannot draft."""

    @property
    def layered(self) -> Layered | None:
        """The same model by layers; None if it computes all of them in one go."""

    @property
    def cache_layers(self) -> int:
        """Number of layers that write to the cache, MTP layers included."""

    def new_cache(self, num_blocks: int, block_size: int = 16, dtype: CacheDtype = "bfloat16") -> LatentCache:
        """An empty cache."""

    def forward(self, ids: Tensor, batch: Batch, cache: LatentCache, counts: Tensor | None = None) -> Tensor:
        """ids [T] int64 -> hidden [T, D] before the final norm; adds tokens per expert to counts [L, E]."""

    def first_not_finite(self, ids: Tensor, batch: Batch, cache: LatentCache) -> str | None:
        """The first part of the model whose output has a NaN or an infinity; None: unknown."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] -> logits [n, V] float32."""

    def top_logits(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [n, D] -> (values [n, k], ids [n, k], logsumexp [n])."""

    def greedy(self, hidden: Tensor) -> list[int]:
        """hidden [n, D] -> the most likely next token per row."""

    def draft(
        self,
        next_ids: Tensor,
        hidden: Tensor,
        batch: Batch,
        cache: LatentCache,
        step: int = 0,
        counts: Tensor | None = None,
    ) -> Tensor:
        """One MTP step: next_ids [T] follow the tokens of `batch`, whose hidden [T, D] is given -> [T, D]."""

    def draft_logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        """`logits` of an MTP step's output."""

    def draft_top_logits(self, hidden: Tensor, k: int, step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """`top_logits` of an MTP step's output."""

    def failure(self) -> str | None:
        """Why the model cannot compute any more; None while it can."""

    def close(self) -> None:
        """Release processes that compute parts of the model."""
