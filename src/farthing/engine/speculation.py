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

from farthing.config import parse_speculate
from farthing.engine.generation import Drafting, Generation
from farthing.engine.runner import Runner, Step
from farthing.engine.sequence import Scheduled
from farthing.engine.speculation_gate import Gate
from farthing.engine.speculation_mtp import MtpDrafter
from farthing.engine.speculation_ngram import NgramDrafter

__all__ = ["Drafter", "Gate", "MtpDrafter", "NgramDrafter", "Speculator", "build_speculator"]

_PAUSE = 48  # steps that a completion goes without a drafter that does not pay
_DECAY = 0.1


class Drafter(Protocol):
    """Proposes continuations at the end of a step."""

    num_drafts: int
    num_lookahead: int  # cache slots needed behind the drafts
    costly: bool  # whether a step is dearer even where it has found no draft

    def observe(self, plan: Seq[Scheduled[Generation]], step: Step, hidden: Tensor) -> None:
        """Called after every step, drafts wanted or not; hidden [T, D] before the final norm."""

    def draft(self, seqs: Seq[Generation], most: Seq[int], price: float) -> list[list[int]]:
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

    def after(self, plan: Seq[Scheduled[Generation]], step: Step, hidden: Tensor, seconds: float) -> None:
        """After a step of so many seconds is committed: learn from it, and draft for the next one."""
        if all(item.decode for item in plan):
            drafts = sum(len(item.drafts) for item in plan)
            for i, gate in enumerate(self.gates):
                if self._used in (None, i):
                    gate.observe(len(plan), seconds + self._seconds, None if self._used is None else drafts)
        began = perf_counter()
        for drafter in self.drafters:
            drafter.observe(plan, step, hidden)
        self._draft([item.seq for item in plan if item.sample and item.seq.active])
        self._seconds = perf_counter() - began

    def verified(self, item: Scheduled[Generation], accepted: int) -> None:
        """Learn from one sequence's drafts."""
        gen = item.seq
        record = gen.drafting[gen.drafted_by]
        for hit in [1] * accepted + [0] * (accepted < len(item.drafts)):
            record.hits += _DECAY * (hit - record.hits)

    def _draft(self, seqs: list[Generation]) -> None:
        self._used = None
        batch = max(1, len(seqs))
        for i, (drafter, gate) in enumerate(zip(self.drafters, self.gates, strict=True)):
            order, price = gate.order(batch), gate.price(batch)
            if order is False:
                continue
            asked, most = [], []
            for seq in seqs:
                count = 0 if seq.drafts else worthwhile(seq.drafting[i], price, drafter.num_drafts)
                if not seq.drafts and (count or order):
                    asked.append(seq)
                    most.append(max(1, count))
            if not asked:
                continue
            for seq, drafts in zip(asked, drafter.draft(asked, most, price), strict=True):
                matcher = seq.sampling.matcher
                seq.drafts = drafts if matcher is None else drafts[: matcher.valid_prefix(drafts)]
                seq.drafted_by = i
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


def build_speculator(speculate: str | None, runner: Runner) -> Speculator | None:
    """The speculator of `EngineConfig.speculate`; None without speculation."""
    parsed = parse_speculate(speculate)
    if parsed is None:
        return None
    methods, count = parsed
    drafters: list[Drafter] = []
    if "ngram" in methods:  # first, because its drafts are free
        drafters.append(NgramDrafter(count))
    if "mtp" in methods:
        drafters.append(MtpDrafter(runner, count))
    return Speculator(drafters)
