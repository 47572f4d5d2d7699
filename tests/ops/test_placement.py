"""Whether weights are on the memory nodes that read them: what the system and a made-up one say."""

import ctypes
import errno
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from farthing.cpus import Cpus, own_cpus
from farthing.ops.cpu import CpuOps, placement, weights
from farthing.ops.cpu.placement import SAMPLED, check_nodes
from tests.ops.parts import weight

native = pytest.importorskip("farthing._native")
GIB = 1 << 30


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "farthing.ops.cpu.placement")
    return caplog


def test_pages_elsewhere_are_counted_by_node(log: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []

    def query(addresses: list[int]) -> Sequence[int]:
        """Node 5 has the upper half of node 1's memory; one page of node 0's was never written."""
        asked.append(len(addresses))
        return [
            -errno.ENOENT if at == 0 else 0 if at < 100 * GIB else 1 if at < 102 * GIB else 5
            for at in addresses
        ]

    check_nodes([(0, 0, 50 * GIB), (1, 100 * GIB, 2 * GIB), (1, 102 * GIB, 2 * GIB)], query)
    assert max(asked) <= SAMPLED
    there, away = log.records
    assert there.levelno == logging.INFO and "node 0's weights: all of" in there.message
    assert away.levelno == logging.WARNING
    half = len([1 for _ in range(asked[1])]) // 2
    assert (
        f"node 1's weights: {half} of {asked[1]} pages sampled are on other memory nodes (5)" in away.message
    )


def test_a_system_that_refuses_is_unknown(log: pytest.LogCaptureFixture) -> None:
    """As containers do."""

    def refuse(addresses: list[int]) -> Sequence[int]:
        raise RuntimeError("move_pages: Operation not permitted")

    check_nodes([(0, 4096, 1)], refuse)
    (record,) = log.records
    assert record.levelno == logging.INFO and "unknown" in record.message
    assert "Operation not permitted" in record.message


def test_nothing_is_said_of_pages_that_were_never_touched(log: pytest.LogCaptureFixture) -> None:
    check_nodes([(0, 4096, 1)], lambda pages: [-errno.ENOENT] * len(pages))
    check_nodes([])
    assert not log.records


def test_the_system_is_asked_about_real_pages() -> None:
    memory = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    memory[0] = memory[mmap.PAGESIZE] = 1
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    try:
        first, second, untouched, _ = native.nodes_of_pages([address + i * mmap.PAGESIZE for i in range(4)])
    except RuntimeError as error:
        assert "move_pages" in str(error)  # a container
        return
    assert {first, second} <= own_cpus().nodes.keys() and untouched == -errno.ENOENT


def test_on_one_of_several_nodes_a_mapped_file_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """Another node's process may have read the file first; a machine of one node has nothing to copy."""
    ops, path = CpuOps(1), str(tmp_path / "packed")
    ops.pack_linear("w", lambda: [weight("int8", 64, 64)])
    ops.save_packed(path)
    x = np.random.default_rng(0).standard_normal((2, 64), dtype=np.float32)
    outputs = []
    for nodes in (1, 2):
        machine = Cpus({9: ((0,),)}, machine_nodes=nodes)
        for module in (placement, weights):
            monkeypatch.setattr(module, "own_cpus", lambda machine=machine: machine)
        mapped = CpuOps(1, packed=path, arrays=True)
        w = mapped.pack_linear("w", pytest.fail)
        mapped.check_placement()
        held = [(node, size >= w.packed.nbytes) for node, _, size in mapped._native.node_memory]
        assert held == ([(9, True)] if nodes == 2 else [])
        outputs.append(mapped.linear(x, w))
    np.testing.assert_array_equal(*outputs)
    (record,) = log.records
    assert "node 9's weights" in record.message  # of which this machine has none, if it tells
    assert "on other memory nodes (" in record.message or "unknown" in record.message


@pytest.mark.parametrize(("nodes", "threads"), [(2, 1), (17, 17)])
def test_threads_that_nodes_do_not_fit_are_not_bound(
    nodes: int, threads: int, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """Two processes of one thread each would share node 0, and 17 nodes are more than a matrix has parts."""
    machine = Cpus({number: ((0,),) for number in range(nodes)}, machine_nodes=nodes)
    for module in (placement, weights):
        monkeypatch.setattr(module, "own_cpus", lambda: machine)
    affinity = []

    def call() -> None:
        ops = CpuOps(threads)
        ops.pack_linear("w", lambda: [weight("int8", 640, 64)])
        ops.check_placement()
        affinity.extend([ops._native.nodes, os.sched_getaffinity(0)])

    caller = threading.Thread(target=call)
    caller.start()
    caller.join()
    assert affinity == [1, os.sched_getaffinity(0)] and not log.records


def test_memory_bound_to_nodes_is_checked(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """A simulated second node has no memory of its own here, and the check finds that out."""
    ops = CpuOps(2, topology="0:0;1:1")
    ops.pack_linear("w", lambda: [weight("int8", 640, 64)])
    monkeypatch.setattr(placement, "own_cpus", lambda: Cpus({0: ((0,),), 1: ((1,),)}, machine_nodes=2))
    ops.check_placement()
    if "unknown" not in log.text and own_cpus().machine_nodes == 1:
        there, away = log.records
        assert "node 0's weights: all of" in there.message and away.levelno == logging.WARNING
