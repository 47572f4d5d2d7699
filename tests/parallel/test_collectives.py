"""One-shot all-reduce: the kernel in Triton's interpreter, eligibility, and agreement on the fallback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from farthing.parallel import collectives

ROOT = Path(__file__).parents[2]

KERNEL = """
import torch
from farthing.parallel.collectives import add_up
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for ranks, n in ((1, 1), (2, 1023), (3, 1024), (8, 7168), (2, 5000)):
        for first in (0, 16):
            slots = [torch.randn(first + n + 3).to(dtype) for _ in range(ranks)]
            out = torch.full((n + 2,), 7.0, dtype=dtype)
            pointers = torch.tensor([s.data_ptr() for s in slots])
            add_up(pointers, first * out.element_size(), out[:n])
            total = torch.zeros(n)
            for s in slots:  # in the order of the ranks
                total += s[first:first + n].float()
            # Not the interpreter's rounding to 16 bits: within one unit of it.
            unit = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
            torch.testing.assert_close(out[:n].float(), total, rtol=unit, atol=unit / 100)
            assert (out[n:] == 7).all()
print("right")
"""


def test_kernel_sums_in_rank_order() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", KERNEL], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )
    assert run.stdout.strip() == "right", run.stderr


class Ranks:
    """A group whose other rank answers `others`, one per question."""

    size, index = 2, 0

    def __init__(self, *others: bool) -> None:
        self.others, self.said = list(others), []  # type: ignore[var-annotated]

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.said.append(bool(x))
        return [x, torch.tensor([int(self.others.pop(0))])]


def test_cpu_ranks_use_their_plain_group() -> None:
    assert collectives.unsuitable(2, torch.device("cpu")) == "ranks compute on cpu"
    group: Any = Ranks(True)
    assert collectives.fastest(group, torch.device("cpu")) is group
    assert group.said == [False]  # the peer is informed and falls back together with this rank


@pytest.mark.parametrize(
    "problem", ["unsuitable", "peer unsuitable", "no rendezvous", "peer no rendezvous", ""]
)
def test_all_ranks_use_symmetric_memory_or_none(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Made:
        def __init__(self, group: Any, device: torch.device) -> None:
            if problem == "no rendezvous":
                raise RuntimeError("no fabric handle")

    monkeypatch.setattr(collectives, "unsuitable", lambda *a: "why" if problem == "unsuitable" else None)
    monkeypatch.setattr(collectives, "SymmetricGroup", Made)
    group: Any = Ranks(problem != "peer unsuitable", problem != "peer no rendezvous")
    chosen = collectives.fastest(group, torch.device("cuda"))
    assert isinstance(chosen, Made) if not problem else chosen is group
    # The same number of collectives whichever rank fails, so that no rank waits forever.
    assert len(group.said) == (1 if "unsuitable" in problem else 2)


def test_a_sum_leaves_the_one_before_in_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slower rank may still read it: two slots take turns, and both lie in the buffer."""
    import torch.distributed._symmetric_memory as symmetric

    class OnDevice(torch.Tensor):
        is_cuda = True

    buffers: list[torch.Tensor] = []

    def empty(size: int, **kept: Any) -> torch.Tensor:
        buffers.append(torch.zeros(size, **kept))
        return buffers[0]

    peers = SimpleNamespace(buffer_ptrs=[0], barrier=lambda: None)
    monkeypatch.setattr(symmetric, "empty", empty)
    monkeypatch.setattr(symmetric, "rendezvous", lambda buffer, group: peers)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(collectives, "add_up", lambda pointers, start, out: None)
    group: Any = SimpleNamespace(size=1, index=0, process_group=None)
    ours = collectives.SymmetricGroup(group, torch.device("cpu"))
    numbers = collectives.SLOT_BYTES // 4
    for call in range(1, 6):
        ours.all_reduce(torch.full((numbers,), float(call)).as_subclass(OnDevice))
        slots = buffers[0].view(torch.float32).view(-1, numbers)
        assert sorted({float(row.unique()) for row in slots}) == [call - 1, call]


@pytest.mark.gpu
def test_two_gpus_sum_like_nccl() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs that map each other's memory")
    torch.multiprocessing.spawn(_rank, nprocs=2)


def _rank(rank: int) -> None:
    import torch.distributed as dist

    from farthing.parallel.collectives import DistGroup

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method="tcp://127.0.0.1:29655", rank=rank, world_size=2
    )
    nccl = DistGroup([0, 1], 60.0)
    group = collectives.fastest(nccl, device)
    assert isinstance(group, collectives.SymmetricGroup)
    for n in (1, 7168, 65_536, 1 << 20):
        for dtype in (torch.float32, torch.bfloat16):
            for _ in range(3):
                x = torch.randn(n, device=device, dtype=dtype)
                torch.testing.assert_close(group.all_reduce(x.clone()), nccl.all_reduce(x.clone()))
    dist.destroy_process_group()
