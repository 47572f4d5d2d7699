"""The control loop: signals -> forecasts -> policy -> decision log -> actuator, every `interval_s`.

No failure ends it. Missing signals make the policy hold. If the actuator does not answer, the controller
raises an alarm and retries at the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from farthing.files import replace_text
from farthing_fleet.actuators.base import Actuator, ActuatorError
from farthing_fleet.decision_log import DecisionLog, read_log
from farthing_fleet.estimates import LiveEstimates
from farthing_fleet.metrics import FleetMetrics
from farthing_fleet.policy import Held, Policy
from farthing_fleet.signals import Source
from farthing_fleet.types import Decision, PolicyState, Snapshot

log = logging.getLogger(__name__)

_SAVE_S = 10.0  # between writes of the policy's state


class Controller:
    """Runs the loop until stopped. With `advise` it only recommends."""

    def __init__(
        self,
        policy: Policy,
        source: Source,
        actuator: Actuator,
        *,
        log_path: Path,
        estimates: LiveEstimates | None = None,
        metrics: FleetMetrics | None = None,
        advise: bool = False,
        state_path: Path | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.policy, self.source, self.actuator, self.estimates = policy, source, actuator, estimates
        self.metrics = metrics if metrics is not None else FleetMetrics()
        self.advise = advise
        self.log = DecisionLog(log_path)
        self._state_path, self._saved_at = state_path, 0.0
        self._wall = wall
        self.held = Held()
        self._cold_start_s: float | None = None  # as last measured
        self._disk: dict[str, str] = {}  # files of the state directory that cannot be written -> alarm
        self._target = _last_target(log_path)  # replicas requested, as last read or decided
        self._maintenance: asyncio.Task[None] | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set; a slow step does not shift the next ones."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not stop.is_set():
            self.held.reported.clear()
            try:
                await self.turn()
            except Exception:  # a bug must not stop the controller: hold the replica count and alert
                log.exception("step failed; holding the replica count")
                self.metrics.failures.inc()
            due = max(due + self.policy.config.interval_s, loop.time())
            await self._pause(stop, due - loop.time())
        self._save(force=True)
        if self._maintenance is not None:
            self._maintenance.cancel()

    async def _pause(self, stop: asyncio.Event, seconds: float) -> None:
        """Wait for the next step; returns early if a gateway holds requests for a fleet scaled to zero."""
        events = [asyncio.ensure_future(stop.wait())]
        if not self._target:
            events.append(asyncio.ensure_future(self.held.reported.wait()))
        await asyncio.wait(events, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
        for event in events:
            event.cancel()

    async def turn(self) -> Decision | None:
        """Make one decision, log it and, unless advising, apply it. None before any signal."""
        alarms: list[str] = []
        current = await self._current(alarms)
        holding = self.held.total()
        snapshot = await self._read(current, holding)
        if current is None:  # replica count unknown: use the last target, or the serving replicas if more
            current = max(self._target or 0, snapshot.ready or 0)
            if self._target is None and snapshot.ready is None and not holding:
                log.warning("neither the actuator nor the signals report the number of replicas")
                return None
            snapshot = replace(snapshot, current=current)
            if current == 0 and holding:
                snapshot = replace(snapshot, backlog=max(float(holding), snapshot.backlog or 0.0))
        now = self._wall()
        decision = self._decide(now, snapshot, current)
        decision = replace(decision, alarms=(*decision.alarms, *alarms, *self._disk.values()))
        await self._act(decision, blind=bool(alarms))
        self._save()
        return decision

    async def _read(self, current: int | None, holding: int) -> Snapshot:
        """The signals. A fleet at zero has none, and waiting for them would delay its start."""
        if current == 0 and holding:
            cold_start_s = self._cold_start_s
            return Snapshot(self._wall(), 0, backlog=float(holding), cold_start_s=cold_start_s, stale=True)
        snapshot = await self.source.read(current if current is not None else 0)
        self._cold_start_s = snapshot.cold_start_s
        return snapshot

    def _decide(self, now: float, snapshot: Snapshot, current: int) -> Decision:
        if self.estimates is None:
            return self.policy.decide(now, snapshot, current=current)
        self.estimates.observe(now, snapshot)
        self._maintain(now)
        plan, capacity = self.estimates.plan(now), self.estimates.capacity()
        decision = self.policy.decide(now, snapshot, plan, current=current, capacity=capacity)
        config = self.policy.config
        lead_s = config.lead_s(snapshot.cold_start_s) + config.interval_s
        return replace(decision, inputs={**decision.inputs, "unit": config.unit, "lead_s": lead_s})

    async def _current(self, alarms: list[str]) -> int | None:
        try:
            current = await self.actuator.current()
        except ActuatorError as problem:
            log.warning("actuator: %s", problem)
            alarms.append(f"actuator: {problem}")
            return self._target
        self._target = current if current is not None else self._target
        return current

    async def _act(self, decision: Decision, *, blind: bool) -> None:
        """Log, expose and apply. If blind (the actuator did not answer), the decision is a guess and is not
        applied.
        """
        if not self.advise and not blind:
            try:
                await self.actuator.apply(decision)
            except ActuatorError as problem:
                log.warning("actuator: %s", problem)
                decision = replace(decision, alarms=(*decision.alarms, f"actuator: {problem}"))
        self._target = decision.target if not blind else self._target
        self.metrics.show(decision)
        with self._writing("decision log"):
            self.log.append(decision)
        if decision.target != decision.current:
            verb = "would scale" if self.advise else "scale"
            log.info("%s %d -> %d: %s", verb, decision.current, decision.target, decision.reason)

    def _maintain(self, now: float) -> None:
        """Refit forecasters in a thread, one run at a time."""
        if self.estimates is None or (self._maintenance is not None and not self._maintenance.done()):
            return
        self._maintenance = asyncio.create_task(self._maintained(self.estimates, now))

    async def _maintained(self, estimates: LiveEstimates, now: float) -> None:
        try:
            await asyncio.to_thread(estimates.maintain, now)
        except Exception:  # a failed fit must not stop the real-time level
            log.exception("forecasters: fit failed; keeping the last one")
            self.metrics.failures.inc()

    def _save(self, *, force: bool = False) -> None:
        if self._state_path is None or not (force or time.monotonic() - self._saved_at > _SAVE_S):
            return
        self._saved_at = time.monotonic()
        with self._writing("policy state"):
            replace_text(self._state_path, self.policy.state.to_json(), durable=False)

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Guard a write to the state directory: a full disk raises an alarm, and scaling continues."""
        try:
            yield
        except OSError as problem:
            if what not in self._disk:
                log.error("state directory: cannot write %s: %s", what, problem)
            self._disk[what] = f"disk: {what} cannot be written: {problem.strerror}"
            self.metrics.failures.inc()
        else:
            if self._disk.pop(what, None):
                log.info("state directory: %s is writable again", what)


def _last_target(log_path: Path) -> int | None:
    """The last target of an earlier run, so that a restart does not treat a partial fleet as full."""
    try:
        last = read_log(log_path, 1)
    except (FileNotFoundError, ValueError):
        return None
    return last[-1].target if last else None


def load_state(path: Path) -> PolicyState | None:
    """The policy's state of an earlier run; None if there is none or it cannot be read (logged)."""
    try:
        return PolicyState.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        log.warning("policy state %s ignored: %s", path, problem)
        return None
