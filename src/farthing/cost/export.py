"""Exports accounts as the `x_farthing` part of a response's usage and as metric samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from farthing.cost.meter import Account, CostReport, RequestCost, Spend


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
class Sample:
    """One metric: `name` without the `_total` of a counter."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: Mapping[str, str]
    value: float


def samples(report: CostReport) -> Iterator[Sample]:
    """Every metric of the accounts, grouped by name."""
    yield from _spent(report)
    yield from _tokens(report)
    yield from _gauges(report)


def _spent(report: CostReport) -> Iterator[Sample]:
    kind, units = report.machine.hardware.kind, report.machine.count
    measures: tuple[tuple[str, str, str, int, dict[str, str]], ...] = (
        ("farthing:cost_usd", "Dollars by declared prices", "usd", 1, {}),
        ("farthing:cost_joules", "Energy", "joules", 1, {"source": report.joules_source}),
        ("farthing:cost_device_seconds", "Seconds of all devices", "seconds", units, {"device": kind}),
    )
    for name, text, field, factor, extra in measures:
        help = f"{text} of ended requests, and of idle time (phase idle)."
        for labels, spend in _buckets(report):
            yield Sample(name, "counter", help, labels | extra, getattr(spend, field) * factor)


def _buckets(report: CostReport) -> Iterator[tuple[dict[str, str], Spend]]:
    """Buckets that add up to the total together with the pending share."""
    for (model, key), account in report.accounts.items():
        for phase, spend in (("prefill", account.prefill), ("decode", account.decode)):
            yield {"model": model, "api_key": key, "phase": phase}, spend
    yield {"model": "", "api_key": "", "phase": "idle"}, report.idle


def _tokens(report: CostReport) -> Iterator[Sample]:
    for (model, key), account in report.accounts.items():
        for phase, tokens in _phases(account).items():
            labels = {"model": model, "api_key": key, "phase": phase}
            yield Sample("farthing:cost_tokens", "counter", "Tokens of ended requests.", labels, tokens)
    for (model, key), account in report.accounts.items():
        labels = {"model": model, "api_key": key}
        text = "Estimated dollars that prefix-cache hits saved."
        yield Sample("farthing:cost_saved_usd", "counter", text, labels, account.saved_usd)


def _phases(account: Account) -> dict[str, int]:
    return {
        "prefill": account.prefill_tokens,
        "cached": account.cached_tokens,
        "decode": account.decode_tokens,
    }


def _gauges(report: CostReport) -> Iterator[Sample]:
    hardware = {"hardware": report.machine.hardware.name, "declared": report.machine.declared}
    text = "Declared price of the whole machine."
    yield Sample("farthing:cost_usd_per_hour", "gauge", text, hardware, report.machine.usd_per_hour)
    text = "Dollars of requests that still run."
    yield Sample("farthing:cost_pending_usd", "gauge", text, {}, report.pending.usd)
    text = "Busy share of the time."
    yield Sample("farthing:cost_utilization", "gauge", text, {}, report.utilization)
    if report.usd_per_million_tokens is not None:
        text = "All dollars, idle time included, over prompt and output tokens since the start."
        yield Sample("farthing:cost_usd_per_million_tokens", "gauge", text, {}, report.usd_per_million_tokens)
