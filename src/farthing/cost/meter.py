"""Cost per request, API key and model, in machine seconds, joules and dollars.

The engine divides the wall time of each step over the tokens in it, so each request has the seconds spent
on its prompt and its output. The machine is paid for by wall time, so three buckets always add up to the
total:

    total = requests recorded (prefill + decode) + pending (requests that still run) + idle

The joules of an interval are split between idle and busy time in proportion to declared idle and busy
power. A finished request takes its share of the unassigned busy joules in proportion to its seconds, so
nothing is lost or counted twice. Tokens found in the prefix cache take no step time and cost nothing; their
savings are an estimate (`saved_usd`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from farthing.cost.energy import EnergyMeter
from farthing.cost.prices import Machine

OTHER = "other"  # the account shared by keys beyond `max_accounts`


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Resources used by a request: the engine's `RequestMetrics` as plain numbers."""

    prefill_tokens: int = 0  # prompt tokens computed
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    decode_tokens: int = 0  # output tokens
    prefill_seconds: float = 0.0  # its share of step wall time
    decode_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected a number, 0 or more")


@dataclass(slots=True)
class Spend:
    """Seconds of the whole machine, joules and dollars."""

    seconds: float = 0.0
    joules: float = 0.0
    usd: float = 0.0

    def add(self, other: Spend) -> None:
        """Add in place."""
        self.seconds += other.seconds
        self.joules += other.joules
        self.usd += other.usd

    def __add__(self, other: Spend) -> Spend:
        return Spend(self.seconds + other.seconds, self.joules + other.joules, self.usd + other.usd)


@dataclass(slots=True)
class Account:
    """Spending of one API key and model, or one request, split into prefill, decode and cached tokens."""

    requests: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    decode_tokens: int = 0
    prefill: Spend = field(default_factory=Spend)
    decode: Spend = field(default_factory=Spend)
    saved_usd: float = 0.0  # estimated: cached tokens at the mean price of computed prompt tokens

    @property
    def spend(self) -> Spend:
        """Prefill and decode together."""
        return self.prefill + self.decode

    @property
    def tokens(self) -> int:
        """Prompt (computed and cached) and output tokens."""
        return self.prefill_tokens + self.cached_tokens + self.decode_tokens

    def add(self, other: Account) -> None:
        """Add in place."""
        self.requests += other.requests
        self.prefill_tokens += other.prefill_tokens
        self.cached_tokens += other.cached_tokens
        self.decode_tokens += other.decode_tokens
        self.prefill.add(other.prefill)
        self.decode.add(other.decode)
        self.saved_usd += other.saved_usd


@dataclass(frozen=True, slots=True)
class RequestCost:
    """The cost of one request. `utilization` is the machine's busy share since the meter started."""

    account: Account
    machine: Machine
    joules_source: str
    utilization: float

    @property
    def usd(self) -> float:
        """The request's share of the steps it took part in."""
        return self.account.spend.usd

    @property
    def usd_with_idle(self) -> float:
        """Its share plus a share of idle time, spread evenly over busy time."""
        return self.usd / self.utilization if self.utilization > 0 else self.usd


@dataclass(frozen=True, slots=True)
class CostReport:
    """A snapshot of all spending; total = requests + pending + idle in seconds, joules and dollars."""

    machine: Machine
    joules_source: str
    total: Spend
    idle: Spend
    pending: Spend
    accounts: dict[tuple[str, str], Account]  # (model, api key) -> account

    @property
    def requests(self) -> Account:
        """The sum of all accounts."""
        whole = Account()
        for account in self.accounts.values():
            whole.add(account)
        return whole

    @property
    def utilization(self) -> float:
        """Busy share of the time, 0…1."""
        return 1 - self.idle.seconds / self.total.seconds if self.total.seconds > 0 else 0.0

    @property
    def usd_per_million_tokens(self) -> float | None:
        """Total cost, idle time included, per prompt or output token. None before the first token."""
        tokens = self.requests.tokens
        return self.total.usd / tokens * 1e6 if tokens else None

    @property
    def usd_per_million_output_tokens(self) -> float | None:
        """Total cost, idle time included, per output token. None before the first token."""
        tokens = self.requests.decode_tokens
        return self.total.usd / tokens * 1e6 if tokens else None


class CostMeter:
    """Keeps the accounts of one machine. Thread-safe.

    The argument busy_seconds is always the engine's cumulative wall time inside steps, from its statistics.
    Time before the meter was created is not counted: create it right after the engine.
    """

    def __init__(
        self,
        machine: Machine,
        energy: EnergyMeter,
        clock: Callable[[], float] = time.monotonic,
        max_accounts: int = 1000,
    ) -> None:
        self.machine = machine
        self._energy = energy
        self._clock = clock
        self._start = clock()
        self._lock = threading.Lock()
        self._max_accounts = max_accounts
        self._wall = self._busy = self._joules = 0.0
        self._idle_joules = 0.0
        self._open = Spend()  # busy seconds and joules not yet charged to a request
        self._accounts: dict[tuple[str, str], Account] = {}
        self._prefill_tokens, self._prefill_usd = 0, 0.0  # over all accounts

    def observe(self, busy_seconds: float) -> None:
        """Record time and energy since the last call. Call at least once a minute."""
        with self._lock:
            self._observe(busy_seconds)

    def record(self, usage: Usage, busy_seconds: float, model: str = "", api_key: str = "") -> RequestCost:
        """Charge a request that finished, failed or was cancelled, and return its cost.

        api_key: a displayable name, never the key itself.
        """
        with self._lock:
            self._observe(busy_seconds)
            account = self._charge(usage)
            self._account(model, api_key).add(account)
            utilization = self._busy / self._wall if self._wall > 0 else 0.0
        return RequestCost(account, self.machine, self._energy.source, utilization)

    def report(self, busy_seconds: float) -> CostReport:
        """A report of the accounts at this moment."""
        with self._lock:
            self._observe(busy_seconds)
            idle_seconds = self._wall - self._busy
            total = self._priced(self._wall, self._joules)
            idle = self._priced(idle_seconds, self._idle_joules)
            pending = self._priced(self._open.seconds, self._open.joules)
            accounts = {key: _copy(account) for key, account in self._accounts.items()}
        return CostReport(self.machine, self._energy.source, total, idle, pending, accounts)

    def _observe(self, busy_seconds: float) -> None:
        wall = max(self._wall, self._clock() - self._start)
        busy = min(max(self._busy, busy_seconds), wall)  # the two clocks are not read at the same instant
        busy = min(busy, self._busy + (wall - self._wall))
        joules = max(self._joules, self._energy.joules(wall, busy))
        new_busy, new_joules = busy - self._busy, joules - self._joules
        new_idle = (wall - self._wall) - new_busy
        share = self._busy_share(new_busy, new_idle)
        self._open.seconds += new_busy
        self._open.joules += share * new_joules
        self._idle_joules += (1 - share) * new_joules
        self._wall, self._busy, self._joules = wall, busy, joules

    def _busy_share(self, busy: float, idle: float) -> float:
        """The part of an interval's energy attributed to busy time, by declared power."""
        used, unused = self.machine.watts * busy, self.machine.idle_watts * idle
        if used + unused > 0:
            return used / (used + unused)
        return 1.0 if busy > 0 else 0.0

    def _charge(self, usage: Usage) -> Account:
        """Move the request's seconds and their share of joules out of the uncharged total."""
        asked = usage.prefill_seconds + usage.decode_seconds
        seconds = min(asked, self._open.seconds)
        joules = self._open.joules * (seconds / self._open.seconds) if seconds > 0 else 0.0
        prefill_share = usage.prefill_seconds / asked if asked > 0 else 0.0
        prefill = self._priced(seconds * prefill_share, joules * prefill_share)
        decode = self._priced(seconds * (1 - prefill_share), joules * (1 - prefill_share))
        self._open = Spend(self._open.seconds - seconds, self._open.joules - joules)
        return Account(
            requests=1,
            prefill_tokens=usage.prefill_tokens,
            cached_tokens=usage.cached_tokens,
            decode_tokens=usage.decode_tokens,
            prefill=prefill,
            decode=decode,
            saved_usd=self._saved(usage, prefill),
        )

    def _saved(self, usage: Usage, prefill: Spend) -> float:
        """Estimate: cached tokens at the mean price of the prompt tokens computed so far."""
        self._prefill_tokens += usage.prefill_tokens
        self._prefill_usd += prefill.usd
        return usage.cached_tokens * self._prefill_usd / self._prefill_tokens if self._prefill_tokens else 0.0

    def _account(self, model: str, api_key: str) -> Account:
        key = (model, api_key)
        if key not in self._accounts and len(self._accounts) >= self._max_accounts:
            key = (model, OTHER)
        return self._accounts.setdefault(key, Account())

    def _priced(self, seconds: float, joules: float) -> Spend:
        usd = seconds * self.machine.usd_per_second + joules * self.machine.usd_per_joule
        return Spend(seconds, joules, usd)


def _copy(account: Account) -> Account:
    whole = Account()
    whole.add(account)
    return whole
