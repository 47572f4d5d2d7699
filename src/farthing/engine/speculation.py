"""Speculative decoding: cheap drafts, verified in one step of the model, without changing the output.

Verification is the sampler itself. A draft is a fixed token, and the sampler draws each token with the
random number of its index; a draft is accepted if the sampler draws the same token.
This is rejection sampling (Leviathan et al. 2023) for a draft distribution with all its mass on one token: a
draft is accepted with the model's own probability p(draft), and a rejected one is replaced by a draw from p
without the draft, renormalized. The output itself equals that without speculation, not only its distribution.

Drafts come from repetitions in the text (speculation_text.py) or from the MTP layer (speculation_mtp.py),
which samples with the verifier's random numbers. speculation_gate.py measures whether they pay.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from farthing.config import parse_speculate
from farthing.engine.generation import FIRST_PAUSE, Drafting, Generation
from farthing.engine.runner import Runner, Step
from farthing.engine.sequence import Scheduled
from farthing.engine.speculation_gate import Gate
from farthing.engine.speculation_mtp import MtpDrafter
from farthing.engine.speculation_text import TextDrafter

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Drafter", "Gate", "MtpDrafter", "Speculator", "TextDrafter", "build_speculator"]

_LONGEST_PAUSE = 16 * FIRST_PAUSE
_DECAY = 0.1
_DECAY_PRIOR = 0.01
_UPKEEP = 0.005  # share of the time that may go into keeping up with texts for which drafts do not pay
_FADE = 0.999  # of a step's share in recent times
_HOPE = 0.8  # share of drafts accepted, before any was verified


class Drafter(Protocol):
    """Proposes continuations at the end of a step."""

    num_drafts: int
    num_lookahead: int  # cache slots needed after the drafts
    costly: bool  # whether it takes time even if it finds no draft

    def observe(self, plan: Seq[Scheduled[Generation]], step: Step, hidden: Tensor, wanted: bool) -> None:
        """Called after every step; hidden [T, D] before the final norm.

        wanted: False where drafts do not pay, so that keeping up with the text may not be worth its time.
        """

    def ready(self, seq: Generation) -> bool:
        """Whether it can draft for `seq`."""

    def draft(self, seqs: Seq[Generation], most: Seq[int], price: float) -> list[list[int]]:
        """At most most[i] drafts for seqs[i], whose last step was observed and whose tokens include it.

        Drafts that are less likely to be accepted than `price` should be left out.
        """


class Speculator:
    """Tries its drafters in order, keeps statistics, and stops drafting where it does not pay."""

    def __init__(self, drafters: Seq[Drafter], gate: Callable[[], Gate] = Gate) -> None:
        """drafters: each one drafts for the sequences for which the previous ones found nothing."""
        self.drafters = tuple(drafters)
        self.gates = tuple(gate() for _ in drafters)
        self.num_lookahead = max(drafter.num_lookahead for drafter in drafters)
        # Accepted share of drafts by drafter, for sampled (0) and greedy (1) requests.
        self._prior = [[_HOPE, _HOPE] for _ in drafters]
        self._used: int | None = None  # the costliest drafter used for the next step
        self._seconds = 0.0  # duration of drafting for it
        self._batch = 1  # sequences of the last step without prompts
        self._gained = 0  # drafts accepted in this step
        self._upkeep = [0.0 for _ in drafters]  # recent seconds of observing, by drafter
        self._recent = 0.0  # recent seconds in all

    def after(self, plan: Seq[Scheduled[Generation]], step: Step, hidden: Tensor, seconds: float) -> None:
        """After a committed step that took `seconds`: learn from it and draft for the next one."""
        batch = len(plan)
        if all(item.decode for item in plan):
            self._batch = batch
            drafts = sum(len(item.drafts) for item in plan)
            for i, gate in enumerate(self.gates):
                if self._used is None:
                    gate.observe(batch, seconds)
                elif self._used == i:
                    gate.observe(batch, seconds + self._seconds, drafts, self._gained)
        self._gained = 0
        self.observe(plan, step, hidden, seconds)
        began = perf_counter()
        self._draft([item.seq for item in plan if item.sample and item.seq.active])
        self._seconds = perf_counter() - began

    def observe(self, plan: Seq[Scheduled[Generation]], step: Step, hidden: Tensor, seconds: float) -> None:
        """Only learn from a committed step, which others follow before its sequences decode."""
        self._recent = _FADE * self._recent + seconds
        size = max(len(plan), self._batch)  # prompts of a burst will decode together
        for i, (drafter, gate) in enumerate(zip(self.drafters, self.gates, strict=True)):
            began = perf_counter()
            cheap = self._upkeep[i] < _UPKEEP * self._recent
            wanted = cheap or gate.may_pay(size)
            drafter.observe(plan, step, hidden, wanted)
            spent = perf_counter() - began
            if wanted:
                gate.charge(size, spent)
            self._upkeep[i] = _FADE * self._upkeep[i] + spent

    def verified(self, item: Scheduled[Generation], accepted: int) -> None:
        """Learn from one sequence's verified drafts."""
        gen = item.seq
        self._gained += accepted
        record = gen.drafting[gen.drafted_by]
        prior, kind = self._prior[gen.drafted_by], gen.sampling.params.greedy
        for hit in [1] * accepted + [0] * (accepted < len(item.drafts)):
            record.hits += _DECAY * (hit - record.hits)
            prior[kind] += _DECAY_PRIOR * (hit - prior[kind])

    def _draft(self, seqs: list[Generation]) -> None:
        self._used = None
        batch = max(1, len(seqs))
        for i, (drafter, gate) in enumerate(zip(self.drafters, self.gates, strict=True)):
            order, price = gate.order(batch), gate.price(batch)
            if order is False or (order is None and price >= 1):
                continue
            asked, most = [], []
            for seq in seqs:
                if seq.num_output <= 1:  # a new completion expects what recent ones met
                    seq.drafting[i].hits = self._prior[i][seq.sampling.params.greedy]
                count = 0 if seq.drafts else worthwhile(seq.drafting[i], price, drafter.num_drafts)
                if not seq.drafts and (count or order) and drafter.ready(seq):
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
    """Number of drafts to request: the n-th is accepted with probability hits^n, which must exceed its price.

    A drafter below its price is paused, each time for longer, then tried again with one draft.
    """
    if price >= 1:
        return 0
    if record.pause:
        record.pause -= 1
        return int(record.pause == 0)
    for count in range(most):
        if record.hits ** (count + 1) < price:
            break
    else:
        count = most
    if count:
        record.patience = FIRST_PAUSE
    else:
        record.pause = record.patience
        record.patience = min(2 * record.patience, _LONGEST_PAUSE)
    return count


def build_speculator(speculate: str | None, runner: Runner) -> Speculator | None:
    """The speculator of `EngineConfig.speculate`; None without speculation."""
    parsed = parse_speculate(speculate)
    if parsed is None:
        return None
    methods, count = parsed
    drafters: list[Drafter] = []
    if "ngram" in methods:  # first, because its drafts are free
        drafters.append(TextDrafter(count))
    if "mtp" in methods:
        drafters.append(MtpDrafter(runner, count))
    return Speculator(drafters)
