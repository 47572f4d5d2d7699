"""`farthing fleet run`: build a controller and its actuators from a configuration; run until a signal."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from contextlib import AsyncExitStack

from farthing_fleet.actuators.base import Actuator, ReadOnly
from farthing_fleet.config import FleetConfig, split_address
from farthing_fleet.controller import Controller, load_state
from farthing_fleet.estimates import LiveEstimates
from farthing_fleet.metrics import MetricsServer
from farthing_fleet.policy import Policy
from farthing_fleet.signals import Source
from farthing_fleet.signals_prometheus import PrometheusError, PrometheusSource
from farthing_fleet.signals_scrape import ScrapeSource

log = logging.getLogger(__name__)

_RECALL_S = 28 * 86400.0  # past load given to the forecasters


def stop_event() -> asyncio.Event:
    """Set by SIGTERM or Ctrl-C."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def run_controller(
    config: FleetConfig, stop: asyncio.Event, estimates: LiveEstimates | None = None
) -> None:
    """Run a controller with everything in the configuration.

    Raises ValueError, ActuatorError or OSError.
    """
    config.state.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        source = make_source(config)
        stack.push_async_callback(source.close)
        actuator = await _actuator(config, stack)
        controller = make_controller(config, source, actuator, estimates)
        await serve_metrics(config, controller, stack)
        if isinstance(source, PrometheusSource) and estimates is not None:
            await recall(config, source, estimates)
        await controller.run(stop)


async def recall(config: FleetConfig, source: PrometheusSource, estimates: LiveEstimates) -> None:
    """Query Prometheus for the load that the estimates did not observe.

    Without an answer they start empty.
    """
    end = time.time()
    begin = max(end - _RECALL_S, estimates.remembers_until or 0.0)
    if end - begin < 120.0:
        return
    try:
        points = await source.load_history(config.policy.unit, begin, end, 60.0)
    except PrometheusError as problem:
        log.warning("past load is unavailable: %s", problem)
        return
    estimates.remember(points)
    log.info("%d minutes of past load read from Prometheus", len(points))


def make_source(config: FleetConfig) -> Source:
    """The source of signals. Raises ValueError if none is configured."""
    signals, slo = config.signals, config.policy.slo
    if signals.prometheus:
        return PrometheusSource(signals, slo, stale_after_s=config.policy.stale_after_s)
    if not signals.replicas:
        raise ValueError("signals: expected `prometheus`, a URL, or `replicas`, a list of base URLs")
    targets = {url: url.rstrip("/") for url in signals.replicas}
    return ScrapeSource(lambda: targets, signals, slo)


def make_controller(
    config: FleetConfig,
    source: Source,
    actuator: Actuator,
    estimates: LiveEstimates | None = None,
) -> Controller:
    """The controller, with its log and saved state under `config.state`."""
    state_path = config.state / "policy.json"
    return Controller(
        Policy(config.policy, load_state(state_path)),
        source,
        actuator,
        log_path=config.state / "decisions.jsonl",
        estimates=estimates,
        advise=config.advise,
        state_path=state_path,
    )


async def serve_metrics(config: FleetConfig, controller: Controller, stack: AsyncExitStack) -> int:
    """Start /metrics and /wake of the controller; they stop with the stack. Returns the port."""
    age = max(120.0, 4 * config.policy.interval_s)
    server = MetricsServer(controller.metrics, max_age_s=age, held=controller.held)
    port = await server.start(*split_address(config.metrics))
    stack.push_async_callback(server.close)
    log.info("controller: metrics on port %d", port)
    return port


async def _actuator(config: FleetConfig, stack: AsyncExitStack) -> Actuator:
    """A /scale patch if a target is configured, else a read-only actuator."""
    kubernetes = config.kubernetes
    if kubernetes is None or kubernetes.target is None:
        return ReadOnly()
    from farthing_fleet.actuators.kubernetes import (
        Elector,
        LeaseConfig,
        ScalePatch,
        Target,
        connect,
        pod_namespace,
    )

    client = connect(kubernetes.api, kubernetes.context)
    namespace = kubernetes.namespace or pod_namespace()
    elector = None
    if kubernetes.lease and kubernetes.patch:
        identity = kubernetes.identity or socket.gethostname()
        elector = Elector(client, LeaseConfig(kubernetes.lease, namespace, identity))
    actuator = ScalePatch(client, Target.parse(kubernetes.target, namespace), elector)
    if not kubernetes.patch:
        return ReadOnly(actuator)
    await actuator.start()
    stack.push_async_callback(actuator.close)
    return actuator
