"""Sizes of weights: in files, in the kernels' layout, and read per decoded token.

Model files store zero blocks; the kernels drop them from integer matrices. A token reads every matrix outside
the routed experts, each expert with its share of routed tokens, and one row of the embedding (all of it if it
is also the head). This is for one sequence without drafts; the KV cache is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from farthing.checkpoint.reader import Checkpoint
from farthing.model.config import ModelConfig
from farthing.ops.weights import BLOCK, Weight, blocks_per_cell, saves_time

if TYPE_CHECKING:
    from torch import Tensor

Measure = Literal["memory", "file", "token"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes by measure."""

    file: int
    memory: int
    token: int

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(self.file + other.file, self.memory + other.memory, self.token + other.token)

    def of(self, measure: Measure) -> int:
        """The bytes by one measure."""
        bytes_: int = getattr(self, measure)
        return bytes_

    def __str__(self) -> str:
        return (
            f"{self.file:,} bytes in files, {self.memory:,} in the kernels' layout, "
            f"{self.token:,} read per token"
        )


Reads = Callable[[str], float]  # module -> how often one decoded token reads it


def reads_of(config: ModelConfig, routed: Mapping[int, Sequence[float]] | None = None) -> Reads:
    """`routed`: layer -> share of tokens that reach each expert; top_k / E for missing layers."""
    shares = routed or {}

    def reads(module: str) -> float:
        pieces = module.split(".")
        if pieces[-1] == "embed_tokens" and len(pieces) == 2:
            return 1.0 if config.head.tie_word_embeddings else 1 / config.vocab_size
        if len(pieces) < 3 or pieces[1] != "layers":
            return 1.0
        layer = int(pieces[2])
        if layer >= config.num_hidden_layers:  # MTP
            return 0.0
        if "experts" not in pieces:
            return 1.0
        if layer in shares:
            return shares[layer][int(pieces[5])]
        return config.num_experts_per_tok / (config.experts_in(layer) or 1)

    return reads


def measured_shares(tokens: Sequence[int], total: int) -> list[float]:
    """Tokens of each expert -> share of `total` tokens that reach it."""
    return [n / max(total, 1) for n in tokens]


def sizes_of(
    checkpoint: Checkpoint,
    reads: Reads,
    saved: Mapping[str, int] | None = None,
    counts: Callable[[str], bool] = lambda module: True,
) -> Sizes:
    """Sizes of every tensor whose module `counts`; saved: bytes of dropped zero blocks, by module."""
    left_out = saved or {}
    file, token = 0, 0.0
    for name in checkpoint.names():
        module = name.rpartition(".")[0]
        if counts(module):
            file += checkpoint.nbytes(name)
            token += checkpoint.nbytes(name) * reads(module)
    token -= sum(n * reads(module) for module, n in left_out.items())
    return Sizes(file, file - sum(left_out.values()), round(token))


def head_in_8_bits(checkpoint: Checkpoint) -> tuple[str, int]:
    """The module of the output head, which may be the embedding, and its bytes with one scale per row, as it
    is rounded while loading."""
    module = "lm_head" if checkpoint.has("lm_head.weight") else "model.embed_tokens"
    n, k = checkpoint.stored_as(module)[1]
    return module, n * (k + 4)


def zero_block_bytes(weight: Weight, keep: Tensor | None) -> int:
    """Bytes of `weight` that the kernels drop: blocks without a weight in `keep` [N, K], and the scales of
    cells without a block.

    Only for integer matrices where that saves time with AVX-512. The index of the remaining cells is
    subtracted.
    """
    if keep is None or weight.format not in ("int8", "int4"):
        return 0
    n, k = keep.shape
    if n % BLOCK or k % 64:
        return 0
    counts = blocks_per_cell(keep, weight.group_size)
    if not saves_time(counts, weight.format, weight.group_size):
        return 0
    share = 1 - float(counts.sum()) * BLOCK**2 / (n * k)
    cells = int((counts > 0).sum())
    scales = (counts.numel() - cells) * BLOCK * 2 if weight.format == "int4" else 0
    return round(weight.data.nbytes * share) + scales - 2 * cells
