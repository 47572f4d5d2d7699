"""Who gives way to whom: rows and blocks are shared equally between clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

from farthing.engine.block_pool import BlockPool
from farthing.engine.sequence import S


def by_claim(running: Seq[S], num_clients: int) -> list[S]:
    """Running sequences, the one to be preempted first at the end.

    That is the least urgent one of the client that holds most blocks.
    """
    if num_clients < 2:
        return list(running)
    held = held_blocks(running)
    return [*running[:1], *sorted(running[1:], key=lambda seq: (held[seq.client], seq.key))]


def held_blocks(running: Seq[S]) -> Counter[str]:
    """Blocks by client; shared ones count for each."""
    held: Counter[str] = Counter()
    for seq in running:
        held[seq.client] += len(seq.blocks)
    return held


def victims(
    running: Seq[S],
    client: str,
    need: int,
    spare: int,
    rows: tuple[int, int],
    num_clients: int,
    pool: BlockPool,
) -> list[S]:
    """The sequences to preempt so that a client gets a row and `need` blocks; none if that is not its right.

    running: by urgency. spare: blocks that stay free in addition. rows: free ones and their total number.
    Sequences of clients above their share give way, least urgent first, but never a client's most urgent one.
    """
    held, used = held_blocks(running), Counter(seq.client for seq in running)
    free_rows, max_rows = rows
    most_rows, most_blocks = max(1, max_rows // num_clients), pool.num_blocks // num_clients
    if used[client] >= most_rows or held[client] + need > most_blocks:
        return []
    lack = need + spare - pool.num_free
    chosen: list[S] = []
    for seq in reversed(running[1:]):
        if lack <= 0 and (free_rows or chosen):
            break
        owner = seq.client
        spared = used[owner] < 2 or owner == client
        if spared or (used[owner] <= most_rows and held[owner] <= most_blocks):
            continue
        chosen.append(seq)
        used[owner] -= 1
        held[owner] -= len(seq.blocks)
        lack -= sum(pool.refs(block) == 1 for block in seq.blocks)
    return chosen if lack <= 0 else []
