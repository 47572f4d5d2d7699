"""Optional extras of the package: what they add and what is missing, from the installed metadata."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

EXTRAS = {
    "torch": "GPTQ, AWQ and other quantized safetensors that are not packed; several ranks",
    "gpu": "the GPU backend and NVML energy",
    "compress": "compression, and export to compressed-tensors and ONNX",
    "train": "training and its curves",
    "fleet": "Prophet's forecasts, charts, Kubernetes, and cache events for routers",
    "ray": "ranks on several nodes, and Ray Serve",
    "mcp": "tools of MCP servers in `farthing chat` and on the page",
}
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"  # PyTorch's own index; PyPI's wheels for Linux have CUDA
_NAME = re.compile(r"[A-Za-z0-9._-]+(\[[\w,-]+\])?")
_RANGE = re.compile(r"[ (]*([<>=!~][^;)]*)?")  # of versions, after a name
_EXTRA = re.compile(r"""extra\s*==\s*["']([\w-]+)["']""")
_DISTRIBUTIONS = {"yaml": "pyyaml", "pynvml": "nvidia-ml-py", "zmq": "pyzmq"}


def how_to_install(extra: str, module: str = "") -> str:
    """The command that installs what is missing of an extra, by its packages' names: `farthing` on PyPI is
    not this project's. module: one that could not be imported."""
    packages = missing(extra) or declared().get(extra, [extra])
    if module and (name := _DISTRIBUTIONS.get(module, module)) not in map(_bare, packages):
        packages = [name, *packages]
    command = " ".join(("pip install", *(f"'{_ranges().get(name, name)}'" for name in packages)))
    if "torch" in packages and not has_torch():
        command += f" (without CUDA: add --extra-index-url {CPU_WHEELS})"
    return command


@cache
def _ranges() -> dict[str, str]:
    """{distribution: the same with the range of its versions} of everything that this package may need."""
    found = {}
    for line in requires("farthing") or []:
        if name := _NAME.match(line):
            versions = _RANGE.match(line, name.end())
            found[name.group()] = name.group() + ((versions and versions[1]) or "").strip()
    return found


def needs_torch() -> str:
    """The error of whatever needs PyTorch, where it is not installed."""
    return f"needs PyTorch: {how_to_install('torch')}"


def has_torch() -> bool:
    """Whether PyTorch is installed. Does not import it."""
    return find_spec("torch") is not None


@cache
def declared() -> dict[str, list[str]]:
    """{extra: distribution names} of EXTRAS, those of extras that it includes too; {} if not installed."""
    extras = {extra: names for extra, names in _extras("farthing").items() if extra in EXTRAS}
    return {extra: _flat(extras, extra) for extra in extras}


def _extras(distribution: str, conditional: bool = True) -> dict[str, list[str]]:
    """{extra: distribution names} of an installed distribution; {} if it is not installed. `conditional`:
    with those needed only on some systems or versions of Python."""
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        return {}
    extras: dict[str, list[str]] = {}
    for line in lines:
        name, marker = _NAME.match(line), line.partition(";")[2]
        extra = _EXTRA.search(marker)
        if name and extra and (conditional or extra.group() == marker.strip()):
            extras.setdefault(extra.group(1), []).append(name.group())
    return extras


def _flat(extras: dict[str, list[str]], extra: str) -> list[str]:
    """The distributions of an extra; of `farthing[a,b]`, those of a and b."""
    flat: list[str] = []
    for name in extras.get(extra, []):
        own = re.fullmatch(r"farthing\[(.*)\]", name)
        flat += [each for part in own[1].split(",") for each in _flat(extras, part)] if own else [name]
    return flat


def missing(extra: str) -> list[str]:
    """Distributions of an extra that are not installed."""
    return [name for name in declared().get(extra, []) if not _installed(name)]


def extra_for(module: str, preferred: str = "") -> str | None:
    """The extra that provides a top-level module, `preferred` if several do; None if none does."""
    distribution = _normal(_DISTRIBUTIONS.get(module, module))
    extras = [
        extra
        for extra, names in declared().items()
        if distribution in (_normal(_bare(name)) for name in names)
    ]
    return preferred if preferred in extras else next(iter(extras), None)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _bare(name: str) -> str:
    """`ray` of `ray[serve]`: metadata is found by the name alone."""
    return name.partition("[")[0]


def _installed(name: str) -> bool:
    """Whether a distribution is installed, with what the extras that its name lists need everywhere."""
    try:
        version(_bare(name))
    except PackageNotFoundError:
        return False
    listed = name.removeprefix(_bare(name)).strip("[]").split(",")
    needs = _extras(_bare(name), conditional=False)
    return all(_installed(need) for extra in listed for need in needs.get(extra, ()))
