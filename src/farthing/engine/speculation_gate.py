"""Measures the cost of drafts online and enables them only if they pay."""

from __future__ import annotations

from dataclasses import dataclass, field

_WARMUP = 16  # steps of each kind before their costs are trusted
_RUN = 8  # consecutive steps of one kind to measure it
_PERIOD = 256  # steps within which both kinds are measured
_DECAY = 0.1
_PRICE = 0.3  # until it is measured


@dataclass(slots=True)
class _Bucket:
    """Measurements for one range of batch sizes: [plain, drafted]."""

    steps: list[int] = field(default_factory=lambda: [0, 0])
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of a step, moving average
    drafts: float = 0.0  # per sequence in a drafted step, moving average
    fresh: list[int] = field(default_factory=lambda: [0, 0])  # steps of this period
    missed: bool | None = None  # the kind that the last period measured too rarely
    tick: int = 0


class Gate:
    """Compares the duration of steps with and without drafts, by batch size (powers of two)."""

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}

    def observe(self, batch: int, seconds: float, drafts: int | None = None) -> None:
        """A step that only decoded `batch` sequences took `seconds`. drafts: None for a plain step."""
        b, kind = self._bucket(batch), drafts is not None
        b.steps[kind] += 1
        b.fresh[kind] += 1
        if b.steps[kind] == 1:
            return  # the first step of a kind includes its warm-up
        first = b.steps[kind] == 2
        # One slow step (another process, a page fault, the layer catching up) must not change the decision.
        rise = seconds - b.seconds[kind] if first else min(seconds - b.seconds[kind], b.seconds[kind] / 2)
        b.seconds[kind] += rise if first else _DECAY * rise
        if drafts is not None:
            b.drafts += (1 if first else _DECAY) * (drafts / batch - b.drafts)

    def order(self, batch: int) -> bool | None:
        """Whether the next step must be drafted (True) or must not be (False), to measure its cost.

        None: each sequence decides.
        """
        b = self._bucket(batch)
        b.tick += 1
        if min(b.steps) < _WARMUP:
            return b.tick // _RUN % 2 == 0
        if b.tick % _PERIOD == 0:
            least = min((False, True), key=b.fresh.__getitem__)
            b.missed = least if b.fresh[least] < _RUN else None
            b.fresh = [0, 0]
        return b.missed if b.tick % _PERIOD < _RUN else None

    def price(self, batch: int) -> float:
        """Cost of one more draft in plain steps: a draft pays if it is accepted with a higher probability."""
        b = self._bucket(batch)
        if min(b.steps) < _WARMUP or b.drafts == 0.0:
            return _PRICE
        return max(0.01, (b.seconds[1] / b.seconds[0] - 1) / b.drafts)

    def _bucket(self, batch: int) -> _Bucket:
        return self._buckets.setdefault(batch.bit_length(), _Bucket())
