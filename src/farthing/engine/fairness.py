"""Fair shares between clients: which is served next, and which is preempted.

Requests are grouped into clients; the server uses the name of the API key. Service is counted in computed
tokens. The least served client is next. A client that returns after a pause starts at the level of the least
served other one, so that idling accumulates no credit. This is the counter of Sheng et al. (2024, "Fairness
in Serving Large Language Models"); unlike deficit round robin it does not need output lengths in advance. Two
clients with waiting work are served equally many tokens, up to one step and one prompt.
"""

from __future__ import annotations

from collections import Counter


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
