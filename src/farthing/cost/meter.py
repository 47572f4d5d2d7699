"""Cost per request, API key and model in machine seconds, joules and dollars: metered, divided and exported.

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

import contextlib
import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from farthing.cost.prices import Machine

log = logging.getLogger(__name__)
POWERCAP = Path("/sys/class/powercap")


class EnergyMeter(Protocol):
    """Cumulative energy since the meter was opened.

    A meter reports the joules since it was opened and their source: "nvml+rapl", "nvml+estimated" (the host
    is estimated), "rapl" or "estimated". RAPL and NVML measure a whole package or board, so on a shared
    machine they include the energy of other processes.
    """

    @property
    def source(self) -> str:
        """The source of the readings."""
        ...

    def joules(self, wall_seconds: float, busy_seconds: float) -> float:
        """Joules so far; arguments: total and busy seconds since opening. Never decreases."""
        ...


class EstimatedMeter:
    """Declared watts times time: `idle_watts` when idle, `watts` when busy."""

    source = "estimated"

    def __init__(self, watts: float, idle_watts: float) -> None:
        self._watts, self._idle_watts = watts, idle_watts

    def joules(self, wall_seconds: float, busy_seconds: float) -> float:
        """See `EnergyMeter`."""
        return self._idle_watts * (wall_seconds - busy_seconds) + self._watts * busy_seconds


class RaplMeter:
    """RAPL (running average power limit) counters of Intel and AMD, read from the kernel's powercap files.

    Covers packages and, where it is a separate zone, their memory. Counters wrap at max_energy_range_uj, so
    read at least once a minute. Raises OSError if the files are missing or unreadable (often root only).
    """

    source = "rapl"

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = [_RaplZone(path) for path in _rapl_zones(root)]
        if not self._zones:
            raise FileNotFoundError(f"no RAPL packages under {root}")

    def joules(self, wall_seconds: float, busy_seconds: float) -> float:
        """See `EnergyMeter`."""
        return sum(zone.read() for zone in self._zones) / 1e6


class _RaplZone:
    def __init__(self, path: Path) -> None:
        self._counter = path / "energy_uj"
        self._range = int((path / "max_energy_range_uj").read_text())
        self._last = int(self._counter.read_text())
        self._sum = 0

    def read(self) -> int:
        """Microjoules since the zone was opened."""
        now = int(self._counter.read_text())
        self._sum += now - self._last if now >= self._last else now - self._last + self._range
        self._last = now
        return self._sum


def _rapl_zones(root: Path) -> list[Path]:
    """Packages (`intel-rapl:0`) and their memory (`intel-rapl:0:N` named dram), counted separately."""
    zones = []
    for path in sorted(root.glob("*-rapl:*")):
        name = (path / "name").read_text().strip()
        if name.startswith("package") or name == "dram":
            zones.append(path)
    return zones


class NvmlMeter:
    """The GPUs' energy counters (mJ since driver load; Volta and newer), through nvidia-ml-py.

    Raises ImportError without nvidia-ml-py, RuntimeError if NVML or the counter is missing.
    """

    source = "nvml"

    def __init__(self, indices: Sequence[int] | None = None) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        try:
            self._nvml.nvmlInit()
            every = range(self._nvml.nvmlDeviceGetCount())
            chosen = every if indices is None else indices
            self._devices = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in chosen]
            self._start = self._millijoules()
        except self._nvml.NVMLError as error:
            raise RuntimeError(f"NVML: {error}") from error

    def _millijoules(self) -> int:
        return sum(int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(device)) for device in self._devices)

    def joules(self, wall_seconds: float, busy_seconds: float) -> float:
        """See `EnergyMeter`."""
        return (self._millijoules() - self._start) / 1e3


class SumMeter:
    """The sum of several meters that do not overlap."""

    def __init__(self, parts: Sequence[EnergyMeter]) -> None:
        self._parts = list(parts)

    @property
    def source(self) -> str:
        """The meters' sources, joined by +."""
        return "+".join(dict.fromkeys(part.source for part in self._parts))

    def joules(self, wall_seconds: float, busy_seconds: float) -> float:
        """See `EnergyMeter`."""
        return sum(part.joules(wall_seconds, busy_seconds) for part in self._parts)


def open_meter(machine: Machine, gpus: Sequence[int] | None = None, root: Path = POWERCAP) -> EnergyMeter:
    """The best meter available. Unmetered parts are estimated and named in the source, which is logged."""
    meter = _open_gpu(machine, gpus, root) if machine.hardware.kind == "gpu" else _rapl(root)
    if meter is None:
        meter = EstimatedMeter(machine.watts, machine.idle_watts)
    log.info("energy: %s", meter.source)
    return meter


def _open_gpu(machine: Machine, gpus: Sequence[int] | None, root: Path) -> EnergyMeter | None:
    with contextlib.suppress(ImportError, RuntimeError):
        devices: EnergyMeter = NvmlMeter(gpus)
        host = _rapl(root) or EstimatedMeter(machine.host_watts, machine.host_watts)
        return SumMeter([devices, host])
    return None


def _rapl(root: Path) -> EnergyMeter | None:
    with contextlib.suppress(OSError, ValueError):
        return RaplMeter(root)
    return None


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
        self._late: list[tuple[Account, float, float]] = []  # (account, prefill, decode seconds) to charge
        self._accounts: dict[tuple[str, str], Account] = {}
        self._prefill_tokens, self._prefill_usd = 0, 0.0  # over all accounts
        self._watts, self._idle_watts = machine.watts, machine.idle_watts
        self._rates = machine.usd_per_second, machine.usd_per_joule

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
            key = (model, api_key)
            if key not in self._accounts and len(self._accounts) >= self._max_accounts:
                key = (model, OTHER)
            total = self._accounts.setdefault(key, Account())
            account = Account(
                requests=1,
                prefill_tokens=usage.prefill_tokens,
                cached_tokens=usage.cached_tokens,
                decode_tokens=usage.decode_tokens,
            )
            total.add(account)
            late = busy_seconds - self._busy
            account.prefill, account.decode = self._assign(
                total, usage.prefill_seconds, usage.decode_seconds, late
            )
            self._prefill_tokens += usage.prefill_tokens
            self._prefill_usd += account.prefill.usd
            price = self._prefill_usd / self._prefill_tokens if self._prefill_tokens else 0.0
            account.saved_usd = usage.cached_tokens * price  # an estimate: the mean price of a computed token
            total.saved_usd += account.saved_usd
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
        used, unused = self._watts * new_busy, self._idle_watts * new_idle  # by declared power
        share = used / (used + unused) if used + unused > 0 else float(new_busy > 0)
        self._open.seconds += new_busy
        self._open.joules += share * new_joules
        self._idle_joules += (1 - share) * new_joules
        self._wall, self._busy, self._joules = wall, busy, joules
        late, self._late = self._late, []
        for account, prefill, decode in late:
            self._assign(account, prefill, decode, prefill + decode)

    def _assign(self, account: Account, prefill: float, decode: float, late: float) -> tuple[Spend, Spend]:
        """Move a request's seconds and their share of joules out of the uncharged total to an account.

        late: seconds that the engine has reported and that will be observed as time passes, because the
        meter was read in the middle of a step. The request's part of them is charged then.
        """
        asked = prefill + decode
        seconds = min(asked, self._open.seconds)
        joules = self._open.joules * (seconds / self._open.seconds) if seconds > 0 else 0.0
        self._open = Spend(self._open.seconds - seconds, self._open.joules - joules)
        share = prefill / asked if asked > 0 else 0.0
        first = self._priced(seconds * share, joules * share)
        then = self._priced(seconds * (1 - share), joules * (1 - share))
        account.prefill.add(first)
        account.decode.add(then)
        if (left := min(asked - seconds, late)) > 1e-9:
            self._late.append((account, left * share, left * (1 - share)))
        return first, then

    def _priced(self, seconds: float, joules: float) -> Spend:
        per_second, per_joule = self._rates
        return Spend(seconds, joules, seconds * per_second + joules * per_joule)


def _copy(account: Account) -> Account:
    whole = Account()
    whole.add(account)
    return whole


def together(costs: Sequence[RequestCost]) -> RequestCost:
    """Sum of the costs of one or more requests."""
    whole = Account()
    for cost in costs:
        whole.add(cost.account)
    return replace(costs[-1], account=whole)


def usage_extension(cost: RequestCost) -> dict[str, Any]:
    """The `usage.x_farthing` object: dollars, joules, and seconds summed over all CPUs or GPUs."""
    account, units = cost.account, cost.machine.count
    seconds = f"{cost.machine.hardware.kind}_seconds"

    def part(tokens: int, spend: Spend) -> dict[str, float]:
        return {"tokens": tokens, seconds: spend.seconds * units, "joules": spend.joules, "usd": spend.usd}

    return {
        "usd": cost.usd,
        "usd_with_idle": cost.usd_with_idle,
        "joules": account.spend.joules,
        "joules_source": cost.joules_source,
        seconds: account.spend.seconds * units,
        "prefill": part(account.prefill_tokens, account.prefill),
        "decode": part(account.decode_tokens, account.decode),
        "cached": {"tokens": account.cached_tokens, "saved_usd_estimated": account.saved_usd},
        "hardware": cost.machine.hardware.name,
        "prices_declared": cost.machine.declared,
    }


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: `name` without the `_total` of a counter."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: Mapping[str, str]
    value: float


def samples(report: CostReport) -> Iterator[Metric]:
    """Every metric of the accounts, grouped by name."""
    yield from _spent(report)
    yield from _tokens(report)
    yield from _gauges(report)


def _spent(report: CostReport) -> Iterator[Metric]:
    kind, units = report.machine.hardware.kind, report.machine.count
    measures: tuple[tuple[str, str, str, int, dict[str, str]], ...] = (
        ("farthing:cost_usd", "Dollars by declared prices", "usd", 1, {}),
        ("farthing:cost_joules", "Energy", "joules", 1, {"source": report.joules_source}),
        ("farthing:cost_device_seconds", "Seconds of all devices", "seconds", units, {"device": kind}),
    )
    for name, text, measure, factor, extra in measures:
        help = f"{text} of ended requests, and of idle time (phase idle)."
        for labels, spend in _buckets(report):
            yield Metric(name, "counter", help, labels | extra, getattr(spend, measure) * factor)


def _buckets(report: CostReport) -> Iterator[tuple[dict[str, str], Spend]]:
    """Buckets that add up to the total together with the pending share."""
    for (model, key), account in report.accounts.items():
        for phase, spend in (("prefill", account.prefill), ("decode", account.decode)):
            yield {"model": model, "api_key": key, "phase": phase}, spend
    yield {"model": "", "api_key": "", "phase": "idle"}, report.idle


def _tokens(report: CostReport) -> Iterator[Metric]:
    for (model, key), account in report.accounts.items():
        for phase, tokens in _phases(account).items():
            labels = {"model": model, "api_key": key, "phase": phase}
            yield Metric("farthing:cost_tokens", "counter", "Tokens of ended requests.", labels, tokens)
    for (model, key), account in report.accounts.items():
        labels = {"model": model, "api_key": key}
        text = "Estimated dollars that prefix-cache hits saved."
        yield Metric("farthing:cost_saved_usd", "counter", text, labels, account.saved_usd)


def _phases(account: Account) -> dict[str, int]:
    return {
        "prefill": account.prefill_tokens,
        "cached": account.cached_tokens,
        "decode": account.decode_tokens,
    }


def _gauges(report: CostReport) -> Iterator[Metric]:
    hardware = {"hardware": report.machine.hardware.name, "declared": report.machine.declared}
    text = "Declared price of the whole machine."
    yield Metric("farthing:cost_usd_per_hour", "gauge", text, hardware, report.machine.usd_per_hour)
    text = "Dollars of requests that still run."
    yield Metric("farthing:cost_pending_usd", "gauge", text, {}, report.pending.usd)
    text = "Busy share of the time."
    yield Metric("farthing:cost_utilization", "gauge", text, {}, report.utilization)
    if report.usd_per_million_tokens is not None:
        text = "All dollars, idle time included, over prompt and output tokens since the start."
        yield Metric("farthing:cost_usd_per_million_tokens", "gauge", text, {}, report.usd_per_million_tokens)
