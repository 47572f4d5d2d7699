"""Signals from a Prometheus server, by its HTTP API.

Queries and the age of samples are evaluated at the server's time, so a wrong local clock cannot make old
samples look recent.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit

from farthing.exchange import ReplicaLost, Upstream
from farthing_fleet.config import SignalsConfig, SloConfig
from farthing_fleet.signals import DIALECTS, LAUNCH_METRIC, Dialect, bound_of, dialect, late_count
from farthing_fleet.types import Snapshot

log = logging.getLogger(__name__)

_POD_LABELS = re.compile(r'\b(?:namespace|pod)(?:=~|!~|!=|=)"(?:[^"\\]|\\.)*"')
MAX_POINTS = 11_000  # per series in one query_range response


class PrometheusError(Exception):
    """The Prometheus server cannot be reached or rejects a query."""


class PrometheusSource:
    """Reads a deployment's signals from Prometheus.

    `signals.selector` filters every metric, for example `{namespace="prod",model_name="deepseek-v3"}`;
    `signals.window_s` must span at least two scrapes.
    """

    def __init__(
        self,
        signals: SignalsConfig,
        slo: SloConfig | None = None,
        *,
        stale_after_s: float = 60.0,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """slo: tokens later than its times count as late. Samples older than `stale_after_s` make a snapshot
        stale.
        """
        url, selector, self._window = signals.prometheus or "", signals.selector, signals.window_s
        if not url.startswith(("http://", "https://")):
            raise ValueError(
                f"signals.prometheus: got {url!r}; expected a URL such as http://prometheus:9090"
            )
        if selector and not (selector.startswith("{") and selector.endswith("}")):
            raise ValueError(f'signals.selector: got {selector!r}; expected {{label="value",…}}')
        self._url, self._selector, self._dialect = url.rstrip("/"), selector, dialect(signals.metrics)
        parts = urlsplit(self._url)
        user, _, host = parts.netloc.rpartition("@")
        self._base, self._path = f"{parts.scheme}://{host}", parts.path
        self._stale_after, self._wall = stale_after_s, wall
        self._limits = (slo.ttft_s, slo.tpot_s) if slo is not None else (None, None)
        self._headers: dict[str, str] = {}
        if signals.token_file is not None:
            self._headers["Authorization"] = f"Bearer {signals.token_file.read_text().strip()}"
        elif user:
            self._headers["Authorization"] = f"Basic {b64encode(unquote(user).encode()).decode()}"
        self._timeout = signals.timeout_s
        self._http = Upstream(self._timeout, self._timeout)

    # ---- the snapshot ----

    async def read(self, current: int) -> Snapshot:
        """All signals in one round of parallel queries. Stale if the server or its samples are missing.

        `ready` is None while a replica that was reported within `stale_after_s` is missing.
        """
        try:
            form = self._dialect or await self._detect()
            if form is None:
                return Snapshot(time=self._wall(), current=current, stale=True)
            questions = self._questions(form)
            answers, late = await asyncio.gather(
                asyncio.gather(*(self.scalar(text) for text in questions.values())), self._late(form)
            )
        except PrometheusError as problem:
            log.warning("signals: %s", problem)
            return Snapshot(time=self._wall(), current=current, stale=True)
        value = dict(zip(questions, answers, strict=True))
        age, ready, lately = value.pop("age"), value.pop("ready"), value.pop("lately")
        if ready != lately:
            ready = None  # a replica is silent: part of the load is unseen, so do not scale down
        return Snapshot(
            time=self._wall() - (age or 0.0),
            current=current,
            ready=int(ready) if ready is not None else None,
            late_share=late,
            stale=age is None or age > self._stale_after,
            **value,
        )

    async def _detect(self) -> Dialect | None:
        for form in DIALECTS.values():
            if await self.scalar(f"count({self._of(form.waiting)})"):
                log.info("signals: %s metrics found in Prometheus", form.name)
                self._dialect = form
                return form
        return None

    def _of(self, metric: str) -> str:
        return f"{metric}{self._selector}"

    def _questions(self, d: Dialect) -> dict[str, str]:
        """PromQL for each field of a snapshot, and for the age of the newest sample in seconds."""
        # the last time a pod became ready: for one that recovered it is too late, hence new pods' median
        ready_at, created = "kube_pod_status_ready_time", f"kube_pod_created{self._pods}"
        questions = {
            "age": f"time() - max(timestamp({self._of(d.waiting)}))",
            "ready": f"count({self._of(d.waiting)})",
            "lately": f"count(count_over_time({self._of(d.waiting)}[{self._stale_after:g}s]))",
            "request_rate": self._arrivals(d),
            "served_rate": self._rate(f"{d.ttft}_count"),
            "prompt_token_rate": self._rate(f"{d.prompt_tokens}_total"),
            "output_token_rate": self._rate(f"{d.output_tokens}_total"),
            "backlog": f"sum({self._of(d.waiting)})",
            "ttft_s": self._mean(d.ttft),
            "running": f"sum({self._of(d.running)})",
            "kv_usage": f"avg({self._of(d.kv_usage)})",
            "cold_start_s": f"quantile(0.9, {self._of(LAUNCH_METRIC)}) or "
            f"quantile(0.5, {ready_at}{self._pods} - {created} and time() - {created} < 86400)",
        }
        if d.queue_time:
            questions["queue_time_s"] = self._mean(d.queue_time)
        if d.cache_hits and d.cache_queries:
            hits, queries = self._rate(f"{d.cache_hits}_total"), self._rate(f"{d.cache_queries}_total")
            questions["cached_share"] = f"{hits} / ({queries} > 0)"
        if d.tpot:
            questions["tpot_s"] = " or ".join(self._mean(name) for name in d.tpot)
        return questions

    @property
    def _pods(self) -> str:
        """The selector's namespace and pods, for kube-state-metrics, whose series have no model labels."""
        labels = _POD_LABELS.findall(self._selector)
        return "{" + ",".join(labels) + "}" if labels else ""

    def _rate(self, counter: str) -> str:
        return f"sum(rate({self._of(counter)}[{self._window:g}s]))"

    def _arrivals(self, d: Dialect) -> str:
        """Arriving requests per second: those with a first token, plus the growth of the queue."""
        queued = f"sum(delta({self._of(d.waiting)}[{self._window:g}s])) / {self._window:g}"
        return f"clamp_min({self._rate(f'{d.ttft}_count')} + {queued}, 0)"

    def _mean(self, histogram: str) -> str:
        """Mean over the window; 0 if the histogram exists but had no observations."""
        total, count = self._rate(f"{histogram}_sum"), self._rate(f"{histogram}_count")
        return f"({total} / ({count} > 0) or {count} * 0)"

    async def _late(self, d: Dialect) -> float | None:
        """Share of first or other tokens that were late in the window, the larger one; None without any."""
        limits = zip(((d.ttft,), d.tpot), self._limits, strict=True)
        limited = [(name, limit) for names, limit in limits if limit is not None for name in names]
        shares = await asyncio.gather(*(self._late_of(name, limit) for name, limit in limited))
        return max((share for share in shares if share is not None), default=None)

    async def _late_of(self, histogram: str, limit: float) -> float | None:
        rates = f"sum by (le) (rate({self._of(f'{histogram}_bucket')}[{self._window:g}s]))"
        data = await self._api("query", {"query": rates})
        read = [(bound_of(row["metric"].get("le", "nan")), float(row["value"][1])) for row in data["result"]]
        buckets = {bound: rate for bound, rate in read if math.isfinite(rate) and not math.isnan(bound)}
        total = max(buckets.values(), default=0.0)
        return late_count(buckets, limit) / total if total > 0 else None

    # ---- the HTTP API ----

    async def scalar(self, query: str) -> float | None:
        """The value of an instant query with one result; None if it has none or is not a number."""
        data = await self._api("query", {"query": query})
        result = data["result"]
        value = result if data["resultType"] == "scalar" else result[0]["value"] if result else None
        number = float(value[1]) if value is not None else math.nan
        return number if math.isfinite(number) else None

    async def history(self, query: str, start: float, end: float, step_s: float) -> list[tuple[float, float]]:
        """[(time, value)] of a range query with one series, split to respect the server's limit."""
        points: list[tuple[float, float]] = []
        part = step_s * (MAX_POINTS - 1)
        while start <= end:
            until = min(end, start + part)
            asked = {"query": query, "start": str(start), "end": str(until), "step": str(step_s)}
            data = await self._api("query_range", asked)
            series = data["result"]
            points += [(float(at), float(value)) for at, value in (series[0]["values"] if series else [])]
            start += part + step_s
        return points

    async def load_history(
        self, unit: str, start: float, end: float, step_s: float
    ) -> list[tuple[float, float]]:
        """Past load for forecasters: (time, requests/s or tokens/s). Raises PrometheusError."""
        form = self._dialect or await self._detect()
        if form is None:
            return []
        query = self._rate(f"{form.ttft}_count")
        if unit == "tokens":
            names = form.prompt_tokens, form.output_tokens
            query = " + ".join(self._rate(f"{name}_total") for name in names)
        return await self.history(query, start, end, step_s)

    async def _api(self, path: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        target = f"{self._path}/api/v1/{path}?{urlencode(parameters)}"
        try:
            status, text = await self._http.get(self._base, target, self._headers, timeout=self._timeout)
        except (ReplicaLost, ValueError) as problem:
            raise PrometheusError(f"{self._base} does not answer: {problem}") from problem
        try:
            body = json.loads(text)
        except ValueError as problem:
            raise PrometheusError(f"{self._base} answers {status} and no JSON: {text[:80]!r}") from problem
        if not isinstance(body, dict) or body.get("status") != "success":
            said = body.get("error", "no error text") if isinstance(body, dict) else repr(body)[:80]
            raise PrometheusError(f"{self._base} rejects {dict(parameters)}: {said}")
        data: dict[str, Any] = body["data"]
        return data

    async def close(self) -> None:
        self._http.close()
