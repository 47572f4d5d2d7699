"""The native CPU backend: packed weights, kernels for the processor at hand, one pool of threads."""

from __future__ import annotations

import os

import torch

from farthing.ops.cpu.backend import CpuOps

__all__ = ["CpuOps", "create"]


def create(
    dtype: torch.dtype | None, threads: int | None, quantization: str | None, packed: str | None
) -> CpuOps:
    """The backend's factory (see `farthing.ops.select`).

    Activations are float32 whatever `dtype` says: kernels read them so, and bfloat16 would only round them.
    What `dtype` decides is the cache of latents, the only activations that are kept: float32 if that is asked
    for, else bfloat16, which halves what attention reads. `threads` defaults to the CPUs this process may
    use. Raises ImportError where `farthing._native` is not built, ValueError on a bad argument.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype {dtype} is not served by backend 'cpu'; expected float32 or bfloat16")
    if threads is not None and threads < 1:
        raise ValueError(f"threads {threads} is not a number of threads; expected at least 1")
    # Two pools of threads would fight for the cores: torch keeps to the calling thread.
    torch.set_num_threads(1)
    ops = CpuOps(threads or len(os.sched_getaffinity(0)), quantization, packed)
    ops.cache_dtype = "float32" if dtype is torch.float32 else "bfloat16"
    return ops
