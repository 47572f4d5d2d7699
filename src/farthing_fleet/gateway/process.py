"""The gateway as a process: keys, dashboard, signals, graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from prometheus_client.samples import Sample

from farthing.process import loop_factory
from farthing.server.config import KeyRing, warn_if_public
from farthing.server.dashboard.site import DATA_PATH, HEADERS, PREFIX, Dashboard
from farthing_fleet.config import split_address
from farthing_fleet.decision_log import DECISIONS, recent, sentence
from farthing_fleet.gateway.config import GatewayConfig, GatewayOptions
from farthing_fleet.gateway.errors import Refused
from farthing_fleet.gateway.replicas_file import follow
from farthing_fleet.gateway.server import Gateway, Page
from farthing_fleet.types import Decision, Snapshot

_SHOWN = 50  # decisions
_REALTIME_S = 300.0  # the current load is drawn this far ahead


def fleet_data(gateway: Gateway, state: Path | None, usd_per_hour: float | None = None) -> dict[str, Any]:
    """The document of one gateway. usd_per_hour: price per replica; state: the controller's directory.

    The document has the format of `farthing.server.dashboard`; see its `source`.
    """
    replicas = [_replica(entry) for entry in gateway.state()["replicas"]]
    ready = sum(entry["state"] == "ready" for entry in replicas)
    document: dict[str, Any] = {
        "kind": "gateway",
        "title": "fleet",
        "facts": {},
        "counters": _counters(gateway),
        "gauges": {
            "ready": ready,
            "waiting": gateway.state()["waiting"],
            "running": sum(entry["inflight"] for entry in replicas),
        },
        "histograms": {"ttfb": _first_byte(gateway)},
        "replicas": replicas,
        "decisions": [],
        "forecasts": {},
    }
    if usd_per_hour is not None:
        document["gauges"]["usd_per_hour"] = usd_per_hour * ready
    if state is not None:
        several = {path.parent.name: recent(path) for path in sorted(state.glob(f"*/{DECISIONS}"))}
        if several:
            _add_models(document, {name: decisions for name, decisions in several.items() if decisions})
        else:
            _add_control(document, state)
    return document


def _replica(entry: Mapping[str, Any]) -> dict[str, Any]:
    status = "ready" if entry["available"] else "starting" if not entry["served"] else "unhealthy"
    return {name: entry[name] for name in ("name", "url", "inflight", "served", "failed")} | {"state": status}


def _counters(gateway: Gateway) -> dict[str, float]:
    errors = sum(s.value for s in _samples(gateway, "requests_total") if s.labels["code"].startswith("5"))
    return {"requests": sum(s.value for s in _samples(gateway, "received_total")), "errors": errors}


def _first_byte(gateway: Gateway) -> dict[str, Any]:
    counts: Counter[float] = Counter()
    for sample in _samples(gateway, "first_byte_seconds_bucket"):  # of all models
        counts[float(sample.labels["le"])] += int(sample.value)
    bounds = sorted(counts)
    return {"bounds": bounds[:-1], "cumulative": [counts[bound] for bound in bounds]}


def _samples(gateway: Gateway, name: str) -> list[Sample]:
    families = gateway.metrics.registry.collect()
    return [s for family in families for s in family.samples if s.name == f"farthing:gateway_{name}"]


def _add_control(document: dict[str, Any], state: Path) -> None:
    """Decisions with their reasons, forecasts, and the load they were made for."""
    decisions = recent(state / DECISIONS)
    document["decisions"] = [_shown(decision) for decision in _telling(decisions)[-_SHOWN:]]
    planned = next((d for d in reversed(decisions) if {"plan", "lead_s"} <= d.inputs.keys()), None)
    if planned is not None:
        document["forecasts"]["short"] = _planned(planned)
    unit = planned.inputs["unit"] if planned is not None else "requests"
    document["unit"] = f"{unit}/s"
    if not decisions:
        return
    last, gauges = decisions[-1], document["gauges"]
    document["why"] = sentence(last)
    gauges["desired"] = last.target
    measured = last.inputs.get("snapshot")
    if measured is None:
        return
    snapshot = Snapshot(**measured)
    load = snapshot.load(unit)
    gauges["load"] = load
    capacity = last.inputs.get("capacity")
    if capacity:
        document["facts"]["capacity"] = f"{capacity:.3g} {unit}/s per replica"
    if snapshot.cold_start_s is not None:
        document["facts"]["cold start"] = f"{snapshot.cold_start_s:.3g} s (P90)"
    if load is not None:
        band = {"p50": [load], "p90": [load], "source": "signals"}
        document["forecasts"]["realtime"] = {"start": time.time(), "step_s": _REALTIME_S, **band}
    tokens = (snapshot.prompt_token_rate or 0.0) + (snapshot.output_token_rate or 0.0)
    if tokens and "usd_per_hour" in gauges:
        gauges["usd_per_million"] = gauges["usd_per_hour"] / 3600 / tokens * 1e6


def _planned(decision: Decision) -> dict[str, Any]:
    """The load at a decision, and the one that it planned for over a lead."""
    inputs, plan = decision.inputs, decision.inputs["plan"]
    now, load = plan["now"] * inputs["capacity"], plan["load"] * inputs["capacity"]
    band = {"p50": [now], "p90": [max(now, load)], "source": "plan"}
    return {"start": decision.time, "step_s": inputs["lead_s"], **band}


def _add_models(document: dict[str, Any], made: Mapping[str, Sequence[Decision]]) -> None:
    """The decisions of several models' controllers, by time."""
    shown = [
        _shown(decision) | {"reason": f"{name}: {decision.reason}"}
        for name, decisions in made.items()
        for decision in _telling(decisions)
    ]
    document["decisions"] = sorted(shown, key=lambda entry: entry["time"])[-_SHOWN:]
    document["why"] = " ".join(f"{name}: {sentence(decisions[-1])}" for name, decisions in made.items())
    document["gauges"]["desired"] = sum(decisions[-1].target for decisions in made.values())


def _telling(decisions: Sequence[Decision]) -> list[Decision]:
    """Decisions without repeats: of a run that holds for the same reason, the first and, if it is the latest,
    the last."""
    told: list[Decision] = []
    for decision in decisions:
        same = bool(told) and _kind(told[-1]) == _kind(decision)
        if decision.action != "hold" or not same:
            told.append(decision)
    return told if not decisions or told[-1] is decisions[-1] else [*told, decisions[-1]]


def _kind(decision: Decision) -> tuple[object, ...]:
    return decision.action, decision.target, decision.decided_by, decision.alarms


def _shown(decision: Decision) -> dict[str, Any]:
    names = ("time", "current", "target", "action", "decided_by", "reason", "alarms")
    return {name: getattr(decision, name) for name in names}


log = logging.getLogger(__name__)

_SAMPLE_S, _SAMPLES = 2.0, 1800  # one hour of dashboard samples


def run(options: GatewayOptions, fd: int | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain. fd: an open socket to listen on.

    Raises ValueError for invalid keys or URLs, OSError if the port is in use.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(options, fd))


async def _serve(options: GatewayOptions, fd: int | None) -> None:
    raise_file_limit()
    keys = KeyRing.from_file(options.api_key_file) if options.api_key_file is not None else None
    replica_key = None
    if options.replica_key_file is not None:
        replica_key = options.replica_key_file.read_text().strip()
        warn_if_public(options.replica_key_file)
    places = [split_address(text) for text in options.replicas_dns]
    state, usd_per_hour = options.state, options.usd_per_hour
    dashboard = Dashboard(lambda: fleet_data(gateway, state, usd_per_hour), _SAMPLE_S, _SAMPLES)
    gateway = Gateway(
        GatewayConfig(health_path=options.health_path, drain_s=options.drain),
        keys=keys,
        replicas_file=options.replicas_file,
        pages=pages_of(dashboard),
        wake=options.wake,
        replica_key=replica_key,
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    sock = socket.socket(fileno=fd) if fd is not None else None
    port = await gateway.start(options.host, options.port, sock=sock)
    if options.replica:
        gateway.set_replicas({f"r{number}": url for number, url in enumerate(options.replica, 1)})
    gc.collect()
    gc.freeze()  # imports are permanent: full collections can skip them
    log.info("gateway on port %d, dashboard at /", port)
    tasks = [asyncio.create_task(_sample(dashboard))]
    if places:
        tasks.append(asyncio.create_task(follow(places, gateway.set_replicas)))
    await stop.wait()
    for task in tasks:
        task.cancel()
    broken = await gateway.stop()
    log.info("gateway stopped; %d requests were cut off", broken)


def raise_file_limit() -> None:
    """Raise the limit of open files to the hard limit: each request needs two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log.debug("open files: limit %d, was %d", hard, soft)


async def _sample(dashboard: Dashboard) -> None:
    """Sample the dashboard, in the event loop to avoid races."""
    while True:
        try:
            dashboard.sample()
        except Exception:  # a dashboard failure must not stop the gateway
            log.exception("the dashboard's source failed")
        await asyncio.sleep(_SAMPLE_S)


def pages_of(dashboard: Dashboard) -> Callable[[str, str], Page | None]:
    """The dashboard's page and assets (public) and its data (requires a key)."""

    def pages(path: str, query: str) -> Page | None:
        if path == DATA_PATH:
            body = json.dumps(dashboard.document(_since(query))).encode()
            return Page(body, "application/json", HEADERS, open=False)
        asset = dashboard.asset(path)
        if asset is None and path.startswith(PREFIX):  # a replica's page would not fit the gateway's
            raise Refused(404, f"{path}: no such page", code="unknown_url")
        return Page(asset.body, asset.content_type, HEADERS) if asset is not None else None

    return pages


def _since(query: str) -> float:
    """`since=T` of a query; 0 if missing or not a number."""
    try:
        return float(parse_qs(query)["since"][0])
    except (KeyError, ValueError):
        return 0.0
