"""Signals from replicas' /metrics and from a real Prometheus: dialects, resets, silence, wrong clocks."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import BasicAuth, ClientSession, web
from hypothesis import given
from hypothesis import strategies as st

from farthing_fleet.config import SignalsConfig, SloConfig
from farthing_fleet.signals import DIALECTS, ColdStarts, detect, dialect, late_count
from farthing_fleet.signals_prometheus import PrometheusError, PrometheusSource
from farthing_fleet.signals_scrape import ScrapeSource, parse
from farthing_fleet.types import Snapshot
from tests.fleet.doubles.replica import FakeReplica
from tests.fleet.doubles.services import prometheus

# ---- names ----


def test_dialects_are_detected_and_can_be_set() -> None:
    for name, known in DIALECTS.items():
        assert detect([known.waiting, "process_cpu_seconds_total"]) is known
        assert dialect(name) is known
    assert detect(["process_cpu_seconds_total"]) is None
    assert dialect("auto") is None
    with pytest.raises(ValueError, match=r"'tgi'.*auto.*farthing, vllm, sglang"):
        dialect("tgi")


def test_metrics_over_several_engines_of_one_server_are_summed() -> None:
    lines = ('vllm:num_requests_running{engine="%d"} 2', 'vllm:num_requests_waiting{engine="%d"} 3')
    text = "".join(f"{line % engine}\n" for engine in (0, 1) for line in lines)
    sample = parse(text, None, 0.0)
    assert sample is not None
    assert (sample.running, sample.waiting, sample.kv_usage) == (4.0, 6.0, None)


@pytest.mark.anyio
@pytest.mark.parametrize("name", DIALECTS)
async def test_whatever_one_line_says_a_reading_has_numbers_alone(name: str) -> None:
    """A replica whose metrics are broken takes away what it says, not the signals of all others."""
    async with FakeReplica(dialect=name) as replica, ClientSession() as client:
        replica.sums = {key: [3.0, 2.0] for key in replica.sums}
        async with client.get(f"{replica.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
    changes = [lambda line: "", lambda line: line.replace("le=", "be=")]
    changes += [
        lambda line, value=value: f"{line.rpartition(' ')[0]} {value}"
        for value in ("NaN", "+Inf", "-Inf", "-1", "1e300")
    ]
    for at, change in itertools.product(range(len(lines)), changes):
        text = "\n".join([*lines[:at], change(lines[at]), *lines[at + 1 :], ""])
        try:
            told = parse(text, None, 0.0, 1.0, 1.0)
        except ValueError:
            continue  # the reader calls the replica silent
        if told is not None:
            numbers = [told.running, told.waiting, told.kv_usage, *told.totals.values()]
            assert all(number is None or 0 <= number < math.inf for number in numbers), (lines[at], told)


# ---- cold starts ----


def test_cold_start_p90_is_the_nearest_rank() -> None:
    starts = ColdStarts()
    assert starts.p90 is None
    for seconds in range(1, 11):
        starts.add(float(seconds))
    assert starts.p90 == 9.0
    for wrong in (-5.0, float("nan"), float("inf")):
        starts.add(wrong)
    assert starts.p90 == 9.0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_cold_start_p90_covers_90_percent(values: list[float]) -> None:
    starts = ColdStarts(keep=200)
    for value in values:
        starts.add(value)
    assert starts.p90 is not None
    assert sum(value <= starts.p90 for value in values) >= 0.9 * len(values)
    assert starts.p90 in values


# ---- scraping ----


class Clock:
    def __init__(self) -> None:
        self.wall, self.mono = 1_700_000_000.0, 100.0

    def tick(self, seconds: float) -> None:
        self.wall += seconds
        self.mono += seconds


def source(clock: Clock, *replicas: FakeReplica, slo: SloConfig | None = None) -> ScrapeSource:
    return ScrapeSource(
        lambda: {r.name: r.url for r in replicas},
        SignalsConfig(window_s=15.0),
        slo,
        wall=lambda: clock.wall,
        monotonic=lambda: clock.mono,
    )


@pytest.mark.anyio
@pytest.mark.parametrize("name", list(DIALECTS))
async def test_scrape_reads_every_dialect(name: str) -> None:
    clock = Clock()
    async with FakeReplica(dialect=name, name="a") as a, FakeReplica(dialect=name, name="b") as b:
        reader = source(clock, a, b)
        first = await reader.read(2)
        assert (first.request_rate, first.ttft_s, first.ready, first.stale) == (None, None, 2, False)
        for replica in (a, b):
            replica.signals.update(waiting=4.0, kv=0.25)
            replica.totals.update(prompt=1000.0, output=200.0)
            replica.sums.update(ttft=[4.0, 20.0], queue=[1.0, 20.0], tpot=[2.0, 200.0])
        clock.tick(10.0)
        now = await reader.read(2)
        await reader.close()
    assert now.time == clock.wall
    assert (now.prompt_token_rate, now.output_token_rate) == (200.0, 40.0)
    assert now.request_rate == pytest.approx(2 * (20 + 4) / 10)  # served plus joined the queue
    assert (now.backlog, now.kv_usage, now.ttft_s) == (8.0, 0.25, 0.2)
    assert now.queue_time_s == (
        None if name == "sglang" else pytest.approx(0.05)
    )  # the fake's sglang dialect has none
    assert now.tpot_s == (None if name == "sglang" else pytest.approx(0.01))


@pytest.mark.anyio
async def test_restarted_replica_does_not_make_a_negative_rate() -> None:
    clock = Clock()
    async with FakeReplica(name="a") as replica:
        reader = source(clock, replica)
        replica.totals["prompt"] = 5000.0
        await reader.read(1)
        replica.totals["prompt"] = 300.0  # restarts at zero
        clock.tick(10.0)
        now = await reader.read(1)
        await reader.close()
    assert now.prompt_token_rate == 30.0


@pytest.mark.anyio
async def test_wall_clock_jump_does_not_change_a_rate() -> None:
    clock = Clock()
    async with FakeReplica(name="a") as replica:
        reader = source(clock, replica)
        await reader.read(1)
        for jump in (-3600.0, 7200.0):
            clock.wall += jump
            clock.tick(5.0)
            replica.totals["prompt"] += 500.0
            now = await reader.read(1)
            assert now.prompt_token_rate == pytest.approx(100.0)
        await reader.close()


@pytest.mark.anyio
async def test_snapshot_is_incomplete_with_a_silent_replica_and_stale_with_none() -> None:
    clock = Clock()
    async with FakeReplica(name="a") as a:
        async with FakeReplica(name="b") as b:
            reader = source(clock, a, b)
            assert not (await reader.read(2)).stale
        clock.tick(1.0)
        now = await reader.read(2)
        assert (now.stale, now.ready) == (False, None)
        await reader.close()
    empty = source(clock)
    assert (await empty.read(0)).stale
    await empty.close()


@pytest.mark.anyio
async def test_idle_histograms_are_zero_not_missing() -> None:
    clock = Clock()
    async with FakeReplica(name="a") as replica:
        reader = source(clock, replica)
        await reader.read(1)
        clock.tick(5.0)
        now = await reader.read(1)
        await reader.close()
    assert (now.queue_time_s, now.ttft_s, now.request_rate) == (0.0, 0.0, 0.0)


@given(st.lists(st.floats(0.01, 20), min_size=1, max_size=50), st.floats(0.1, 12))
def test_late_count_is_within_the_bucket_of_the_limit(times: list[float], limit: float) -> None:
    bounds = [0.25, 0.5, 1.0, 2.0, 5.0, 10.0]
    buckets = {b: float(sum(t <= b for t in times)) for b in [*bounds, float("inf")]}
    late = late_count(buckets, limit)
    above = min((b for b in bounds if b >= limit), default=10.0)
    below = max((b for b in bounds if b < limit), default=0.0)
    assert sum(t > above for t in times) - 1e-9 <= late <= sum(t > below for t in times) + 1e-9
    if limit in bounds:
        assert late == sum(t > limit for t in times)


@pytest.mark.anyio
async def test_late_share_counts_requests_and_not_the_mean() -> None:
    clock = Clock()
    async with FakeReplica(name="a") as a, FakeReplica(name="b") as b:
        reader = source(clock, a, b, slo=SloConfig())
        assert (await reader.read(2)).late_share is None
        for replica, late in ((a, 4.0), (b, 0.0)):
            replica.sums["ttft"], replica.late = [30.0, 40.0], late
        clock.tick(5.0)
        now = await reader.read(2)
        clock.tick(60.0)
        idle = await reader.read(2)
        await reader.close()
    assert now.ttft_s == 0.75
    assert now.late_share == pytest.approx(0.05)
    assert idle.late_share is None


@pytest.mark.parametrize(("tpot_s", "share"), [(2.0, 0.2), (None, 0.05)])
def test_late_tokens_count_where_their_time_has_a_target(tpot_s: float | None, share: float) -> None:
    def text(first: int, late_first: int, others: int, late_others: int) -> str:
        counts = {"time_to_first_token": (first, late_first), "inter_token_latency": (others, late_others)}
        lines = []
        for name, (count, late) in counts.items():
            family = f"vllm:{name}_seconds"
            lines += [f"# TYPE {family} histogram", f'{family}_bucket{{le="2.0"}} {count - late}']
            lines += [f'{family}_bucket{{le="+Inf"}} {count}', f"{family}_sum 1.0", f"{family}_count {count}"]
        return "\n".join(["vllm:num_requests_waiting 0", *lines, ""])

    reader = ScrapeSource(dict)
    texts = text(0, 0, 0, 0), text(40, 2, 400, 80)
    snapshots = [reader.snapshot(1, {"a": parse(t, None, at, 2.0, tpot_s)}) for at, t in enumerate(texts)]
    assert snapshots[-1].late_share == pytest.approx(share)


# ---- a real Prometheus ----


@pytest.mark.anyio
@pytest.mark.parametrize(
    "broken", [("1.0", "NaN"), ("+Inf", "NaN"), ("0.5", "+Inf"), ("nan", "3"), (None, "3")]
)
async def test_what_one_bucket_says_leaves_the_share_of_late_requests_a_share(
    monkeypatch: pytest.MonkeyPatch, broken: tuple[str | None, str]
) -> None:
    label, value = broken
    rows = [({"le": le}, str(count)) for le, count in (("2.0", 6.0), ("4.0", 8.0))]
    rows.append(({"le": label} if label else {}, value))

    async def answer(self: PrometheusSource, path: str, asked: dict[str, str]) -> dict[str, object]:
        return {"resultType": "vector", "result": [{"metric": m, "value": [0, v]} for m, v in rows]}

    monkeypatch.setattr(PrometheusSource, "_api", answer)
    reader = PrometheusSource(SignalsConfig("http://127.0.0.1:9"), SloConfig(ttft_s=2.0))
    assert await reader._late_of("ttft", 2.0) == pytest.approx(0.25)
    await reader.close()


async def eventually(read: Callable[[], Awaitable[Snapshot]], good: Callable[[Snapshot], bool]) -> Snapshot:
    for _ in range(200):
        snapshot = await read()
        if good(snapshot):
            return snapshot
        await asyncio.sleep(0.1)
    raise AssertionError(f"never came: {snapshot}")


async def busy(*replicas: FakeReplica) -> None:
    """40 requests/s and 4000 tokens/s at each replica; 0.2 s to the first token, 0.05 s in the queue."""
    while True:
        for replica in replicas:
            replica.totals["prompt"] += 1000
            replica.sums["ttft"] = [replica.sums["ttft"][0] + 2.0, replica.sums["ttft"][1] + 10]
            replica.sums["queue"] = [replica.sums["queue"][0] + 0.5, replica.sums["queue"][1] + 10]
            replica.late += 1
            replica.sums["tpot"] = [replica.sums["tpot"][0] + 2.0, replica.sums["tpot"][1] + 100]
            replica.late_tokens += 30
        await asyncio.sleep(0.25)


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["vllm", pytest.param("sglang", marks=pytest.mark.slow)])
async def test_prometheus_returns_the_same_signals(tmp_path: Path, name: str) -> None:
    async with FakeReplica(dialect=name, name="a") as a, FakeReplica(dialect=name, name="b") as b:
        manager = prometheus(tmp_path, [f"127.0.0.1:{r.port}" for r in (a, b)])
        url, _ = await asyncio.to_thread(manager.__enter__)
        try:
            reader = PrometheusSource(
                SignalsConfig(url, '{model_name=~"a|b"}', window_s=2.0), SloConfig(ttft_s=2.0, tpot_s=2.0)
            )
            a.signals.update(waiting=3.0, kv=0.5)
            load = asyncio.create_task(busy(a, b))

            def complete(s: Snapshot) -> bool:  # each signal is a separate query: one may arrive first
                queue = name == "sglang" or s.queue_time_s
                load = (
                    s.ttft_s
                    and s.late_share
                    and (s.tpot_s or name == "sglang")
                    and s.prompt_token_rate
                    and s.backlog
                )
                return bool(load and queue) and s.ready == 2

            now = await eventually(lambda: reader.read(2), complete)
            points = await reader.load_history("tokens", now.time - 3, time.time(), 0.5)
            load.cancel()
            assert now.backlog == 3.0
            assert now.kv_usage == 0.25
            assert now.ttft_s == pytest.approx(0.2, rel=0.05)
            assert now.late_share == pytest.approx(0.1 if name == "sglang" else 0.3, rel=0.05)
            assert now.prompt_token_rate is not None and now.prompt_token_rate > 0
            assert now.queue_time_s == (None if name == "sglang" else pytest.approx(0.05, rel=0.05))
            assert not now.stale
            assert any(value > 0 for _, value in points)
            await reader.close()
        finally:
            await asyncio.to_thread(manager.__exit__, None, None, None)


@pytest.mark.anyio
@pytest.mark.slow  # test_faults stops a Prometheus in the fast set
async def test_unresponsive_prometheus_and_missing_targets_make_snapshots_stale(
    tmp_path: Path,
) -> None:
    replica = FakeReplica(name="a")
    await replica.start()
    manager = prometheus(tmp_path, [f"127.0.0.1:{replica.port}"])
    url, process = await asyncio.to_thread(manager.__enter__)
    reader = PrometheusSource(SignalsConfig(url, window_s=2.0, timeout_s=0.5), stale_after_s=5.0)
    try:
        await eventually(lambda: reader.read(1), lambda s: not s.stale)
        os.kill(process.pid, signal.SIGSTOP)
        assert (await reader.read(1)).stale
        os.kill(process.pid, signal.SIGCONT)
        await eventually(lambda: reader.read(1), lambda s: not s.stale)
        await replica.stop()
        gone = await eventually(lambda: reader.read(1), lambda s: s.stale and s.backlog is None)
        assert gone.running is None and gone.ready is None  # missing, not zero
    finally:
        os.kill(process.pid, signal.SIGCONT)
        await asyncio.to_thread(manager.__exit__, None, None, None)
    assert (await reader.read(1)).stale
    await reader.close()


@pytest.mark.anyio
async def test_prometheus_errors_quote_the_server(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^signals.prometheus: got .*http://prometheus:9090"):
        PrometheusSource(SignalsConfig("prometheus:9090"))
    with pytest.raises(ValueError, match=r"^signals.selector: got"):
        PrometheusSource(SignalsConfig("http://p:9090", "model=x"))

    manager = prometheus(tmp_path, [])
    url, _ = await asyncio.to_thread(manager.__enter__)
    try:
        reader = PrometheusSource(SignalsConfig(url))
        with pytest.raises(PrometheusError, match="parse error"):
            await reader.scalar("sum(")
        assert await reader.scalar("vector(1) == 2") is None
        await reader.close()
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)


@pytest.mark.anyio
async def test_login_in_the_url_of_prometheus_is_basic_authentication() -> None:
    async def query(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != BasicAuth("me", "a:/b").encode() or "@" in request.host:
            return web.Response(status=401, text="Unauthorized")
        return web.json_response({"status": "success", "data": {"resultType": "scalar", "result": [0, "2"]}})

    app = web.Application()
    app.router.add_get("/at/api/v1/query", query)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host = f"127.0.0.1:{runner.addresses[0][1]}"
    source = PrometheusSource(SignalsConfig(f"http://me:a%3A%2Fb@{host}/at/", timeout_s=60.0))
    assert await source.scalar("2") == 2.0
    await source.close()
    source = PrometheusSource(SignalsConfig(f"http://me:secret@{host}/at", timeout_s=60.0))
    with pytest.raises(PrometheusError, match=f"http://{host} answers 401 and no JSON: b'Unauthorized'"):
        await source.scalar("2")
    await source.close()
    await runner.cleanup()


def test_pods_cold_start_is_the_median_of_new_pods_of_the_selector() -> None:
    source = PrometheusSource(
        SignalsConfig("http://prometheus", '{namespace="prod",model_name="a,b",pod=~"v3-.{1,9}"}')
    )
    pods = '{namespace="prod",pod=~"v3-.{1,9}"}'
    assert source._questions(DIALECTS["vllm"])["cold_start_s"].endswith(
        f"quantile(0.5, kube_pod_status_ready_time{pods} - kube_pod_created{pods}"
        f" and time() - kube_pod_created{pods} < 86400)"
    )
