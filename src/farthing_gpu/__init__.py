"""The GPU backend: the ops as Triton kernels. See docs/design/gpu-backend.md."""

from __future__ import annotations

import torch

from farthing.extras import how_to_install

try:
    import triton  # noqa: F401
except ImportError as error:
    message = f"backend 'gpu' needs Triton: {how_to_install('gpu')}"
    raise ImportError(message, name="triton") from error

from farthing_gpu.backend import GpuOps
from farthing_gpu.launch import INTERPRETED, LEAST_CAPABILITY

__all__ = ["GpuOps", "compiles", "create"]


def create(
    dtype: torch.dtype | None, threads: int | None, quantization: str | None, packed: str | None
) -> GpuOps:
    """The backend's factory (see `farthing.ops.select`).

    dtype: activation dtype, bfloat16 unless float32 is requested. Raises RuntimeError without an NVIDIA GPU
    unless TRITON_INTERPRET=1 is set, ValueError for a bad argument.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: got {dtype} with backend 'gpu'; expected float32 or bfloat16")
    if quantization not in (None, "int8", "int4"):
        raise ValueError(f"quantization: got {quantization!r}; expected 'int8', 'int4' or None")
    if packed is not None:
        raise ValueError("the gpu backend reads no packed file; use backend 'cpu'")
    if not INTERPRETED and not torch.cuda.is_available():
        raise RuntimeError(
            "backend 'gpu' needs an NVIDIA GPU and a CUDA build of torch, and torch.cuda.is_available() is "
            "False; TRITON_INTERPRET=1 runs its kernels on the CPU, slowly, for tests"
        )
    device = torch.device("cpu" if INTERPRETED else "cuda")
    if not INTERPRETED and (has := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} has compute capability {has[0]}.{has[1]}; "
            f"backend 'gpu' needs 8.0 (Ampere) or later"
        )
    return GpuOps(dtype or torch.bfloat16, device, quantization)


def compiles() -> bool:
    """Whether the kernels run compiled on the GPU at hand: interpreted ones are for tests, and never selected
    automatically."""
    return not INTERPRETED and torch.cuda.get_device_capability() >= LEAST_CAPABILITY
