"""What operators see: Prometheus metrics, under vLLM's names where vLLM has the same, and the dashboard."""

from __future__ import annotations

import base64
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

import farthing
from farthing.cost.meter import samples
from farthing.prompts import BLOCK
from farthing.server.dashboard.site import DATA_PATH, HEADERS, PREFIX, Asset, Dashboard, assets
from farthing.server.dashboard.source import reading, service_data, visible_to
from farthing.server.errors import ApiError

if TYPE_CHECKING:
    from farthing.cost.meter import CostReport
    from farthing.engine.stats import HistogramSnapshot, StatsSnapshot
    from farthing.server.service import Service

GAUGES = {  # name -> (field of StatsSnapshot, help)
    "num_requests_running": ("num_requests_running", "Requests in the running batch."),
    "num_requests_waiting": ("num_requests_waiting", "Requests waiting to be scheduled."),
    "kv_cache_usage_perc": ("kv_cache_usage", "Share of the cache's blocks in use, 0 to 1."),
    "prefix_disk_bytes": ("prefix_disk.stored_bytes", "Bytes in the prefix cache on disk, by all processes."),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens computed, without those found in the prefix cache."),
    "generation_tokens": ("generation_tokens", "Tokens generated."),
    "prefix_cache_queries": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "num_preemptions": ("preemptions", "Requests returned to the queue because the cache was full."),
    "spec_decode_num_drafts": ("drafts", "Drafts verified."),
    "spec_decode_num_draft_tokens": ("draft_tokens", "Tokens drafted."),
    "spec_decode_num_accepted_tokens": ("accepted_tokens", "Drafted tokens accepted."),
    "engine_steps": ("steps", "Engine steps."),
    "engine_busy_seconds": ("busy_seconds", "Seconds spent in steps."),
    "integrity_failures": ("integrity_failures", "Failed self-checks of the idle engine."),
    "failed_steps": ("failed_steps", "Steps that failed, whose requests ended with an error."),
    "prefix_disk_hits": ("prefix_disk.hits", "Prompt tokens read from the prefix cache on disk."),
    "prefix_disk_read_bytes": ("prefix_disk.read_bytes", "Bytes read from it."),
    "prefix_disk_read_seconds": ("prefix_disk.read_seconds", "Seconds spent reading, in the background."),
    "prefix_disk_written_bytes": ("prefix_disk.written_bytes", "Bytes written to it."),
    "prefix_disk_write_seconds": ("prefix_disk.write_seconds", "Seconds spent writing, in the background."),
    "prefix_disk_evictions": ("prefix_disk.evictions", "Files evicted by this process."),
    "prefix_disk_errors": ("prefix_disk.errors", "Files that were damaged or could not be read or written."),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("time_to_first_token", "From arrival to the first token."),
    "inter_token_latency_seconds": ("inter_token_latency", "Between two tokens of a request."),
    "request_time_per_output_token_seconds": (
        "time_per_output_token",
        "Mean time between a request's tokens after the first.",
    ),
    "e2e_request_latency_seconds": ("e2e_request_latency", "From arrival to the last token."),
    "request_queue_time_seconds": ("request_queue_time", "From arrival to the first scheduling."),
}


class Metrics:
    """One registry per server, so that several servers can run in one process."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.registry = CollectorRegistry()
        self.http_requests = Counter(
            "farthing:http_requests",
            "HTTP requests answered, by path and status.",
            ["path", "status"],
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self.registry.register(ServerCollector(service))
        self.accounts = CollectorRegistry()  # separate registry: these metrics name API keys
        self.accounts.register(AccountsCollector(service))

    def render(self, accounts: bool = True) -> bytes:
        """Metrics in Prometheus text format, with or without spending per API key."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry) + (generate_latest(self.accounts) if accounts else b"")

    def _refused(self) -> int:
        """Requests to the API that were answered with an error status."""
        samples = (sample for family in self.http_requests.collect() for sample in family.samples)
        return int(sum(s.value for s in samples if _is_refusal(s.labels) and s.name.endswith("_total")))

    def add_routes(self, api: FastAPI) -> None:
        """Add what scrapers, gateways and the dashboard read."""

        @api.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
        async def scrape(request: Request) -> Response:
            text = self.render(accounts=request.scope["viewer"].everything)
            return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

        @api.get("/cache/digest", summary="Blocks of prompt text in the prefix cache, for gateways")
        async def digest(request: Request) -> Response:
            # With the digest one can test guesses at cached prompts.
            if not request.scope["viewer"].everything:
                raise ApiError(403, "the cache digest is for metrics and admin keys", code="forbidden")
            return JSONResponse(await _digest(self._service))

        mount(
            api,
            lambda: service_data(self._service, self._refused()),
            self._seen,
        )

    def _seen(self, request: Request, document: dict[str, Any]) -> dict[str, Any]:
        """What a request for the dashboard's data may see, with the progress of the prompt that it names."""
        seen = visible_to(request.scope["viewer"], document)
        if (request_id := request.query_params.get("reading")) is None:
            return seen
        return {**seen, "reading": reading(self._service, request.scope["client_name"], request_id)}


def _is_refusal(labels: Mapping[str, str]) -> bool:
    return labels["path"].startswith("/v1/") and labels["status"][0] in "45" and labels["status"] != "499"


async def _digest(service: Service) -> dict[str, Any]:
    """`blocks` are 64-bit little-endian integers in base64, of `block` bytes of text each."""
    engine = service.require_engine()
    blocks = await service.cache_digest.blocks(engine)
    snapshot = engine.stats.snapshot()
    return {
        "block": BLOCK,
        "blocks": base64.b64encode(struct.pack(f"<{len(blocks)}Q", *blocks)).decode(),
        "requests": snapshot.num_requests_running + snapshot.num_requests_waiting,
        "waiting_bytes": round(snapshot.num_requests_waiting * service.cache_digest.mean_bytes),
    }


class AccountsCollector(Collector):
    """Spending by API key."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        """Yield nothing until the engine is loaded."""
        if self._service.accounts is not None:
            yield from cost_families(self._service.accounts.report())
        engine = self._service.engine
        if engine is not None and engine.sandbox is not None:
            work = CounterMetricFamily(
                "farthing:work_seconds",
                "CPU time of tokenizing, chat templates and grammars, by API key.",
                labels=["api_key"],
            )
            for client, seconds in engine.sandbox.seconds().items():
                work.add_metric([client], seconds)
            yield work


class ServerCollector(Collector):
    """Reads the engine's statistics at scrape time, with no overhead per token."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        """All metric families; the engine's appear once it is loaded."""
        service, model = self._service, self._service.names[0]
        ready = GaugeMetricFamily("farthing:ready", "1 while requests are accepted.", labels=["model_name"])
        ready.add_metric([model], 0.0 if service.unready() else 1.0)
        yield ready
        info = GaugeMetricFamily("farthing:build_info", "Always 1.", labels=["version"])
        info.add_metric([farthing.__version__], 1.0)
        yield info
        ignored = CounterMetricFamily(
            "farthing:unknown_request_fields", "Request fields ignored as unknown, by name.", labels=["field"]
        )
        for name, count in list(service.unknown_fields.counts.items()):
            ignored.add_metric([name], float(count))
        yield ignored
        answers = CounterMetricFamily(
            "farthing:continued_answers",
            "Prompts that continue an answer of this server: sampled, with the tokens that the model wrote; "
            "changed, tokenized again because the prompt has another text there.",
            labels=["tokens"],
        )
        for name, count in service.answers.continued.items():
            answers.add_metric([name], float(count))
        yield answers
        if service.launch_to_ready is not None:
            launch = GaugeMetricFamily(
                "farthing:launch_to_ready_seconds",
                "From the start of the process until requests were accepted.",
                labels=["model_name"],
            )
            launch.add_metric([model], service.launch_to_ready)
            yield launch
        if service.engine is not None:
            yield from engine_families(service.engine.stats.snapshot(), model)
            config = service.engine.config
            cache = GaugeMetricFamily(
                "farthing:cache_config_info",
                "Always 1. Tokens per cache block, and their number (under vLLM's label).",
                labels=["model_name", "block_size", "num_gpu_blocks"],
            )
            cache.add_metric([model, str(config.block_size), str(config.num_blocks)], 1.0)
            yield cache
            yield from _memory_families(service.engine.cache_bytes, service.written_at_ready, model)


def _memory_families(cache: int, written: int, model: str) -> Iterator[Metric]:
    sizes = {
        "kv_cache_bytes": (cache, "Size of the cache of this process; it is resident as far as it is used."),
        "written_at_ready_bytes": (written, "Memory written before the first request, without mapped files."),
    }
    for name, (value, text) in sizes.items():
        gauge = GaugeMetricFamily(f"farthing:{name}", text, labels=["model_name"])
        gauge.add_metric([model], float(value))
        yield gauge


def engine_families(snapshot: StatsSnapshot, model: str) -> Iterator[Metric]:
    """An engine's statistics as Prometheus families, labelled with the model's name."""
    for name, (field, text) in GAUGES.items():
        gauge = GaugeMetricFamily(f"farthing:{name}", text, labels=["model_name"])
        gauge.add_metric([model], float(attrgetter(field)(snapshot)))
        yield gauge
    for name, (field, text) in COUNTERS.items():
        counter = CounterMetricFamily(f"farthing:{name}", text, labels=["model_name"])
        counter.add_metric([model], float(attrgetter(field)(snapshot)))
        yield counter
    for name, (field, text) in HISTOGRAMS.items():
        yield _histogram(name, text, getattr(snapshot, field), model)
    finished = CounterMetricFamily(
        "farthing:request_success",
        "Requests that ended, by reason.",
        labels=["model_name", "finished_reason"],
    )
    for reason, count in snapshot.requests_finished.items():
        finished.add_metric([model, reason], float(count))
    yield finished
    yield _expert_tokens(snapshot.expert_tokens, model)


def cost_families(report: CostReport) -> Iterator[Metric]:
    """Dollars, joules and device seconds by model, API key and phase."""
    for name, group in groupby(samples(report), key=lambda sample: sample.name):
        found = list(group)
        family = (CounterMetricFamily if found[0].kind == "counter" else GaugeMetricFamily)(
            name, found[0].help, labels=list(found[0].labels)
        )
        for sample in found:
            family.add_metric(list(sample.labels.values()), sample.value)
        yield family


def _histogram(name: str, text: str, snapshot: HistogramSnapshot, model: str) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"farthing:{name}", text, labels=["model_name"])
    bounds = [*(repr(bound) for bound in snapshot.bounds), "+Inf"]
    buckets = list(zip(bounds, snapshot.cumulative, strict=True))
    family.add_metric([model], buckets=buckets, sum_value=snapshot.sum)
    return family


def _expert_tokens(tokens: Mapping[int, list[int]], model: str) -> CounterMetricFamily:
    family = CounterMetricFamily(
        "farthing:expert_tokens",
        "Tokens routed to each expert of each layer.",
        labels=["model_name", "layer", "expert"],
    )
    for layer, experts in tokens.items():
        for expert, count in enumerate(experts):
            family.add_metric([model, str(layer), str(expert)], float(count))
    return family


# The dashboard in a FastAPI application.

PAGES = frozenset(assets())  # paths that need no key
View = Callable[[Request, dict[str, Any]], dict[str, Any]]  # the part of a document that a request may see


def router(dashboard: Dashboard, view: View = lambda request, document: document) -> APIRouter:
    """Routes for the page (`/`), its assets and its data."""
    routes = APIRouter(include_in_schema=False)

    @routes.head("/")
    @routes.get("/")
    @routes.get(PREFIX.rstrip("/"))
    def page() -> Response:
        return _response(dashboard.asset("/"))

    @routes.get(DATA_PATH)
    def data(request: Request, since: float = 0.0) -> dict[str, Any]:
        return view(request, dashboard.document(since))

    @routes.get(PREFIX + "{path:path}")
    def asset(path: str) -> Response:
        return _response(dashboard.asset(PREFIX + path))

    return routes


def mount(
    app: FastAPI,
    data: Callable[[], Mapping[str, Any]],
    view: View = lambda request, document: document,
    interval: float = 1.0,
) -> Dashboard:
    """Serve the dashboard from `app` and sample `data` while the application runs."""
    dashboard = Dashboard(data, interval)
    app.include_router(router(dashboard, view))
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: Any) -> AsyncIterator[Any]:
        async with inner(running) as state:
            with dashboard:
                yield state

    app.router.lifespan_context = lifespan
    return dashboard


def _response(asset: Asset | None) -> Response:
    if asset is None:
        raise HTTPException(404, "no such page")
    return Response(asset.body, media_type=asset.content_type, headers=HEADERS)
