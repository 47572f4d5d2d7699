"""Replays of a rate trace: the load, the forecasts and the oracle, and the table of outcomes.

Shapes: T = ticks, S = sub-steps per tick, B = lanes (seeds; utilizations x seeds while tuning).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from farthing import files
from farthing.process import cache_dir
from farthing_fleet.config import RULES, SloConfig, window
from farthing_fleet.forecast.base import DAY_S, Floats, Series
from farthing_fleet.forecast.day import DayForecaster, ProphetConfig, best_share, floor_losses
from farthing_fleet.forecast.growth import History, trailing_max, trailing_mean
from farthing_fleet.forecast.short import ShortConfig, capped, walk
from farthing_lab.replay.policies import FarthingRule, FixedRule, HpaRule, needed
from farthing_lab.replay.rate import Ints, Result, Rule, Setting, simulate
from farthing_lab.replay.trace import rate_load

# The oracle: the cheapest fleet that knows the future exactly but still pays for cold starts.
#
# d_t = max(1, ceil(trailing 60 s rate / (u·C))). For each level k, the k-th replica is needed during on =
# {t: d_t >= k}. It costs its busy time, plus for every gap the smaller of the gap and the load time (keep
# it, or stop and relaunch it in time), plus one load time if it is first needed after the start. The
# total is the sum over levels.


def demand(load: Floats, dt: float, capacity: float, utilization: float) -> Ints:
    """[N, B] replicas needed at every step for `load` [N, B], from the trailing 60 s rate."""
    rate = trailing_mean(load, round(60 / dt))
    return np.maximum(1, np.ceil(rate / (utilization * capacity) - 1e-9)).astype(np.int64)


def cost_hours(wanted: Ints, dt: float, load_time_s: float) -> float:
    """Instance-hours of one lane's demand [N]."""
    total = 0.0
    for level in range(1, int(wanted.max()) + 1):
        on = (wanted >= level).astype(np.int8)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], on, [0]])))
        begins, ends = edges[::2], edges[1::2]
        gaps = (begins[1:] - ends[:-1]) * dt
        total += on.sum() * dt + np.minimum(gaps, load_time_s).sum()
        total += load_time_s if begins[0] > 0 else 0.0
    return total / 3600


def oracle_hours(load: Floats, dt: float, capacity: float, utilization: float, load_time_s: float) -> Floats:
    """[B] instance-hours of the oracle for `load` [N, B]."""
    wanted = demand(load, dt, capacity, utilization)
    return np.array([cost_hours(wanted[:, lane], dt, load_time_s) for lane in range(wanted.shape[1])])


# The mid-term level in a replay: a day plan, made every day from past data only.

JUDGED_S = 300.0  # interval of judged peaks
MOST_DAYS = 7  # between fits
HISTORY_S = 7 * DAY_S  # no plan before this: the load replaces it
MOST_FITS = 40  # a long trace is refitted only every few days
JUDGED_WINDOW_S = 7 * DAY_S  # of the running skill and of the floor's share


@dataclass(frozen=True)
class PlanConfig:
    """Settings of the day plan and of its judgement."""

    enabled: bool = True
    utilization: float = 0.7  # target utilization of the replicas
    prophet: ProphetConfig = field(default_factory=ProphetConfig)


def day_plan(
    series: Series, load: Floats, bound: Floats, tick_s: float, lead_s: float, config: PlanConfig
) -> Floats:
    """[T] the floor at each tick: a share of the plan's peak over the next `lead_s`; NaN without a plan.

    `load` and `bound` [T] are the load and the short-term bound at each tick. As in production, a plan is not
    used while its running skill against the last value known when it was made is below zero.
    """
    if not config.enabled:
        return np.full(len(load), np.nan)
    value, good = _plans(series, config)
    ahead = max(1, int(np.ceil(lead_s / series.step_s)) + 1)
    peak = trailing_max(value[::-1, None], ahead)[::-1, 0]  # over the next steps
    at = np.minimum(np.floor(np.arange(len(load)) * tick_s / series.step_s).astype(np.int64), len(series) - 1)
    planned = np.where(good, peak, np.nan)[at]
    floor: Floats = planned * _shares(planned, load, bound, tick_s, lead_s, config)
    return floor


def _shares(
    planned: Floats, load: Floats, bound: Floats, tick_s: float, lead_s: float, config: PlanConfig
) -> Floats:
    """[T] the floor's share of the plan, chosen every day from previous days."""
    lead, every = max(1, round(lead_s / tick_s)), max(1, round(JUDGED_S / tick_s))
    day, window = round(DAY_S / tick_s), round(JUDGED_WINDOW_S / tick_s)
    peaks = trailing_max(load[:, None], lead)[:, 0]
    out = np.ones(len(load))
    for begin in range(0, len(load), day):
        judged = np.arange(max(0, begin - window), max(0, begin - lead), every)
        judged = judged[~np.isnan(planned[judged])]
        losses = floor_losses(planned[judged], bound[judged], peaks[judged + lead], config.utilization)
        out[begin : begin + day] = best_share(losses)
    return out


def _plans(series: Series, config: PlanConfig) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """([steps] planned values, [steps] whether there is a plan with skill)."""
    first, day = round(HISTORY_S / series.step_s), series.per_day
    value, naive = series.values.copy(), series.values.copy()
    good = np.zeros(len(series), dtype=np.bool_)
    window = round(JUDGED_WINDOW_S / series.step_s)
    every = min(MOST_DAYS, max(1, -(-round((len(series) - first) / day) // MOST_FITS)))
    forecaster = DayForecaster(config.prophet)
    for count, begin in enumerate(range(first, len(series) - 1, day)):
        end = min(len(series), begin + day)
        if count % every == 0:
            forecaster.fit(series.head(begin))
        value[begin:end] = forecaster.predict(series.values[:begin], end - begin)
        naive[begin:end] = series.values[begin - 1]
        past = slice(max(first, begin - window), begin)
        truth = series.values[past]
        good[begin:end] = np.abs(value[past] - truth).sum() <= np.abs(naive[past] - truth).sum()
    return value, good


# The short-term level in a replay: the production `ShortLevel` over the replayed load.
#
# Its members are trained on the first run, on the production schedule. Results are cached in the user's
# cache directory by trace, settings and packaged weights, so that a second replay starts at once.
#
# Shapes: T = ticks, B = runs.

_FORMAT = 5


@dataclass(frozen=True)
class ShortTrack:
    """The short level's output at each tick."""

    bound: Floats  # [T, B] 0.9 bound on the peak within the lead
    weights: dict[str, float]  # mean weight of each member


def short_track(raw: Floats, tick_s: float, lead_s: float, config: ShortConfig) -> ShortTrack:
    """Run the level over `raw` [T, B], the mean load known at each tick; uses only complete steps."""
    config = replace(config, lead_s=lead_s)
    every = max(1, round(config.grid_s / tick_s))
    whole = len(raw) // every * every
    steps = raw[:whole].reshape(-1, every, raw.shape[1]).mean(axis=1)
    path = _cache(steps, config)
    if path.exists():
        with np.load(path) as kept:
            bound, weights = kept["bound"], kept["weights"]
            names = [str(name) for name in kept["names"]]
    else:
        history = History(steps, every * tick_s, lead_s, pace=config.pace)
        made, names = walk(history, config)
        bound, weights = capped(made.p90, history).astype(np.float32), made.weights.mean(axis=(0, 2))
        _keep(path, bound, weights, names)
    # a step is known from the tick at which it ends
    ticks = np.repeat(bound.astype(np.float64), every, axis=0)
    shifted = np.concatenate([raw[: every - 1] * 1.25, ticks])[: len(raw)]
    if len(shifted) < len(raw):
        shifted = np.concatenate([shifted, np.repeat(shifted[-1:], len(raw) - len(shifted), axis=0)])
    return ShortTrack(shifted, dict(zip(names, weights.round(3).tolist(), strict=True)))


def _cache(steps: Floats, config: ShortConfig) -> Path:
    digest = hashlib.sha256(steps.tobytes())
    digest.update(repr((_FORMAT, steps.shape, replace(config, pretrained=Path()))).encode())
    digest.update(config.pretrained.read_bytes() if config.pretrained.exists() else b"")
    root = cache_dir() / "replay"
    return root / f"{digest.hexdigest()[:32]}.npz"


def _keep(path: Path, bound: Floats, weights: Floats, names: list[str]) -> None:
    """Write atomically; a failed write only costs time."""

    def write(scratch: Path) -> None:
        with scratch.open("wb") as file:
            np.savez(file, bound=bound, weights=weights, names=np.array(names))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, write)
    except OSError:
        return


# Policies that follow a rule of the controller, under its name ("farthing" is the default rule), or one of
# its levels alone.
RULE_OF = {
    "farthing": "slo",
    **{name: name for name in RULES if name != "slo"},
    "short": "published",
    "mid": "published",
    "realtime": "published",
}
POLICIES = (*RULE_OF, "hpa", "hpa-tuned", "keda", "static", "oracle")
TUNABLE = ("stabilized", "published", "hpa", "keda")
GRID = tuple(round(0.4 + 0.02 * k, 2) for k in range(28))
Progress = Callable[[str], None]


@dataclass(frozen=True)
class ReplayConfig:
    """Settings of a replay; `capacity` None: the trace's mean load needs `mean_replicas` replicas."""

    utilization: float = 0.7
    load_time_s: float = 600.0
    capacity: float | None = None
    mean_replicas: float = 20.0
    seeds: int = 5
    noise: float = 0.1
    price_per_hour: float = 1.0
    slo_target: float = 0.995  # tuned policies reach it on the first half
    second_half: bool = False  # report only the second half
    drain_s: float = 30.0
    wait_slo_s: float = 2.0
    failures_per_day: float = 0.0
    short: ShortConfig = field(default_factory=ShortConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization: got {self.utilization}; expected a number in (0, 1]")
        if self.capacity is not None and not self.capacity > 0:
            raise ValueError(f"capacity: got {self.capacity}; expected a number above 0")
        if self.seeds < 1:
            raise ValueError(f"seeds: got {self.seeds}; expected 1 or more")
        for name in ("noise", "price_per_hour"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a finite number, 0 or more")


def base_of(name: str) -> str:
    """The policy's name without `-tuned`. Raises ValueError with the known policies."""
    base = name.removesuffix("-tuned")
    if base not in POLICIES or (base != name and base not in TUNABLE):
        tuned = ", ".join(f"{policy}-tuned" for policy in TUNABLE)
        raise ValueError(f"policy {name!r}: expected one of {', '.join(POLICIES)}, {tuned}")
    return base


class Replay:
    """A prepared trace: its load, the forecasts along it, and runs of policies."""

    def __init__(self, series: Series, config: ReplayConfig, progress: Progress = lambda text: None) -> None:
        if len(series) < 4:
            raise ValueError(f"{series.name}: got {len(series)} steps; expected at least four")
        mean = float(series.values.mean())
        if mean <= 0:
            raise ValueError(f"{series.name}: the load is zero everywhere; expected a positive load")
        self.series, self.config, self.progress = series, config, progress
        capacity = config.capacity if config.capacity is not None else mean / config.mean_replicas
        slow = series.step_s > 600  # a slow trace needs no decision every 15 s
        self.setting = Setting(
            capacity=capacity,
            load_time_s=config.load_time_s,
            tick_s=60.0 if slow else 15.0,
            substeps=6 if slow else 3,
            drain_s=config.drain_s,
            wait_slo_s=config.wait_slo_s,
            failures_per_day=config.failures_per_day,
        )
        load = rate_load(series, self.setting.dt, config.seeds, config.noise)
        self.ticks = len(load) // self.setting.substeps
        self.load: Floats = load[: self.ticks * self.setting.substeps]
        self._know()

    def _know(self) -> None:
        """Compute what is known at each tick: trailing rate, bound on the next peak, day plan; all [T, B]."""
        setting, config = self.setting, self.config
        means = self.load.reshape(self.ticks, setting.substeps, -1).mean(axis=1)
        raw = np.concatenate([means[:1], means[:-1]])  # at a tick, the previous one is known
        lead = config.load_time_s + setting.tick_s
        self.rate = trailing_mean(raw, round(60 / setting.tick_s))
        self.progress("short-term bound")
        track = short_track(raw, setting.tick_s, lead, config.short)
        self.bound, self.weights = np.maximum(track.bound, self.rate), track.weights
        self.progress("day plan")
        told = replace(config.plan, utilization=config.utilization)
        plan = day_plan(
            self.series, self.rate.mean(axis=1), self.bound.mean(axis=1), setting.tick_s, lead, told
        )[:, None]
        self.floor = np.where(np.isnan(plan), self.rate, plan)

    def span(self, half: int | None) -> slice:
        """Ticks of the first (0) or second (1) half, or all (None)."""
        middle = self.ticks // 2
        return {None: slice(0, self.ticks), 0: slice(0, middle), 1: slice(middle, self.ticks)}[half]

    def rule(self, name: str, utilization: Floats, span: slice) -> Rule:
        """The policy over lanes of `utilization` [B]; B is a multiple of the seeds."""
        copies = len(utilization) // self.config.seeds
        capacity, tick_s = self.setting.capacity, self.setting.tick_s
        rate = np.tile(self.rate[span], (1, copies))
        if name == "hpa":
            return HpaRule(rate, utilization, capacity, tick_s)
        if name == "keda":
            return HpaRule(rate, utilization, capacity, tick_s, poll_s=30.0, backlog_s=60.0)
        if name == "static":
            peak = needed(rate.max(axis=0), utilization, capacity)
            return FixedRule(np.broadcast_to(peak, rate.shape))
        if name == "oracle":
            return FixedRule(self._oracle_demand(span, copies, float(utilization[0])))
        bound = np.tile(self.bound[span], (1, copies))
        floor = np.tile(self.floor[span], (1, copies))
        parts = {"short": (bound,), "mid": (floor,), "realtime": (rate,)}.get(name, (bound, floor, rate))
        rule = RULES[RULE_OF[name]]
        return FarthingRule(
            np.maximum.reduce(parts),
            rate,
            utilization,
            capacity,
            self.config.load_time_s,
            tick_s,
            scale_down_below=rule.scale_down_below,
            scale_up_above=rule.scale_up_above,
            scale_down_spare=rule.scale_down_spare,
            stabilization_s=window(rule.stabilization_s, self.config.load_time_s),
            realtime=name not in ("short", "mid"),
            drains_fast=rule.drains_fast,
            slo=self.config.slo if rule.by_slo else None,
        )

    def _oracle_demand(self, span: slice, copies: int, utilization: float) -> Ints:
        per_step = demand(self._part(span), self.setting.dt, self.setting.capacity, utilization)
        per_tick = per_step.reshape(-1, self.setting.substeps, per_step.shape[1]).max(axis=1)
        return np.tile(per_tick, (1, copies))

    def _part(self, span: slice) -> Floats:
        steps = self.setting.substeps
        return self.load[span.start * steps : span.stop * steps]

    def run(self, name: str, utilizations: list[float], half: int | None = None) -> Result:
        """Lanes are utilizations x seeds, seeds the faster index."""
        span = self.span(half)
        lanes = np.repeat(np.array(utilizations), self.config.seeds)
        load = np.tile(self._part(span), (1, len(utilizations)))
        oracle = name == "oracle"
        setting = replace(self.setting, load_time_s=0.0, drain_s=0.0) if oracle else self.setting
        return simulate(load, self.rule(name, lanes, span), setting)

    def oracle(self, utilization: float, half: int | None = None) -> Floats:
        """[seeds] instance-hours of the oracle."""
        load = self._part(self.span(half))
        setting = self.setting
        return oracle_hours(load, setting.dt, setting.capacity, utilization, setting.load_time_s)

    def curve(
        self, name: str, grid: tuple[float, ...] = GRID, half: int | None = None
    ) -> list[tuple[float, float, float]]:
        """(utilization, SLO, instance-hours), means over the seeds, by rising utilization."""
        result = self.run(name, list(grid), half)
        slo = result.slo.reshape(len(grid), -1).mean(axis=1)
        hours = result.instance_hours.reshape(len(grid), -1).mean(axis=1)
        return [(u, float(s), float(h)) for u, s, h in zip(grid, slo, hours, strict=True)]

    def tune(self, name: str, half: int | None = 0) -> float:
        """The cheapest utilization of the grid that meets the SLO target; the lowest if none does."""
        good = [(hours, u) for u, slo, hours in self.curve(name, half=half) if slo >= self.config.slo_target]
        return min(good)[1] if good else GRID[0]

    def outcome(self, name: str) -> tuple[dict[str, Any], Result]:
        """The table row of one policy (means over the seeds) and its run."""
        base = base_of(name)
        half = 1 if self.config.second_half else None
        utilization = self.tune(base) if name != base else self.config.utilization
        result = self.run(base, [utilization], half)
        hours = self.oracle(utilization, half) if base == "oracle" else result.instance_hours
        row = {
            "instance_hours": float(hours.mean()),
            "slo": float(result.slo.mean()),
            "changes": float(result.changes.mean()),
            "direction_changes": float(result.direction_changes.mean()),
            "cost": float(hours.mean()) * self.config.price_per_hour,
            "utilization": utilization,
            "rule": RULE_OF.get(base, base),
        }
        return row, result


def replay(
    series: Series,
    policies: tuple[str, ...] = POLICIES,
    config: ReplayConfig | None = None,
    progress: Progress = lambda text: None,
) -> tuple[dict[str, Any], dict[str, Result], Replay]:
    """Replay `series` against `policies`. Returns the JSON document, the runs (for a plot) and the replay."""
    for name in policies:
        base_of(name)
    config = config or ReplayConfig()
    made = Replay(series, config, progress)
    rows, runs = {}, {}
    for name in policies:
        progress(name)
        rows[name], runs[name] = made.outcome(name)
    span = made.span(1 if config.second_half else None)
    hours = (span.stop - span.start) * made.setting.tick_s / 3600
    document = {
        "trace": series.name,
        "hours": hours,
        "capacity": made.setting.capacity,
        "load_time_s": config.load_time_s,
        "seeds": config.seeds,
        "forecaster": {"model": config.short.model, "weights": made.weights},
        "policies": rows,
    }
    return document, runs, made
