"""Kernels read what they are given and nothing after it: the page that follows each input has no access."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing.ops.api import Norm
from farthing.ops.cpu import CpuOps
from farthing.ops.specs import RouterSpec
from tests.isas import ISAS, threads_of
from tests.ops.parts import EPS, experts, norm

pytestmark = pytest.mark.usefixtures("exact_on_amx")

SPEC = RouterSpec(8, 3)


def at_the_end(x: Tensor) -> Tensor:
    """A copy whose last byte is the last of its page; to touch the next one ends the process."""
    data = x.numpy()
    pages = -(-data.nbytes // mmap.PAGESIZE)
    room = np.frombuffer(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE), np.uint8)
    end = pages * mmap.PAGESIZE
    address = ctypes.c_void_p(room.ctypes.data + end)
    assert ctypes.CDLL(None, use_errno=True).mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = room[end - data.nbytes : end].view(data.dtype).reshape(data.shape)
    copy[...] = data
    return torch.from_numpy(copy)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_given_experts_are_read_to_their_end(isa: str, tokens: int) -> None:
    torch.manual_seed(0)
    ops, scale = CpuOps(threads_of(isa), isa=isa), Norm(norm(64), EPS)
    handle = ops.pack_moe("m", SPEC, lambda: experts(SPEC, "int8", 64, 96, None))
    x, gates = torch.randn(tokens, 64), torch.rand(tokens, 3)
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)])
    y = ops.moe_chosen(x.clone(), handle, scale, ids, gates)
    z = ops.moe(x.clone(), handle, scale, None, False, ids)
    ids, gates = at_the_end(ids), at_the_end(gates)
    assert torch.equal(ops.moe_chosen(at_the_end(x), handle, scale, ids, gates), y)
    assert torch.equal(ops.moe(at_the_end(x), handle, scale, None, False, ids), z)
