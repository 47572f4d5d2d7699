"""An estimate for large CPU servers: a roofline of memory bandwidth and the INT8 peak of every core.

Each socket reads its own panels of every matrix (`native/threads.h`), so the bandwidths of the sockets add
up, and so do the peaks of the cores. The shares of both ceilings that kernels reach are measured on two
cores. Waiting for other threads is not counted; `joins` says how often a step does.
"""

from __future__ import annotations

from dataclasses import dataclass

from farthing.parallel.plan import Layout, ShardPlan
from farthing.planner.devices import Ceilings, Shares
from farthing.planner.footprint import Holder, Stored
from farthing.planner.memory import PlannedModel
from farthing.planner.roofline import RankRoofline, Workload

BANDWIDTH = (0.65, 0.85)  # share of bandwidth while decoding: V2L's and L576's (docs/performance.md)
INT8 = 0.60  # share of the INT8 peak with 512 rows: L576's
MOST_ATTENTION = 0.5  # of the INT8 peak: bfloat16 has half the operations per instruction …
ATTENTION = 0.4  # … of which expanded attention reaches 85 % (docs/lab/cpu-kernels.md)
JOINS = 15  # times per layer that threads wait for each other (`barrier` and regions in native/)
BATCHES = (1, 8, 16, 32, 64)
CHUNK = 512  # prompt tokens per step


@dataclass(frozen=True, slots=True)
class Machine:
    """Sockets of equal cores."""

    sockets: int
    cores: int  # per socket
    bandwidth: float  # GB/s per socket
    int8: float  # GOP/s per core

    @property
    def peak(self) -> float:
        """INT8 TOP/s of all cores."""
        return self.sockets * self.cores * self.int8 / 1000


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step of `batch` sequences: tokens per second at the ceilings, and at the measured shares."""

    batch: int
    gigabytes: float  # read
    limit: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class CpuEstimate:
    """One replica on all sockets."""

    steps: tuple[Step, ...]
    prefill_limit: float  # prompt tokens/s
    prefill: float  # at the measured shares
    joins: int  # per step


def estimate(
    model: PlannedModel, holder: Holder, machine: Machine, workload: Workload, cache_dtype: str
) -> CpuEstimate:
    """Decoding within `workload`, and chunks of its prompts. Raises ValueError for weights other than
    integers, whose products have other ceilings than INT8's."""
    floats = sorted({s.kind for n, s in model.matrices if not _is_integer(holder, n, s)})
    if floats:
        raise ValueError(
            f"quantization: got {holder.quantization!r} for weights in {', '.join(floats)}; expected int4 or "
            "int8: the estimate uses the INT8 ceiling"
        )

    def server(bandwidth: float, peak: float, shares: Shares) -> _Server:
        return _Server(model, holder, Ceilings("CPU", 0, bandwidth, peak, peak, 0, 0), shares, cache_dtype)

    everything = Shares(1.0, 1.0, MOST_ATTENTION, 1.0, 1.0)
    sizes = server(1.0, 1e9, everything)  # at 1 GB/s, seconds are gigabytes
    bandwidth = machine.sockets * machine.bandwidth
    limit = server(bandwidth, machine.peak, everything)
    low, high = (
        server(bandwidth, machine.peak, Shares(INT8, INT8, ATTENTION, share, 1.0)) for share in BANDWIDTH
    )
    steps = [
        Step(n, sizes.decode(n, workload), *(n / s.decode(n, workload) for s in (limit, low, high)))
        for n in BATCHES
    ]
    tokens = min(CHUNK, workload.prompt)
    most, reached = (tokens / s.prefill(tokens) for s in (limit, low))
    return CpuEstimate(tuple(steps), most, reached, JOINS * model.config.num_hidden_layers)


def _is_integer(holder: Holder, name: str, stored: Stored) -> bool:
    return holder.rounded(stored, 64, mlp=".mlp." in name).kind in ("int4", "int8")


class _Server:
    """All sockets as one device."""

    def __init__(
        self, model: PlannedModel, holder: Holder, device: Ceilings, shares: Shares, cache_dtype: str
    ) -> None:
        plan = ShardPlan.build(model.config, Layout())
        experts = model.config.n_routed_experts or 0
        self._rank = RankRoofline(
            model, plan, plan.layout.place(0), holder, device, shares, cache_dtype, experts
        )

    def decode(self, batch: int, workload: Workload) -> float:
        """Seconds of a step."""
        return self._step(batch, workload, batch, decode=True)

    def prefill(self, tokens: int) -> float:
        """Seconds of a whole prompt in one step."""
        return self._step(tokens, Workload(tokens, 0), 1, decode=False)

    def _step(self, tokens: int, workload: Workload, logits: int, decode: bool) -> float:
        rank = self._rank
        layers = sum(rank.layer(i, tokens, tokens, workload, decode) for i in rank.layers)
        return layers + rank.products(rank.head, logits)
