"""The capacity of one replica, learned online as two costs: per prompt token and per output token.

A replica that processes P uncached prompt tokens and generates D output tokens per second is busy for
rho = prefill · P + decode · D of every second. At the limit of its latency targets rho is 1, so

    capacity = 1 / (prefill · (prompt tokens per request, not cached) + decode · (output tokens per request))

requests per second: a shift in lengths changes it before any queue grows. All of this is work that was done,
never what arrived: when a burst ends, its last requests are still answered while nothing arrives.

Learning moves the two costs only as far as a snapshot contradicts them: rho is 1 while every replica has a
queue; it is at most 1 within all targets, and at least 1 with TTFT or TPOT above its target though nothing
queued. With a target of TPOT, which grows as 1 / (1 - rho), rho is known at any load. Rates are means over a
window, so a snapshot counts only if the same replicas worked, and queued or did not, for all of it.
Where no lengths are reported, a request counts as one prompt token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from farthing_fleet.types import Snapshot

DECODE_PER_PREFILL = 20.0  # initial cost of an output token, in prompt tokens
MOST = 4.0  # the capacity at the guess's lengths stays within this factor of the guess
BOUND_RATE, QUEUE_RATE = 0.05, 0.2  # of learning: a bound is weaker evidence than a measured throughput
LENGTH_RATE = 0.2
# Snapshots until the mean lengths count as known: at first, requests run that have answered little.
FIRST = 20
WEAK = 0.5  # a replica that is less busy says less
LIGHT = 0.15  # busier replicas do not show the time per token of an idle one


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


class OnlineCapacity:
    """Learns the capacity from snapshots; starts from `guess`, within a factor of four of it."""

    def __init__(
        self, guess: float, unit: str = "requests", targets: Targets | None = None, window_s: float = 0.0
    ) -> None:
        """window_s: over which the snapshots' rates are means."""
        if not guess > 0:
            raise ValueError(f"OnlineCapacity.guess: got {guess}; expected a number above 0")
        self.guess, self.unit = guess, unit
        self.targets, self._window = targets or Targets(), window_s
        self._costs = (1.0 / guess, 0.0)  # seconds per uncached prompt token and per output token
        self._seen = (0.0, 0.0, 0.0, 0.0)  # recent requests, prompt tokens, uncached ones and output tokens
        self._sums, self._measured = (0.0, 0.0, 0.0), 0  # load units and tokens of the first snapshots
        self._anchor = (1.0, 0.0)  # tokens per load unit at the guess
        self._light: float | None = None  # seconds per output token of an idle replica
        self._state: tuple[int, bool] | None = None  # ready replicas, and whether each has a queue,
        self._state_since = 0.0  # since when

    @property
    def estimate(self) -> float:
        """Load units per second of one replica, at the latest request lengths."""
        requests, prompt, uncached, output = self._seen
        if not output:
            return 1.0 / self._costs[0]
        units = requests if self.unit == "requests" else prompt + output
        return units / max(self._busy(uncached, output), 1e-12)

    @property
    def costs(self) -> tuple[float, float] | None:
        """Seconds per uncached prompt token and per output token; None while lengths are unknown."""
        return self._costs if self._seen[3] else None

    def observe(self, snapshot: Snapshot) -> float:
        """Update from one snapshot; returns the estimate. Ignores stale and incomplete ones."""
        served, ready, queue = snapshot.served_rate, snapshot.ready, snapshot.queue_time_s
        if snapshot.stale or served is None or not ready or queue is None:
            return self.estimate
        self._measure(snapshot, served)
        waiting = snapshot.backlog or 0.0
        if not self._lasts(snapshot.time, ready, waiting >= ready):
            return self.estimate
        prompt, output = served / ready, 0.0
        if self._seen[3]:
            prompt, output = _uncached(snapshot) / ready, (snapshot.output_token_rate or 0.0) / ready
        busy = self._busy(prompt, output)
        told = self._told_by_tpot(snapshot.tpot_s, busy)
        if waiting >= ready and queue > self.targets.queue_s:
            self._move(prompt, output, 1.0, QUEUE_RATE)
        elif waiting or queue > self.targets.queue_s:
            pass  # some replicas have a queue: neither are all busy, nor is a late token due to the load
        elif self.targets.breached(snapshot):
            self._move(prompt, output, max(busy, 1.0), BOUND_RATE)
        elif told is not None or busy > 1:
            self._move(prompt, output, told if told is not None else 1.0, BOUND_RATE)
        return self.estimate

    def _lasts(self, time: float, ready: int, queued: bool) -> bool:
        """Whether the same replicas have had a queue, or none, for all of the window before `time`."""
        if self._state != (ready, queued):
            known, self._state, self._state_since = self._state is not None, (ready, queued), time
            return not known
        return time - self._state_since >= self._window

    def _told_by_tpot(self, tpot: float | None, busy: float) -> float | None:
        """How busy the replicas are, by their time per output token: it grows as 1 / (1 - rho)."""
        limit = self.targets.tpot_s
        if tpot is None or limit is None or tpot <= 0:
            return None
        light = min(tpot, limit) * (1 - min(busy, 0.9))  # time per token without other requests
        if self._light is None:
            self._light = light
        elif busy < LIGHT:
            self._light += LENGTH_RATE * (light - self._light)
        self._light = min(self._light, tpot, 0.9 * limit)
        return (1 - self._light / tpot) / (1 - self._light / limit)

    def _busy(self, prompt: float, output: float) -> float:
        return self._costs[0] * prompt + self._costs[1] * output

    def _measure(self, snapshot: Snapshot, served: float) -> None:
        """Update the mean lengths; those of the first snapshots turn the guess into two costs.

        They are quotients of sums that fade with the requests that are served, not with time: the tokens that
        follow a burst belong to its requests, which are few per second by then.
        """
        prompt, output = snapshot.prompt_token_rate, snapshot.output_token_rate
        if prompt is None or output is None:
            return
        fades = min(LENGTH_RATE, served / self._seen[0]) if self._seen[0] else 1.0
        new = served, prompt, _uncached(snapshot), output
        requests, tokens, uncached, generated = (
            (1 - fades) * old + more for old, more in zip(self._seen, new, strict=True)
        )
        self._seen = requests, tokens, uncached, generated
        if self._measured < FIRST and served and output:
            self._settle((served if self.unit == "requests" else prompt + output, new[2], output))

    def _settle(self, seen: tuple[float, float, float]) -> None:
        """The guess is that of the mean request so far: both costs follow, what was learned stays."""
        before = self._anchor[0] + DECODE_PER_PREFILL * self._anchor[1]
        units, prompt, output = (total + new for total, new in zip(self._sums, seen, strict=True))
        self._sums, self._measured = (units, prompt, output), self._measured + 1
        self._anchor = prompt / units, output / units
        factor = before / (self._anchor[0] + DECODE_PER_PREFILL * self._anchor[1])
        prefill, decode = self._costs[0], self._costs[1] or DECODE_PER_PREFILL * self._costs[0]
        self._costs = prefill * factor, decode * factor

    def _move(self, prompt: float, output: float, busy: float, rate: float) -> None:
        """Move towards busy(prompt, output) = `busy`, each cost in proportion to its share."""
        parts = (self._costs[0] * prompt, self._costs[1] * output)
        total = sum(parts)
        if total <= 0:
            return
        step = rate * max(-1.0, min(1.0, (busy - total) / max(total, WEAK)))
        moved = [cost * math.exp(step * part / total) for cost, part in zip(self._costs, parts, strict=True)]
        at_guess = self.guess * (moved[0] * self._anchor[0] + moved[1] * self._anchor[1])
        back = min(max(at_guess, 1 / MOST), MOST) / at_guess
        self._costs = moved[0] * back, moved[1] * back


def _uncached(snapshot: Snapshot) -> float:
    """Prompt tokens per second that were not found in a cache."""
    return (snapshot.prompt_token_rate or 0.0) * (1 - min(max(snapshot.cached_share or 0.0, 0.0), 0.99))
