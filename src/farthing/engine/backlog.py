"""Limits on work in flight: sequences, and their prompt tokens in memory."""

from __future__ import annotations

from farthing.config import EngineConfig
from farthing.engine.request import QueueFull

_CACHES = 16  # prompt tokens in flight, in units of what the cache holds


class Backlog:
    """Counts waiting and running work. The caller holds a lock."""

    def __init__(self, config: EngineConfig) -> None:
        """config: resolved, so that num_blocks is known."""
        assert config.num_blocks is not None
        self._limit = None if config.max_queue is None else config.max_num_seqs + config.max_queue
        self._max_tokens = config.max_queue_tokens or _CACHES * config.num_blocks * config.block_size
        self._sequences = self._tokens = 0

    @property
    def room(self) -> int | None:
        """Sequences that may still be added; None: any number."""
        return None if self._limit is None else max(0, self._limit - self._sequences)

    def add(self, sequences: int, prompt_tokens: int) -> None:
        """Add a request of `sequences` completions. Raises QueueFull without adding anything.

        A request is never refused by an idle engine.
        """
        tokens = sequences * prompt_tokens
        if self._limit is not None and self._sequences:
            if self._sequences + sequences > self._limit:
                raise QueueFull(
                    f"queue full: {self._sequences} sequences in flight and {sequences} requested "
                    f"(limit {self._limit}); retry later"
                )
            if self._tokens + tokens > self._max_tokens:
                raise QueueFull(
                    f"queue full: {self._tokens} prompt tokens in flight and {tokens} requested "
                    f"(limit {self._max_tokens}); retry later"
                )
        self._sequences += sequences
        self._tokens += tokens

    def remove(self, sequences: int, prompt_tokens: int) -> None:
        """A request has ended."""
        self._sequences -= sequences
        self._tokens -= sequences * prompt_tokens
