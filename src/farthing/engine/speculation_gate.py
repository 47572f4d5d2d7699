"""Measures online what drafts cost and gain, and permits them only while they pay.

The unit is a plain step of the same batch size. A drafted step that takes as long as r plain steps and
yields g times a plain step's tokens saves g - r. Savings and losses add up to a balance, and drafts are
allowed while it is positive. It starts with a few steps' worth for first trials; plain steps add 0.5 % for
later ones. Useless drafts therefore cost little more than that, whatever the model, the text and the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

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
_DECAY = 0.2
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
    """Allows drafts by batch size (powers of two)."""

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
        known = [key for key, b in self._buckets.items() if b.num_plain]
        if not known:
            return True
        b = self._buckets[min(known, key=lambda key: abs(key - batch.bit_length()))]
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
    b.plain += _DECAY * (min(seconds, _SPIKE * b.plain) - b.plain)
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
    rate = max(_DECAY, 1 / (b.num_drafted - 1))
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
