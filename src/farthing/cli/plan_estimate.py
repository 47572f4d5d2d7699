"""The part of `farthing plan` that needs a price: throughput and dollars per million tokens."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.cli.tables import size

if TYPE_CHECKING:
    from farthing.cli.plan_options import Planned
    from farthing.planner.devices import Ceilings, Shares
    from farthing.planner.estimate import Estimate

CACHE_HIT = 0.563  # of prompt tokens, as published by DeepSeek


def print_estimate(planned: Planned, device: Ceilings, shares: Shares, as_json: bool) -> None:
    """Print an estimate of the deployment that the options describe. Raises ValueError if there is none."""
    e = _estimate(planned, device, shares)
    if as_json:
        document: dict[str, Any] = {
            "kind": "estimate",
            "stored": planned.stored,
            "serve": _command(planned, e),
        }
        document |= {"replicas": planned.options.dp, "device": asdict(device), "shares": asdict(shares)}
        memory = asdict(e.memory) | {"total": e.memory.total}
        print(json.dumps(document | asdict(e) | {"memory": memory}))
        return
    _print(planned, e, device)


def _estimate(planned: Planned, device: Ceilings, shares: Shares) -> Estimate:
    from farthing.planner.estimate import Target, groups, serving, smallest
    from farthing.planner.roofline import Workload

    o = planned.options
    _check(planned)
    load = replace(planned.serving, cache_tokens=o.kv_tokens or 0)
    limit = planned.limit or 0
    target = Target(planned.model, planned.holder, load, limit, device, shares, o.max_num_seqs)
    hit = CACHE_HIT if o.cache_hit is None and not o.dp_attention else o.cache_hit or 0.0
    workload = Workload(o.prompt, o.output, hit, 1 / o.user_rate)
    price = o.price or 0.0
    if o.prefill_gpus and o.decode_gpus:
        return groups(target, o.prefill_gpus, o.decode_gpus, workload, price)
    if any((o.tp, o.pp, o.ep)):
        return serving(target, o.layout, workload, price)
    allowed = not o.cache_hit and not o.redundant_experts
    return smallest(target, workload, price, replace(workload, cache_hit=0.0) if allowed else None)


def _check(planned: Planned) -> None:
    """Refuse options that the estimate cannot honour."""
    o, backend = planned.options, planned.holder.backend
    separate = (o.prefill_gpus, o.decode_gpus)
    given = any((o.tp, o.pp, o.ep))
    if backend != "gpu":
        raise ValueError(f"backend: got {backend!r}; expected 'gpu' with --price: ceilings are those of GPUs")
    if o.dtype not in ("auto", "bfloat16"):
        raise ValueError(f"dtype: got {o.dtype!r}; expected auto or bfloat16 with --price")
    if o.experts_on:
        raise ValueError(f"experts-on: got {o.experts_on!r}; expected none with --price")
    if any(separate) and not all(separate):
        missing = "decode-gpus" if o.prefill_gpus else "prefill-gpus"
        raise ValueError(f"{missing} is not set; expected both --prefill-gpus and --decode-gpus, or neither")
    if any(separate) and (given or o.dp_attention):
        raise ValueError("prefill-gpus is set with a layout; expected no --tp, --pp, --ep, --dp-attention")
    if o.dp_attention and (o.cache_hit or o.redundant_experts):
        raise ValueError(
            "dp-attention is set; expected --cache-hit 0 and --redundant-experts 0: `farthing serve "
            "--dp-attention` has neither a prefix cache nor copies of experts"
        )
    experts = planned.model.config.n_routed_experts or 0
    if o.redundant_experts and given and (o.layout.ep == 1 or o.redundant_experts % o.layout.ep):
        raise ValueError(
            f"redundant-experts: got {o.redundant_experts}; expected 0, or a multiple of ep with --ep above 1"
        )
    if o.redundant_experts > experts:
        raise ValueError(f"redundant-experts: got {o.redundant_experts}; expected at most {experts}")
    length = planned.serving.max_model_len
    if o.prompt + o.output > length:
        raise ValueError(
            f"prompt and output: got {o.prompt} and {o.output}; expected at most {length} tokens together"
        )


def _command(planned: Planned, e: Estimate) -> str | None:
    """The command that serves the deployment; None for separate groups."""
    o, layout = planned.options, e.layout
    if layout is None:
        return None
    known = o.model == "mite" or "/" in o.model or Path(o.model).exists()  # others are configurations only
    words = [f"farthing serve {o.model if known else 'MODEL'} --backend gpu"]
    words += [f"--{n} {getattr(layout, n)}" for n in ("tp", "pp", "ep") if getattr(layout, n) > 1]
    words += ["--dp-attention --no-enable-prefix-caching"] if layout.dp_attention else []
    words += [f"--quantization {o.quantization}"] if o.quantization else []
    words += [f"--kv-cache-dtype {o.kv_cache_dtype}", f"--max-num-seqs {e.decode.tokens_per_step}"]
    words += [f"--max-model-len {o.max_model_len}"] if o.max_model_len else []
    words += [f"--max-num-batched-tokens {o.max_num_batched_tokens}"] if o.max_num_batched_tokens else []
    if o.memory or o.kv_tokens:  # otherwise the server fills a GPU's memory by itself
        words += [f"--num-blocks {e.cache_tokens // planned.serving.block_size}"]
    copies = o.redundant_experts
    return " ".join(words + ([f"--redundant-experts {copies} --rebalance-steps 1000"] if copies else []))


def _print(planned: Planned, e: Estimate, device: Ceilings) -> None:
    from rich.console import Console
    from rich.table import Table

    o, m = planned.options, e.memory
    table = Table(
        "ESTIMATE, not measured",
        "prefill",
        "decode",
        title=f"{o.model} on {device.name}, ${o.price:g} per GPU-hour",
    )
    table.add_row("GPUs" if e.layout else "GPUs per group", str(e.prefill.gpus), str(e.decode.gpus))
    table.add_row("tokens per step", f"{e.prefill.tokens_per_step:,}", f"{e.decode.tokens_per_step:,}")
    table.add_row(
        "tokens/s per GPU", f"{e.prefill.tokens_per_second:,.0f}", f"{e.decode.tokens_per_second:,.0f}"
    )
    table.add_row("  including cache hits", f"{e.prefill_with_hits:,.0f}", "")
    table.add_row("bound by", e.prefill.bound, e.decode.bound)
    table.add_row("dollars per million tokens", f"{e.usd_input:.3f} input", f"{e.usd_output:.3f} output")
    table.add_row("  including prompts", "", f"{e.usd_request_output:.3f} output")
    console = Console()
    console.print(table)
    console.print(
        f"memory per GPU: weights {size(m.weights)} ({planned.stored}), cache {size(m.cache)} "
        f"({e.cache_tokens:,} tokens, {o.kv_cache_dtype}), buffers {size(m.buffers)}, total {size(m.total)} "
        f"of {size(e.limit)} usable",
        highlight=False,
    )
    if o.dp > 1:
        gpus = o.dp * e.decode.gpus
        console.print(
            f"{o.dp} replicas: {gpus} GPUs, ${gpus * (o.price or 0):,.2f} per hour", highlight=False
        )
    if command := _command(planned, e):
        found = "" if any((o.tp, o.pp, o.ep)) else "smallest deployment that fits: "
        console.print(found + command, highlight=False, soft_wrap=True)
    console.print("Assumed:")
    for line in e.assumptions:
        console.print(f"- {line}", highlight=False)
