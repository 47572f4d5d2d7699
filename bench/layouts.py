"""One model served in several layouts on this machine: ranks, and routed experts on the host.

    python bench/layouts.py [--model S576] [--weights int4] [--rounds 5] [--backend auto] \\
        [--ways "" "--tp 2" "--experts-on cpu --hot-experts 4"]

Layouts are written as options of `farthing serve`; the others are compared with the first. Each runs in its
own process, which is stopped while others are measured; rounds alternate, and figures are medians. A layout's
threads are divided among its ranks, and between host and device if both are this CPU. The limit is the
machine's, measured before every round (see bench/decode.py); it is unknown with a GPU.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from decode import generating, machine
from farthing import LLM
from farthing.parallel.plan import Layout
from limits import BYTES_PER_WEIGHT, Point, limit
from peers import PROMPT, Child
from random_model import SIZES, make_model

log = Console(stderr=True)
WAYS = [
    "",
    "--tp 2",
    "--pp 2",
    "--ep 2",
    "--tp 2 --ep 2",
    "--experts-on cpu",
    "--experts-on cpu --hot-experts 4",
]
POINTS = [Point("prefill", 1, 512), Point("decode", 1, PROMPT), Point("decode", 8, PROMPT)]


@dataclass(frozen=True, slots=True)
class Way:
    """The options of `farthing serve` for model placement."""

    layout: Layout
    experts_on: str | None
    hot_experts: int

    @classmethod
    def of(cls, text: str) -> Way:
        """Parse the options. Raises SystemExit on an option that does not affect placement."""
        p = argparse.ArgumentParser(prog="--ways", add_help=False)
        for name in ("--tp", "--pp", "--ep"):
            p.add_argument(name, type=int, default=1)
        p.add_argument("--dp-attention", action="store_true")
        p.add_argument("--experts-on", choices=["cpu"])
        p.add_argument("--hot-experts", type=int, default=0)
        a = p.parse_args(shlex.split(text))
        return cls(Layout(a.tp, a.pp, a.ep, a.dp_attention), a.experts_on, a.hot_experts)


def child(model: str, weights: str, backend: str, threads: int, text: str) -> None:
    """Load, print "ready", and answer each "BATCH PROMPT NEW" with seconds until the input ends."""
    way = Way.of(text)
    sides = way.layout.world
    if way.experts_on and not torch.cuda.is_available():
        sides = 2
    llm = LLM(
        model, backend=backend, threads=max(1, threads // sides),
        quantization=None if weights == "bf16" else weights, skip_tokenizer_init=True,  # type: ignore[arg-type]
        max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=512, kv_cache_dtype="bfloat16",
        num_blocks=512, tensor_parallel_size=way.layout.tp, pipeline_parallel_size=way.layout.pp,
        expert_parallel_size=way.layout.ep, dp_attention=way.layout.dp_attention,
        enable_prefix_caching=not way.layout.dp_attention, experts_on=way.experts_on,  # type: ignore[arg-type]
        hot_experts=way.hot_experts,
    )  # fmt: skip

    seconds = generating(llm, {PROMPT})
    seconds(8, PROMPT, 40)  # also lets the engine choose its hot experts
    print("ready", flush=True)
    for line in sys.stdin:
        print("seconds", seconds(*map(int, line.split())), flush=True)


def run(a: argparse.Namespace) -> Table:
    """Measure all configurations interleaved, round by round."""
    model = make_model(a.model, a.cache)
    ways = {}
    for text in a.ways:
        log.print(f"loading {text or 'one rank'}")
        ways[text] = Child([
            sys.executable, __file__, "--child", model, a.weights, a.backend, str(a.threads), text,
        ])  # fmt: skip
    limits, rates = [], {(point, text): [] for point in POINTS for text in ways}
    for turn in range(a.rounds):
        limits.append(machine(a.threads))
        for point in POINTS:
            for text, way in ways.items():
                rate = way.measure(point) or 0.0
                rates[point, text].append(rate)
                log.print(f"round {turn + 1}: {point}: {text or 'one rank'} {rate:.1f} tok/s")
    here = {key: statistics.median(m[key] for m in limits) for key in limits[0]}
    on_cpu = a.backend == "cpu" or not torch.cuda.is_available()
    title = f"{a.model}, {a.weights}, tok/s (x the first; of the limit)"
    table = Table("", *(f"{p.kind} {p.tokens}" for p in POINTS), title=title)
    for text in ways:
        cells = []
        for point in POINTS:
            rate, first = (statistics.median(rates[point, t]) for t in (text, a.ways[0]))
            share = f"; {rate / limit(a.model, a.weights, point, here):.0%}" if on_cpu else ""
            cells.append(f"{rate:,.1f} ({rate / first:.2f}x{share})")
        table.add_row(text or "one rank", *cells)
    return table


def main() -> None:
    """Parse, run, print."""
    if sys.argv[1:2] == ["--child"]:
        model, weights, backend, threads, text = sys.argv[2:]
        child(model, weights, backend, int(threads), text)
        return
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=SIZES, default="S576")
    p.add_argument("--weights", choices=BYTES_PER_WEIGHT, default="int4")
    p.add_argument("--backend", default="auto")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--ways", nargs="+", default=WAYS)
    p.add_argument("--cache", type=Path, default=Path.home() / ".cache/farthing/bench")
    a = p.parse_args()
    for text in a.ways:
        Way.of(text)  # before anything is loaded
    Console(width=None if sys.stdout.isatty() else 160).print(run(a))


if __name__ == "__main__":
    main()
