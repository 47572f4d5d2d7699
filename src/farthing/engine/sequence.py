"""One sequence of tokens on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any


class Status(Enum):
    """Where a sequence stands."""

    NEW = auto()  # the scheduler has not seen it
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """State the scheduler owns; `payload` is the engine's and the scheduler never looks at it.

    tokens[:num_computed] are in the cache. While decoding, the last token is sampled and not yet computed.
    """

    id: int
    tokens: list[int]  # prompt, then output
    num_prompt: int
    max_len: int  # tokens it may grow to
    order: float = 0.0  # smaller runs first, larger is preempted first
    salt: str = ""
    read_cache: bool = True
    payload: Any = None

    status: Status = Status.NEW
    num_computed: int = 0
    num_cached: int = 0  # tokens found in the prefix cache at the last admission
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0  # leading blocks offered to the prefix cache
    drafts: list[int] = field(default_factory=list)  # proposed continuation, not verified
    preemptions: int = 0
    row: int = -1  # while running: a number below max_num_seqs that no other running sequence has
    row_filled: int = 0  # blocks the runner has copied to its table

    @property
    def key(self) -> tuple[float, int]:
        """Total order of urgency."""
        return (self.order, self.id)

    @property
    def num_output(self) -> int:
        """Sampled tokens."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True, slots=True)
class Scheduled:
    """What one sequence computes in one step: tokens[start : start + count], then `drafts`."""

    seq: Sequence
    start: int
    count: int
    drafts: tuple[int, ...]
    sample: bool  # the last known token is among them, so a next token comes out
    decode: bool  # nothing but the last sampled token (and drafts)
    first: bool  # admitted in this step

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return self.count + len(self.drafts)
