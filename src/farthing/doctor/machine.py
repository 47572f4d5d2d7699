"""Checks of this machine: processor, memory, accelerators, native kernels, compilers and optional extras."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from farthing import extras
from farthing.cost import Prices, open_meter
from farthing.cpus import CPUINFO, Cpus, cpu_name, own_cpus, usable_cpus
from farthing.extras import has_torch, how_to_install

# The result of a check.

Status = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One result. ok: good; info: a fact; warn: reduced capability; fail: serving will not work."""

    group: str
    name: str
    status: Status
    detail: str
    advice: str = ""  # how to fix or improve it
    data: dict[str, Any] = field(default_factory=dict)  # machine-readable values for --json


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All results, in order."""

    checks: Sequence[Check]

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "fail" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """{"healthy", "checks": [{group, name, status, detail, advice, data}]}."""
        return {"healthy": self.healthy, "checks": [asdict(check) for check in self.checks]}


# Instruction sets used by the kernels, best last of x86-64 and of ARM, with their /proc/cpuinfo names.
INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_vbmi",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)
GIB = 1 << 30
_PROBE_BYTES = 512 << 20  # larger than all but the largest caches


def check_processor(cpuinfo: Path = CPUINFO, cpus: Cpus | None = None) -> Iterator[Check]:
    """Name, vCPUs, cores and memory nodes, and instruction sets."""
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
    yield _cores(cpus or own_cpus())
    flags = [flag for flag in INSTRUCTION_SETS if flag in _flags(cpuinfo)]
    native = _native()
    kernels = str(native.instruction_sets()) if native is not None else ""
    # Of macOS there is no list of flags, but the kernels have looked.
    vector = any(flag.startswith(("avx512", "amx", "asimddp")) for flag in flags) or kernels.startswith(
        "neon"
    )
    yield Check(
        group="processor",
        name="instruction sets",
        status="ok" if vector else "warn" if platform.machine() in ("x86_64", "AMD64") else "info",
        detail=(", ".join(flags) or "none that the kernels know")
        + (f"; kernels: {kernels}" if kernels else ""),
        advice="" if vector else "decoding is bound by memory and hardly suffers; long prompts will be slow",
        data={"instruction_sets": flags, "kernels": kernels},
    )
    if native is not None:
        far, nibbles, near, rows, byte_rows = native.prefetch_distances()
        few = "few rows" if rows > 1 else f"one row (of bytes: up to {byte_rows})"
        yield Check(
            group="processor",
            name="prefetching",
            status="info",
            detail=f"for {few} 8-bit weights {far:,} bytes ahead, 4-bit weights {nibbles:,} into L2 "
            f"and {near:,} into L1, by the kind of processor",
            data={
                "bytes": far,
                "nibbles": nibbles,
                "nibbles_near": near,
                "rows": rows,
                "byte_rows": byte_rows,
            },
        )


def _cores(cpus: Cpus) -> Check:
    """Cores and memory nodes that this process may use, and the threads that are chosen for them."""
    nodes, threads = len(cpus.nodes), cpus.threads()
    others = f" of {cpus.machine_nodes}" if cpus.machine_nodes > nodes else ""
    shared = f" of {cpus.hardware_threads} hardware threads" if cpus.hardware_threads > cpus.cores else ""
    quota = "" if cpus.quota is None else f", quota {cpus.quota:g} CPUs"
    native, bound = _native(), ""
    if native is not None and cpus.pinned and nodes <= min(threads, native.MOST_NODES):
        bound = ", each bound to a core" if threads == cpus.cores else ", bound to their nodes" * (nodes > 1)
    return Check(
        group="processor",
        name="cores",
        status="info",
        detail=f"{cpus.cores}{shared}, {nodes}{others} memory node{'s' * (cpus.machine_nodes > 1)}{quota}; "
        f"{threads} thread{'s' * (threads > 1)} by default{bound}{_verified(cpus)}",
        data={
            "cores": cpus.cores,
            "hardware_threads": cpus.hardware_threads,
            "memory_nodes": nodes,
            "quota": cpus.quota,
            "threads": threads,
        },
    )


def _verified(cpus: Cpus) -> str:
    """Whether the system tells on which memory nodes weights are."""
    native = _native()
    if cpus.machine_nodes == 1 or native is None:
        return ""
    try:
        native.nodes_of_pages([id(native)])
    except RuntimeError as error:
        return f"; the placement of weights cannot be verified ({error})"
    return "; the placement of weights is verified after loading"


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
    rate, how = read_bandwidth(own_cpus().threads())
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
    native, some = _native(), f"{threads} thread{'s' * (threads > 1)}"
    if native is not None:
        return float(native.read_bandwidth(threads, _PROBE_BYTES)), f"native, {some}"
    return _numpy_bandwidth(threads), f"numpy, {some}, a lower bound"


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
    return set(
        next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "").split()
    )


def _meminfo(field: str) -> int:
    """Total memory in bytes; 0 if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


# Checks of Python, the native kernels, compilers and optional extras.

COMPILERS = ("c++", "g++", "clang++", "cmake", "ninja")


def check_python() -> Iterator[Check]:
    """The interpreter and torch."""
    good = sys.version_info >= (3, 11)
    yield Check(
        group="software",
        name="python",
        status="ok" if good else "fail",
        detail=sys.version.split()[0],
        advice="" if good else "install Python 3.11 or newer",
    )
    try:
        installed = version("torch")
    except PackageNotFoundError:
        installed = ""
    yield Check(
        group="software",
        name="torch",
        status="ok" if installed else "info",
        detail=installed or "not installed: only packed files can be served",
        advice="" if installed else extras.how_to_install("torch"),
    )


def check_native() -> Iterator[Check]:
    """Whether the C++ kernels are built; without them, Farthing falls back to slow PyTorch ops."""
    compiler = any(shutil.which(name) for name in COMPILERS[:3])
    try:
        module = import_module("farthing._native")
        problem = ""
    except ImportError as error:
        module, problem = None, str(error)
    hint = "pip install --force-reinstall --no-deps . in a checkout of Farthing"
    hint += "" if compiler else " (needs a C++ compiler)"
    yield Check(
        group="software",
        name="cpu kernels",
        status="ok" if module is not None else "warn",
        detail=f"built ({Path(str(module.__file__)).name})" if module is not None else f"missing: {problem}",
        advice="" if module is not None else f"serving works, but slowly; {hint}",
    )


def check_compilers() -> Iterator[Check]:
    """Compilers, needed only to build from source."""
    versions = {name: _version_of(name) for name in COMPILERS if shutil.which(name)}
    compiler = next((name for name in COMPILERS[:3] if name in versions), None)
    yield Check(
        group="software",
        name="compilers",
        status="info",
        detail=", ".join(f"{name} {text}".strip() for name, text in versions.items()) or "none",
        advice="" if compiler else "install g++ or clang++ (C++20) to build from source",
        data={"found": versions},
    )


def check_extras() -> Iterator[Check]:
    """Each optional extra: complete, or the missing packages."""
    for extra in extras.declared():
        missing = extras.missing(extra)
        yield Check(
            group="extras",
            name=extra,
            status="info" if missing else "ok",
            detail=extras.EXTRAS[extra] + (f"; missing {', '.join(missing)}" if missing else ""),
            advice=extras.how_to_install(extra) if missing else "",
            data={"missing": missing},
        )


def check_energy() -> Iterator[Check]:
    """The source of energy readings in cost accounts."""
    machine = Prices.load().machine("gpu" if _has_gpu() else "cpu")
    source = open_meter(machine).source
    estimated = "estimated" in source
    yield Check(
        group="cost",
        name="energy",
        status="info" if estimated else "ok",
        detail=source + (f" from the declared watts of {machine.hardware.name}" if estimated else ""),
        advice="RAPL needs a readable /sys/class/powercap, NVML needs nvidia-ml-py" if estimated else "",
        data={"source": source},
    )


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _version_of(program: str) -> str:
    """The first version number a program prints; "" if there is none."""
    try:
        run = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    version = re.search(r"\d+(\.\d+)+", run.stdout)
    return version.group() if version else ""


def examine(measure: bool = True) -> Diagnosis:
    """Check the machine. measure: also measure memory bandwidth, which briefly uses every core."""
    checks = chain(
        check_processor(),
        check_memory(measure),
        check_gpus(),
        check_python(),
        check_native(),
        check_compilers(),
        check_extras(),
        check_energy(),
        [_backend()],
    )
    return Diagnosis(list(checks))


def _backend() -> Check:
    """The backend that `--backend auto` resolves to, found by building it."""
    try:
        from farthing.ops.select import select

        ops = select(arrays=not has_torch())
    except (ImportError, RuntimeError, OSError) as error:
        return Check(group="serving", name="backend", status="fail", detail=str(error), advice="see above")
    slow = ops.name.startswith("torch/cpu")
    advice = "build the CPU kernels, or use a GPU: the torch ops are slower" if slow else ""
    if has_torch() and ops.device.type == "cpu" and (other := _accelerator()):
        advice = f"torch has a device of type {other}: --backend torch --device {other} (not tested on one)"
    return Check(
        group="serving",
        name="backend",
        status="warn" if slow else "ok",
        detail=f"auto resolves to {ops.name}",
        advice=advice,
        data={"backend": ops.name},
    )


def _accelerator() -> str | None:
    """The type of torch's accelerator, if there is one."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return None if accelerator is None else str(accelerator.type)
