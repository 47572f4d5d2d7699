"""The loop: signals -> forecasts -> policy -> decision log -> actuator, once every `interval_s`.

Nothing that fails ends it. Signals that are missing make the policy hold; an actuator that does not
answer is an alarm, and the next turn is the retry.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from farthing.files import replace_text
from farthing.fleet.actuators.base import Actuator, ActuatorError, LastDecision
from farthing.fleet.decision_log import DecisionLog, read_log
from farthing.fleet.decisions import Decision
from farthing.fleet.forecast.curve import FORECASTS, Forecast, write_forecasts
from farthing.fleet.metrics import FleetMetrics
from farthing.fleet.policy import Policy
from farthing.fleet.policy_state import PolicyState
from farthing.fleet.signals import Source
from farthing.fleet.snapshot import Snapshot
from farthing.fleet.wake import Held

log = logging.getLogger(__name__)

_SAVE_S = 10.0  # between writes of the policy's state


class Estimates(Protocol):
    """What the controller needs of forecasters and of a capacity model."""

    def observe(self, now: float, snapshot: Snapshot) -> None:
        """Take in the signals of one turn."""
        ...

    def short(self, now: float) -> Forecast | None: ...

    def mid(self, now: float) -> Forecast | None: ...

    def capacity(self) -> float | None:
        """Load units a second one replica sustains, as learned; None: the configured one."""
        ...

    def maintain(self, now: float) -> None:
        """Fit what is due. Called in a thread, one at a time; may take long."""
        ...


class Controller:
    """Decides and acts until it is told to stop. With `advise` it only recommends."""

    def __init__(
        self,
        policy: Policy,
        source: Source,
        actuator: Actuator,
        *,
        log_path: Path,
        estimates: Estimates | None = None,
        last_decision: LastDecision | None = None,
        metrics: FleetMetrics | None = None,
        advise: bool = False,
        state_path: Path | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.policy, self.source, self.actuator, self.estimates = policy, source, actuator, estimates
        self.last_decision = last_decision if last_decision is not None else LastDecision()
        self.metrics = metrics if metrics is not None else FleetMetrics()
        self.advise = advise
        self.log = DecisionLog(log_path)
        self._forecasts = log_path.with_name(FORECASTS)
        self._state_path, self._saved_at = state_path, 0.0
        self._wall = wall
        self.held = Held()
        self._disk: dict[str, str] = {}  # files of the state directory that cannot be written, and why
        self._known = _last_target(log_path)  # replicas requested, as last read or decided
        self._maintenance: asyncio.Task[None] | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Turn after turn until `stop` is set; a turn that takes long does not shift the next ones."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not stop.is_set():
            try:
                await self.turn()
            except Exception:  # a defect must not stop the controller: hold the replica count and alert
                log.exception("this turn failed; the number of replicas is held")
                self.metrics.failures.inc()
            due = max(due + self.policy.config.interval_s, loop.time())
            await self._pause(stop, due - loop.time())
        self._save(force=True)
        if self._maintenance is not None:
            self._maintenance.cancel()

    async def _pause(self, stop: asyncio.Event, seconds: float) -> None:
        """Until the next turn; a gateway that holds requests for a fleet of none is answered at once."""
        self.held.reported.clear()
        events = [asyncio.ensure_future(stop.wait())]
        if not self._known:
            events.append(asyncio.ensure_future(self.held.reported.wait()))
        await asyncio.wait(events, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
        for event in events:
            event.cancel()

    async def turn(self) -> Decision | None:
        """One decision, logged and, unless it is advice only, acted on. None before anything is known."""
        alarms: list[str] = []
        current = await self._current(alarms)
        snapshot = await self.source.read(current if current is not None else 0)
        if current is None:  # nothing says how many are asked for: what we asked for, or what serves if more
            current = max(self._known or 0, snapshot.ready or 0)
            if self._known is None and snapshot.ready is None and not self.held.total():
                log.warning("neither the actuator nor the signals say how many replicas there are")
                return None
            snapshot = replace(snapshot, current=current)
        if current == 0 and (held := self.held.total()):
            snapshot = replace(snapshot, backlog=max(float(held), snapshot.backlog or 0.0))
        now = self._wall()
        decision = self._decide(now, snapshot, current)
        decision = replace(decision, alarms=(*decision.alarms, *alarms, *self._disk.values()))
        await self._act(decision, blind=bool(alarms))
        self._save()
        return decision

    def _decide(self, now: float, snapshot: Snapshot, current: int) -> Decision:
        if self.estimates is None:
            return self.policy.decide(now, snapshot, current=current)
        self.estimates.observe(now, snapshot)
        self._maintain(now)
        short, mid = self.estimates.short(now), self.estimates.mid(now)
        with self._writing("forecasts"):
            write_forecasts(self._forecasts, self.policy.config.unit, short, mid)
        return self.policy.decide(
            now,
            snapshot,
            short,
            mid,
            current=current,
            capacity=self.estimates.capacity(),
        )

    async def _current(self, alarms: list[str]) -> int | None:
        try:
            current = await self.actuator.current()
        except ActuatorError as problem:
            log.warning("actuator: %s", problem)
            alarms.append(f"actuator: {problem}")
            return self._known
        self._known = current if current is not None else self._known
        return current

    async def _act(self, decision: Decision, *, blind: bool) -> None:
        """Log, show and apply. Blind (the actuator did not answer), nothing is applied: the turn was a
        guess.
        """
        if not self.advise and not blind:
            try:
                await self.actuator.apply(decision)
            except ActuatorError as problem:
                log.warning("actuator: %s", problem)
                decision = replace(decision, alarms=(*decision.alarms, f"actuator: {problem}"))
        self._known = decision.target if not blind else self._known
        self.last_decision.post(decision)
        self.metrics.show(decision)
        with self._writing("decision log"):
            self.log.append(decision)
        if decision.target != decision.current:
            verb = "would scale" if self.advise else "scale"
            log.info("%s %d -> %d: %s", verb, decision.current, decision.target, decision.reason)

    def _maintain(self, now: float) -> None:
        """Let the forecasters fit in a thread, one run at a time."""
        if self.estimates is None or (self._maintenance is not None and not self._maintenance.done()):
            return
        self._maintenance = asyncio.create_task(self._maintained(self.estimates, now))

    async def _maintained(self, estimates: Estimates, now: float) -> None:
        try:
            await asyncio.to_thread(estimates.maintain, now)
        except Exception:  # a forecaster that cannot be fitted must not stop the real-time level
            log.exception("forecasters: this fit failed, the last one stays in use")
            self.metrics.failures.inc()

    def _save(self, *, force: bool = False) -> None:
        if self._state_path is None or not (force or time.monotonic() - self._saved_at > _SAVE_S):
            return
        self._saved_at = time.monotonic()
        with self._writing("policy state"):
            replace_text(self._state_path, self.policy.state.to_json(), durable=False)

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """A write to the state directory: a disk that is full is an alarm, and scaling continues."""
        try:
            yield
        except OSError as problem:
            if what not in self._disk:
                log.error("state directory: %s cannot be written: %s", what, problem)
            self._disk[what] = f"disk: {what} cannot be written: {problem.strerror}"
            self.metrics.failures.inc()
        else:
            if self._disk.pop(what, None):
                log.info("state directory: %s is writable again", what)


def _last_target(log_path: Path) -> int | None:
    """What an earlier run asked for last, so that a restart does not take a thinned fleet for the whole
    one.
    """
    try:
        last = read_log(log_path, 1)
    except (FileNotFoundError, ValueError):
        return None
    return last[-1].target if last else None


def load_state(path: Path) -> PolicyState | None:
    """The policy's state of an earlier run; None where there is none, or it cannot be read (which is
    logged).
    """
    try:
        return PolicyState.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        log.warning("policy state %s ignored: %s", path, problem)
        return None
