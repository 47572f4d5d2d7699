"""What a backend needs to know to sum over the ranks of a host within one native call."""

from __future__ import annotations

from dataclasses import dataclass


class PeerLost(RuntimeError):
    """Another rank has exited, or did not join a collective in time."""


@dataclass(frozen=True, slots=True)
class SharedSum:
    """Shared memory of sums over one host's ranks, as addresses (see `farthing.parallel.shared`)."""

    counters: int  # rank 0's counter; the others follow, one cache line apart
    slots: int  # two per rank
    slot_bytes: int
    step: int  # number of collectives this rank has started
    failed: int  # a word that becomes nonzero once a rank has failed
    size: int
    index: int
    parent: int  # exit if this parent process exits; 0 for none
    crowded: bool  # more ranks than cores
    timeout: float  # seconds
