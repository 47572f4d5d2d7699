"""Speculative decoding: cheap drafts, verified in one step without changing the output, while they pay.

Verification is the sampler itself. A draft is a fixed token, and the sampler draws each token with the
random number of its index; a draft is accepted if the sampler draws the same token. This is rejection
sampling (Leviathan et al. 2023) for a draft distribution with all its mass on one token: a draft is
accepted with the model's own probability p(draft), and a rejected one is replaced by a draw from p without
the draft, renormalized. The output itself equals that without speculation, not only its distribution.

Drafts (`drafters.py`) come from repetitions in the text or from the MTP layer, which samples with the
verifier's random numbers. A gate measures whether they pay.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from farthing.config import parse_speculate
from farthing.engine.drafters import MtpDrafter, TextDrafter
from farthing.engine.generation import FIRST_PAUSE, Drafting, Generation
from farthing.engine.runner import Runner, Step
from farthing.engine.sequence import Scheduled

if TYPE_CHECKING:
    from torch import Tensor


_START = 8.0  # balance at first
_MOST = 16.0  # and at most, so that drafts that no longer pay are soon switched off
_REFILL = 0.005  # share of plain time that later trials may lose
_TRIAL = 4.0  # balance that a new trial needs
_TRIAL_STEPS = 4  # steps of a trial in which every sequence gets a draft
_WARMUP = 4  # plain steps before the first trial
_REFRESH = 64  # steps of one kind after which the other is timed again
_PLAIN_STEPS = 2  # consecutive ones for that
_SETTLING = 12  # plain steps after which a change of their length is known
_SLOWER = 1.25  # a plain step by more than this since drafts were last used: their judgment does not hold
_PARDON = 256  # plain steps at least between trials for that reason
_MARGIN = 1.1  # sequences that run ahead leave a smaller, less efficient batch behind: not seen in a step
_GATE_DECAY = 0.2
_SPIKE = 3.0  # a slower step is another process's or a page fault's; it counts as this many times the mean
_PRICE = 0.3  # of a draft until it is measured


@dataclass(slots=True)
class _Bucket:
    """Measurements for one range of batch sizes."""

    plain: float = 0.0  # seconds of a plain step, moving average
    num_plain: int = 0
    num_drafted: int = 0
    cost: float = 0.0  # of all drafts of a step, in plain steps, moving average
    drafts: float = 0.0  # per sequence in a drafted step, moving average
    balance: float = _START
    open: bool = True
    trial: int = _TRIAL_STEPS  # steps left
    timing: int = 0  # plain steps left
    since_plain: int = 0  # drafted steps
    since_drafted: int = 0  # plain steps
    judged_by: float = 0.0  # `plain` when drafts were last used
    pardon: int = _PARDON  # plain steps since the last trial for a slower machine

    @property
    def price(self) -> float:
        return (
            max(0.01, _MARGIN * self.cost / self.drafts) if self.num_drafted > 1 and self.drafts else _PRICE
        )


class Gate:
    """Allows drafts by batch size (powers of two).

    The unit is a plain step of the same batch size. A drafted step that takes as long as r plain steps and
    yields g times a plain step's tokens saves g - r. Savings and losses add up to a balance, and drafts are
    allowed while it is positive. It starts with a few steps' worth for first trials; plain steps add 0.5 %
    for later ones. Useless drafts therefore cost little more than that, whatever the model, the text and the
    machine.
    """

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}

    def observe(self, batch: int, seconds: float, drafts: int | None = None, gained: int = 0) -> None:
        """A step that only decoded `batch` sequences took `seconds`, its drafting included.

        drafts: None for a plain step. gained: how many of them were accepted.
        """
        b = self._bucket(batch)
        if drafts is None:
            _time_plain(b, seconds)
        elif b.num_plain > 1:
            _judge(b, seconds / b.plain, drafts / batch, gained / batch)

    def charge(self, batch: int, seconds: float) -> None:
        """A drafter spent time on keeping up with the text, whether or not it drafted."""
        b = self._bucket(batch)
        if b.num_plain > 1:
            _save(b, -seconds / b.plain)

    def order(self, batch: int) -> bool | None:
        """Whether the next step must be drafted (True) or must not be (False).

        None: each sequence decides.
        """
        b = self._bucket(batch)
        if not b.open or b.timing or b.num_plain < _WARMUP:
            return False
        return True if b.trial else None

    def may_pay(self, batch: int) -> bool:
        """False while drafts are switched off for this batch size, or for the nearest one measured."""
        measured = [key for key, b in self._buckets.items() if b.num_plain]
        if not measured:
            return True
        b = self._buckets[min(measured, key=lambda key: abs(key - batch.bit_length()))]
        return b.open and (b.trial > 0 or b.price < 1)

    def price(self, batch: int) -> float:
        """Cost of one more draft in plain steps: a draft pays if it is accepted with a higher probability."""
        return self._bucket(batch).price

    def _bucket(self, batch: int) -> _Bucket:
        return self._buckets.setdefault(batch.bit_length(), _Bucket())


def _time_plain(b: _Bucket, seconds: float) -> None:
    b.num_plain += 1
    b.since_plain, b.timing = 0, max(0, b.timing - 1)
    if b.num_plain <= 2:  # the first one includes warm-up
        b.plain = seconds
        return
    b.plain += _GATE_DECAY * (min(seconds, _SPIKE * b.plain) - b.plain)
    _save(b, _REFILL)
    b.since_drafted += 1
    b.pardon += 1
    wrong = b.since_drafted == _SETTLING and b.plain > _SLOWER * b.judged_by and b.pardon > _PARDON
    if wrong:  # the machine had become slower, not the drafts
        b.balance, b.num_drafted, b.pardon = max(b.balance, _TRIAL), 1, 0
    if b.balance >= _TRIAL and (wrong or not b.open or b.since_drafted >= _REFRESH):
        b.open, b.trial, b.since_drafted = True, _TRIAL_STEPS, 0


def _judge(b: _Bucket, length: float, drafts: float, gained: float) -> None:
    """A drafted step took `length` plain steps; drafts and gained are per sequence."""
    b.num_drafted += 1
    b.judged_by = b.plain
    b.trial = max(0, b.trial - 1)
    if b.num_drafted == 1:  # includes warm-up
        return
    rate = max(_GATE_DECAY, 1 / (b.num_drafted - 1))
    if rate < 1:
        length = min(length, _SPIKE * (1 + b.cost))
    b.cost += rate * (length - 1 - b.cost)
    b.drafts += rate * (drafts - b.drafts)
    _save(b, 1 + gained - _MARGIN * length)
    b.since_plain, b.since_drafted = b.since_plain + 1, 0
    if b.since_plain >= _REFRESH:
        b.timing = _PLAIN_STEPS


def _save(b: _Bucket, steps: float) -> None:
    b.balance = min(_MOST, b.balance + steps)
    if b.balance < 0:
        b.balance, b.open = max(b.balance, -_TRIAL), False


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
        self._draft([item.seq for item in plan if item.sample and item.seq.active and not item.seq.redo])
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
