"""Choose each kernel's configuration by measured time and write this GPU's file: `--tune`.

Candidates are compiled first, several at a time. Then all are timed, and the best of them again, interleaved.
The file is updated after every kernel, so that an interrupted run keeps its results.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from farthing_gpu.bench import attention, products
from farthing_gpu.launch import FOLDER, Config, file_name

ROWS = {16: 16, 64: 64, 512: 4096}  # maximum rows of the entry -> tokens of the workload that decides
FINALISTS = 3
Medians = Callable[..., list[float]]
_UNFIT = (RuntimeError, ValueError)  # too much shared memory or registers; unsupported tile


@dataclass(frozen=True, slots=True)
class Job:
    """A kernel's configuration up to `rows`, chosen by the time of a workload of about that size."""

    kernel: str
    rows: int
    make: Callable[[], products.Work]
    candidates: list[Config]


def product_candidates(rows: int, name: str, persistent: bool) -> list[Config]:
    """Tiles not much taller than the rows, with several widths, depths and warp counts."""
    heights = [bm for bm in (16, 64, 128) if rows // 8 <= bm <= max(16, rows)]
    widths = (64, 128) if persistent or rows > 64 else (32, 64, 128)
    if name == "fp8" and rows > 64 and not persistent:
        widths = (128, 256)  # 256: two tiles of weights per program
    turns = (64, 128) if name == "dense" and rows <= 64 else (64,)  # FP8 and INT4 fix theirs
    depths = (4, 8) if rows <= 16 else (3, 4)  # with few rows the weights limit: prefetch more of them
    return [
        Config(bm, bn, bk, num_warps, num_stages, per)
        for bm, bn, bk, num_warps, num_stages in product(heights, widths, turns, (4, 8), depths)
        for per in ((1, 4) if persistent and bm == 16 else (1,))
    ]


def decode_candidates(heads: int) -> list[Config]:
    """Heads and keys per decode tile."""
    return [
        Config(bm=bm, bk=bk, num_warps=warps, num_stages=stages, per_processor=per)
        for bm, bk, warps, stages in product((16, 32, 64), (16, 32, 64), (4, 8), (3, 5))
        if bm <= max(16, heads)
        for per in ((1, 2) if bm == 16 else (1,))
    ]


def jobs() -> dict[str, list[Job]]:
    """All tuned configurations, by kernel."""
    found: dict[str, list[Job]] = {}
    for name in ("fp8", "dense", "int4"):
        for rows, tokens in ROWS.items():
            make = (
                partial(products.dense_fp8, tokens, 7168, 7168)
                if name == "fp8"
                else partial(products.linear, name, tokens, 7168, 7168)
            )
            tiles = product_candidates(rows, name, persistent=False)
            found.setdefault(f"gemm_{name}", []).append(Job(f"gemm_{name}", rows, make, tiles))
            make = partial(products.experts, name, rows * 4, 16, 4, 7168, 2048)
            tiles = product_candidates(rows, name, persistent=True)
            found.setdefault(f"grouped_{name}", []).append(Job(f"grouped_{name}", rows, make, tiles))
    for kernel, kind in (("decode", "bfloat16"), ("decode_8bit", "fp8")):
        found[kernel] = [
            Job(kernel, heads, partial(attention.mla_decode, 16, 8192, heads, kind), decode_candidates(heads))
            for heads in (16, 128)
        ]
    tiles = [
        Config(bm=bm, bk=bk, num_warps=w, num_stages=2) for bm, bk, w in product((64, 128), (32, 64), (4, 8))
    ]
    found["prefill"] = [Job("prefill", 128, partial(attention.mla_prefill, 2, 4096, 16), tiles)]
    return found


def compiled(
    run: Callable[[Config], object], candidates: list[Config], console: Console, text: str
) -> list[Config]:
    """Candidates that run on this GPU. Most compile time is spent outside the GIL."""

    def fits(choice: Config) -> bool:
        try:
            run(choice)
        except _UNFIT:
            return False
        return True

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = track(pool.map(fits, candidates), text, len(candidates), console=console)
        return [choice for choice, ok in zip(candidates, found, strict=True) if ok]


def best(job: Job, medians: Medians, console: Console) -> tuple[float, Config] | None:
    """(microseconds, configuration); None if no candidate runs."""
    run = job.make().run
    text = f"{job.kernel}, {job.rows} rows"
    fit = compiled(run, job.candidates, console, text)
    if not fit:
        return None
    times = {c: medians(partial(run, c))[0] for c in fit}
    finalists = sorted(fit, key=times.__getitem__)[:FINALISTS]
    again = medians(*(partial(run, c) for c in finalists))
    return min(zip(again, finalists, strict=True), key=lambda pair: pair[0])


def write(path: Path, kernel: str, entries: list[dict[str, int]]) -> None:
    """Write the kernel's entries to the file, replacing its old ones."""
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    table[kernel] = entries
    lines = (
        f'  "{k}": [\n' + ",\n".join(f"    {json.dumps(e)}" for e in v) + "\n  ]" for k, v in table.items()
    )
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def tune(medians: Medians, console: Console, only: str = "") -> int:
    """Measure the candidates of every kernel whose name contains `only` and keep the best. Returns the exit
    code.
    """
    path = FOLDER / file_name(torch.cuda.get_device_name())
    for kernel, sizes in jobs().items():
        if only not in kernel:
            continue
        entries = []
        for job in sizes:
            found = best(job, medians, console)
            torch.cuda.empty_cache()
            text = "no candidate runs here" if found is None else f"{found[0]:,.1f} us, {found[1]}"
            console.print(f"{kernel}, {job.rows} rows: {text}")
            if found is not None:
                entries.append({"rows": job.rows, **asdict(found[1])})
        if len(entries) == len(sizes):  # the last entry also covers larger sizes: write all or none
            write(path, kernel, entries)
    console.print(f"written: {path}")
    return 0
