"""Optional extras of the package: what they add and what is missing, from the installed metadata."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

EXTRAS = {
    "fast": "a faster event loop and HTTP parser",
    "structured": "JSON schemas and grammars",
    "gpu": "the GPU backend and NVML energy",
    "fleet": "forecasts, gateway and Kubernetes",
    "compress": "compressed-tensors and ONNX export",
    "train": "training curves",
    "ray": "ranks on several nodes",
}
_DISTRIBUTIONS = {"yaml": "pyyaml", "grpc": "grpcio", "google": "protobuf", "pynvml": "nvidia-ml-py"}


@cache
def declared() -> dict[str, list[str]]:
    """{extra: distribution names} of EXTRAS; {} if the package is not installed."""
    try:
        lines = requires("farthing") or []
    except PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", line)
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if extra and name and extra.group(1) in EXTRAS and name.group() != "farthing":
            found.setdefault(extra.group(1), []).append(name.group())
    return found


def missing(extra: str) -> list[str]:
    """Distributions of an extra that are not installed."""
    return [name for name in declared().get(extra, []) if not _installed(name)]


def extra_for(module: str, preferred: str = "") -> str | None:
    """The extra that provides a top-level module, `preferred` if several do; None if none does."""
    distribution = _normal(_DISTRIBUTIONS.get(module, module))
    found = [extra for extra, names in declared().items() if distribution in map(_normal, names)]
    return preferred if preferred in found else next(iter(found), None)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
