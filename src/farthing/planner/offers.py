"""What the catalogue's models would do on this machine, before anything is downloaded: an ESTIMATE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from farthing.catalogue import Entry, File, catalogue
from farthing.cpus import own_cpus
from farthing.memory import machine_memory
from farthing.planner.estimate import BANDWIDTH, INT8, Machine

PROMPT, BEHIND = 200, 1_000  # tokens of a first question with its system prompt, and of a context
PROBE = 1 << 28  # bytes
SHOWN = 6  # models that are offered at once
SLOW = 5.0  # tokens per second below which a model is not offered: about the speed of reading aloud


@dataclass(frozen=True, slots=True)
class Offer:
    """A model of the catalogue: its file for this machine, and what to expect of it."""

    entry: Entry
    file: File
    memory: int  # bytes of a conversation
    tokens_per_second: float
    first_answer: float  # seconds to the first token, once the model is loaded
    fits: bool


def offers(machine: Machine, memory: int) -> Iterator[Offer]:
    """Every model of the catalogue, the most worth having first. memory: bytes of the machine."""
    low, high = BANDWIDTH
    for entry in catalogue().values():
        file = entry.best(memory)
        read = entry.read(file) + BEHIND * entry.cache
        speed = (low + high) / 2 * machine.sockets * machine.bandwidth * 1e9 / read
        prompt = 2 * entry.active * 1e9 * PROMPT / (INT8 * machine.peak * 1e12)
        yield Offer(entry, file, entry.memory(file), speed, prompt + 1 / speed, entry.fits(file, memory))


def offers_here() -> list[Offer]:
    """The whole catalogue on this machine, whose memory and processor are measured. Raises ValueError."""
    cpus, bandwidth, core = measure()
    return list(offers(Machine(1, cpus, bandwidth, core), machine_memory()))


def worth(found: Sequence[Offer]) -> list[Offer]:
    """A few that fit: the most worth having of those that are not slow, and the smallest."""
    fitting = [offer for offer in found if offer.fits]
    quick = [offer for offer in fitting if offer.tokens_per_second >= SLOW] or fitting[-3:]
    return [*quick[: SHOWN - 1], *quick[SHOWN - 1 :][-1:]]


def measure() -> tuple[int, float, float]:
    """Threads that would serve here; GB/s that they read; INT8 GOP/s of each with all busy."""
    try:
        native: Any = import_module("farthing._native")
    except ImportError:
        raise ValueError(
            "the CPU kernels are not built, so nothing can be measured; expected --socket-bandwidth and "
            "--core-int8"
        ) from None
    cpus = own_cpus().threads()
    units = ("avx2_int8", "avx_vnni_int8", "vnni_int8", "amx_int8")
    peak = max(native.peak_ops(unit, cpus) for unit in units)
    return cpus, native.read_bandwidth(cpus, PROBE), peak / cpus
