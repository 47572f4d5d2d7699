"""Checks of the processor, memory and accelerators."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from farthing.cost import cpu_name, usable_cpus
from farthing.doctor.check import Check
from farthing.extras import how_to_install

# Instruction sets used by the kernels, best last, with their /proc/cpuinfo names.
INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
GIB = 1 << 30
_PROBE_BYTES = 512 << 20  # larger than all but the largest caches


def check_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterator[Check]:
    """Name, vCPUs and instruction sets."""
    name = cpu_name(cpuinfo) or platform.processor() or platform.machine()
    usable, present = usable_cpus(), os.cpu_count() or 1
    some = "" if usable == present else f" of {present}: affinity or a control group keeps the others"
    yield Check(
        group="processor",
        name="cpu",
        status="info",
        detail=f"{name}, {usable} vCPUs{some}",
        data={"name": name, "usable": usable, "present": present, "architecture": platform.machine()},
    )
    found = [flag for flag in INSTRUCTION_SETS if flag in _flags(cpuinfo)]
    native = _native()
    kernels = str(native.instruction_sets()) if native is not None else ""
    vector = any(flag.startswith(("avx512", "amx")) for flag in found)
    yield Check(
        group="processor",
        name="instruction sets",
        status="ok" if vector else "warn" if platform.machine() in ("x86_64", "AMD64") else "info",
        detail=(", ".join(found) or "none that the kernels know")
        + (f"; kernels: {kernels}" if kernels else ""),
        advice="" if vector else "decoding is bound by memory and hardly suffers; long prompts will be slow",
        data={"instruction_sets": found, "kernels": kernels},
    )


def check_memory(measure: bool = True) -> Iterator[Check]:
    """Memory size and (briefly measured) read bandwidth, which bounds decoding."""
    total, free = _meminfo("MemTotal"), _meminfo("MemAvailable")
    yield Check(
        group="memory",
        name="size",
        status="warn" if free and free < 2 * GIB else "info",
        detail=f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB free" if total else "unknown",
        advice="close something: the weights and the KV cache take what is free"
        if 0 < free < 2 * GIB
        else "",
        data={"total_bytes": total, "free_bytes": free},
    )
    if not measure:
        return
    rate, how = read_bandwidth(usable_cpus())
    # every token reads each active weight once
    yield Check(
        group="memory",
        name="read bandwidth",
        status="info",
        detail=f"{rate:.1f} GB/s measured ({how}); "
        f"at most {rate:.0f} tokens/s for each GB of weights a token reads",
        data={"gb_per_second": rate, "measured_with": how},
    )


def read_bandwidth(threads: int) -> tuple[float, str]:
    """(GB/s, method): the native kernels' probe, else numpy, which reports less."""
    native = _native()
    if native is not None:
        return float(native.read_bandwidth(threads, _PROBE_BYTES)), f"native, {threads} threads"
    return _numpy_bandwidth(threads), f"numpy, {threads} threads, a lower bound"


def _numpy_bandwidth(threads: int, size: int = _PROBE_BYTES // 2, passes: int = 4) -> float:
    import numpy as np

    parts = [np.ones(size // threads // 8, dtype=np.uint64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            began = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = max(best, size / (time.perf_counter() - began) / 1e9)
    return best


def check_gpus() -> Iterator[Check]:
    """CUDA devices visible to torch."""
    try:
        import torch
    except ImportError:
        return  # reported by the software checks
    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield Check(
            group="accelerator",
            name="gpu",
            status="info",
            detail="none" if built else "none; this torch is built without CUDA",
            advice="" if built else f"with an NVIDIA GPU: a CUDA build of torch, {how_to_install('gpu')}",
            data={"count": 0},
        )
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Check(
            group="accelerator",
            name=f"gpu {index}",
            status="ok",
            detail=f"{device.name}, {device.total_memory / GIB:.0f} GiB, sm {device.major}.{device.minor}",
            data={"name": device.name, "memory_bytes": device.total_memory},
        )


def _native() -> Any:
    """The native module; None if it is not built or does not load."""
    try:
        return import_module("farthing._native")
    except ImportError:
        return None


def _flags(cpuinfo: Path) -> set[str]:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def _meminfo(field: str) -> int:
    """Total memory in bytes; 0 if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
