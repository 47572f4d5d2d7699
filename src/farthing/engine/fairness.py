"""Fair shares between clients: which is served next, and which is preempted.

Requests are grouped into clients; the server uses the name of the API key. Service is counted in computed
tokens. The least served client is next. A client that returns after a pause starts at the level of the least
served other one, so that idling accumulates no credit. This is the counter of Sheng et al. (2024, "Fairness
in Serving Large Language Models"); unlike deficit round robin it does not need output lengths in advance. Two
clients with waiting work are served equally many tokens, up to one step and one prompt.

Rows and blocks are shared equally, too: a client above its share gives way to one below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

from farthing.engine.block_pool import BlockPool
from farthing.engine.sequence import S


class Fairness:
    """Tokens served to each client. Plain numbers; the scheduler decides."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._live: Counter[str] = Counter()  # sequences
        self._level = 0  # of the client that was the last one to have work

    @property
    def num_clients(self) -> int:
        """Clients that have sequences."""
        return len(self._live)

    def served(self, client: str) -> int:
        """Tokens, counted from an arbitrary start."""
        return self._served.get(client, 0)

    def enter(self, client: str) -> None:
        """A sequence was added."""
        if client not in self._live:
            level = min((self._served[other] for other in self._live), default=self._level)
            self._served[client] = max(self._served.get(client, 0), level - 1)  # before those at the level
        self._live[client] += 1

    def leave(self, client: str) -> None:
        """A sequence has ended."""
        self._live[client] -= 1
        if self._live[client]:
            return
        del self._live[client]
        if not self._live:
            self._level = self._served[client]
        level = min((self._served[other] for other in self._live), default=self._level)
        for other, served in list(self._served.items()):
            if other not in self._live and served <= level:
                del self._served[other]  # it would start at the level anyway

    def charge(self, client: str, tokens: int) -> None:
        """Tokens are computed for a client."""
        self._served[client] = self._served.get(client, 0) + tokens


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
    """The sequences to preempt so that a client gets a row and `need` blocks; none without a claim.

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
        if spared or seq.busy or (used[owner] <= most_rows and held[owner] <= most_blocks):
            continue
        chosen.append(seq)
        used[owner] -= 1
        held[owner] -= len(seq.blocks)
        lack -= sum(pool.refs(block) == 1 for block in seq.blocks)
    return chosen if lack <= 0 else []
