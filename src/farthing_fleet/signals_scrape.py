"""Signals from replicas' own /metrics.

Rates and means are differences over a sliding window (`window_s`), per replica and on the monotonic clock, so
that neither a replica's restart (counters restart at zero) nor a clock change distorts a rate.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from farthing.exchange import ReplicaLost, Upstream
from farthing_fleet.config import SignalsConfig, SloConfig
from farthing_fleet.signals import LAUNCH_METRIC, ColdStarts, Dialect, bound_of, detect, dialect, late_count
from farthing_fleet.types import Snapshot

log = logging.getLogger(__name__)

_MOST = 2.0**53  # a larger counter no longer counts by one

Targets = Callable[[], Mapping[str, str]]  # {replica: base url}


@dataclass(frozen=True)
class Reading:
    """A reading of a replica: current gauges; counters and histogram sums since its start."""

    at: float  # monotonic seconds
    running: float | None
    waiting: float | None
    kv_usage: float | None
    launch_s: float | None  # launch to ready, if the server reports it
    totals: Mapping[str, float]  # "prompt", "output", "<histogram>_sum", "_count" and "_late"


@dataclass
class _History:
    """A replica's readings within the window, oldest first."""

    samples: deque[Reading] = field(default_factory=deque)

    def add(self, sample: Reading, window_s: float) -> None:
        if self.samples and sample.at <= self.samples[-1].at:  # told again
            return
        self.samples.append(sample)
        while len(self.samples) > 2 and self.samples[1].at <= sample.at - window_s:
            self.samples.popleft()

    def increase(self, key: str, window_s: float = float("inf")) -> tuple[float, float] | None:
        """(increase, seconds) of a counter over the window or its last `window_s`, handling resets.

        Uses at least the last two readings; None if there are fewer.
        """
        values = [(s.at, s.totals[key]) for s in self.samples if key in s.totals]
        late = [value for value in values if value[0] >= values[-1][0] - window_s]
        values = late if len(late) > 1 else values[-2:]
        if len(values) < 2:
            return None
        pairs = itertools.pairwise(values)
        total = sum(new - old if new >= old else new for (_, old), (_, new) in pairs)
        return total, values[-1][0] - values[0][0]

    def growth_of_queue(self) -> float:
        """Growth of the queue over the window, requests/s; 0 if unknown."""
        lengths = [(s.at, s.waiting) for s in self.samples if s.waiting is not None]
        if len(lengths) < 2 or lengths[-1][0] <= lengths[0][0]:
            return 0.0
        return (lengths[-1][1] - lengths[0][1]) / (lengths[-1][0] - lengths[0][0])


def parse(
    text: str,
    form: Dialect | None,
    at: float,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
) -> Reading | None:
    """Parse one replica's /metrics text, of this form or a known one; None if none is recognized.

    First tokens after `ttft_s`, and others after `tpot_s`, are counted as late. What is no count or time,
    such as NaN, is missing. Raises ValueError for other text.
    """
    values: dict[str, float] = {}
    buckets: dict[str, dict[float, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not 0 <= sample.value <= _MOST:  # one NaN would stay in every mean that it enters
                continue
            if sample.name.endswith("_bucket"):
                if "le" not in sample.labels:
                    continue
                counts = buckets.setdefault(sample.name.removesuffix("_bucket"), {})
                bound = bound_of(sample.labels["le"])
                counts[bound] = counts.get(bound, 0.0) + sample.value
            elif not sample.name.endswith("_created"):
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    form = form or detect(values)
    if form is None:
        return None
    totals: dict[str, float] = {}
    counters = {
        "prompt": form.prompt_tokens,
        "output": form.output_tokens,
        "cache_hits": form.cache_hits,
        "cache_queries": form.cache_queries,
    }
    for key, name in counters.items():
        if name and f"{name}_total" in values:
            totals[key] = values[f"{name}_total"]
    tpot = next((name for name in form.tpot if f"{name}_count" in values), None)
    for key, histogram in (("queue", form.queue_time), ("ttft", form.ttft), ("tpot", tpot)):
        if histogram and {f"{histogram}_count", f"{histogram}_sum"} <= values.keys():
            totals[f"{key}_sum"] = values[f"{histogram}_sum"]
            totals[f"{key}_count"] = values[f"{histogram}_count"]
    for key, histogram, limit in (("ttft", form.ttft, ttft_s), ("tpot", tpot, tpot_s)):
        if limit is not None and histogram in buckets:
            totals[f"{key}_late"] = late_count(buckets[histogram], limit)
    running, waiting, kv_usage = (values.get(n) for n in (form.running, form.waiting, form.kv_usage))
    return Reading(at, running, waiting, kv_usage, values.get(LAUNCH_METRIC), totals)


_DEFAULT = SignalsConfig()


class ScrapeSource:
    """Reads every replica of `targets()`, and the number of requests waiting at a gateway, if any: all of
    them, or those for `model`."""

    def __init__(
        self,
        targets: Targets,
        signals: SignalsConfig = _DEFAULT,
        slo: SloConfig | None = None,
        *,
        latency_window_s: float | None = None,
        gateway: str | None = None,
        model: str | None = None,
        cold_starts: ColdStarts | None = None,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """slo: tokens later than its times count as late."""
        self._targets, self._dialect, self._window = targets, dialect(signals.metrics), signals.window_s
        self._gateway, self._model = gateway, model
        self._latency_window = self._window if latency_window_s is None else latency_window_s
        self._limits = (slo.ttft_s, slo.tpot_s) if slo is not None else (None, None)
        self._cold_starts, self._wall, self._monotonic = cold_starts, wall, monotonic
        self._timeout = signals.timeout_s
        self._http = Upstream(self._timeout, self._timeout)
        self._histories: dict[str, _History] = {}
        self._silent: set[str] = set()

    async def read(self, current: int) -> Snapshot:
        """Scrape all replicas concurrently.

        Stale if none answers. If some do not, part of the load is unseen: `ready` is then None, and the
        policy may scale up but not down.
        """
        targets = dict(self._targets())
        texts = await asyncio.gather(*map(self._get, targets.values()))
        now = self._monotonic()
        fresh = {name: self._parse(name, text, now) for name, text in zip(targets, texts, strict=True)}
        return self.snapshot(current, fresh, await self._waiting_at_gateway())

    def snapshot(
        self, current: int, fresh: Mapping[str, Reading | None], waiting: float | None = None
    ) -> Snapshot:
        """The signals of a fleet with these readings. waiting: requests in front of the replicas."""
        for name, sample in fresh.items():
            if sample is not None:
                self._histories.setdefault(name, _History()).add(sample, self._window)
        self._histories = {name: history for name, history in self._histories.items() if name in fresh}
        self._report(fresh)
        samples = [sample for sample in fresh.values() if sample is not None]
        return Snapshot(
            time=self._wall(),
            current=current,
            ready=len(samples) if len(samples) == len(fresh) else None,
            request_rate=self._arrivals(),
            served_rate=self._rate("ttft_count"),
            prompt_token_rate=self._rate("prompt"),
            output_token_rate=self._rate("output"),
            cached_share=self._cached(),
            backlog=_plus(_sum(s.waiting for s in samples), waiting),
            queue_time_s=self._mean("queue"),
            ttft_s=self._mean("ttft"),
            tpot_s=self._mean("tpot"),
            late_share=self._late(),
            running=_sum(s.running for s in samples),
            kv_usage=_mean(s.kv_usage for s in samples),
            cold_start_s=self._cold_start(samples),
            stale=not samples,
        )

    async def close(self) -> None:
        self._http.close()

    async def _get(self, url: str) -> str | None:
        """The /metrics of a server."""
        parts = urlsplit(url)
        try:
            base, path = f"{parts.scheme}://{parts.netloc}", f"{parts.path}/metrics"
            status, body = await self._http.get(base, path, timeout=self._timeout)
            return body.decode() if status == 200 else None
        except (ReplicaLost, UnicodeDecodeError):
            return None

    def _parse(self, name: str, text: str | None, now: float) -> Reading | None:
        try:
            return parse(text, self._dialect, now, *self._limits) if text is not None else None
        except ValueError as problem:
            log.warning("%s: /metrics is not in the Prometheus text format: %s", name, problem)
            return None

    def _report(self, fresh: Mapping[str, Reading | None]) -> None:
        """Log once when a replica's metrics are missing, and once when they are back."""
        silent = {name for name, sample in fresh.items() if sample is None}
        for name in sorted(silent - self._silent):
            log.warning("%s: no usable /metrics", name)
        for name in sorted(self._silent - silent):
            if name in fresh:
                log.info("%s: /metrics is back", name)
        self._silent = silent

    async def _waiting_at_gateway(self) -> float | None:
        if self._gateway is None:
            return None
        text = await self._get(self._gateway)
        for family in text_string_to_metric_families(text or ""):
            if family.name == "farthing:gateway_requests_waiting":
                own = (s for s in family.samples if self._model in (None, s.labels["model_name"]))
                return sum(float(sample.value) for sample in own)
        return None

    def _rate(self, key: str) -> float | None:
        """Increase per second, summed over replicas; None while no replica has two readings."""
        increases = [i for h in self._histories.values() if (i := h.increase(key)) and i[1] > 0]
        return sum(total / seconds for total, seconds in increases) if increases else None

    def _cached(self) -> float | None:
        """Share of prompt tokens found in a prefix cache; None if none was looked up."""
        hits, queries = self._rate("cache_hits"), self._rate("cache_queries")
        return hits / queries if hits is not None and queries else None

    def _arrivals(self) -> float | None:
        """Arriving requests/s: those with a first token, plus the growth of the queue."""
        served = self._rate("ttft_count")
        if served is None:
            return None
        queued = (h.growth_of_queue() for h in self._histories.values())
        return max(0.0, served + sum(queued))

    def _cold_start(self, samples: Iterable[Reading]) -> float | None:
        """P90 of externally measured cold starts, else of those reported by the replicas."""
        if self._cold_starts is not None and self._cold_starts.p90 is not None:
            return self._cold_starts.p90
        reported = ColdStarts()
        for sample in samples:
            if sample.launch_s is not None:
                reported.add(sample.launch_s)
        return reported.p90

    def _late(self) -> float | None:
        """Share of first or other tokens that were late in the window, the larger one; None without any."""
        shares = []
        for key in ("ttft", "tpot"):
            late, count = (self._increase(f"{key}_{kind}", self._window) for kind in ("late", "count"))
            if late is not None and count:
                shares.append(late / count)
        return max(shares, default=None)

    def _mean(self, key: str) -> float | None:
        """Mean of a histogram over the latency window and all replicas; 0 without observations."""
        total = self._increase(f"{key}_sum", self._latency_window)
        count = self._increase(f"{key}_count", self._latency_window)
        if total is None or count is None:
            return None
        return total / count if count > 0 else 0.0

    def _increase(self, key: str, window_s: float) -> float | None:
        """Increase of a counter over all replicas; None while no replica has two readings of it."""
        increases = [i[0] for h in self._histories.values() if (i := h.increase(key, window_s))]
        return sum(increases) if increases else None


def _sum(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) if numbers else None


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _plus(value: float | None, extra: float | None) -> float | None:
    if value is None:
        return extra
    return value + extra if extra is not None else value
