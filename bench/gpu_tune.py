"""Choose each kernel's configuration by measured time; keep them in a file of this card (`gpu.py --tune`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import gpu_work
from farthing.ops.gpu.launch import FOLDER, Config, file_name

ROWS = (16, 64, 512)
Medians = Callable[..., list[float]]


def candidates(rows: int, columns: tuple[int, ...], warps: tuple[int, ...] = (4, 8)) -> Iterator[Config]:
    """Tiles not much taller than the rows, a few widths, depths and numbers of warps."""
    heights = [bm for bm in (16, 64, 128) if bm <= max(16, rows)]
    # Few rows wait for weights: more of them on their way.
    for bm, bn, num_warps, num_stages in product(heights, columns, warps, (4, 8) if rows <= 16 else (3, 4)):
        for per in (1, 4) if bm == 16 else (1,):
            yield Config(bm=bm, bn=bn, num_warps=num_warps, num_stages=num_stages, per_processor=per)


def attention_candidates(heads: int) -> Iterator[Config]:
    """Heads and keys of a decode tile."""
    for bm, bk, warps, stages in product((16, 32, 64), (16, 32, 64), (4, 8), (3, 5)):
        for per in (1, 2) if bm == 16 else (1,):
            if bm <= max(16, heads):
                yield Config(bm=bm, bk=bk, num_warps=warps, num_stages=stages, per_processor=per)


def jobs() -> Iterator[tuple[str, int, Callable[[Config], Any], list[Config]]]:
    """(kernel, rows, the work of a configuration, candidates)."""
    for rows in ROWS:
        yield (
            "gemm_fp8", rows, lambda c, rows=rows: gpu_work.dense_fp8(rows, 7168, 7168, c),
            list(candidates(rows, (32, 64, 128))),
        )  # fmt: skip
        for name in ("fp8", "int4"):
            yield (
                f"grouped_{name}", rows,
                lambda c, name=name, rows=rows: gpu_work.experts(name, rows * 4, 16, 4, 7168, 2048, c),
                list(candidates(rows, (64, 128))),
            )  # fmt: skip
    for heads in (16, 128):
        for kernel, kind in (("decode", "bfloat16"), ("decode_8bit", "fp8")):
            yield (
                kernel, heads, lambda c, h=heads, kind=kind: gpu_work.mla_decode(16, 8192, h, kind, c),
                list(attention_candidates(heads)),
            )  # fmt: skip
    tall = [
        Config(bm=bm, bk=bk, num_warps=w, num_stages=2) for bm, bk, w in product((64, 128), (32, 64), (4, 8))
    ]
    yield "prefill", 128, lambda c: gpu_work.mla_prefill(2, 4096, 16, c), tall


def tune(medians: Medians, console: Console) -> int:
    """Measure every candidate; write the best of each kernel and size."""
    table: dict[str, list[dict[str, int]]] = {}
    for kernel, rows, make, choices in jobs():
        best: tuple[float, Config] | None = None
        failed = 0
        for choice in track(choices, f"{kernel}, {rows} rows", console=console, transient=True):
            try:
                time = medians(make(choice).run)[0]
            except (RuntimeError, ValueError):  # more shared memory or registers than there are
                failed += 1
                continue
            if best is None or time < best[0]:
                best = time, choice
        torch.cuda.empty_cache()
        if best is None:
            console.print(f"{kernel}, {rows} rows: none of {failed} configurations ran; the default stays")
            continue
        console.print(f"{kernel}, {rows} rows: {best[0]:,.1f} us, {best[1]}")
        table.setdefault(kernel, []).append({"rows": rows, **asdict(best[1])})
    path = FOLDER / file_name(torch.cuda.get_device_name())
    lines = [
        f'  "{k}": [\n' + ",\n".join(f"    {json.dumps(e)}" for e in v) + "\n  ]" for k, v in table.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    console.print(f"written: {path}")
    return 0
