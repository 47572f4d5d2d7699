"""`farthing fleet tune`: chooses rule and utilization by replaying the load that the controller recorded.

A load does not depend on the fleet that serves it, so the simulated fleets of `farthing_fleet.rehearsal` tell
what every candidate would have cost: the rehearsed rules (the default), a rule like KEDA's at each
utilization, and static fleets. The cheapest of those that serve at least as large a share of the requests in
time as the default, or as the SLO asks for, is chosen. So the choice is behind none of them on this load.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import numpy as np
from rich.table import Table

from farthing.files import replace_json
from farthing_fleet.config import FleetConfig
from farthing_fleet.decision_log import last_decisions
from farthing_fleet.estimates import TUNED, read_loads
from farthing_fleet.forecast.base import DAY_S
from farthing_fleet.forecast.learned import GRID_S
from farthing_fleet.rehearsal import FiveMinutes, Fleets, Floats, Pinned, Rehearsal, Settings

PERCENTS = tuple(range(30, 101))  # utilizations
_STATIC = 40  # static fleets, from the mean load to the highest
_LONGEST_S = 7 * DAY_S  # of the recorded load, the last
_LEAST_STEP_S = 15.0


@dataclass(frozen=True)
class Row:
    """A candidate and its outcome on the recorded load."""

    rule: Pinned
    hours: float  # of replicas
    share: float  # of the requests that are served in time


@dataclass(frozen=True)
class Tuned:
    """The outcomes, the default's first, and the choice."""

    rows: list[Row]
    chosen: Row
    days: float  # of recorded load


def tune(config: FleetConfig) -> Tuned | None:
    """Replay the recorded load of a controller's state directory; None with less than a day of it."""
    recorded = [load for _, load in read_loads(config.state / "load.csv")]
    if len(recorded) * GRID_S < DAY_S:
        return None
    recorded = recorded[-round(_LONGEST_S / GRID_S) :]
    capacity, cold_start_s = _measured(config)
    step_s = max(config.policy.interval_s, _LEAST_STEP_S)
    settings = replace(Settings.of(config.policy, cold_start_s), step_s=step_s)
    at = np.arange(0.0, len(recorded) * GRID_S, step_s) // GRID_S
    rows = outcomes(np.array(recorded)[at.astype(int)] / capacity, settings)
    return Tuned(rows, best(rows, settings.target), len(recorded) * GRID_S / DAY_S)


def _measured(config: FleetConfig) -> tuple[float, float]:
    """Capacity of a replica and cold start, as the controller last knew them."""
    policy = config.policy
    try:
        inputs = last_decisions(config.state, 1)[-1].inputs
    except (FileNotFoundError, IndexError, ValueError):
        inputs = {}
    measured = inputs.get("snapshot", {}).get("cold_start_s")
    return inputs.get("capacity") or policy.capacity, policy.lead_s(measured)


def outcomes(loads: Floats, settings: Settings) -> list[Row]:
    """What every candidate costs for these loads, in replicas, one per step."""
    counts = np.linspace(max(1.0, loads.mean()), max(1.0, loads.max()) + 1, _STATIC)
    statics = np.unique(np.clip(np.ceil(counts), max(1, settings.least), settings.most))
    used = np.array(PERCENTS) / 100
    rehearsal, recent = (
        Rehearsal(settings, float(loads[: round(300 / settings.step_s)].mean())),
        FiveMinutes(settings.step_s),
    )
    first = np.ceil(np.concatenate([[loads[0] * 1.25], loads[0] / used]))
    following = Fleets(settings, np.clip(first, settings.least, settings.most))
    fixed = Fleets(replace(settings, drain_s=math.inf), statics)
    for load in map(float, loads):
        following.serve(load)
        fixed.serve(load)
        plan, (now, highest) = rehearsal.observe(load), recent.add(load)
        following.order(np.concatenate([[plan.need], highest / used]), now)
        fixed.order(statics, now)
    rules = [
        Pinned(),
        *(Pinned(utilization=percent / 100) for percent in PERCENTS),
        *(Pinned(replicas=int(n)) for n in statics),
    ]
    late, hours = (np.concatenate(both) for both in zip(following.settle(), fixed.settle(), strict=True))
    shares = 1 - late / max(float(loads.sum()) * settings.step_s, 1e-9)
    hours = hours * settings.step_s / 3600
    return [Row(rule, float(h), float(s)) for rule, h, s in zip(rules, hours, shares, strict=True)]


def best(rows: list[Row], target: float) -> Row:
    """The cheapest row that keeps the SLO as well as the first, which stays if no other is cheaper."""
    needed = min(target, rows[0].share)
    return min((row for row in rows if row.share >= needed), key=lambda row: row.hours)


def write(config: FleetConfig, tuned: Tuned) -> None:
    """Write the choice where a running controller reads it before its next decision."""
    chosen = {name: value for name, value in asdict(tuned.chosen.rule).items() if value is not None}
    replace_json(config.state / TUNED, chosen)


def table(tuned: Tuned) -> Table:
    """Hours and share in time of the default, every fifth utilization, the smallest static fleet that keeps
    up, and the choice."""
    made = Table(title=f"{tuned.days:.1f} days of recorded load")
    made.add_column("rule")
    for column in ("replica-hours", "% in time", ""):
        made.add_column(column, justify="right")
    needed = tuned.chosen.share
    statics = [row for row in tuned.rows if row.rule.replicas is not None]
    shown = min(
        (row for row in statics if row.share >= needed), key=lambda row: row.hours, default=statics[-1]
    )
    for row in tuned.rows:
        fifth = row.rule.replicas is None and round(100 * (row.rule.utilization or 0)) % 5 == 0
        if fifth or row in (shown, tuned.chosen):
            chosen = "chosen" if row is tuned.chosen else ""
            made.add_row(str(row.rule), f"{row.hours:.1f}", f"{100 * row.share:.2f}", chosen)
    return made
