"""Ranks on a Ray cluster (two nodes on this host): same tokens as one rank, and a dead rank."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farthing.config import EngineConfig
from farthing.engine.request import EngineFailed, SamplingParams
from farthing.llm import LLM
from farthing.model.load import load
from farthing.ops.select import select
from farthing.parallel import worker
from farthing.parallel.cluster import ParallelModel, RankFailed, RankOptions
from farthing.parallel.plan import Layout
from farthing.parallel.worker import interface_of
from farthing_ray import workers as ray_workers
from farthing_ray.workers import RayWorkers
from tests.parallel.ranks import rank_options
from tests.parallel.test_cluster import check_rebalanced, checkpoint, greedy
from tests.parallel.test_serving import until

__all__ = ["checkpoint"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # it kills workers when others fill the memory
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [before.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    node: dict[str, Any] = dict(num_cpus=2, object_store_memory=80_000_000, include_dashboard=False)
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(num_cpus=2, object_store_memory=80_000_000)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    os.environ.clear()
    os.environ.update(before)


def options(checkpoint: Path, cluster: Any, layout: Layout, **more: Any) -> RankOptions:
    return rank_options(checkpoint, layout, nodes=2, ray_address=cluster.address, **more)


def gone(pids: list[int], seconds: float) -> bool:
    """Whether all processes exit in time."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_two_nodes_generate_the_tokens_of_one_rank_and_a_dead_rank_ends_them(
    cluster: Any, checkpoint: Path
) -> None:
    import ray

    expected = greedy(load(checkpoint, select("reference")))
    model = ParallelModel(options(checkpoint, cluster, Layout(2, 2)))
    workers = model._workers
    assert isinstance(workers, RayWorkers)
    group, pids = workers._group, list(workers.pids.values())
    try:
        assert greedy(model) == expected
        # One stage per node: its ranks share memory, stages communicate through gloo.
        own = ray.get_runtime_context().get_node_id()
        assert workers.nodes[0] == workers.nodes[1] != own == workers.nodes[3]
        assert type(model._rank._stage).__name__ == "SharedGroup"
        assert type(model._rank._before).__name__ == "DistGroup"
        # Unlinked, so a crash cannot leak them.
        mapped = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        shared = [line for line in mapped if "/dev/shm/farthing-" in line]
        assert shared and all(line.endswith("(deleted)") for line in shared)
        os.kill(workers.pids[0], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RankFailed, match=r"rank 0 of 4 failed: .*; restart the replica"):
            while time.monotonic() - began < 10:
                greedy(model, 2)
        assert time.monotonic() - began < 10
        assert "rank 0 of 4 failed" in str(model.failure())  # shown by /health
    finally:
        model.close()
    assert gone(pids, 10)
    ray.init(address=cluster.address, logging_level="ERROR")
    deadline = time.monotonic() + 10
    while ray.util.placement_group_table(group)["state"] != "REMOVED" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.util.placement_group_table(group)["state"] == "REMOVED"
    ray.shutdown()


def test_experts_are_rebalanced_over_nodes(cluster: Any, checkpoint: Path) -> None:
    expected = greedy(load(checkpoint, select("reference")))
    balanced: dict[str, Any] = dict(redundant_experts=2, rebalance_steps=5)
    spread = options(checkpoint, cluster, Layout(ep=2), **balanced)
    model = ParallelModel(spread)
    try:
        assert greedy(model) == expected
        check_rebalanced(model)
    finally:
        model.close()


def test_ranks_that_cannot_start_report_why(
    cluster: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "PLACE_TIMEOUT", 1.0)
    with pytest.raises(
        RankFailed, match=r"could not place 2 nodes of {'CPU': 3} within 1 s; .* have \[{'CPU': 2.0}"
    ):
        ParallelModel(options(checkpoint, cluster, Layout(2, 3, 2)))

    with monkeypatch.context() as patched:
        patched.setattr(importlib.metadata, "version", lambda name: "9.9")  # only in this process
        with pytest.raises(
            RankFailed, match=r"rank \d could not start: ValueError: .*expected 9.9, the driver's"
        ):
            ParallelModel(options(checkpoint, cluster, Layout(2)))


def test_the_engine_serves_over_nodes(cluster: Any, checkpoint: Path) -> None:
    fixed: dict[str, Any] = dict(backend="reference", skip_tokenizer_init=True, threads=1, num_blocks=16)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with LLM(checkpoint, **fixed) as llm:
        expected = llm.generate([[1, 2, 3]], params, use_tqdm=False)[0].outputs[0].token_ids
    over: dict[str, Any] = dict(tensor_parallel_size=2, nodes=2, ray_address=cluster.address)
    with LLM(checkpoint, **fixed, **over) as llm:
        assert llm.generate([[1, 2, 3]], params, use_tqdm=False)[0].outputs[0].token_ids == expected
        assert isinstance(llm.engine._model, ParallelModel)
        os.kill(llm.engine._model._workers.pids[1], signal.SIGKILL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:  # an idle engine also detects it
            try:
                llm.engine.health()
            except EngineFailed as error:
                assert "rank 1 of 2 failed" in str(error)
                break
            time.sleep(0.05)
        else:
            pytest.fail("the failure was not noticed")


def test_missing_cluster(checkpoint: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=r"ray_address: got '127.0.0.1:1', but there is no Ray cluster"):
        ray_workers.RayWorkers(rank_options(checkpoint, Layout(2), nodes=2, ray_address="127.0.0.1:1"))


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"nodes is more than 1, which requires Ray: pip install .*'ray\["):
        ray_workers.import_ray()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(nodes=2), "nodes: got 2 with 1 ranks; expected at most one node per rank"),
        (dict(nodes=0), "nodes: got 0; expected an integer >= 1"),
        (dict(ray_address="a:1"), "ray_address: got 'a:1' with nodes 1; expected nodes > 1"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None


def test_stages_are_together_on_a_node() -> None:
    layout = Layout(2, 4)
    assert [layout.node(r, 2) for r in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [layout.node(r, 8) for r in range(8)] == list(range(8))
    assert [layout.node(r, 3) for r in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_cuda_index_of_a_ray_gpu_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert ray_workers._ordinal("3") == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert ray_workers._ordinal("3") == 1


class FakeRay:
    """Ray with one actor, which answers heartbeats while `answers` is true."""

    def __init__(self) -> None:
        self.answers = True
        self.beat = self
        self.killed = 0

    def options(self, **_: Any) -> FakeRay:
        return self

    def remote(self) -> object:
        return object()

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return (references, []) if self.answers else ([], references)

    def get(self, reference: Any) -> None:
        return None

    def kill(self, actor: Any) -> None:
        self.killed += 1


def test_silent_rank_is_unhealthy_until_it_answers_and_lost_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_workers, "BEAT", 0.005)
    monkeypatch.setattr(ray_workers, "MISSED_BEATS", 100_000)
    monkeypatch.setattr(worker, "SILENCE", 0.05)
    ray, workers = FakeRay(), object.__new__(RayWorkers)
    workers._ray, workers._actors, workers._seat, workers._group = ray, {1: ray}, None, None
    workers._failure, workers._closed, workers._ended = None, False, threading.Event()
    workers._heard, workers.arena, workers._own_connection = {}, None, False
    workers._layout = Layout(tp=2)
    workers._watcher = threading.Thread(target=workers._watch, daemon=True)
    workers._watcher.start()
    until(lambda: workers._heard)
    ray.answers = False
    until(lambda: workers.failure() is not None)
    assert "rank 1 of 2 has not responded for" in (workers.failure() or "") and not ray.killed
    ray.answers = True
    until(lambda: workers.failure() is None)
    monkeypatch.setattr(ray_workers, "MISSED_BEATS", 3)
    ray.answers = False
    until(lambda: "no response" in (workers.failure() or ""))
    assert ray.killed
    workers.close()
