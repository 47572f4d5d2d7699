"""The dashboard's data for one server, from the engine's statistics and the accounts.

A source document is plain JSON:

    kind        "server" | "gateway"
    title       the model or the fleet
    facts       {label: text} that do not change: backend, hardware, …
    counters    cumulative numbers, see `history.RATES` and `history.RATIOS`
    gauges      current numbers, drawn unchanged
    histograms  {name: {bounds, cumulative}}, drawn as name + _p50 and _p95
    experts     {layer: [tokens of each expert]}
    cost        {usd_per_hour, joules_source, declared, hardware, accounts: […]}

A gateway adds `replicas`, `decisions`, `why` and `forecasts` (see docs/guide/observe.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from farthing.cost import CostReport
from farthing.engine.stats import HistogramSnapshot, StatsSnapshot

if TYPE_CHECKING:
    from farthing.engine.engine import Engine
    from farthing.server.access import Viewer
    from farthing.server.service import Service

_COUNTERS = (
    "generation_tokens",
    "prompt_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "preemptions",
    "draft_tokens",
    "accepted_tokens",
    "drafts",
    "busy_seconds",
)
_MOST_ACCOUNTS = 20


def service_data(service: Service) -> dict[str, Any]:
    """The document of a server whose engine may still be loading."""
    engine, accounts = service.engine, service.accounts
    if engine is None:
        return server_data(service.names[0], facts={"state": "the model is being loaded"})
    cost = accounts.report() if accounts else None
    return server_data(service.names[0], engine.stats.snapshot(), cost, _facts(engine))


def _facts(engine: Engine) -> dict[str, str]:
    """Facts that do not change; empty ones are not shown."""
    config = engine.config
    assert config.num_blocks is not None  # set by the engine
    kind = f" of {config.kv_cache_dtype}" if config.kv_cache_dtype != "auto" else ""
    return {
        "backend": engine.backend,
        "weights": f"rounded to {config.quantization}" if config.quantization else "",
        "KV cache": f"{config.num_blocks * config.block_size:,} tokens{kind}",
        "context": f"{config.max_model_len:,} tokens",
        "speculation": config.speculate or "",
        "experts": config.experts if config.experts != "auto" else "",
    }


def visible_to(viewer: Viewer, document: dict[str, Any]) -> dict[str, Any]:
    """The part of a server's document for a viewer: everyone's spending, or that of one key.

    The curves of power and price sum over all keys, so only viewers of everything get them.
    """
    cost = document.get("cost")
    if cost is None:
        return document
    if viewer.everything:
        return {**document, "cost": {**cost, "accounts": cost["accounts"][:_MOST_ACCOUNTS]}}
    own = [account for account in cost["accounts"] if account["api_key"] == viewer.name]
    usd = sum(account["prefill_usd"] + account["decode_usd"] for account in own)
    hidden = dict.fromkeys(("idle_usd", "saved_usd", "utilization"))
    counters = {k: v for k, v in document["counters"].items() if k not in ("usd", "joules")}
    points = {k: v for k, v in document["points"].items() if k not in ("watts", "usd_per_million")}
    joules = sum(account["joules"] for account in own)
    cost = {**cost, **hidden, "accounts": own, "usd": usd, "joules": joules}
    return {**document, "cost": cost, "counters": counters, "points": points}


def server_data(
    title: str,
    stats: StatsSnapshot | None = None,
    cost: CostReport | None = None,
    facts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The document of one engine; without statistics, of an engine that is loading."""
    if stats is None:
        empty: dict[str, Any] = {part: {} for part in ("counters", "gauges", "histograms", "experts")}
        return {"kind": "server", "title": title, "facts": dict(facts or {}), **empty}
    counters: dict[str, float] = {name: getattr(stats, name) for name in _COUNTERS}
    counters["requests"] = sum(stats.requests_finished.values())
    counters["errors"] = stats.requests_finished.get("error", 0)
    counters["tokens"] = stats.prompt_tokens + stats.generation_tokens
    document: dict[str, Any] = {
        "kind": "server",
        "title": title,
        "facts": dict(facts or {}),
        "uptime": stats.uptime_seconds,
        "counters": counters,
        "gauges": {
            "running": stats.num_requests_running,
            "waiting": stats.num_requests_waiting,
            "kv": stats.kv_cache_usage,
        },
        "histograms": {
            "ttft": _histogram(stats.time_to_first_token),
            "tpot": _histogram(stats.time_per_output_token),
        },
        "experts": {str(layer): list(tokens) for layer, tokens in stats.expert_tokens.items()},
    }
    if cost is not None:
        counters["usd"], counters["joules"] = cost.total.usd, cost.total.joules
        document["cost"] = _cost(cost)
        document["gauges"]["usd_per_hour"] = cost.machine.usd_per_hour
    return document


def _histogram(histogram: HistogramSnapshot) -> dict[str, Any]:
    return {"bounds": list(histogram.bounds), "cumulative": list(histogram.cumulative)}


def _cost(report: CostReport) -> dict[str, Any]:
    """All accounts, largest spending first."""
    accounts = sorted(report.accounts.items(), key=lambda item: -item[1].spend.usd)
    return {
        "hardware": f"{report.machine.count} × {report.machine.hardware.name}",
        "declared": report.machine.declared,
        "joules_source": report.joules_source,
        "usd_per_hour": report.machine.usd_per_hour,
        "usd": report.total.usd,
        "joules": report.total.joules,
        "idle_usd": report.idle.usd,
        "utilization": report.utilization,
        "usd_per_million_tokens": report.usd_per_million_tokens,
        "usd_per_million_output_tokens": report.usd_per_million_output_tokens,
        "saved_usd": report.requests.saved_usd,
        "accounts": [
            {
                "model": model,
                "api_key": key,
                "requests": account.requests,
                "prompt_tokens": account.prefill_tokens + account.cached_tokens,
                "output_tokens": account.decode_tokens,
                "prefill_usd": account.prefill.usd,
                "decode_usd": account.decode.usd,
                "joules": account.spend.joules,
            }
            for (model, key), account in accounts
        ],
    }
