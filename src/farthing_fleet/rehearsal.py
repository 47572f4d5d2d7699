"""Decides how to scale by rehearsing: hundreds of simulated fleets follow the load that was observed.

A load does not depend on the fleet that serves it, so what any other rule would have cost, and how many
requests it would have made wait, is known exactly. A *rule* is a plan of `farthing_fleet.forecast.recent`, a
window whose highest plan counts, and a margin:

    replicas = ceil(margin · highest plan of the window)
             or, if more, load + what drains the backlog (`drain`)

Every rule has a simulated fleet with a queue, and its replicas serve one cold start after they were ordered.
A replica serves now if it has been wanted for a whole cold start: ready = the lowest order of that time. That
is the order book. Every ten minutes the rules are weighted by their costs,

    cost   = replica-hours per load + `PRICE` · (share of late requests beyond the error budget)
    weight ~ 1 - (cost / least cost - 1) / `SPREAD`, not below zero

both parts fading with a half-life of two days. What runs is the weighted mean of what the rules want: rules
whose costs differ by less than chance share the decision, so that it does not jump between them. A fleet
starts with the evidence of two hours of a made-up day (`made_up_day`). Loads are in replicas: load units per
second over one replica's capacity.

Shapes: P = plans, W = windows, M = margins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from farthing_fleet.config import PolicyConfig
from farthing_fleet.forecast.recent import DAY_S, PLANS, SAYS, Highest, Mean, RecentPlans

Floats = NDArray[np.float64]

WINDOWS = (0.25, 1, 3, 12, 48, 144)  # in leads, at most
LONGEST_S = 7200.0
MARGINS = np.geomspace(0.9, 2.8, 40)
PRICE = 20.0  # replica-seconds per request-second that is late
SPREAD = 0.1  # a rule that costs this share more than the cheapest has no weight
HALF_LIFE_S = 2 * DAY_S
EVERY_S = 600.0  # between weighings
START_S, START_MARGIN = 600.0, 1.25  # the least margin while too little has been seen to measure noise
PRIOR_S = 2 * 3600.0  # weight of the made-up day
MADE_UP_STEP_S = 15.0  # its least step: a fleet that decides more often follows the same loads in less time
TERMINATION_S = 30.0  # a removed replica finishes its requests
SHARE_OF_BUDGET = 0.8  # of the permitted late requests that a rule may have


@dataclass(frozen=True)
class Settings:
    """The fleet that is rehearsed. Times in seconds."""

    step_s: float  # between observations of the load
    cold_start_s: float
    wait_s: float = 2.0  # requests that wait longer are late
    target: float = 0.995  # share of the requests that are not
    drain_s: float = 60.0  # a backlog is processed at most this fast
    least: int = 1
    most: int = 1_000_000

    @classmethod
    def of(cls, policy: PolicyConfig, cold_start_s: float | None = None) -> Self:
        """Those of a policy; `cold_start_s` is measured, if not the configured one."""
        return cls(
            policy.interval_s,
            policy.cold_start_s if cold_start_s is None else cold_start_s,
            wait_s=policy.slo.ttft_s,
            target=policy.slo.target,
            drain_s=policy.drain_s,
            least=policy.min_replicas,
            most=policy.max_replicas,
        )

    @property
    def lead_s(self) -> float:
        """From a decision to the next one after its replicas serve."""
        return self.cold_start_s + self.step_s


@dataclass(frozen=True)
class Noise:
    """A load that is constant but for noise, in replicas."""

    high: float  # its mean and three deviations of a minute
    need: float  # mean of what the rule wants


@dataclass(frozen=True)
class Plan:
    """What the rules of least cost want now. Loads in replicas."""

    need: float  # replicas, not rounded, without the backlog
    load: float  # that is planned for
    now: float  # the load of the last minute
    margin: float  # replicas per load planned for
    rule: str  # of the greatest weight, in words
    steady: Noise | None = None  # while the load is constant but for noise
    late: float = 0.0  # share of late requests of the rehearsed fleets
    rules: int = 1  # that have a weight


@dataclass(frozen=True)
class Pinned:
    """A rule in place of the rehearsed ones, which `farthing fleet tune` chose; without fields, none."""

    utilization: float | None = None  # the highest load of five minutes runs at this one
    replicas: int | None = None  # a static fleet

    def __post_init__(self) -> None:
        if self.utilization is not None and not 0 < self.utilization <= 1:
            raise ValueError(f"utilization: got {self.utilization}; expected a number in (0, 1]")
        if self.replicas is not None and self.replicas < 1:
            raise ValueError(f"replicas: got {self.replicas}; expected 1 or more")

    def __str__(self) -> str:
        if self.replicas is not None:
            return f"static fleet of {self.replicas}"
        return f"highest load of 5 min at {self.utilization:.0%}" if self.utilization else "rehearsed rules"


class PinnedRule:
    """What a pinned rule wants: the interface of `Rehearsal`."""

    def __init__(self, settings: Settings, pinned: Pinned) -> None:
        self._pinned, self._load = pinned, FiveMinutes(settings.step_s)

    def observe(self, load: float) -> Plan:
        """The plan after a step with this mean load."""
        now, planned = self._load.add(load)
        need = float(self._pinned.replicas or planned / (self._pinned.utilization or 1.0))
        margin = need / planned if need > 0 and planned > 0 else 1.0
        return Plan(need=need, load=planned, now=now, margin=margin, rule=f"tuned: {self._pinned}")


class FiveMinutes:
    """The load of the last minute and the highest one of five minutes, HPA's window before it scales down."""

    def __init__(self, step_s: float) -> None:
        self._minute = Mean(max(1, round(60 / step_s)))
        self._highest = Highest(max(1, round(300 / step_s)))

    def add(self, load: float) -> tuple[float, float]:
        """Both after a step with this mean load."""
        now = self._minute.add(load)
        return now, self._highest.add(now)


class Steady:
    """Whether the load is constant but for noise: no recent mean contradicts the mean since the last jump.

    The noise is measured as differences of neighbors. A contradiction is a jump: the mean starts again, and
    the load counts as steady after it has been so for `SETTLES_S`.
    """

    SIGMAS = 6.0
    SETTLES_S = 1800.0
    NOISIEST = 0.12  # deviation of one-minute means above which nothing is called noise

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._settles = max(1, round(self.SETTLES_S / step_s))
        self._recent = [Mean(1 << k) for k in range(max(1, self._settles.bit_length() - 1))]
        self._noise = Mean(max(2, round(7200 / step_s)))
        self._before: float | None = None
        self._level = self._sum = 0.0
        self._count, self._settling = 0, 0
        self._need = Mean(self._settles)

    def add(self, load: float, need: float) -> Noise | None:
        """The load of the last half hour and its need if it is steady."""
        before, self._before = self._before, load
        if before is not None:
            self._noise.add(abs(load - before) / max(self._level, 1e-9))
        self._sum += load
        self._count += 1
        self._level = self._sum / self._count
        deviation = 0.886 * self._noise.value * self._level  # of one step: E|a - b| of two is 1.128
        jump = False
        for recent in self._recent:
            mean, count = recent.add(load), len(recent)
            far = abs(mean - self._level)
            jump = jump or (count < self._count and far > self.SIGMAS * deviation / math.sqrt(count) > 0)
        self._settling = max(0, self._settling - 1)
        mean_need = self._need.add(need)
        if jump:
            self._restart(load, need)
        elif self._count > 4 * self._settles:  # forget slowly, so that a drift is a drift
            self._sum, self._count = self._sum / 2, self._count // 2
        minute = 0.886 * self._noise.value * math.sqrt(self._step_s / 60)
        if self._settling or minute > self.NOISIEST:
            return None
        return Noise(self._level * (1 + 3 * minute), mean_need)

    def _restart(self, load: float, need: float) -> None:
        self._sum, self._count, self._settling = load, 1, self._settles
        self._need.reset()
        self._need.add(need)
        for recent in self._recent:
            recent.reset()


def drain(load: Any, backlog: Any, drain_s: float, lead_s: float) -> Any:
    """Replicas that a backlog is worth besides those for the load.

    x of them cost x · lead until they serve, and the load is late for another backlog / x, so that the sum is
    least at x = √(price · load · backlog / lead): a spike of minutes that has passed orders little, a jump
    that lasts orders much. At least as many as drain it in another lead, so that it ends without a load.
    """
    worth = np.maximum(backlog / lead_s, np.sqrt(PRICE * load * backlog / lead_s))
    return np.minimum(backlog / drain_s, worth)


class Fleets:
    """The simulated fleets of all rules, as arrays of any shape."""

    def __init__(self, settings: Settings, start: Floats) -> None:
        self._settings = settings
        self._reach = max(1, round(settings.cold_start_s / settings.step_s)) + 1
        self.orders = start.astype(np.float32)
        self.ready = self.orders.copy()
        # the lowest order of the last `reach` steps: of this block, and of the rest of the block before
        self._block = np.empty((self._reach, *start.shape), np.float32)
        self._before = np.concatenate([np.repeat(self.orders[None], self._reach, 0), self._infinite()[None]])
        self._lowest = self._infinite()
        self._at = 0
        self.backlog = np.zeros(start.shape, np.float32)
        self.late = np.zeros(start.shape)  # requests, in seconds of a replica
        self.hours = np.zeros(start.shape)  # in steps of a replica
        self._queued, self._least_ready = False, float(self.ready.min())

    def _infinite(self) -> NDArray[np.float32]:
        return np.full(self.orders.shape, np.inf, np.float32)

    def serve(self, load: float) -> None:
        """One step with this load; the backlog and the late requests follow."""
        self.hours += self.orders
        if not self._queued and load <= self._least_ready:
            return
        step_s, limit = np.float32(self._settings.step_s), self._settings.wait_s
        ready = np.maximum(self.ready, 1e-6)
        first = self.backlog / ready
        self.backlog = np.maximum(0, self.backlog + (np.float32(load) - self.ready) * step_s)
        last = self.backlog / ready
        high = np.maximum(first, last)
        if float(high.max()) > limit:
            low = np.minimum(first, last)
            self.late += load * step_s * (1 - np.clip((limit - low) / np.maximum(high - low, 1e-9), 0, 1))
        self._queued = bool(self.backlog.any())

    def order(self, need: Floats, load: float) -> None:
        """Set the replicas for a need; `load` is the present one."""
        settings = self._settings
        if self._queued:
            extra = drain(np.float32(load), self.backlog, settings.drain_s, settings.lead_s)
            need = np.where(extra > 0, np.maximum(need, np.float32(load) + extra), need)
        orders = np.clip(np.ceil(need - 1e-6), settings.least, settings.most).astype(np.float32)
        self.hours += np.maximum(0, self.orders - orders) * (TERMINATION_S / settings.step_s)
        self.orders = self._block[self._at] = orders
        self._lowest = np.minimum(self._lowest, orders)
        self.ready = np.minimum(self._lowest, self._before[self._at + 1])
        self._least_ready = float(self.ready.min())
        self._at += 1
        if self._at == self._reach:
            self._before[: self._reach] = np.minimum.accumulate(self._block[::-1], axis=0)[::-1]
            self._lowest, self._at = self._infinite(), 0

    def settle(self) -> tuple[Floats, Floats]:
        """(late, hours) since the last call."""
        out = self.late, self.hours
        self.late, self.hours = np.zeros_like(self.late), np.zeros_like(self.hours)
        return out


class Rehearsal:
    """Feed it the load of every step; it says what to run. See the module."""

    def __init__(self, settings: Settings, first: float, *, prior: bool = True) -> None:
        """`first` is the load at the start, in replicas."""
        self.settings = settings
        step_s, lead_s = settings.step_s, settings.lead_s
        steps = {max(1, round(min(LONGEST_S, w * lead_s) / step_s)) for w in WINDOWS}
        self._windows = sorted(steps)
        self._plans = RecentPlans(step_s, lead_s)
        self._highest = [[Highest(steps) for steps in self._windows] for _ in PLANS]
        self._planned = np.full((len(PLANS), len(self._windows)), max(first, 0.0))
        shape = (len(PLANS), len(self._windows), len(MARGINS))
        start = np.broadcast_to(np.clip(np.ceil(first * MARGINS), settings.least, settings.most), shape)
        self._fleets = Fleets(settings, start)
        self._every, self._steps = max(1, round(EVERY_S / step_s)), 0
        self._late, self._hours = np.zeros(shape), np.zeros(shape)
        self._time = self._arrived = self._arriving = 0.0
        self._weights, self._margins = np.zeros(shape[:-1]), np.full(shape[:-1], 1.25)
        self._weights[PLANS.index("growth"), 1] = 1.0
        self._share_late = 0.0
        self._steady = Steady(step_s)
        if prior:
            self._imagine(max(first, 0.5))

    def _imagine(self, scale: float) -> None:
        """Start with the evidence of a made-up day, at this mean load."""
        other = Rehearsal(self.settings, scale, prior=False)
        for load in made_up_day(max(self.settings.step_s, MADE_UP_STEP_S)) * scale:
            other.observe(float(load))
        weight = min(1.0, PRIOR_S / max(other._time, 1e-9))
        self._late, self._hours = other._late * weight, other._hours * weight
        self._time, self._arrived = other._time * weight, other._arrived * weight
        self._weights, self._margins = other._weights, other._margins
        self._plans.growth = other._plans.growth

    def observe(self, load: float) -> Plan:
        """The plan after a step with this mean load."""
        if self._steps:
            self._fleets.serve(load)
            self._arriving += load * self.settings.step_s
        plans = self._plans.add(load)
        for row, plan in enumerate(plans):
            for column, highest in enumerate(self._highest[row]):
                self._planned[row, column] = highest.add(plan)
        self._fleets.order(self._planned[:, :, None] * MARGINS, plans[0])
        self._steps += 1
        if self._steps % self._every == 0:
            self._weigh()
        return self._plan(load, plans[0])

    def _plan(self, load: float, now: float) -> Plan:
        loads, wanted = self._planned, self._planned * self._margins
        row, column = np.unravel_index(int(self._weights.argmax()), self._weights.shape)
        ended = wanted[row, column] <= 0  # the longest windows of other rules last for hours
        planned, need = (0.0 if ended else float((self._weights * part).sum()) for part in (loads, wanted))
        if self._steps * self.settings.step_s < max(START_S, self.settings.lead_s):
            need = max(need, START_MARGIN * planned)
        name, window_s = PLANS[row], self._windows[column] * self.settings.step_s
        window = f"{window_s / 60:.0f} min" if window_s >= 90 else f"{window_s:.0f} s"
        return Plan(
            need=need,
            load=planned,
            now=now,
            margin=need / planned if planned > 0 else START_MARGIN,
            rule=f"highest of {window} by {SAYS[name]}",
            steady=self._steady.add(load, need),
            late=self._share_late,
            rules=int(np.count_nonzero(self._weights)),
        )

    def _weigh(self) -> None:
        """Add the evidence of the last steps and weigh the rules."""
        late, hours = self._fleets.settle()
        passed = self._every * self.settings.step_s
        fades = 0.5 ** (passed / HALF_LIFE_S)
        self._late = self._late * fades + late
        self._hours = self._hours * fades + hours * self.settings.step_s
        self._arrived, self._arriving = self._arrived * fades + self._arriving, 0.0
        self._time = self._time * fades + passed
        cost, shares = self.costs()
        best = cost.argmin(axis=-1)[..., None]
        cost, shares = (np.take_along_axis(part, best, -1)[..., 0] for part in (cost, shares))
        weights = np.maximum(0.0, 1 - (cost / max(float(cost.min()), 1e-9) - 1) / SPREAD)
        self._weights, self._margins = weights / weights.sum(), MARGINS[best[..., 0]]
        self._share_late = float((self._weights * shares).sum())

    def costs(self) -> tuple[Floats, Floats]:
        """([P, W, M] cost, [P, W, M] share of late requests) of every rule."""
        shares = np.minimum.accumulate(self._late / max(self._arrived, 1e-9), axis=-1)
        budget = SHARE_OF_BUDGET * (1 - self.settings.target)
        hours = self._hours / max(self._arrived, 1e-9)
        return hours + PRICE * np.maximum(0.0, shares - budget), shares


def made_up_day(step_s: float, seed: int = 3) -> Floats:
    """[T] a day of a service with a mean of 1: a wave, drifts, jumps, spikes and noise."""
    random = np.random.default_rng(seed)
    count = round(DAY_S / 600)
    wave = 1 + 0.35 * np.sin(2 * np.pi * np.arange(count) / count - 1.5)
    drift = 0.0
    for at in range(count):
        drift = 0.85 * drift + random.normal(0, 0.06)
        wave[at] *= math.exp(drift)
    for jumps, low, high in ((8, 1.3, 1.8), (2, 0.4, 0.7)):
        for at in random.integers(0, count, jumps):
            wave[at : at + random.integers(2, 6)] *= random.uniform(low, high)
    steps = round(DAY_S / step_s)
    load = np.interp((np.arange(steps) + 0.5) * step_s, np.arange(count) * 600.0, wave)
    for at in random.integers(0, steps, 8):
        load[at : at + round(random.uniform(60, 300) / step_s)] *= random.uniform(1.4, 2.0)
    noise = 0.1 * math.sqrt(10 / max(step_s, 10))
    load = load * random.gamma(1 / noise**2, noise**2, steps)
    return np.asarray(load / load.mean(), dtype=np.float64)
