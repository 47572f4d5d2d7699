"""Cost accounting of a server: the price of its machine and the spending of each API key."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from farthing.cost import (
    Account,
    CostMeter,
    CostReport,
    Machine,
    Prices,
    RequestCost,
    Usage,
    cpu_name,
    open_meter,
    usable_cpus,
)

if TYPE_CHECKING:
    import torch

    from farthing.engine.engine import Engine
    from farthing.engine.request import RequestMetrics

log = logging.getLogger("farthing.server")


class Accounts:
    """Charges every request of one engine from the moment the object is created."""

    def __init__(self, engine: Engine, machine: Machine, model: str) -> None:
        self._stats = engine.stats
        self._model = model
        self._meter = CostMeter(machine, open_meter(machine))

    @property
    def machine(self) -> Machine:
        """The machine being paid for."""
        return self._meter.machine

    def charge(self, client: str, metrics: RequestMetrics) -> RequestCost:
        """Charge a finished request; `client` is the name of its key."""
        usage = Usage(
            prefill_tokens=metrics.prefill_tokens,
            cached_tokens=metrics.cached_tokens,
            decode_tokens=metrics.decode_tokens,
            prefill_seconds=metrics.prefill_seconds,
            decode_seconds=metrics.decode_seconds,
        )
        return self._meter.record(usage, self._stats.busy_seconds, self._model, client)

    def report(self) -> CostReport:
        """A snapshot of all accounts."""
        return self._meter.report(self._stats.busy_seconds)


def machine_of(device: torch.device, prices: str | None = None, hardware: str | None = None) -> Machine:
    """The machine of an engine on `device`. Raises ValueError for unknown hardware or invalid prices."""
    declared = Prices.load(prices)
    if device.type == "cuda":
        import torch

        machine = declared.machine("gpu", torch.cuda.get_device_name(device), 1, hardware)
    else:
        machine = declared.machine("cpu", cpu_name(), usable_cpus(), hardware)
    log.info(
        "cost: %d x %s at %.4g USD/hour (declared %s)",
        *(machine.count, machine.hardware.name, machine.usd_per_hour, machine.declared),
    )
    return machine


def together(costs: Sequence[RequestCost]) -> RequestCost:
    """Sum of the costs of one or more requests."""
    whole = Account()
    for cost in costs:
        whole.add(cost.account)
    return replace(costs[-1], account=whole)
