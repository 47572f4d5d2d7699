"""Placement of routed experts on ranks: balanced by measured load, with copies of hot experts.

Greedy EPLB (DeepSeek 2025): the expert with the most tokens per copy gets the next copy. Copies are then
assigned, heaviest first, to the least loaded rank that has room and does not hold that expert. Integers
only, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """The experts of one layer on each rank of a stage, in ascending order."""

    ranks: tuple[tuple[int, ...], ...]

    def shares(self, rank: int) -> dict[tuple[int, int], tuple[int, ...]]:
        """A rank's experts by share (m, j): of m copies, this one computes rows t with t mod m = j."""
        shares: dict[tuple[int, int], list[int]] = {}
        for expert in self.ranks[rank]:
            holders = [r for r, experts in enumerate(self.ranks) if expert in experts]
            shares.setdefault((len(holders), holders.index(rank)), []).append(expert)
        return {share: tuple(experts) for share, experts in sorted(shares.items())}

    def loads(self, tokens: Sequence[int]) -> list[float]:
        """Tokens per rank, if every expert's tokens are spread evenly over its copies."""
        copies = [sum(e in rank for rank in self.ranks) for e in range(len(tokens))]
        return [sum(tokens[e] / copies[e] for e in rank) for rank in self.ranks]


Placements = dict[int, Placement]  # by checkpoint layer; missing layers use contiguous ranges


def in_order(experts: int, ranks: int) -> Placement:
    """Equal contiguous ranges of experts: the initial placement."""
    each = experts // ranks
    return Placement(tuple(tuple(range(r * each, (r + 1) * each)) for r in range(ranks)))


def place(tokens: Sequence[int], ranks: int, redundant: int = 0) -> Placement:
    """Place len(tokens) experts plus `redundant` copies, with the same number of experts on every rank.

    tokens: measured tokens per expert. Raises ValueError if the numbers do not divide or a copy cannot be
    placed.
    """
    experts = len(tokens)
    slots, rest = divmod(experts + redundant, ranks)
    if rest:
        raise ValueError(
            f"{experts} experts and {redundant} redundant copies do not divide evenly over {ranks} ranks; "
            f"expected a multiple in total, such as redundant = {redundant + ranks - rest}"
        )
    if redundant < 0 or slots > experts:
        raise ValueError(
            f"redundant: got {redundant}; expected 0…{experts * (ranks - 1)}, at most one copy per rank"
        )
    copies = [1] * experts
    for _ in range(redundant):
        hottest = max(
            (e for e in range(experts) if copies[e] < ranks), key=lambda e: (tokens[e] / copies[e], -e)
        )
        copies[hottest] += 1
    return Placement(_pack([t / c for t, c in zip(tokens, copies, strict=True)], copies, ranks, slots))


def _pack(
    load: Sequence[float], copies: Sequence[int], ranks: int, slots: int
) -> tuple[tuple[int, ...], ...]:
    """Longest processing time first. Ties go to experts with more copies, which need more ranks."""
    held: list[set[int]] = [set() for _ in range(ranks)]
    total = [0.0] * ranks
    # Experts on every rank have no choice; the others are placed by load.
    order = sorted(range(len(load)), key=lambda e: (copies[e] < ranks, -load[e], e))
    for expert in order:
        open_ranks = sorted((r for r in range(ranks) if len(held[r]) < slots), key=lambda r: (total[r], r))
        chosen = open_ranks[: copies[expert]]
        for rank in chosen:
            held[rank].add(expert)
            total[rank] += load[expert]
        for _ in range(copies[expert] - len(chosen)):
            _make_room(held, total, load, expert, slots)
    return tuple(tuple(sorted(experts)) for experts in held)


def _make_room(
    held: list[set[int]], total: list[float], load: Sequence[float], expert: int, slots: int
) -> None:
    """If only ranks that already have the expert have room, move another rank's expert there."""
    spare = next(r for r, experts in enumerate(held) if len(experts) < slots)
    giver, moved = min(
        (
            (r, e)
            for r, experts in enumerate(held)
            if expert not in experts
            for e in experts
            if e not in held[spare]
        ),
        key=lambda pair: (total[pair[0]], load[pair[1]], pair),
    )
    held[giver].remove(moved)
    held[spare].add(moved)
    held[giver].add(expert)
    total[spare] += load[moved]
    total[giver] += load[expert] - load[moved]
