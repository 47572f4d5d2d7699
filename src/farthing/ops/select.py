"""Backend selection, done once when an engine is built."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from farthing.config import Compute, Dtype, Quantization
from farthing.extras import has_torch
from farthing.lazy import torch
from farthing.ops.api import Ops

log = logging.getLogger(__name__)

# Name -> module with `create(dtype, threads, quantization, packed) -> Ops`, imported only if selected.
# Packages for other devices register theirs as entry points of "farthing.ops", as `farthing_gpu` does;
# its `compiles()` says whether Triton compiles for the GPU at hand.
BACKENDS = {
    "reference": "farthing.ops.reference",
    "cpu": "farthing.ops.cpu",
    "torch": "farthing.ops.torch_backend",
}
_PARTS = {"cpu": "isa", "torch": "device"}  # the meaning of what follows a backend's name and a slash
_GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd", "/dev/dri")  # of Linux


def known_backends() -> dict[str, str]:
    """Name -> module of every backend, entry points included."""
    return BACKENDS | {e.name: e.value for e in entry_points(group="farthing.ops")}


def select(
    backend: str = "auto",
    dtype: torch.dtype | Dtype | None = None,
    threads: int | None = None,
    quantization: Quantization | None = None,
    packed: str | None = None,
    verify: bool = False,
    parts: int | None = None,
    arrays: bool = False,
    compute: Compute = "auto",
) -> Ops:
    """Resolve `backend` ('auto', 'reference', 'cpu', 'gpu', 'torch' or an entry point) and log the choice.

    'cpu/ISA' selects an instruction set of the CPU kernels, such as 'cpu/avx2'; 'torch/DEVICE' a device of
    torch, such as 'torch/xpu'. dtype: activation dtype; None: the backend's default. quantization: round
    dense weights to nearest while packing. packed: a file written by `Ops.save_packed`, mapped instead of
    packing again; verify: compare its checksums first.
    parts: with `--deterministic`, how many halves of a row-parallel product this process computes.
    compute: what the CPU kernels round inputs of integer matrices to: `int8`, or `exact`, two integers; auto:
    exact with dtype float32.
    arrays: tensors are numpy arrays and torch is not imported (backend 'cpu' only; others ignore it).
    Raises ValueError for an unknown name, RuntimeError if the backend cannot run on this machine.
    """
    if backend == "auto":
        backend = resolve(backend)
        if backend == "torch":
            log.warning("the native CPU kernels are not built; serving with the slower torch ops")
    name, more = _named(backend)
    if parts is not None and name != "cpu":
        raise ValueError(f"deterministic: got True with backend {backend!r}; expected backend 'cpu'")
    if parts is not None:
        more["parts"] = parts
    if compute != "auto" and name != "cpu":
        raise ValueError(f"compute: got {compute!r} with backend {backend!r}; expected backend 'cpu'")
    if name == "cpu":
        more |= {"compute": compute, "verify": verify}
    if arrays and name == "cpu":
        more["arrays"] = True
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else dtype if arrays and name == "cpu" else getattr(torch, dtype)
    ops: Ops = import_module(known_backends()[name]).create(
        dtype=dtype, threads=threads, quantization=quantization, packed=packed, **more
    )
    log.info("ops: %s", ops.name)
    return ops


def check(backend: str) -> None:
    """Raise what `select` would for a backend that cannot run on this machine; torch is not imported for the
    CPU's."""
    if backend != "auto":
        name, more = _named(backend)
        rest = {"arrays": True} if name == "cpu" else {}
        module = import_module(known_backends()[name])
        module.create(dtype=None, threads=1, quantization=None, packed=None, **more, **rest)


def _named(backend: str) -> tuple[str, dict[str, Any]]:
    """The name of a backend, and the options that follow it. Raises ValueError."""
    backends = known_backends()
    name, _, part = backend.partition("/")
    if name not in backends or (part and name not in _PARTS):
        raise ValueError(f"backend: got {backend!r}; expected 'auto' or one of {sorted(backends)}")
    return name, {_PARTS[name]: part} if part else {}


def resolve(backend: str) -> str:
    """Resolve 'auto' on this machine; other names are returned unchanged."""
    if backend != "auto":
        return backend
    if has_torch() and _device() and torch.cuda.is_available() and _gpu():
        return "gpu"
    return "cpu" if _native() else "torch"


def _device() -> bool:
    """Whether this machine may have a GPU. Asking torch would import it."""
    return sys.platform != "linux" or any(map(os.path.exists, _GPU_FILES))


def _gpu() -> bool:
    """Whether Triton is installed and compiles for this GPU; interpreted kernels are for tests and never
    selected automatically."""
    try:
        return bool(import_module(known_backends()["gpu"]).compiles())
    except (ImportError, KeyError):
        return False


def _native() -> bool:
    try:
        import_module("farthing._native")
    except ImportError:
        return False
    return True
