"""Fair shares between clients: whose turn it is, and what a client may still have.

Every place where API keys compete asks one of these objects: the engine for tokens, the workers that tokenize
and check grammars for CPU time, the event loop for turns, the quotas for requests and tokens per minute, the
store of responses for memory, and the gateway for a replica. What one unit of cost is, the place decides.

Turns follow the virtual token counter of Sheng et al. (2024, "Fairness in Serving Large Language Models"):
every cost is charged to its client, and of the clients with waiting work the one charged least is next.
Unlike deficit round robin, this does not need costs in advance. A client that returns after a pause is lifted
to the level of those at work, so idling accumulates no credit, and one that leaves keeps its debt.

A limit on what each client may have is a token bucket: charges empty it, time or negative charges fill it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, KeysView
from dataclasses import dataclass
from typing import Any

MOST_ABSENT = 16_384  # clients without work that are remembered


class Busy(RuntimeError):
    """A client has as much work waiting as one may have; retry later (HTTP 429)."""


@dataclass(slots=True)
class _Account:
    """One client."""

    at: float  # when `spent` was last reduced
    served: float = 0.0  # its charges, from an arbitrary start: the least served is next
    turn: int = 0  # number of its last turn or arrival
    spent: float = 0.0  # of its limit
    work: int = 0  # pieces of work that it has here, waiting or in progress


class Shares:
    """What each client has been charged. Not thread-safe."""

    def __init__(
        self,
        limit: float = math.inf,
        refill: float = 0.0,
        ahead: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """limit: what a client may have at once; refill: of it per second of `clock`. ahead: how far a client
        that returns is ahead of the least served one, at most the least cost of a turn; 0: level with it."""
        self.limit, self._refill, self._ahead, self._clock = limit, refill, ahead, clock
        self._accounts: dict[str, _Account] = {}
        self._present: dict[str, _Account] = {}  # those with work
        self.present: KeysView[str] = self._present.keys()  # their names, always the current ones
        self._level = 0.0  # of the least served client, at the last time when none had work
        self._turns = 0
        self._most = 0  # accounts, before some are forgotten

    # Whose turn it is

    def enter(self, client: str, pieces: int = 1) -> None:
        """Pieces of the client's work have arrived."""
        account = self._account(client)
        if not account.work:
            account.served = max(account.served, self._start())
            self._moved(account)
            self._present[client] = account
        account.work += pieces

    def leave(self, client: str, pieces: int = 1) -> None:
        """Pieces of its work have ended."""
        account = self._present[client]
        account.work -= pieces
        if not account.work:
            del self._present[client]
            self._moved(account)

    def charge(self, client: str, cost: float) -> None:
        """The client has had something; negative: it has given something back."""
        account = self._account(client)
        account.served += cost
        account.spent += cost
        self._moved(account)

    def next(self, waiting: Iterable[str], tie: Callable[[str], Any] | None = None) -> str:
        """The client whose turn it is, of one or more that have work. tie: orders those that were served
        equally; None: by the time of their last turn or, without one, of their arrival."""
        present = self._present
        if tie is None:
            return min(waiting, key=lambda client: (present[client].served, present[client].turn))
        return min(waiting, key=lambda client: (present[client].served, tie(client)))

    def served(self, client: str) -> float:
        """The client's charges, from an arbitrary start."""
        account = self._accounts.get(client)
        return account.served if account is not None else self._start()

    def work(self, client: str) -> int:
        """Number of pieces of work that a client has here."""
        account = self._present.get(client)
        return account.work if account is not None else 0

    # What a client may have

    def used(self, client: str) -> float:
        """What the client has of its limit."""
        account = self._accounts.get(client)
        return 0.0 if account is None else self._refilled(account).spent

    def room(self, client: str) -> float:
        """What is left of the client's limit; negative: a debt."""
        return self.limit - self.used(client)

    def wait(self, client: str, cost: float = 0.0) -> float:
        """Seconds until there is room for `cost`."""
        lack = cost - self.room(client)
        return 0.0 if lack <= 0 else lack / self._refill if self._refill else math.inf

    def greediest(self, clients: Iterable[str]) -> str:
        """The client, of one or more, that has most: what it has makes room for others."""
        return max(clients, key=self.used)

    # Accounts

    def _account(self, client: str) -> _Account:
        account = self._accounts.get(client)
        if account is None:
            if len(self._accounts) >= self._most:
                self._forget()
            account = self._accounts[client] = _Account(self._clock(), self._start())
        return self._refilled(account) if self._refill else account

    def _refilled(self, account: _Account) -> _Account:
        if self._refill:
            now = self._clock()
            account.spent = max(0.0, account.spent - (now - account.at) * self._refill)
            account.at = now
        return account

    def _moved(self, account: _Account) -> None:
        self._turns += 1
        account.turn = self._turns
        if not self._present:
            self._level = max(self._level, account.served)

    def _start(self) -> float:
        """The level at which a client begins."""
        return max(0.0, self._lowest() - self._ahead)

    def _lowest(self) -> float:
        return min((account.served for account in self._present.values()), default=self._level)

    def _forget(self) -> None:
        """Drop absent clients that are as good as new, and of too many others those nearest to it."""
        lowest, limited, absent = self._lowest(), self.limit < math.inf, []
        for client, account in list(self._accounts.items()):
            spent = self._refilled(account).spent if limited else 0.0
            if account.work or (spent and not self._refill):  # what it has will be given back
                continue
            if spent or account.served > lowest:
                absent.append((spent, account.served, client))
            else:
                del self._accounts[client]
        if len(absent) > MOST_ABSENT:
            for _, _, client in sorted(absent)[: len(absent) - MOST_ABSENT // 2]:
                del self._accounts[client]
        self._most = len(self._accounts) + max(8, min(len(self._accounts), MOST_ABSENT) // 2)
