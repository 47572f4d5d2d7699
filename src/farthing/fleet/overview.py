"""Data for a gateway's dashboard: its own traffic, and the state that the controller wrote.

The document has the format of `farthing.server.dashboard`; see its `source`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.samples import Sample

from farthing.fleet.decision_log import DECISIONS, recent
from farthing.fleet.decisions import Decision
from farthing.fleet.explain import sentence
from farthing.fleet.forecast.curve import FORECASTS, read_forecasts
from farthing.fleet.gateway.server import Gateway
from farthing.fleet.snapshot import Snapshot

_SHOWN = 50  # decisions
_REALTIME_S = 300.0  # the current load is drawn this far ahead


def fleet_data(gateway: Gateway, state: Path | None, usd_per_hour: float | None = None) -> dict[str, Any]:
    """The document of one gateway. usd_per_hour: price per replica; state: the controller's directory."""
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
        _add_control(document, state)
    return document


def _replica(entry: Mapping[str, Any]) -> dict[str, Any]:
    status = "ready" if entry["available"] else "starting" if not entry["served"] else "unhealthy"
    return {name: entry[name] for name in ("name", "url", "inflight", "served", "failed")} | {"state": status}


def _counters(gateway: Gateway) -> dict[str, float]:
    errors = sum(s.value for s in _samples(gateway, "requests_total") if s.labels["code"].startswith("5"))
    return {"requests": sum(s.value for s in _samples(gateway, "received_total")), "errors": errors}


def _first_byte(gateway: Gateway) -> dict[str, Any]:
    buckets = _samples(gateway, "first_byte_seconds_bucket")
    return {
        "bounds": [float(s.labels["le"]) for s in buckets[:-1]],
        "cumulative": [int(s.value) for s in buckets],
    }


def _samples(gateway: Gateway, name: str) -> list[Sample]:
    families = gateway.metrics.registry.collect()
    return [s for family in families for s in family.samples if s.name == f"farthing:gateway_{name}"]


def _add_control(document: dict[str, Any], state: Path) -> None:
    """Decisions with their reasons, forecasts, and the load they were made for."""
    decisions = recent(state / DECISIONS)
    document["decisions"] = [_shown(decision) for decision in _telling(decisions)[-_SHOWN:]]
    unit, document["forecasts"] = read_forecasts(state / FORECASTS)
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
