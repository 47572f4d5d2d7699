"""The native CPU backend: packed weights, kernels for the CPU's ISA, one thread pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farthing.config import Compute, is_exact
from farthing.cpus import own_cpus
from farthing.lazy import torch
from farthing.ops.arrays import dtype_name

if TYPE_CHECKING:
    from farthing.ops.cpu.backend import CpuOps

__all__ = ["CpuOps", "create"]


def __getattr__(name: str) -> Any:
    """CpuOps on first use: `farthing plan` needs only the sizes of packed matrices, and no numpy."""
    if name != "CpuOps":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from farthing.ops.cpu.backend import CpuOps

    return CpuOps


def create(
    dtype: torch.dtype | str | None,
    threads: int | None,
    quantization: str | None,
    packed: str | None,
    isa: str = "auto",
    parts: int | None = None,
    arrays: bool = False,
    compute: Compute = "auto",
    verify: bool = False,
) -> CpuOps:
    """The backend's factory (see `farthing.ops.select`).

    Activations are always float32: kernels read float32, and bfloat16 would only add rounding. Matrices of
    integers round their inputs to 8 bits, or with `compute` "exact" to two integers, as it is with float32
    unless it says otherwise. `dtype` sets the dtype of the latent cache: float32 if requested, else bfloat16,
    which halves the bytes that attention reads. `threads` defaults to the cores this process may use.
    `arrays`, `parts`, `verify`: see `farthing.ops.select`.
    Raises ImportError if `farthing._native` is not built, ValueError for a bad argument.
    """
    from farthing.ops.cpu.backend import CpuOps

    kind = None if dtype is None else dtype_name(dtype)
    if kind not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype: got {dtype} with backend 'cpu'; expected float32 or bfloat16")
    if threads is not None and threads < 1:
        raise ValueError(f"threads: got {threads}; expected at least 1")
    if not arrays:  # two thread pools would compete for cores, so torch uses only the calling thread
        torch.set_num_threads(1)
    ops = CpuOps(
        threads or own_cpus().threads(), quantization, packed, isa,
        parts=parts or 1, invariant=parts is not None, arrays=arrays, exact=is_exact(compute, kind),
    )  # fmt: skip
    if verify:
        ops.verify_packed()
    ops.cache_dtype = "float32" if kind == "float32" else "bfloat16"
    return ops
