"""Drafts: guess the next tokens cheaply, verify them in one step of the model, lose nothing.

Verification is the sampler itself. A draft is a fixed token, and the sampler draws each token from a number
that belongs to the token's index; the draft is accepted if it is what the sampler draws there. That is
rejection sampling (Leviathan et al. 2023) for a draft distribution with all its mass on one token: it
is accepted with the model's own probability p(draft), and a refused one is replaced by a draw from p without
the draft, renormalized. The output is not only distributed as without speculation, it is the same tokens.

Drafts come from the MTP layer (speculation_mtp.py), from the text itself (speculation_ngram.py), or from the
text where it repeats itself and else from the layer. speculation_gate.py measures whether they pay.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from time import perf_counter
from typing import Protocol

from torch import Tensor

from farthing.engine.generation import Drafting, Generation
from farthing.engine.runner import Step
from farthing.engine.sequence import Scheduled, Sequence, Status
from farthing.engine.speculation_gate import Gate
from farthing.engine.speculation_mtp import MtpDrafter
from farthing.engine.speculation_ngram import NgramDrafter

__all__ = ["Drafter", "Gate", "MtpDrafter", "NgramDrafter", "Speculator"]

_PAUSE = 48  # steps that a completion goes without a drafter that does not pay
_DECAY = 0.1


class Drafter(Protocol):
    """Proposes continuations at the end of a step."""

    num_drafts: int
    num_lookahead: int  # cache slots needed behind the drafts
    costly: bool  # whether a step is dearer even where it has found no draft

    def observe(self, plan: Seq[Scheduled], step: Step, hidden: Tensor) -> None:
        """Called after every step, drafts wanted or not; hidden [T, D] before the final norm."""

    def draft(self, seqs: Seq[Sequence], most: Seq[int], price: float) -> list[list[int]]:
        """At most most[i] drafts for seqs[i], whose last step was observed; its tokens include those of that
        step. A draft that is surely accepted less often than `price` is better left out."""


class Speculator:
    """Asks its drafters in turn, keeps the counts, and switches off what does not pay."""

    def __init__(self, drafters: Seq[Drafter], gate: Callable[[], Gate] = Gate) -> None:
        """drafters: the next one is asked about sequences the one before has found nothing for."""
        self.drafters = tuple(drafters)
        self.gates = tuple(gate() for _ in drafters)
        self.num_lookahead = max(drafter.num_lookahead for drafter in drafters)
        self._used: int | None = None  # the dearest drafter asked about the step to come
        self._seconds = 0.0  # what drafting for it took

    def after(self, plan: Seq[Scheduled], step: Step, hidden: Tensor, seconds: float) -> None:
        """After a step of so many seconds is committed: learn from it, and draft for the next one."""
        if all(item.decode for item in plan):
            drafts = sum(len(item.drafts) for item in plan)
            for i, gate in enumerate(self.gates):
                if self._used in (None, i):
                    gate.observe(len(plan), seconds + self._seconds, None if self._used is None else drafts)
        began = perf_counter()
        for drafter in self.drafters:
            drafter.observe(plan, step, hidden)
        self._draft([item.seq for item in plan if item.sample and _goes_on(item.seq)])
        self._seconds = perf_counter() - began

    def verified(self, item: Scheduled, accepted: int) -> None:
        """Learn from one sequence's drafts."""
        gen: Generation = item.seq.payload
        record = gen.drafting[gen.drafted_by]
        for hit in [1] * accepted + [0] * (accepted < len(item.drafts)):
            record.hits += _DECAY * (hit - record.hits)

    def _draft(self, seqs: list[Sequence]) -> None:
        self._used = None
        batch = max(1, len(seqs))
        for i, (drafter, gate) in enumerate(zip(self.drafters, self.gates, strict=True)):
            order, price = gate.order(batch), gate.price(batch)
            if order is False:
                continue
            asked, most = [], []
            for seq in seqs:
                count = 0 if seq.drafts else worthwhile(seq.payload.drafting[i], price, drafter.num_drafts)
                if not seq.drafts and (count or order):
                    asked.append(seq)
                    most.append(max(1, count))
            if not asked:
                continue
            for seq, drafts in zip(asked, drafter.draft(asked, most, price), strict=True):
                gen: Generation = seq.payload
                matcher = gen.sampling.matcher
                seq.drafts = drafts if matcher is None else drafts[: matcher.valid_prefix(drafts)]
                gen.drafted_by = i
            if drafter.costly or any(seq.drafts for seq in asked):
                self._used = i


def worthwhile(record: Drafting, price: float, most: int) -> int:
    """Drafts to ask for: the n-th is right with chance hits^n, which must exceed its price.

    A drafter that is wrong too often is left out for a while, and then tried again with one draft.
    """
    if record.pause:
        record.pause -= 1
        return int(record.pause == 0)
    for count in range(most):
        if record.hits ** (count + 1) < price:
            break
    else:
        return most
    if count == 0:
        record.pause = _PAUSE
    return count


def _goes_on(seq: Sequence) -> bool:
    return seq.status is Status.RUNNING and seq.payload.finish_reason is None
