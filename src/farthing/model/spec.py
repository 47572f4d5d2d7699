"""What tensors a model has: each is declared once, by the form of layer that reads it.

A loader, the shard plan, recipes, the planner and `inspect` ask these declarations, and know no names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from farthing.ops.cut import Cut, bounds

Role = Literal[
    "matrix",
    "heads",  # a matrix that is packed head by head: latents to keys and values
    "index",  # a matrix of an indexer, which published files quantize and recipes leave
    "join",  # a matrix that recipes round and published files leave
    "linear",  # a matrix that both leave, because it is small or decides much
    "router",
    "embedding",
    "head",
    "norm",
    "scale",  # numbers around 1
    "bias",
    "vector",  # other plain numbers
    "table",  # integers
]
Part = Literal["ends", "mixer", "dense", "router", "shared", "expert", "layer"]

COMPRESSED = frozenset({"matrix", "heads", "join"})  # roles whose matrices a recipe rounds
PUBLISHED = frozenset({"matrix", "heads", "index"})  # and those that published files quantize
ROUNDED = PUBLISHED | {"linear"}  # and those that backends round while loading
FEED = frozenset({"dense", "router", "shared", "expert"})  # parts of a layer's second half


@dataclass(frozen=True, slots=True)
class Share:
    """How tensor-parallel ranks divide a tensor along `dim`.

    heads: units that are never split; ranks beyond so many share them. None: any columns, in whole blocks of
    scales. widths: of several matrices stored as one, of each of which a rank has a part.
    """

    dim: int
    heads: int | None = None
    widths: tuple[int, ...] = ()

    def cut(self, shape: tuple[int, ...], ranks: int, index: int) -> Cut:
        """The part of one of the ranks."""
        size = shape[self.dim]
        if self.heads is None and not self.widths:
            return Cut(self.dim, *bounds(size, ranks, index))
        parts = min(ranks, self.heads or ranks)
        at = index * parts // ranks
        widths = self.widths or (size,)
        starts = accumulate(widths[:-1], initial=0)
        first, *more = (
            (start + width * at // parts, start + width * (at + 1) // parts)
            for start, width in zip(starts, widths, strict=True)
        )
        return Cut(self.dim, *first, more=tuple(more))


@dataclass(frozen=True, slots=True)
class Tensor:
    """A parameter of a checkpoint under its name here; files of some types have another."""

    name: str
    shape: tuple[int, ...]
    role: Role = "vector"
    share: Share | None = None  # None: every rank has all of it
    reads: str = ""  # what a matrix is multiplied by, where others read the same; empty: what it alone reads
    part: Part = "mixer"
    expert: int | None = None  # of a routed expert's matrices and biases

    @property
    def module(self) -> str:
        """The name without `.weight`."""
        return self.name.removesuffix(".weight")

    @property
    def input(self) -> str:
        """A name for what it is multiplied by; matrices with the same input have the same name."""
        return self.reads or self.module

    @property
    def scaled_with(self) -> str:
        """The same where a kernel quantizes an input once for all experts that read a part of it."""
        if self.expert is None or not self.reads:
            return self.input
        return self.reads.replace(f".experts.{self.expert}.", ".experts.*.")

    def cut(self, ranks: int, index: int) -> Cut:
        """The part of one of `ranks` that share it."""
        if self.share is None or ranks == 1:
            return Cut(None)
        return self.share.cut(self.shape, ranks, index)


Tensors = Iterator[Tensor]


GATED = ("gate_proj", "up_proj", "down_proj")  # of an MLP


def gated(
    prefix: str, width: int, inner: int, part: Part, bias: bool = False, expert: int | None = None
) -> Tensors:
    """The matrices of a gated MLP [inner, width], [inner, width], [width, inner]; prefix: of the names."""
    rows, reads = Share(0), prefix + GATED[0]
    for name in GATED:
        up = name != GATED[-1]
        shape, share = ((inner, width), rows) if up else ((width, inner), Share(1))
        yield Tensor(f"{prefix}{name}.weight", shape, "matrix", share, reads if up else "", part, expert)
        if bias:  # of the sum, down's is added once
            own = share if up else None
            yield Tensor(f"{prefix}{name}.bias", shape[:1], "bias", own, part=part, expert=expert)


def of_expert(first: Tensor, expert: int) -> Tensor:
    """A tensor of another expert than the first, which has the same shapes."""
    name, reads = (text.replace(".experts.0.", f".experts.{expert}.") for text in (first.name, first.reads))
    return Tensor(name, first.shape, first.role, first.share, reads, first.part, expert)
