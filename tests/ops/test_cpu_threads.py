"""Results do not depend on the number of threads, NUMA nodes or the batch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farthing.cpus import own_cpus
from farthing.ops.api import Norm, Place
from farthing.ops.cpu import CpuOps, create
from farthing.ops.specs import RouterSpec
from farthing.ops.weights import quantize_int4
from tests.isas import ISAS
from tests.ops.parts import SPECS, batch_of, experts, weight

pytestmark = pytest.mark.usefixtures("exact_on_amx")

native = pytest.importorskip("farthing._native")


def results(ops: CpuOps) -> list[Tensor]:
    """Run every op once, on inputs independent of the backend."""
    torch.manual_seed(1)
    x, scale = torch.randn(19, 64), torch.rand(64) + 0.5
    spec = RouterSpec(8, 3, num_groups=4, top_k_groups=2)
    moe = ops.pack_moe("moe", spec, lambda: experts(spec, "int4", 64, 96, 64))
    linear = ops.pack_linear("linear", lambda: [weight("int8", 1100, 64)])
    layout = SPECS["small"]
    kv_b = weight("bf16", layout.num_heads * (layout.nope_dim + layout.value_dim), layout.latent_dim)
    torch.manual_seed(2)  # weights from a packed file used no random numbers
    angles = torch.rand(600, layout.rope_dim // 2)
    rope = torch.stack((angles.cos(), angles.sin()))
    attention = ops.pack_attention("a", layout, lambda: (kv_b, torch.ones(layout.latent_dim)), rope)
    cache = ops.new_cache(1, 80, 16, layout.latent_dim + layout.rope_dim, "bfloat16")
    batch = batch_of([(0, 560), (0, 3)], 16, 600)
    heads = layout.num_heads * (layout.nope_dim + layout.rope_dim)
    torch.manual_seed(3)
    q, kv = torch.randn(563, heads), torch.randn(563, layout.latent_dim + layout.rope_dim)
    out = [ops.mla(q, kv, attention, Place(cache, 0, batch))]
    later = batch_of([(560, 1), (3, 1)], 16, 600)
    later = type(later)(
        later.positions, later.slots, later.query_start, later.context_lens, batch.block_table
    )
    out.append(ops.mla(q[:2], kv[:2], attention, Place(cache, 0, later)))
    for rows in (x, x[:1], x[:3]):
        out += [ops.linear(rows, linear, Norm(scale, 1e-6)), ops.moe(rows.clone(), moe, Norm(scale, 1e-6))]
        out += list(ops.top_logits(rows, linear, Norm(scale, 1e-6), 5))
    return out


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_a_bit(isa: str) -> None:
    first = results(CpuOps(1, isa=isa))
    for threads, active in ((2, 2), (2, 1), (3, 3), (3, 2)):  # the others rest
        ops = CpuOps(threads, isa=isa)
        ops._native.set_active(active)
        for a, b in zip(first, results(ops), strict=True):
            assert torch.equal(a, b)


def test_numa_nodes_do_not_change_a_bit() -> None:
    first = results(CpuOps(1))
    for topology in ("0;1", "0-1;2-3;4-5"):
        for a, b in zip(first, results(CpuOps(3, topology=topology)), strict=True):
            assert torch.equal(a, b)


def test_each_node_computes_its_share_of_the_weights() -> None:
    """Four threads on two simulated nodes: each node computes the panels in its own memory."""
    ops = CpuOps(4, topology="0-1;2-3")
    packed = ops.pack_linear("w", lambda: [weight("int4", 16 * 64, 64)]).packed
    assert ops._native.nodes == 2
    assert packed.parts() == [0, 32, 64]
    seen = ops._native.units_of_threads(64)
    assert sorted(unit for _, _, unit, _ in seen) == list(range(64))
    for thread, node, unit, _ in seen:
        assert node == thread // 2
        assert (unit >= 32) == (node == 1)


@settings(max_examples=30, deadline=None)
@given(
    threads=st.integers(1, 5),
    units=st.integers(1, 300),
    topology=st.sampled_from(["", "0", "0;1", "0-2;3", "0;1;2", "3:0+4,1+5;7:2+6"]),
)
def test_every_unit_is_computed_once(threads: int, units: int, topology: str) -> None:
    backend = native.Backend(threads, "auto", topology)
    for _ in range(3):
        assert sorted(unit for _, _, unit, _ in backend.units_of_threads(units)) == list(range(units))


@pytest.mark.parametrize("isa", [s for s in ISAS if s != "portable"])
def test_row_does_not_depend_on_its_batch(isa: str) -> None:
    """Quantized projections of up to 32 rows: the same bits for a token alone and in a batch."""
    torch.manual_seed(2)
    ops = CpuOps(2, isa=isa)
    for name in ("int8", "int4"):
        w = ops.pack_linear(name, lambda name=name: [weight(name, 80, 256, 64)])
        x = torch.randn(32, 256)
        together = ops.linear(x, w)
        for rows in (1, 3, 8, 17):
            assert torch.equal(ops.linear(x[:rows], w), together[:rows])


def test_threads_that_rest_are_wanted_again() -> None:
    backend = native.Backend(4)
    for active in (1, 4, 3, 2, 4):
        for _ in range(1000):  # it takes a while until all who rest can be woken
            backend.set_active(active)
            assert sorted(unit for _, _, unit, _ in backend.units_of_threads(40)) == list(range(40))
            if backend.active == active:
                break
            time.sleep(0.01)
        assert backend.active <= 4
    assert native.Backend(3, topology="0;1").active == 3


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="threads: got 0"):
        create(None, 0, None, None)
    with pytest.raises(ValueError, match="float16"):
        create(torch.float16, 1, None, None)
    with pytest.raises(ValueError, match="instruction set 'sse9'"):
        CpuOps(1, isa="sse9")
    with pytest.raises(ValueError, match="topology ';'"):
        CpuOps(1, topology=";")
    with pytest.raises(ValueError, match="has 17 nodes"):
        CpuOps(17, topology=";".join(map(str, range(17))))
    with pytest.raises(ValueError, match=r"K = \[64, 128\]"):
        CpuOps(1).pack_linear("w", lambda: [weight("int8", 16, 64), weight("int8", 16, 128)])


def test_many_threads_do_not_change_a_bit() -> None:
    """More threads than meet in one counter, in groups of 8, 8 and 4 and of 8 and 2."""
    x = torch.randn(3, 64)
    w = quantize_int4(torch.randn(1100, 64))
    expected = CpuOps(1)
    first = expected.linear(x, expected.pack_linear("w", lambda: [w]))
    for topology in ("", "0;1"):
        ops = CpuOps(20, topology=topology)
        packed = ops.pack_linear("w", lambda: [w])
        for _ in range(5):
            assert torch.equal(ops.linear(x, packed), first)


def test_regions_and_barriers_are_counted() -> None:
    backend = native.Backend(3, topology="0;1")
    before = backend.meetings
    assert backend.region_seconds(barriers=4, regions=5) > 0
    assert [after - b for after, b in zip(backend.meetings, before, strict=True)] == [5, 5 * 5]


@pytest.mark.parametrize(("threads", "topology"), [(3, "0;1;2"), (4, "0;1")])
def test_regions_follow_each_other_while_gates_are_opened(threads: int, topology: str) -> None:
    """A thread of another node that met a barrier before the end of the last region had opened its gate took
    that opening for its own, and the pool stood still within about a thousand regions."""
    code = "import sys; from farthing import _native as n; n.Backend(int(sys.argv[1]), topology=sys.argv[2])"
    code += ".region_seconds(barriers=1, regions=1000)"
    subprocess.run([sys.executable, "-c", code, str(threads), topology], check=True, timeout=120)


# Threads that run out of memory between any two barriers, in most regions a few at once: what is thrown there
# is thrown by the region, once every thread has left it, and the next one computes as before. Of one node
# some threads rest at times, and take no part.
FAILING = """
import random, sys
from farthing import _native
threads, topology, regions = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
backend, rng = _native.Backend(threads, topology=topology), random.Random(threads)
for _ in range(regions):
    barriers = rng.randint(0, 3)
    memory = [rng.choice([9, 9, *range(barriers + 1)]) for _ in range(threads)]
    if rng.random() < 0.3:
        backend.set_active(rng.randint(1, threads))
    try:
        backend.region_seconds(barriers, 1, memory)
        assert min(memory[: backend.active]) == 9, (barriers, memory)
    except MemoryError:
        assert min(memory[: backend.active]) < 9, (barriers, memory)
    if rng.random() < 0.3:
        assert sorted(unit for _, _, unit, _ in backend.units_of_threads(40)) == list(range(40))
before = backend.meetings
backend.region_seconds(barriers=2, regions=3)
assert [after - b for after, b in zip(backend.meetings, before)] == [3, 9 * (threads > 1)]
"""


@pytest.mark.parametrize(("threads", "topology"), [(1, ""), (2, ""), (2, "0;1"), (3, "0;1;2"), (9, "0;1")])
def test_what_a_thread_throws_reaches_the_caller(threads: int, topology: str) -> None:
    command = [sys.executable, "-c", FAILING, str(threads), topology, str(400 if threads < 3 else 60)]
    subprocess.run(command, check=True, timeout=300)


def test_a_forked_process_is_refused_and_does_not_wait_for_threads_it_does_not_have() -> None:
    code = """
import os
from farthing import _native
backend = _native.Backend(2)
backend.units_of_threads(8)
child = os.fork()
try:
    assert len(backend.units_of_threads(8)) == 8 and child
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
except RuntimeError as error:
    assert not child and "do not survive a fork" in str(error)
    assert len(_native.Backend(2).units_of_threads(8)) == 8
    os._exit(7)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_more_threads_than_the_system_starts_are_refused() -> None:
    """The process was aborted. Address space for few stacks is a limit as containers set for processes."""
    code = """
import resource
from farthing import _native
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
try:
    _native.Backend(5000)
except ValueError as error:
    assert "threads: got 5000; expected at most " in str(error), error
else:
    raise AssertionError
assert len(_native.Backend(2).units_of_threads(8)) == 8
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("threads", "topology", "yields"),
    [
        (4, "0-3", False),
        (5, "0-3", True),
        (8, "0:0+4,1+5;1:2+6,3+7", False),
        (9, "0:0+4,1+5;1:2+6,3+7", True),
    ],
)
def test_threads_beyond_the_cpus_do_not_spin(threads: int, topology: str, yields: bool) -> None:
    assert native.Backend(threads, topology=topology).yields_at_once is yields


def test_threads_beyond_the_affinity_do_not_spin() -> None:
    """Those of a process that was given one CPU of many, too: the machine's CPUs were counted."""
    code = """
import os
from farthing import _native
for cpus in (os.sched_getaffinity(0), {min(os.sched_getaffinity(0))}):
    os.sched_setaffinity(0, cpus)
    assert not _native.Backend(len(cpus)).yields_at_once
    assert _native.Backend(len(cpus) + 1).yields_at_once
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_threads_that_wait_for_a_late_one_sleep() -> None:
    """Three threads wait 300 ms for one that has no core, and use next to no processor time."""
    backend = native.Backend(4)
    backend.units_of_threads(8)
    began = time.process_time()
    assert len(backend.units_of_threads(8, late=300)) == 8
    assert time.process_time() - began < 0.15


# Threads and their affinity: those that are as many as a node's cores have a core each, with all of its
# hardware threads; the caller keeps the whole node, because what it starts inherits that.
PINNED = """
import os, sys, threading
from farthing import _native
threads, topology, *expected = sys.argv[1:]
backend = _native.Backend(int(threads), "auto", topology, True)
found, free = [], os.sched_getaffinity(0)
def call():
    backend.units_of_threads(8)
    found.append(os.sched_getaffinity(0))
    backend.free_caller()
    assert os.sched_getaffinity(0) == free, "until its next region"
    backend.units_of_threads(8)
    assert os.sched_getaffinity(0) == found[0]
    others = [int(t) for t in os.listdir("/proc/self/task") if int(t) != threading.get_native_id()]
    found.extend(mask for t in others if (mask := os.sched_getaffinity(t)) != free)
caller = threading.Thread(target=call)
caller.start()
caller.join()
bound = sorted("".join(map(str, sorted(mask))) for mask in found)
assert bound == sorted(expected), (bound, expected)
backend.units_of_threads(8)
other = _native.Backend(2, "auto", "0;1", True)
other.units_of_threads(8)
del backend, other
assert os.sched_getaffinity(0) == free, "the thread that ends a pool has its CPUs back"
backend, called, ended = _native.Backend(2, "auto", topology, True), threading.Event(), threading.Event()
def stay():
    backend.units_of_threads(8)
    found[:] = [os.sched_getaffinity(0)]
    called.set()
    ended.wait()
    found.append(os.sched_getaffinity(0))
caller = threading.Thread(target=stay)
caller.start()
called.wait()
del backend
ended.set()
caller.join()
assert found[1] == free, "and so has every other thread that called it"
pid = os.fork()
if pid == 0:
    backend = _native.Backend(2, "auto", topology, True)
    backend.units_of_threads(8)
    del backend
    os._exit(os.sched_getaffinity(0) != free)
assert os.waitpid(pid, 0)[1] == 0, "after a fork too"
"""


@pytest.mark.skipif(os.sched_getaffinity(0) != {0, 1}, reason="pins threads to CPUs 0 and 1")
@pytest.mark.parametrize(
    ("threads", "topology", "bound"),
    [
        (4, "0;1", ["0", "0", "1", "1"]),
        (4, "5:0;2:1", ["0", "0", "1", "1"]),
        (2, "0;1", ["0", "1"]),
        (2, "0,1", ["01", "1"]),
        (3, "0:0;1:1,0", ["0", "1", "0"]),
    ],
)
def test_threads_are_pinned_to_their_node_or_core(threads: int, topology: str, bound: list[str]) -> None:
    subprocess.run([sys.executable, "-c", PINNED, str(threads), topology, *bound], check=True)


FREED_FIRST = """
from farthing import _native
backend = _native.Backend(2)
backend.free_caller()
backend.units_of_threads(8)
backend.free_caller()
"""


def test_a_thread_that_never_called_a_pool_may_be_freed() -> None:
    subprocess.run([sys.executable, "-c", FREED_FIRST], check=True, timeout=60)


def test_memory_of_nodes_is_told_by_their_numbers() -> None:
    backend = CpuOps(4, topology="3:0,1;8:2,3")
    packed = backend.pack_linear("w", lambda: [weight("int4", 16 * 64, 64)]).packed
    memory = backend._native.node_memory
    assert [node for node, _, _ in memory] == [3, 8]
    assert sum(size for _, _, size in memory) >= packed.nbytes
    with suppress(RuntimeError):  # a container that refuses to tell
        assert set(native.nodes_of_pages([address for _, address, _ in memory])) <= own_cpus().nodes.keys()
