"""Replicas by Ray Serve on a simulated cluster of three nodes, and the policy behind Serve's autoscaling."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farthing.prompts import read_prompt
from farthing_fleet.config import FleetConfig, PolicyConfig, SloConfig
from tests.fleet.doubles.services import free_port

pytest.importorskip("ray.serve", exc_type=ImportError)
from farthing_ray.serve import Prefix, Replica, Scaling, ServeConfig, reading_of, serving

ROOT = Path(__file__).parents[2]
REPLICA = ROOT / "tests" / "fleet" / "doubles" / "replica.py"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # it kills workers when others fill the memory
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "55",  # a busy machine imports slowly
    "OMP_NUM_THREADS": "1",
}


def until(condition: Callable[[], Any], seconds: float = 300.0, every: float = 0.1) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(every)
    return found


def context(waiting: float | None, target: int = 1, queued: float = 0.0) -> Any:
    """Serve's AutoscalingContext of one replica, with a fresh reading if `waiting` is given."""
    point = lambda value: [SimpleNamespace(timestamp=time.time(), value=value)]  # noqa: E731
    metrics = {}
    if waiting is not None:
        totals = {"total:prompt": 10.0, "total:output": 5.0, "total:ttft_count": 1.0}
        values = {"at": time.monotonic(), "running": 1.0, "waiting": waiting, **totals}
        metrics = {name: {"r1": point(value)} for name, value in values.items()}
    return SimpleNamespace(
        running_replicas=["r1"], raw_metrics=metrics, target_num_replicas=target, total_queued_requests=queued
    )


def config(tmp_path: Path, **policy: Any) -> FleetConfig:
    return FleetConfig(PolicyConfig(5.0, max_replicas=3, **policy), state=tmp_path)


def as_json(config: FleetConfig) -> str:
    return json.dumps(asdict(config), default=str)


@pytest.fixture
def unrehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearsing a made-up day in steps of a twentieth of a second takes minutes."""
    monkeypatch.setattr("farthing_ray.serve.make_estimates", lambda fleet: None)


@pytest.mark.usefixtures("unrehearsed")
def test_the_policy_decides_for_serve(tmp_path: Path) -> None:
    scaling = Scaling(as_json(config(tmp_path, interval_s=0.05, cold_start_s=1.0, drain_s=1.0)))
    assert scaling(context(None))[0] == 1  # nothing is known yet
    assert until(lambda: scaling(context(60.0))[0] > 1)
    decisions = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert any("backlog" in decision["reason"] for decision in decisions)


@pytest.mark.usefixtures("unrehearsed")
def test_without_readings_the_replica_count_is_held(tmp_path: Path) -> None:
    scaling = Scaling(as_json(config(tmp_path, interval_s=0.05)))
    log = tmp_path / "decisions.jsonl"
    until(lambda: scaling(context(None, target=2))[0] and log.exists() and log.read_text().count("\n") > 2)
    assert scaling(context(None, target=2))[0] == 2
    assert json.loads(log.read_text().splitlines()[-1])["decided_by"] == "stale"


def test_readings_pass_through_numbers() -> None:
    values = {"at": 3.0, "running": 1.0, "waiting": 2.0, "total:prompt": 7.0}
    reading = reading_of(values)
    assert reading is not None and (reading.at, reading.waiting, reading.kv_usage) == (3.0, 2.0, None)
    assert reading.totals == {"prompt": 7.0}
    assert reading_of({"running": 1.0}) is None  # the server did not answer


def test_what_a_server_tells_reaches_the_policy() -> None:
    async def get(url: str, path: str) -> tuple[int, bytes]:
        return 200, b"farthing:num_requests_running 2.0\nfarthing:num_requests_waiting 5.0\n"

    server = SimpleNamespace(url="http://x")
    replica: Any = SimpleNamespace(_upstream=SimpleNamespace(get=get), _server=server, _slo=SloConfig())
    told = reading_of(asyncio.run(Replica.record_autoscaling_stats(replica)))
    assert told is not None and (told.running, told.waiting) == (2.0, 5.0)


def test_replicas_that_are_gone_are_forgotten_and_serve_knows_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known: list[list[Any]] = []
    monkeypatch.setattr(Prefix.__base__, "update_replicas", lambda self, replicas: known.append(replicas))
    monkeypatch.setattr(Prefix, "curr_replicas", {"a": None, "b": None})
    router = Prefix.__new__(Prefix)
    router.initialize_state()
    for name in "ab":
        router._prefixes.learn([b"block"], name)
    router.update_replicas(left := [SimpleNamespace(replica_id="b")])
    assert router._prefixes.depths([b"block"]).keys() == {"b"} and known == [left]


def test_requests_that_arrive_together_choose_different_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Prefix, "replica_queue_len_cache", {"a": 1})
    router = Prefix.__new__(Prefix)
    router.initialize_state()
    replicas = [SimpleNamespace(replica_id=name) for name in "abc"]

    def request(name: str) -> Any:
        return SimpleNamespace(
            args=[SimpleNamespace(prompt=read_prompt(b"{}", 0))],
            metadata=SimpleNamespace(internal_request_id=name),
            created_at=time.time(),
            future=SimpleNamespace(cancelled=lambda: False),
        )

    asked = [request(str(i)) for i in range(5)]
    first = [asyncio.run(router.choose_replicas(replicas, one))[0][0].replica_id for one in asked]
    assert sorted(first) == ["a", "b", "b", "c", "c"]
    for one, name in zip(asked, first, strict=True):
        router.on_request_routed(one, name, None)
    assert not router._chosen, "Serve counts them now"


class Stream(threading.Thread):
    """A streamed completion, read to its end."""

    def __init__(self, url: str, prompt: str) -> None:
        super().__init__(daemon=True)
        self.text, self.pid, self.status, self.failure = "", 0, 0, ""
        self._request = completion(url, prompt)
        self.start()

    def run(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=240) as answer:
                self.status = answer.status
                for line in answer:
                    self.text += line.decode()
                    if b"pid-" in line:
                        self.pid = int(line.decode().partition("pid-")[2].partition('"')[0])
        except OSError as problem:
            self.failure = repr(problem)

    def served_by(self) -> int:
        until(lambda: self.pid or self.failure)
        return self.pid


def completion(url: str, prompt: str) -> urllib.request.Request:
    body = json.dumps({"model": "mite", "prompt": prompt, "stream": True}).encode()
    return urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def raylet(node: Any) -> int:
    (process,) = node.all_processes["raylet"]
    return int(process.process.pid)


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    paths = [str(ROOT), *filter(None, [before.get("PYTHONPATH")])]
    os.environ |= {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
    node: dict[str, Any] = dict(num_cpus=1, object_store_memory=80_000_000, include_dashboard=False)
    made = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(2):
        made.add_node(num_cpus=1, object_store_memory=80_000_000)
    yield made
    made.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_scales_routes_by_prefix_and_survives_losses(cluster: Any, tmp_path: Path) -> None:
    command = (sys.executable, str(REPLICA), "--port", "{port}", "--tokens", "120", "--interval", "0.1")
    fleet = config(tmp_path, interval_s=3.0, cold_start_s=5.0, drain_s=5.0, cooldown_s=600.0)
    wanted = ServeConfig({"mite": command}, fleet, health_path="/health", drain_s=1.0)
    with serving(wanted, cluster.address, "127.0.0.1", free_port()) as url:
        pid = Stream(url, "first").served_by()
        _signal(pid, waiting=60.0)
        streams = until(lambda: _spread(url), every=5.0)  # the policy has added replicas, for the backlog
        assert len({parent(parent(stream.pid)) for stream in streams}) == 3  # on three nodes

        killed = streams[0].pid
        os.kill(killed, signal.SIGKILL)
        _only_those_of(killed, streams)
        _repeated_prompts_stay(url)

        streams = until(lambda: _spread(url), every=5.0)  # the replica was replaced
        lost = next(n for n in cluster.worker_nodes if raylet(n) in {parent(parent(s.pid)) for s in streams})
        killed = next(s.pid for s in streams if parent(parent(s.pid)) == raylet(lost))
        cluster.remove_node(lost, allow_graceful=False)
        _only_those_of(killed, streams)
        _repeated_prompts_stay(url)


def _signal(pid: int, **signals: float) -> None:
    arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    port = arguments[arguments.index("--port") + 1]
    url = f"http://127.0.0.1:{port}/_signals"
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(signals).encode(), method="PUT"))


def _spread(url: str) -> list[Stream] | None:
    """Six streams that three servers answer; None as long as there are fewer."""
    streams = [Stream(url, f"{i}") for i in range(6)]
    return streams if len({stream.served_by() for stream in streams}) == 3 else None


def _only_those_of(killed: int, streams: list[Stream]) -> None:
    """The streams of a killed server end with an error event, the others complete."""
    for stream in streams:
        stream.join(120)
        assert stream.status == 200 and not stream.failure
        if stream.pid == killed:
            assert '"error"' in stream.text and "[DONE]" not in stream.text
        else:
            assert stream.text.count("data:") == 121 and "[DONE]" in stream.text


def _repeated_prompts_stay(url: str) -> None:
    """Requests are answered, those with a long common prefix by the server that has it."""
    first = Stream(url, "a long prompt " * 300).served_by()
    assert first and Stream(url, "a long prompt " * 300 + "and more").served_by() == first
