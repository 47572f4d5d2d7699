"""The models that people start with (`assets/catalogue.toml`), the file of each that suits a machine, and
what else is meant by a name that is typed."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from farthing.memory import machine_memory

_ASSETS = Path(__file__).parent / "assets"
_FILE = _ASSETS / "catalogue.toml"
# Addresses of a model's page, and what other programs put before an id.
_ADDRESS = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)([^/?#]+/[^/?#]+)(?:/tree/[^/]+)?/?"
)
CONTEXT = 8_192  # tokens of a conversation that has to fit
_USABLE = 0.8  # of the machine's memory
_FLUENT = 5_000_000_000  # bytes per token above which a smaller file is chosen, because it is faster
_PROGRAM = 300_000_000  # bytes of Python and its libraries


@dataclass(frozen=True, slots=True)
class File:
    """A quantized file of a model. type: as GGUF names it."""

    type: str
    size: int  # bytes, about


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the catalogue; parameters of the whole, and of those that a token reads."""

    name: str
    repository: str
    files: tuple[File, ...]  # the closest to the original first
    parameters: float
    active: float
    cache: int  # bytes per token
    gated: bool = False
    package: str | None = None  # a package of an index that has the file, with its version

    def memory(self, file: File) -> int:
        """Bytes that a conversation takes: weights, the cache of its context, and the program."""
        return file.size + CONTEXT * self.cache + _PROGRAM

    def read(self, file: File) -> float:
        """Bytes of weights that a token reads."""
        return file.size * self.active / self.parameters

    def fits(self, file: File, memory: int) -> bool:
        """Whether a conversation fits a machine with that memory."""
        return self.memory(file) <= _USABLE * memory

    def best(self, memory: int) -> File:
        """The file closest to the original of those that fit and are not slow; else the smallest."""
        fitting = (f for f in self.files if self.fits(f, memory) and self.read(f) <= _FLUENT)
        return next(fitting, self.files[-1])

    def id_of(self, file: File) -> str:
        """Its name on the hub."""
        return self.repository if self.package else f"{self.repository}:{file.type}"


@cache
def catalogue() -> dict[str, Entry]:
    """The models by name, the most worth having first."""
    return {name: _entry(name, **raw) for name, raw in tomllib.loads(_FILE.read_text("utf-8")).items()}


def _entry(
    name: str, *, repository: str, files: dict[str, float], parameters: float, cache: float,
    active: float | None = None, gated: bool = False, package: str | None = None,
) -> Entry:  # fmt: skip
    found = tuple(File(kind, round(size * 1e9)) for kind, size in files.items())
    active = parameters if active is None else active
    return Entry(name, repository, found, parameters, active, round(cache * 1000), gated, package)


def id_for(name: str) -> str | None:
    """The hub id of a name of the catalogue, with the file that suits this machine; None for other names."""
    entry = catalogue().get(name.lower())
    return None if entry is None else entry.id_of(entry.best(machine_memory()))


@cache
def short_names() -> dict[str, str]:
    """Names of released models, and their hub ids."""
    names: dict[str, str] = tomllib.loads((_ASSETS / "models.toml").read_text(encoding="utf-8"))
    return names


def plain_name(model: str) -> str:
    """The hub id within an address of the hub; other names unchanged."""
    address = _ADDRESS.fullmatch(model)
    return model if address is None else address[1]


def hub_id(model: str) -> str:
    """The id that a short name or an address stands for, with the file if the catalogue has it; other names
    unchanged."""
    name = plain_name(model)
    return id_for(name) or short_names().get(name.lower(), name)


def suggestion(name: str) -> str:
    """A question for the name or hub id that is closest to `name`; "" if none is close."""
    repositories = {entry.repository for entry in catalogue().values()} | set(short_names().values())
    known = {each.lower(): each for each in (*catalogue(), *short_names(), *sorted(repositories))}
    close = get_close_matches(name.lower(), known, n=1)
    return f"did you mean {known[close[0]]!r}? " if close else ""
