"""Cost per token: declared prices, energy meters, and accounts that balance. Imports no other room.

machine = Prices.load().machine("cpu", count=2)
meter = CostMeter(machine, open_meter(machine))
cost = meter.record(Usage(prefill_tokens=…, decode_seconds=…), busy_seconds, model="m", api_key="team-a")
usage_extension(cost)                       # the `x_farthing` part of a response's usage
samples(meter.report(busy_seconds))         # metrics
"""

from __future__ import annotations

import math
import os
from pathlib import Path

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

# The CPUs this process may use, which are what a server without GPUs pays for.

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """The CPU's vendor model name; "" if the system does not report it."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """vCPUs this process may use: its affinity, capped by its cgroup quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def _quota(cgroup: Path) -> float | None:
    """CPU quota of the cgroup in CPUs (version 2, then 1); None: unlimited."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text()
        period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text()
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError):
        return None


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
    "cpu_name",
    "open_meter",
    "samples",
    "usable_cpus",
    "usage_extension",
]
