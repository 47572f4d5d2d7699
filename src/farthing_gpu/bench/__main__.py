"""Every kernel of the GPU backend: time, share of the GPU's measured ceilings, torch's own path, targets.

    python -m farthing_gpu.bench [--only mla] [--rounds 30] [--into gpu.json] [--page docs/performance.md]
    python -m farthing_gpu.bench --tune [--only decode]   # writes configs/<card>.json next to the kernels

Ceilings are measured first: a copy of 1 GiB, and products of 8192 x 8192 in bfloat16 and FP8. Our and torch's
runs alternate; before each, 256 MiB are written so that no input is in L2. Times are medians. Without a GPU
only the reason is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from farthing_gpu.bench.attention import decode_step, mla_decode, mla_prefill, rotary
from farthing_gpu.bench.products import (
    Work,
    dense_fp8,
    experts,
    linear,
    norm_quantize,
    routing,
    sampling,
    softmax,
    softmax_fused,
    sparse_product,
)
from farthing_gpu.bench.tune import tune


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: the function that builds its work, and its target."""

    kernel: str
    size: str
    make: Callable[..., Work]
    arguments: tuple[Any, ...]
    share: float | None = None  # target share of the ceiling
    of_dense: float | None = None  # target share of the dense FP8 product's rate
    times_peer: float | None = None  # target speedup over torch


DENSE = Row("FP8 GEMM", "4096 x 7168 x 16384", dense_fp8, (4096, 7168, 16384), share=0.55, times_peer=1.0)
ROWS = [
    Row("MLA decode, bf16 cache", "16 x 8k, 16 heads", mla_decode, (16, 8192, 16, "bfloat16"), share=0.8),
    Row("MLA decode, bf16 cache", "16 x 8k, 128 heads", mla_decode, (16, 8192, 128, "bfloat16"), share=0.8),
    Row("MLA decode, fp8 cache", "16 x 8k, 16 heads", mla_decode, (16, 8192, 16, "fp8")),
    Row("MLA prefill", "4 x 4k, 16 heads", mla_prefill, (4, 4096, 16)),
    DENSE,
    Row("FP8 GEMM, few rows", "64 x 7168 x 16384", dense_fp8, (64, 7168, 16384)),
    Row("grouped FP8", "8 x 512 rows", experts, ("fp8", 4096, 8, 1, 7168, 2048), of_dense=0.7),
    Row("grouped FP8, decode", "64 tokens, 8 of 64", experts, ("fp8", 64, 64, 8, 7168, 2048)),
    Row("grouped INT8, decode", "64 tokens, 8 of 64", experts, ("int8", 64, 64, 8, 7168, 2048)),
    Row("grouped INT4, decode", "64 tokens, 8 of 64", experts, ("int4", 64, 64, 8, 7168, 2048)),
    Row("grouped bf16, decode", "64 tokens, 8 of 64", experts, ("dense", 64, 64, 8, 2048, 1408)),
    Row("INT4 GEMM", "1 x 7168 x 16384", linear, ("int4", 1, 7168, 16384)),
    Row("bf16 GEMM, few rows", "16 x 7168 x 16384", linear, ("dense", 16, 7168, 16384)),
    Row("softmax", "8192 x 8192", softmax, (8192, 8192), times_peer=3.75),
    Row("softmax, vocabulary", "64 x 129280", softmax_fused, (64, 129280)),
    Row("RMSNorm + quantize", "4096 x 7168", norm_quantize, (4096, 7168)),
    Row("routing + sort", "4096 tokens, 256 experts", routing, (4096,)),
    Row("rotary", "4096 tokens, 128 heads", rotary, (4096, 128)),
    Row("2:4 GEMM", "16 x 7168 x 7168", sparse_product, ("2:4", 16, 7168, 7168)),
    Row("block-sparse, 90 % zero", "16 x 7168 x 7168", sparse_product, ("16x16", 16, 7168, 7168)),
    Row("sampling", "64 x 129280", sampling, (64, 129280)),
    Row("decode step, V2-Lite shape", "16 x 1k", decode_step, (16, 1024), share=0.6),
]


@dataclass(frozen=True, slots=True)
class Result:
    """Measurements of a row."""

    kernel: str
    size: str
    microseconds: float
    rate: str
    share: float
    peer: str
    peer_microseconds: float | None
    target: str
    met: bool | None


def missing() -> str | None:
    """Why nothing can be measured on this machine; None if it can."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return (
            "no CUDA device: torch.cuda.is_available() is False"
            if built
            else "no CUDA device: this torch was built without CUDA"
        )
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: kernels would be interpreted on the CPU"
    return None


def wanted(row: Row) -> str:
    """The target as text."""
    parts = []
    if row.of_dense is not None:
        parts.append(f"{row.of_dense:.0%} of the dense one")
    if row.share is not None:
        parts.append(f"{row.share:.0%} of the ceiling")
    if row.times_peer is not None:
        parts.append(f"{row.times_peer:g}x torch")
    return ", ".join(parts) or "–"


class Clock:
    """Device times with a cold L2."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def medians(self, *runs: Callable[[], object]) -> list[float]:
        """Microseconds of each, measured interleaved."""
        for run in runs:
            for _ in range(3):
                run()
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(self._rounds):
            for run, kept in zip(runs, times, strict=True):
                self._flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                torch.cuda.synchronize()
                kept.append(start.elapsed_time(end) * 1e3)
        return [statistics.median(t) for t in times]


def ceilings(clock: Clock) -> dict[str, float]:
    """Measured ceilings of this GPU: copy bandwidth (bytes/s), bfloat16 and FP8 operations/s."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    n = 8192
    a = torch.randn(n, n, device="cuda").bfloat16()
    out = {"copy": 2e6 * source.numel() / clock.medians(lambda: target.copy_(source))[0]}
    out["bf16"] = 2e6 * n**3 / clock.medians(lambda: a @ a)[0]
    if torch.cuda.get_device_capability() >= (8, 9):
        eight, one = a.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        run = partial(torch._scaled_mm, eight, eight.t(), one, one, out_dtype=torch.bfloat16)
        out["fp8"] = 2e6 * n**3 / clock.medians(run)[0]
    return out


def measure(row: Row, clock: Clock, limits: dict[str, float], dense: float | None) -> Result:
    """Time one row and torch's path; dense: the share reached by the dense FP8 product."""
    work = row.make(*row.arguments)
    runs, name = [work.run], work.peer_name
    if work.peer is not None:
        try:
            work.peer()
            runs.append(work.peer)
        except (RuntimeError, ValueError) as error:  # unsupported by this GPU, or out of memory
            name = f"{name}: {str(error).splitlines()[0][:60]}"
            torch.cuda.empty_cache()
    times = clock.medians(*runs)
    seconds = times[0] / 1e6
    amount = work.bytes if work.ceiling == "copy" else work.flops
    share = amount / seconds / limits[work.ceiling]
    unit, scale = ("GB/s", 1e9) if work.ceiling == "copy" else ("TFLOP/s", 1e12)
    peer = times[1] if len(times) > 1 else None
    met: bool | None = None
    if row.share is not None:
        met = share >= row.share
    if row.times_peer is not None:
        met = None if peer is None else met is not False and peer >= row.times_peer * times[0]
    if row.of_dense is not None and dense is not None:
        met = share >= row.of_dense * dense
    torch.cuda.empty_cache()
    return Result(
        row.kernel, row.size, times[0], f"{amount / seconds / scale:,.0f} {unit}", share, name,
        peer, wanted(row), met,
    )  # fmt: skip


def cells(row: Row, result: Result) -> list[str]:
    """The row as printed."""
    peer = result.peer or "–"
    if result.peer_microseconds is not None:
        ratio = result.peer_microseconds / result.microseconds
        peer = f"{result.peer_microseconds:,.0f} us ({ratio:.2f}x, {result.peer})"
    verdict = {None: "–", True: "met", False: "missed"}[result.met]
    return [
        row.kernel, row.size, f"{result.microseconds:,.1f} us", result.rate, f"{result.share:.0%}", peer,
        wanted(row), verdict,
    ]  # fmt: skip


HEADINGS = ["kernel", "size", "time", "rate", "of the ceiling", "torch", "target", ""]


@dataclass(frozen=True, slots=True)
class Measured:
    """A run: the GPU's name, or why there is none."""

    card: str | None
    reason: str | None
    ceilings: dict[str, float]
    rows: dict[Row, Result]

    @property
    def about(self) -> str:
        """The GPU and its ceilings in one sentence."""
        if self.reason is not None:
            return f"Nothing was measured: {self.reason}."
        limits = ((k, v / (1e9 if k == "copy" else 1e12)) for k, v in self.ceilings.items())
        return f"{self.card}; ceilings (GB/s, TFLOP/s): {', '.join(f'{k} {v:,.0f}' for k, v in limits)}."

    def document(self) -> dict[str, Any]:
        """The run as JSON."""
        rows = [asdict(r) for r in self.rows.values()]
        return {"card": self.card, "reason": self.reason, "ceilings": self.ceilings, "rows": rows}


def run(rows: list[Row], clock: Clock, console: Console) -> Measured:
    """Measure rows; a failing row is reported and skipped."""
    limits, dense = ceilings(clock), None
    results = {}
    for row in track(rows, "measuring", console=console, transient=True):
        try:
            results[row] = measure(row, clock, limits, dense)
            dense = results[row].share if row == DENSE else dense
        except (RuntimeError, KeyError) as error:
            console.print(f"[red]{row.kernel}, {row.size}: {error}[/]")
    return Measured(torch.cuda.get_device_name(), None, limits, results)


def markdown(rows: list[list[str]]) -> str:
    """The table for a page."""
    lines = [HEADINGS, *rows]
    lines.insert(1, ["---"] * len(HEADINGS))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: Path, *parts: str) -> None:
    """Put paragraphs between the page's markers `measured: gpu` and `end`. Raises SystemExit without them."""
    begin, end = "<!-- measured: gpu -->", "<!-- end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{page}: expected {begin!r} and {end!r} after it")
    after = rest.partition(end)[2]
    page.write_text(before + "\n\n".join((begin, *parts, end)) + after, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="only rows whose kernel contains this text")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--into", type=Path, help="write the results as JSON")
    parser.add_argument("--page", type=Path, help="write the table between its markers `measured: gpu`")
    parser.add_argument("--tune", action="store_true", help="choose configurations and write this GPU's file")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows = [r for r in ROWS if options.only.lower() in r.kernel.lower()]
    if not rows and not options.tune:
        parser.error(f"--only {options.only!r} matches nothing; expected part of {[r.kernel for r in ROWS]}")
    reason = missing()
    if reason is not None:
        measured = Measured(None, reason, {}, {})
    elif options.tune:
        return tune(Clock(options.rounds).medians, console, options.only)
    else:
        measured = run(rows, Clock(options.rounds), console)
    table = [cells(row, result) for row, result in measured.rows.items()]
    if table:
        shown = Table(*HEADINGS)
        for line in table:
            shown.add_row(*line)
        console.print(shown)
    console.print(measured.about, highlight=False)
    if options.page is not None:
        fill(options.page, measured.about, *([markdown(table)] if table else []))
    if options.into is not None:
        options.into.write_text(json.dumps(measured.document(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
