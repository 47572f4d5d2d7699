"""The part of `farthing plan` that needs --cores: throughput of a CPU server."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from farthing.cli.tables import size

if TYPE_CHECKING:
    from farthing.cli.plan_options import Planned
    from farthing.planner.cpu import CpuEstimate, Machine

PROBE = 1 << 28  # bytes


def print_cpu_estimate(planned: Planned, as_json: bool) -> None:
    """Print an estimate for the server that the options describe. Raises ValueError if there is none."""
    from farthing.planner.cpu import estimate
    from farthing.planner.roofline import Workload

    o = planned.options
    if planned.holder.backend != "cpu":
        raise ValueError(f"backend: got {planned.holder.backend!r}; expected cpu with --cores")
    if o.prompt + o.output > planned.serving.max_model_len:
        raise ValueError(
            f"prompt and output: got {o.prompt} and {o.output}; expected at most "
            f"{planned.serving.max_model_len} tokens together"
        )
    machine, sources = _machine(planned)
    found = estimate(planned.model, planned.holder, machine, Workload(o.prompt, o.output), o.kv_cache_dtype)
    if as_json:
        document = {"kind": "estimate", "stored": planned.stored, "machine": asdict(machine)}
        print(json.dumps(document | {"sources": sources} | asdict(found)))
    else:
        _print(planned, machine, sources, found)


def _machine(planned: Planned) -> tuple[Machine, dict[str, str]]:
    """The server, and where its figures come from."""
    from farthing.planner.cpu import Machine

    o = planned.options
    assert o.cores is not None
    bandwidth, core, sources = o.socket_bandwidth, o.core_int8, {"bandwidth": "given", "int8": "given"}
    if bandwidth is None or core is None:
        here, together, measured_core = _measure()
        how = f"measured on this machine with {here} threads"
        if bandwidth is None:
            if o.sockets * o.cores != here:
                raise ValueError(
                    f"socket-bandwidth: got None with {o.sockets} x {o.cores} cores; expected the GB/s of a "
                    f"socket, because this machine ({here} cores) can only measure its own"
                )
            bandwidth, sources["bandwidth"] = together / o.sockets, how
        if core is None:
            core, sources["int8"] = measured_core, how
    return Machine(o.sockets, o.cores, bandwidth, core), sources


def _measure() -> tuple[int, float, float]:
    """Usable CPUs here; GB/s that they read; INT8 GOP/s of each with all busy."""
    from farthing.cost import usable_cpus

    try:
        from farthing import _native
    except ImportError:
        raise ValueError(
            "the CPU kernels are not built, so nothing can be measured; expected --socket-bandwidth and "
            "--core-int8"
        ) from None
    cpus = usable_cpus()
    peak = max(_native.peak_ops(kind, cpus) for kind in ("vnni_int8", "amx_int8"))
    return cpus, _native.read_bandwidth(cpus, PROBE), peak / cpus


def _print(planned: Planned, machine: Machine, sources: dict[str, str], found: CpuEstimate) -> None:
    from rich.console import Console
    from rich.table import Table

    from farthing.planner.cpu import BANDWIDTH, INT8

    o, rank = planned.options, planned.ranks[0]
    low, high = (f"{share:.0%}" for share in BANDWIDTH)
    table = Table(
        "ESTIMATE, not measured", "GB per step", "tok/s, limit", f"at {low} to {high} of it",
        title=f"{o.model} on {machine.sockets} x {machine.cores} cores",
    )  # fmt: skip
    for s in found.steps:
        table.add_row(
            f"decode, batch {s.batch}",
            f"{s.gigabytes:.1f}",
            f"{s.limit:,.1f}",
            f"{s.low:,.1f} to {s.high:,.1f}",
        )
    table.add_row("prefill", "", f"{found.prefill_limit:,.0f}", f"{found.prefill:,.0f} at {INT8:.0%}")
    console = Console()
    console.print(table)
    each, slower = found.joins / 1000, found.joins * found.steps[0].high * 1e-6
    for line in (
        f"memory: weights {size(rank.weights)}, buffers {size(rank.buffers)}, and the cache",
        f"bandwidth: {machine.sockets} x {machine.bandwidth:.0f} GB/s, {sources['bandwidth']}",
        f"INT8: {machine.int8:.0f} GOP/s per core, {sources['int8']}",
        "extrapolated: sockets and cores add up; shares of the ceilings are those of two cores",
        f"not counted: waiting for other threads, {found.joins:,} times per step; each microsecond of it "
        f"adds {each:.1f} ms, {slower:.0%} at batch 1",
        f"prompts of {o.prompt:,} tokens, {o.output:,} output tokens, {o.kv_cache_dtype} cache; random "
        "routing",
    ):
        console.print(f"- {line}", highlight=False, soft_wrap=True)
