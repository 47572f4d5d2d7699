"""Sequences of tokens as the scheduler sees them, and queues of them ordered by urgency."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from enum import Enum, auto
from operator import attrgetter
from typing import Generic, TypeVar

from farthing.engine.block_pool import IntegrityError


class Status(Enum):
    """Scheduling state of a sequence."""

    NEW = auto()  # not added to the scheduler yet
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """State that the scheduler reads and writes. The engine's completions (`Generation`) extend it.

    tokens[:num_computed] are in the cache. While decoding, the last token is sampled and not yet computed.
    """

    id: int
    tokens: list[int]  # prompt, then output
    num_prompt: int
    max_len: int  # maximum number of tokens
    order: float = 0.0  # urgency: smaller runs first, larger is preempted first
    salt: str = ""
    read_cache: bool = True
    client: str = ""  # clients share the engine fairly
    scored: bool = False  # every token of the prompt needs logits

    status: Status = Status.NEW
    num_computed: int = 0
    num_cached: int = 0  # tokens found in the prefix cache at the last admission
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0  # leading blocks registered in the prefix cache
    read_from: int = -1  # the last block at which a read from disk was started
    drafts: list[int] = field(default_factory=list)  # proposed continuation, unverified
    busy: bool = False  # its scheduled tokens take several steps
    preemptions: int = 0
    row: int = -1  # while running: a unique index below max_num_seqs
    row_filled: int = 0  # blocks already copied to the runner's table

    @property
    def key(self) -> tuple[float, int]:
        """Total order of urgency."""
        return (self.order, self.id)

    @property
    def num_output(self) -> int:
        """Number of sampled tokens."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Number of tokens that are not in the cache yet."""
        return len(self.tokens) - self.num_computed


S = TypeVar("S", bound=Sequence)
KEY = attrgetter("key")


@dataclass(frozen=True, slots=True)
class Scheduled(Generic[S]):
    """One sequence's part of a step: tokens[start : start + count], then `drafts`."""

    seq: S
    start: int
    count: int
    drafts: tuple[int, ...]
    sample: bool  # the last known token is included, so the step samples the next one
    decode: bool  # only the last sampled token (and drafts)
    first: bool  # admitted in this step

    @property
    def num_tokens(self) -> int:
        """Number of rows in the step."""
        return self.count + len(self.drafts)


class Queues(dict[str, list[S]]):
    """Waiting sequences by client; clients without any are absent."""

    def push(self, seq: S) -> None:
        """Insert a sequence in order."""
        insert(self.setdefault(seq.client, []), seq)

    def drop(self, seq: S) -> None:
        """Remove a sequence."""
        queue = self.get(seq.client, [])
        remove(queue, seq)
        if not queue:
            del self[seq.client]


def insert(sequences: list[S], seq: S) -> None:
    """Insert a sequence in order."""
    insort(sequences, seq, key=KEY)


def remove(sequences: list[S], seq: S) -> None:
    """Remove a sequence."""
    index = bisect_left(sequences, seq.key, key=KEY)
    if index == len(sequences) or sequences[index] is not seq:
        raise IntegrityError(f"sequence {seq.id} is missing from the queue of its status")
    del sequences[index]
