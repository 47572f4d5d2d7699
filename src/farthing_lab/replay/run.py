"""Replays of a rate trace: the load, the policies, and the table of outcomes.

Shapes: T = ticks, S = sub-steps per tick, B = lanes (seeds; settings x seeds while choosing in hindsight).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from farthing_fleet.config import RULES, PolicyConfig, SloConfig
from farthing_fleet.forecast.history import trailing_max, trailing_mean
from farthing_lab.replay.policies import FarthingRule, FixedRule, HpaRule, deviations, needed
from farthing_lab.replay.rate import Result, Rule, Setting, View, simulate
from farthing_lab.replay.trace import Floats, Ints, rate_load
from farthing_lab.series import Series

# Rules of twenty lines. Their parameters may be chosen in hindsight: `best-NAME`.
SHORT_RULES = ("keda", "hpa", "deviations", "highest")
CONTROLLED = (
    "farthing",
    *(rule for rule in RULES if rule != "rehearsed"),
)  # the controller, by `policy.rule`
POLICIES = ("farthing", "published", *SHORT_RULES, *(f"best-{name}" for name in SHORT_RULES), "static")
WINDOWS_S = (300.0, 600.0, 1800.0, 3600.0, 7200.0)
WINDOW_S = 3600.0  # of `deviations` and `highest` if it is not chosen in hindsight
GRID = tuple(round(0.3 + 0.025 * k, 3) for k in range(37))  # utilizations
Progress = Callable[[str], None]


@dataclass(frozen=True)
class ReplayConfig:
    """Settings of a replay; `capacity` None: the trace's mean load needs `mean_replicas` replicas."""

    utilization: float = 0.7  # of the short rules
    load_time_s: float = 600.0
    capacity: float | None = None
    mean_replicas: float = 20.0
    seeds: int = 1
    noise: float = 0.1
    drain_s: float = 30.0
    slo: SloConfig = field(default_factory=SloConfig)

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization: got {self.utilization}; expected a number in (0, 1]")
        if self.capacity is not None and not self.capacity > 0:
            raise ValueError(f"capacity: got {self.capacity}; expected a number above 0")
        if self.seeds < 1:
            raise ValueError(f"seeds: got {self.seeds}; expected 1 or more")
        for name in ("noise", "load_time_s", "drain_s"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a finite number, 0 or more")


def base_of(name: str) -> str:
    """The policy's name without `best-`. Raises ValueError with the known policies."""
    known = tuple(dict.fromkeys((*CONTROLLED, *POLICIES)))
    if name not in known:
        raise ValueError(f"policy {name!r}: expected one of {', '.join(known)}")
    return name.removeprefix("best-")


@dataclass
class _Side:
    """Several rules over their own lanes of one simulation."""

    rules: list[Rule]

    def __post_init__(self) -> None:
        self.start: Ints = np.concatenate([rule.start for rule in self.rules])
        ends = np.cumsum([len(rule.start) for rule in self.rules])
        self._lanes = [slice(end - len(r.start), end) for end, r in zip(ends, self.rules, strict=True)]

    def decide(self, view: View) -> Ints:
        return np.concatenate([r.decide(view.lanes(s)) for r, s in zip(self.rules, self._lanes, strict=True)])


class Replay:
    """A prepared trace: its load, and runs of policies."""

    def __init__(self, series: Series, config: ReplayConfig, progress: Progress = lambda text: None) -> None:
        if len(series) < 4:
            raise ValueError(f"{series.name}: got {len(series)} steps; expected at least four")
        mean = float(series.values.mean())
        if mean <= 0:
            raise ValueError(f"{series.name}: the load is zero everywhere; expected a positive load")
        self.series, self.config, self.progress = series, config, progress
        slow = series.step_s > 600  # a slow trace needs no decision every 15 s
        self.setting = Setting(
            capacity=config.capacity if config.capacity is not None else mean / config.mean_replicas,
            load_time_s=config.load_time_s,
            tick_s=60.0 if slow else 15.0,
            substeps=6 if slow else 3,
            drain_s=config.drain_s,
            wait_slo_s=config.slo.ttft_s,
        )
        load = rate_load(series, self.setting.dt, config.seeds, config.noise)
        self.ticks = len(load) // self.setting.substeps
        self.load: Floats = load[: self.ticks * self.setting.substeps]
        means = self.load.reshape(self.ticks, self.setting.substeps, -1).mean(axis=1)
        self.seen = np.concatenate([means[:1], means[:-1]])  # at a tick, the previous one is known
        self.rate = trailing_mean(self.seen, round(60 / self.setting.tick_s))
        self._curve: list[tuple[str, str, float, float]] = []

    def policy(self, name: str = "farthing") -> PolicyConfig:
        """The controller's policy for this fleet: the default, or with the rule of this name."""
        return PolicyConfig(
            rule="rehearsed" if name == "farthing" else name,
            capacity=self.setting.capacity,
            interval_s=self.setting.tick_s,
            cold_start_s=self.config.load_time_s,
            max_replicas=1_000_000,
            slo=self.config.slo,
        )

    def rule(self, name: str, utilization: Floats | float, window_s: float = WINDOW_S) -> Rule:
        """The policy; with `utilization` [U], over U lanes for each seed."""
        capacity, tick_s, rate = self.setting.capacity, self.setting.tick_s, self.rate
        if name in CONTROLLED:
            return FarthingRule(self.seen, self.policy(name))
        used = np.atleast_1d(np.asarray(utilization, dtype=np.float64))
        rate, used = np.tile(rate, (1, len(used))), np.repeat(used, rate.shape[1])
        if name == "hpa":
            return HpaRule(rate, used, capacity, tick_s)
        if name == "keda":
            return HpaRule(rate, used, capacity, tick_s, poll_s=max(30.0, tick_s), backlog_s=60.0)
        steps = self.ticks if name == "static" else max(1, round(window_s / tick_s))
        planned = deviations(rate, steps) if name == "deviations" else trailing_max(rate, steps)
        if name == "static":
            planned = np.broadcast_to(rate.max(axis=0), rate.shape)
        return FixedRule(np.maximum(1, needed(planned, used, capacity)))

    def run(self, rule: Rule, copies: int = 1) -> Result:
        """Simulate over the whole trace; the load is repeated for `copies` lanes per seed."""
        return simulate(np.tile(self.load, (1, copies)), rule, self.setting)

    def curve(self) -> list[tuple[str, str, float, float]]:
        """(name, parameters, share in time, hours) of every short rule with every parameter."""
        if not self._curve:
            grid, rules, labels = np.array(GRID), [], []
            for name in SHORT_RULES:
                for window_s in WINDOWS_S if name in ("deviations", "highest") else (0.0,):
                    rules.append(self.rule(name, grid, window_s))
                    window = f" {window_s / 60:.0f} min" if window_s else ""
                    labels += [(name, f"u {u:g}{window}") for u in GRID]
            made = self.run(_Side(rules), len(labels))
            slo, hours = (
                part.reshape(len(labels), -1).mean(axis=1) for part in (made.slo, made.instance_hours)
            )
            self._curve = [
                (name, parameters, float(s), float(h))
                for (name, parameters), s, h in zip(labels, slo, hours, strict=True)
            ]
        return self._curve

    def best(self, slo: float, name: str | None = None) -> tuple[str, float, float] | None:
        """(name and parameters, share in time, hours) of the cheapest short rule, or of `name`, that keeps
        `slo`; chosen in hindsight. None if none does.
        """
        good = [(h, f"{n} {p}", s) for n, p, s, h in self.curve() if s >= slo and name in (None, n)]
        return (min(good)[1], min(good)[2], min(good)[0]) if good else None

    def outcome(self, name: str, slo: float) -> tuple[dict[str, Any], Result | None]:
        """The table row of one policy (means over the seeds) and its run; `best-` policies keep `slo`."""
        base, config = base_of(name), self.config
        if base != name:
            found = self.best(slo, base)
            if found is None:
                return {"instance_hours": None, "slo": None, "parameters": "none keeps the SLO"}, None
            label, share, hours = found
            return {"instance_hours": hours, "slo": share, "parameters": label.partition(" ")[2]}, None
        rule = self.rule(name, config.utilization)
        result = self.run(rule)
        row: dict[str, Any] = {
            "instance_hours": float(result.instance_hours.mean()),
            "slo": float(result.slo.mean()),
            "changes": float(result.changes.mean()),
            "parameters": "" if name in CONTROLLED else f"u {config.utilization:g}",
        }
        if name == "farthing" and isinstance(rule, FarthingRule):
            row["rules"] = rule.rules()
        return row, result


def replay(
    series: Series,
    policies: tuple[str, ...],
    config: ReplayConfig,
    progress: Progress = lambda text: None,
) -> tuple[dict[str, Any], dict[str, Result], Replay]:
    """The JSON document, the runs (for a plot) and the replay of `series` against `policies`."""
    made = Replay(series, config, progress)
    rows, runs = {}, {}
    slo = config.slo.target
    for name in sorted(policies, key=lambda name: name != "farthing"):  # first: others keep its SLO
        progress(name)
        rows[name], result = made.outcome(name, slo)
        if result is not None:
            runs[name] = result
        slo = rows[name]["slo"] if name == "farthing" else slo
    document = {
        "trace": series.name,
        "hours": made.ticks * made.setting.tick_s / 3600,
        "capacity": made.setting.capacity,
        "load_time_s": config.load_time_s,
        "seeds": config.seeds,
        "policies": rows,
    }
    return document, runs, made
