"""The dashboard's data for one server: the engine's statistics, the accounts, and their recent history.

A source document is plain JSON:

    kind        "server" | "gateway"
    title       the model or the fleet
    facts       {label: text} that do not change: backend, hardware, …
    counters    cumulative numbers, see `RATES` and `RATIOS`
    gauges      current numbers, drawn unchanged
    histograms  {name: {bounds, cumulative}}, drawn as name + _p50 and _p95
    experts     {layer: [tokens of each expert]}; layers: their number without those that draft
    loading     {what, done, total}, "" and 0 at first: what a server without an engine is doing
    cost        {usd_per_hour, joules_source, declared, hardware, accounts: […]}

A gateway adds `replicas`, `decisions`, `why` and `forecasts` (see docs/guide/observe.md).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farthing.cost.meter import CostReport
from farthing.engine.stats import HistogramSnapshot, StatsSnapshot
from farthing.memory import resident

if TYPE_CHECKING:
    from farthing.engine.engine import Engine
    from farthing.server.access import Viewer
    from farthing.server.service import Service


# Counters to curves: a ring of points for the dashboard.
#
# A source document has cumulative `counters`, momentary `gauges` and cumulative `histograms`; a point has
# rates, ratios and quantiles over a short window that ends at it. A value that the source lacks, or
# without an event in the window, is None: a gap in the curve, not a zero.

# point -> counter; per second
RATES = {
    "generation_tps": "generation_tokens",
    "prompt_tps": "prompt_tokens",
    "requests_ps": "requests",
    "watts": "joules",
    "busy": "busy_seconds",
    "errors_ps": "errors",
    "refused_ps": "refused",
    "preemptions_ps": "preemptions",
    "cpus": "cpu_seconds",
}
# point -> (numerator, denominator, factor)
RATIOS = {
    "prefix_hit": ("prefix_cache_hits", "prefix_cache_queries", 1.0),
    "acceptance": ("accepted_tokens", "draft_tokens", 1.0),
    "accepted_length": ("accepted_tokens", "drafts", 1.0),
    "usd_per_million": ("usd", "tokens", 1e6),
}
QUANTILES = {"p50": 0.5, "p95": 0.95}


@dataclass(frozen=True, slots=True)
class Sample:
    """A source document and its time (wall clock, seconds)."""

    time: float
    data: Mapping[str, Any]

    def part(self, name: str) -> Mapping[str, Any]:
        """`counters`, `gauges` or `histograms`; {} if the source has none."""
        found = self.data.get(name)
        return found if isinstance(found, Mapping) else {}


class History:
    """The last `keep` points, from samples at least `window` seconds apart."""

    def __init__(self, keep: int = 900, window: float = 5.0) -> None:
        self._points: deque[dict[str, float | None]] = deque(maxlen=keep)
        self._recent: deque[Sample] = deque()
        self._window = window
        self.last: Sample | None = None

    def add(self, time: float, data: Mapping[str, Any]) -> None:
        """Add a source document. If the clock jumps back, the curves restart."""
        sample = Sample(time, data)
        if self.last is not None and time <= self.last.time:
            self._points.clear()
            self._recent.clear()
        if self._recent and _restarted(self._recent[-1], sample):
            self._recent.clear()
        while len(self._recent) > 1 and self._recent[1].time <= time - self._window:
            self._recent.popleft()
        before = self._recent[0] if self._recent else None
        self._points.append({"t": time, **sample.part("gauges"), **_changes(before, sample)})
        self._recent.append(sample)
        self.last = sample

    def columns(self, since: float = 0.0) -> dict[str, list[float | None]]:
        """The points after `since`: one list per name, including `t`, all of the same length."""
        points = [p for p in self._points if (p["t"] or 0.0) > since]
        names = dict.fromkeys(name for point in points for name in point)
        return {name: [_short(point.get(name)) for point in points] for name in names}


def _restarted(before: Sample, now: Sample) -> bool:
    """Whether a counter decreased, which means that the source restarted."""
    old = before.part("counters")
    return any(value < old.get(name, value) for name, value in now.part("counters").items())


def _changes(before: Sample | None, now: Sample) -> dict[str, float | None]:
    """Rates, ratios and quantiles between two samples."""
    if before is None or now.time <= before.time:
        return {}
    delta = {
        name: value - before.part("counters").get(name, value) for name, value in now.part("counters").items()
    }
    seconds = now.time - before.time
    point: dict[str, float | None] = {
        name: delta[counter] / seconds for name, counter in RATES.items() if counter in delta
    }
    for name, (top, bottom, factor) in RATIOS.items():
        if top in delta and bottom in delta:
            point[name] = delta[top] / delta[bottom] * factor if delta[bottom] > 0 else None
    for name, histogram in now.part("histograms").items():
        earlier = before.part("histograms").get(name)
        counts = _difference(histogram["cumulative"], earlier["cumulative"] if earlier else None)
        for suffix, q in QUANTILES.items():
            point[f"{name}_{suffix}"] = quantile(histogram["bounds"], counts, q)
    return point


def _difference(now: Sequence[int], before: Sequence[int] | None) -> list[int]:
    return [n - b for n, b in zip(now, before, strict=True)] if before is not None else list(now)


def quantile(bounds: Sequence[float], cumulative: Sequence[int], q: float) -> float | None:
    """The q-quantile of a histogram, linear within a bucket as in Prometheus; None if it is empty.

    bounds: ascending upper bounds; cumulative: one more count than bounds, the last for all larger values.
    """
    total = cumulative[-1]
    if total <= 0:
        return None
    rank = q * total
    for index, upper in enumerate(bounds):
        if cumulative[index] >= rank:
            lower = bounds[index - 1] if index else 0.0
            below = cumulative[index - 1] if index else 0
            return lower + (upper - lower) * (rank - below) / (cumulative[index] - below)
    return bounds[-1]


def _short(value: float | None) -> float | None:
    """Round to six significant digits, which is enough for drawing."""
    return value if value is None or value > 1e8 else float(f"{value:.6g}")


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


def service_data(service: Service, refused: int = 0) -> dict[str, Any]:
    """The document of a server whose engine may still be loading. refused: requests answered by an error."""
    engine, accounts = service.engine, service.accounts
    if engine is None:
        document = server_data(service.names[0], facts={"state": "the model is being loaded"})
        what, done, total = service.loading or ("", 0, 0)
        return {**document, "loading": {"what": what, "done": done, "total": total}}
    cost = accounts.report() if accounts else None
    document = server_data(service.names[0], engine.stats.snapshot(), cost, _facts(engine))
    document["layers"] = engine.model_config.num_hidden_layers
    document["counters"] |= {"refused": refused, "cpu_seconds": time.process_time()}
    document["gauges"]["memory"] = resident()
    return document


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


def reading(service: Service, client: str, request_id: str) -> dict[str, int]:
    """Tokens of a client's chat's prompt: those that are {read}, of the {total}; empty if none of that id
    runs."""
    for job in list(service.jobs):  # a copy: they change in the event loop
        if job.identity == f"chatcmpl-{request_id}" and job.client == client and job.streams:
            stream = job.streams[0]
            known, total = stream.metrics, len(stream.request.prompt_token_ids)
            read = known.cached_tokens + known.prefill_tokens if known else 0
            return {"read": min(read, total), "total": total}
    return {}


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
