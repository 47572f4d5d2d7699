"""Cost per token: declared prices, energy meters, and accounts that balance. Imports no other room.

machine = Prices.load().machine("cpu", count=2)
meter = CostMeter(machine, open_meter(machine))
cost = meter.record(Usage(prefill_tokens=…, decode_seconds=…), busy_seconds, model="m", api_key="team-a")
usage_extension(cost)                       # the `x_farthing` part of a response's usage
samples(meter.report(busy_seconds))         # metrics
"""

from farthing.cost.detect import cpu_name, usable_cpus
from farthing.cost.energy import EnergyMeter, EstimatedMeter, NvmlMeter, RaplMeter, open_meter
from farthing.cost.export import Sample, samples, usage_extension
from farthing.cost.meter import Account, CostMeter, CostReport, RequestCost, Spend, Usage
from farthing.cost.prices import Hardware, Machine, Prices

__all__ = [
    "Account",
    "CostMeter",
    "CostReport",
    "EnergyMeter",
    "EstimatedMeter",
    "Hardware",
    "Machine",
    "NvmlMeter",
    "Prices",
    "RaplMeter",
    "RequestCost",
    "Sample",
    "Spend",
    "Usage",
    "cpu_name",
    "open_meter",
    "samples",
    "usable_cpus",
    "usage_extension",
]
