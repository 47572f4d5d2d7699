"""The capacity of one replica, learned online as two costs: per prompt token and per output token.

A replica that processes P uncached prompt tokens and generates D output tokens per second is busy for
rho = prefill · P + decode · D of every second. At the limit of its latency targets rho is 1, so

    capacity = 1 / (prefill · (prompt tokens per request, not cached) + decode · (output tokens per request))

requests per second: a shift in lengths changes it before any queue grows. Learning moves the two costs only
as far as a snapshot contradicts them: within all targets rho is at most 1; with a backlog, or with TTFT or
TPOT above target, it is at least 1. Without token rates, the capacity itself is learned the same way.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from farthing_fleet.types import Snapshot

DECODE_PER_PREFILL = 20.0  # initial cost of an output token, in prompt tokens
MOST = 4.0  # the capacity at the guess's lengths stays within this factor of the guess


@dataclass(frozen=True)
class Capacity:
    """A measured capacity, as written by `farthing bench capacity --json` (`capacity` and `unit`)."""

    per_replica: float  # load units per second
    unit: str = "requests"  # or "tokens"
    source: str = "configured"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.per_replica) and self.per_replica > 0):
            raise ValueError(f"Capacity.per_replica: got {self.per_replica}; expected a number above 0")
        if self.unit not in ("requests", "tokens"):
            raise ValueError(f"Capacity.unit: got {self.unit!r}; expected requests or tokens")

    @classmethod
    def read(cls, path: str | Path) -> Capacity:
        """Read a JSON file with `capacity` and `unit`. Raises ValueError with what is missing."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not isinstance(data.get("capacity"), int | float):
            raise ValueError(f"{path}: no number `capacity`; write it with `farthing bench capacity --json`")
        return cls(float(data["capacity"]), str(data.get("unit", "requests")), str(path))


@dataclass(frozen=True)
class Targets:
    """Latency targets that bound the capacity, in seconds; None: ignored."""

    queue_s: float = 0.2
    ttft_s: float | None = None
    tpot_s: float | None = None
    late: float = 0.005  # share of requests that may miss their time to first token

    def breached(self, snapshot: Snapshot) -> bool:
        """Whether TTFT or TPOT is above its target, or too many requests miss that of the TTFT."""
        if snapshot.late_share is not None and snapshot.late_share > self.late:
            return True
        pairs = ((snapshot.ttft_s, self.ttft_s), (snapshot.tpot_s, self.tpot_s))
        return any(value is not None and limit is not None and value > limit for value, limit in pairs)


@dataclass
class _Costs:
    """Seconds per uncached prompt token and per output token; the latest mean request lengths."""

    prefill: float
    decode: float
    prompt: float
    output: float
    anchor: tuple[float, float] = field(init=False)  # request lengths at the guess

    def __post_init__(self) -> None:
        self.anchor = (self.prompt, self.output)

    def busy(self, prompt: float, output: float) -> float:
        return self.prefill * prompt + self.decode * output

    def per_second(self) -> float:
        """Requests per second at the latest lengths."""
        return 1.0 / max(self.busy(self.prompt, self.output), 1e-12)

    def move(self, prompt: float, output: float, rate: float) -> None:
        """Move towards busy(prompt, output) = 1, each cost in proportion to its share; both stay positive."""
        parts = (self.prefill * prompt, self.decode * output)
        total = sum(parts)
        if total <= 0:
            return
        step = rate * max(-1.0, min(1.0, (1.0 - total) / total))
        self.prefill *= math.exp(step * parts[0] / total)
        self.decode *= math.exp(step * parts[1] / total)


class OnlineCapacity:
    """Learns the capacity from snapshots; starts from `guess`, within a factor of four of it."""

    def __init__(
        self, guess: float, unit: str = "requests", targets: Targets | None = None, rate: float = 0.05
    ) -> None:
        if not guess > 0:
            raise ValueError(f"OnlineCapacity.guess: got {guess}; expected a number above 0")
        self.guess, self.unit, self.rate = guess, unit, rate
        self.targets = targets or Targets()
        self._plain = guess  # load units/s, used while lengths are unknown
        self._costs: _Costs | None = None
        self._lengths = (0.0, 0.0)  # prompt and output tokens of a request

    @property
    def estimate(self) -> float:
        """Load units per second of one replica, at the latest request lengths."""
        if self._costs is None:
            return self._plain
        return self._costs.per_second() * self._per_request

    @property
    def _per_request(self) -> float:
        """Load units per request at the latest lengths."""
        prompt, output = self._lengths
        by_unit = {"requests": 1.0, "prompt_tokens": prompt, "output_tokens": output}
        return by_unit.get(self.unit, prompt + output)

    @property
    def costs(self) -> tuple[float, float] | None:
        """Seconds per uncached prompt token and per output token; None while lengths are unknown."""
        return (self._costs.prefill, self._costs.decode) if self._costs is not None else None

    def observe(self, snapshot: Snapshot, completed: float | None = None) -> float:
        """Update from one snapshot; `completed` is the load finished per second, if known.

        Returns the estimate. Snapshots that are stale, or taken while replicas start or fail, are ignored.
        """
        load, ready = snapshot.load(self.unit), snapshot.ready
        if snapshot.stale or load is None or not ready or snapshot.starting or snapshot.queue_time_s is None:
            return self.estimate
        saturated = bool(snapshot.backlog)
        within = snapshot.queue_time_s <= self.targets.queue_s and not saturated
        breached = self.targets.breached(snapshot)
        if self._measure(snapshot):
            self._learn_costs(snapshot, ready, within and not breached, saturated, breached)
        else:
            self._learn_plain(load / ready, completed, ready, within, saturated, breached)
        return self.estimate

    def _measure(self, snapshot: Snapshot) -> bool:
        """Update the mean lengths; False while they are unknown."""
        requests, prompt, output = (
            snapshot.request_rate,
            snapshot.prompt_token_rate,
            snapshot.output_token_rate,
        )
        if not requests or prompt is None or not output:
            return self._costs is not None and prompt is not None and output is not None
        cached = min(max(snapshot.cached_share or 0.0, 0.0), 0.99)
        lengths = prompt / requests * (1 - cached), output / requests
        self._lengths = (prompt / requests, output / requests)
        if self._costs is None:
            guess = self.guess / self._per_request
            prefill = 1.0 / (guess * (lengths[0] + DECODE_PER_PREFILL * lengths[1]))
            self._costs = _Costs(prefill, DECODE_PER_PREFILL * prefill, *lengths)
        share = min(1.0, 4 * self.rate)
        self._costs.prompt += share * (lengths[0] - self._costs.prompt)
        self._costs.output += share * (lengths[1] - self._costs.output)
        return True

    def _learn_costs(
        self, snapshot: Snapshot, ready: int, within: bool, saturated: bool, breached: bool
    ) -> None:
        assert self._costs is not None
        cached = min(max(snapshot.cached_share or 0.0, 0.0), 0.99)
        prompt = (snapshot.prompt_token_rate or 0.0) * (1 - cached) / ready
        output = (snapshot.output_token_rate or 0.0) / ready
        busy = self._costs.busy(prompt, output)
        if saturated or (breached and busy < 1) or (within and busy > 1):
            before = (self._costs.prefill, self._costs.decode)
            self._costs.move(prompt, output, self.rate)
            requests = 1.0 / max(self._costs.busy(*self._costs.anchor), 1e-12)
            guess = self.guess / self._per_request
            if not guess / MOST <= requests <= guess * MOST:
                self._costs.prefill, self._costs.decode = before

    def _learn_plain(
        self,
        carried: float,
        completed: float | None,
        ready: int,
        within: bool,
        saturated: bool,
        breached: bool,
    ) -> None:
        if breached and not saturated:
            observed = min(self._plain, carried)
        elif within:
            observed = max(self._plain, carried)
        elif saturated and completed is not None and completed > 0:
            observed = completed / ready
        else:
            return
        moved = self._plain + self.rate * (observed - self._plain)
        self._plain = min(max(moved, self.guess / MOST), self.guess * MOST)
