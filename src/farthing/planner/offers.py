"""What the catalogue's models would do on this machine, before anything is downloaded: an ESTIMATE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from farthing.catalogue import Entry, File, catalogue
from farthing.planner.estimate import BANDWIDTH, INT8, Machine

PROMPT, BEHIND = 200, 1_000  # tokens of a first question with its system prompt, and of a context
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
