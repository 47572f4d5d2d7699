"""Checks of Python, the native kernels, compilers and optional extras."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from farthing import extras
from farthing.cost import Prices, open_meter
from farthing.doctor.check import Check

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
        found = version("torch")
    except PackageNotFoundError:
        found = ""
    yield Check(
        group="software",
        name="torch",
        status="ok" if found else "info",
        detail=found or "not installed: only packed files can be served",
        advice="" if found else extras.how_to_install("torch"),
    )


def check_native() -> Iterator[Check]:
    """Whether the C++ kernels are built; without them, Farthing falls back to slow PyTorch ops."""
    compiler = any(shutil.which(name) for name in COMPILERS[:3])
    try:
        module = import_module("farthing._native")
        problem = ""
    except ImportError as error:
        module, problem = None, str(error)
    hint = extras.how_to_install(options="--force-reinstall --no-deps")
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
    found = {name: _version_of(name) for name in COMPILERS if shutil.which(name)}
    compiler = next((name for name in COMPILERS[:3] if name in found), None)
    yield Check(
        group="software",
        name="compilers",
        status="info",
        detail=", ".join(f"{name} {text}".strip() for name, text in found.items()) or "none",
        advice="" if compiler else "install g++ or clang++ (C++20) to build from source",
        data={"found": found},
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
    found = re.search(r"\d+(\.\d+)+", run.stdout)
    return found.group() if found else ""
