"""Estimates that the controller maintains: the rehearsal of the load and the capacity of a replica.

`load.csv` in the state directory has the load per minute, so that a restarted controller knows the past. With
a Prometheus server, the controller queries it for the load that it did not observe itself.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from farthing.files import read
from farthing_fleet.capacity import OnlineCapacity, Targets
from farthing_fleet.config import FleetConfig
from farthing_fleet.forecast.base import DAY_S
from farthing_fleet.forecast.learned import GAIN, GRID_S, LEAST_S, NAMES, TRAIN_S, WEEKS_S, Learned, make
from farthing_fleet.forecast.prophet import ProphetConfig
from farthing_fleet.rehearsal import Pinned, PinnedRule, Plan, Rehearsal, Settings
from farthing_fleet.types import Snapshot

log = logging.getLogger(__name__)

REHEARSED_STEPS = 3 * 5760  # of the recorded load that a new rehearsal replays: three days of 15 s
LEAD_CHANGE = 1.2  # the rehearsal is repeated when the measured lead differs by this factor,
LEAD_CHANGE_S = 3600.0  # at most this often
TRIAL_S = DAY_S
TUNED = "tuned.json"  # in the state directory: what `farthing fleet tune` chose, as a `Pinned`
_GAP = 20  # steps without a load after which the present one does not stand for the gap


@dataclass(frozen=True)
class ForecastConfig:
    """The `forecast` section: learned forecasters that may be tried, and Prophet's holidays and events."""

    learned: tuple[str, ...] = NAMES  # empty: none
    prophet: ProphetConfig = field(default_factory=ProphetConfig)

    def __post_init__(self) -> None:
        unknown = set(self.learned) - set(NAMES)
        if unknown:
            raise ValueError(f"forecast.learned: got {sorted(unknown)[0]!r}; expected {', '.join(NAMES)}")


class LiveEstimates:
    """Feeds the rehearsal and the capacity model with every snapshot, and records the load per minute."""

    def __init__(self, config: FleetConfig) -> None:
        self._policy = policy = config.policy
        slo = policy.slo
        targets = Targets(policy.latency_threshold_s, slo.ttft_s, slo.tpot_s, 1 - slo.target)
        self._capacity = OnlineCapacity(policy.capacity, policy.unit, targets)
        self._forecast = read(ForecastConfig, config.forecast, "forecast")
        self._path = config.state / "load.csv"
        self._points = read_loads(self._path)  # (time, load) a minute
        self._cold_start = policy.cold_start_s
        self._lead_changed = -math.inf
        self._tuned = config.state / TUNED
        self._pinned, self._stamp = Pinned(), 0
        self._rehearsal: Rehearsal | PinnedRule | None = None
        self._learned: tuple[str, Learned] | None = None
        self._learned_plan: tuple[float, float] = (-math.inf, 0.0)  # (time, load)
        self._trained = self._tried = -math.inf
        self._plan: Plan | None = None
        self._last: Snapshot | None = None
        self._minute: list[float] = []
        self._minute_start: float | None = self._points[-1][0] if self._points else None
        self._open_minute = 0.0

    # ---- input ----

    def remember(self, points: list[tuple[float, float]]) -> None:
        """Add past loads (time, load), oldest first, after the last recorded one."""
        for time, load in points:
            if time > (self._minute_start or -math.inf) and np.isfinite(load) and load >= 0:
                self._record(time, load)

    @property
    def remembers_until(self) -> float | None:
        """Time of the last recorded load."""
        return self._minute_start

    def observe(self, now: float, snapshot: Snapshot) -> None:
        """Update from the signals of one step."""
        self._capacity.observe(snapshot)
        last, self._last = self._last, snapshot
        load = snapshot.load(self._policy.unit)
        if load is None or snapshot.stale or snapshot.ready is None or not np.isfinite(load) or load < 0:
            return
        measured = self._policy.lead_s(snapshot.cold_start_s)
        if self._retuned() or self._rehearsal is None or self._changed(measured, now):
            self._cold_start, self._lead_changed = measured, now
            self._rehearsal = self._rehearsed(load)
            last = None
        for _ in range(self._steps(last, snapshot)):
            self._plan = self._rehearsal.observe(load / self._capacity.estimate, self._learned_load(now))
        self._keep(now, load)

    def _changed(self, cold_start_s: float, now: float) -> bool:
        """Whether the measured cold start asks for another rehearsal."""
        used, lead = (s + self._policy.interval_s for s in (self._cold_start, cold_start_s))
        far = max(lead, used) > LEAD_CHANGE * min(lead, used)
        return far and abs(now - self._lead_changed) >= LEAD_CHANGE_S

    def _retuned(self) -> bool:
        """Read what `farthing fleet tune` wrote since. Whether it is another choice; ignores a bad file."""
        try:
            stamp = self._tuned.stat().st_mtime_ns
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            chosen = read(Pinned, json.loads(self._tuned.read_text()), TUNED)
        except FileNotFoundError:
            chosen, self._stamp = Pinned(), 0
        except (OSError, ValueError) as problem:
            log.warning("%s is ignored: %s", self._tuned, problem)
            return False
        changed, self._pinned = chosen != self._pinned, chosen
        if changed:
            log.info("tuned: %s", chosen)
        return changed

    def _steps(self, last: Snapshot | None, snapshot: Snapshot) -> int:
        """Steps of the rehearsal since the last snapshot."""
        if last is None:
            return 1
        passed = round((snapshot.time - last.time) / self._policy.interval_s)
        return max(1, passed) if passed <= _GAP else 1

    def _rehearsed(self, load: float) -> Rehearsal | PinnedRule:
        """A rehearsal, or the pinned rule, that has seen the last recorded loads."""
        capacity, every = self._capacity.estimate, max(1, round(GRID_S / self._policy.interval_s))
        past = [value for _, value in self._points[-(REHEARSED_STEPS // every) :]]
        first = float(np.mean(past[:5])) if past else load
        learned = self._learned[0] if self._learned else None
        told = Settings.of(self._policy, self._cold_start, learned)
        pinned = self._pinned != Pinned()
        made = PinnedRule(told, self._pinned) if pinned else Rehearsal(told, first / capacity)
        for value in past:
            for _ in range(every):
                self._plan = made.observe(value / capacity)
        return made

    def _learned_load(self, now: float) -> float | None:
        at, load = self._learned_plan
        return load / self._capacity.estimate if self._learned and now - at <= 3 * GRID_S else None

    def _keep(self, now: float, load: float) -> None:
        """Record the mean of each complete minute."""
        minute = now // GRID_S
        if self._minute and minute != self._open_minute:
            self._record(self._open_minute * GRID_S, float(np.mean(self._minute)))
            self._minute = []
        self._open_minute = minute
        self._minute.append(load)

    def _record(self, time: float, load: float) -> None:
        append_load(self._path, time, load)
        self._points.append((time, load))
        self._minute_start = time
        if len(self._points) > 2 * WEEKS_S / GRID_S:
            del self._points[: round(WEEKS_S / GRID_S)]

    # ---- output ----

    def plan(self, now: float) -> Plan | None:
        """What the weighted rules want now; None before a load."""
        return self._plan

    def capacity(self) -> float | None:
        """Learned capacity of a replica in load units per second."""
        return self._capacity.estimate

    def maintain(self, now: float) -> None:
        """Try the learned forecasters once a day, and keep the admitted one up to date."""
        if self._learned is not None:
            loads = np.array([load for _, load in self._points[-round(WEEKS_S / GRID_S) :]])
            if now - self._trained >= TRAIN_S:
                self._learned[1].fit(loads)
                self._trained = now
            if now - self._learned_plan[0] >= GRID_S and len(loads):
                self._learned_plan = now, float(self._learned[1].plans(loads, 1)[0])
        if now - self._tried >= TRIAL_S and self._forecast.learned:
            self._tried = now
            self._admit(self._trials(), now)

    def _trials(self) -> dict[str, float]:
        """The saved share of the cost by forecaster, computed in another process."""
        points = self._points[-round(WEEKS_S / GRID_S) :]
        if len(points) * GRID_S < LEAST_S:
            return {}
        task = {
            "names": self._forecast.learned,
            "points": points,
            "settings": asdict(Settings.of(self._policy, self._cold_start)),
            "capacity": self._capacity.estimate,
            "prophet": asdict(self._forecast.prophet),
        }
        path = self._path.with_name("trial.json")
        path.write_text(json.dumps(task))
        command = [sys.executable, "-m", "farthing_fleet.forecast.learned", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3 * 3600)
        path.unlink(missing_ok=True)
        if done.returncode:
            log.warning("learned forecasters were not tried: %s", done.stderr.strip()[-300:])
            return {}
        return {found["name"]: found["saved"] for found in json.loads(done.stdout)}

    def _admit(self, saved: dict[str, float], now: float) -> None:
        """Use the forecaster that saves most, if it saves enough."""
        if not saved:
            return
        told = ", ".join(f"{name} {share:+.1%}" for name, share in saved.items())
        best = max(saved, key=lambda name: saved[name])
        admitted = best if saved[best] >= GAIN else None
        log.info("learned forecasters would have saved: %s; %s is admitted", told, admitted or "none")
        if admitted == (self._learned[0] if self._learned else None):
            return
        self._learned = None
        if admitted is not None:
            begin = self._points[-round(WEEKS_S / GRID_S) :][0][0]
            lead_s = self._cold_start + self._policy.interval_s
            self._learned = admitted, make(admitted, lead_s, begin, self._forecast.prophet)
        self._trained, self._rehearsal = -math.inf, None  # the next observation rehearses again


def append_load(path: Path, time: float, load: float) -> None:
    """Append one line to the load file. With a full disk the line is lost and forecasts continue."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{time:.0f},{load:.6g}\n")
    except OSError as problem:
        log.warning("%s: %s; the load of this minute is not recorded", path, problem.strerror)


def read_loads(path: Path) -> list[tuple[float, float]]:
    """[(time, load)] of a load file, ordered by time. Skips partial lines, and loads that are none.

    Empty if there is no file.
    """
    points = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            time, _, load = line.partition(",")
            try:
                point = float(time), float(load)
                if not (math.isfinite(sum(point)) and point[1] >= 0):
                    raise ValueError(point)
                points.append(point)
            except ValueError:
                log.warning("%s: skipping line %r", path, line[:40])
    return sorted(points)


def make_estimates(config: FleetConfig) -> LiveEstimates:
    """The estimates of a configuration. Raises ValueError if its `forecast` section is invalid."""
    config.state.mkdir(parents=True, exist_ok=True)
    return LiveEstimates(config)
