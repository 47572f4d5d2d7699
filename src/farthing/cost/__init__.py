"""Cost per token: declared prices, energy meters, and accounts that balance. Imports no other room.

machine = Prices.load().machine("cpu", count=2)
meter = CostMeter(machine, open_meter(machine))
cost = meter.record(Usage(prefill_tokens=…, decode_seconds=…), busy_seconds, model="m", api_key="team-a")
usage_extension(cost)                       # the `x_farthing` part of a response's usage
samples(meter.report(busy_seconds))         # metrics
"""

from __future__ import annotations

from farthing.cost.meter import (
    Account,
    CostMeter,
    CostReport,
    EnergyMeter,
    EstimatedMeter,
    Metric,
    NvmlMeter,
    RaplMeter,
    RequestCost,
    Spend,
    Usage,
    open_meter,
    samples,
    usage_extension,
)
from farthing.cost.prices import Hardware, Machine, Prices

__all__ = [
    "Account",
    "CostMeter",
    "CostReport",
    "EnergyMeter",
    "EstimatedMeter",
    "Hardware",
    "Machine",
    "Metric",
    "NvmlMeter",
    "Prices",
    "RaplMeter",
    "RequestCost",
    "Spend",
    "Usage",
    "open_meter",
    "samples",
    "usage_extension",
]
