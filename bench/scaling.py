"""How the CPU backend scales with threads: 1, 2, 4, … all cores, and more threads than cores.

    python bench/scaling.py [--model S576] [--beyond 64] [--into FILE]

Per number of threads: the bandwidth of reading memory; the time of an empty region of the pool, and of each
barrier in one; decoding of the packed model at batch 1 and 8; and how many regions and barriers a step has.
`--beyond` adds a run with more threads than cores, where the pool's waiting threads must give way instead of
spinning. Prints one JSON line per number of threads; `share` is the rate divided by that of one thread and by
the threads with a core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from decode import log, packed
from farthing import LLM, SamplingParams, _native
from farthing.cpus import own_cpus
from random_model import MODELS, make_model

READ = 1 << 30  # bytes
BARRIERS = 50  # of a region that measures them
PROMPT, NEW = 16, 64


def counts(cores: int, beyond: int) -> list[int]:
    """Powers of two up to all cores, all cores, then `beyond` of them."""
    powers = [1 << i for i in range(cores.bit_length()) if 1 << i < cores]
    return [*powers, cores, *([beyond] if beyond > cores else [])]


def meeting_microseconds(threads: int, most: float = 1.0) -> tuple[float, float]:
    """(an empty region, each barrier in one): the best of several means."""
    pool = _native.Backend(threads, "auto", (cpus := own_cpus()).topology, cpus.pinned)
    regions, passes = 1000, 20
    best = [float("inf")] * 2
    began = time.perf_counter()
    for _ in range(passes):
        for i, barriers in enumerate((0, BARRIERS)):
            best[i] = min(best[i], pool.region_seconds(barriers, regions) * 1e6)
        if time.perf_counter() - began > most:
            break
    return best[0], (best[1] - best[0]) / BARRIERS


def decoding(model: Path, file: Path, threads: int, batch: int, rounds: int) -> tuple[float, float, float]:
    """(tokens/s, regions and barriers of a step), from the last first token to the end; all prompts fit into
    one step."""
    options: dict[str, Any] = dict(backend="cpu", packed=file, threads=threads, skip_tokenizer_init=True)
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    prompts = [[3 + i] * PROMPT for i in range(batch)]
    with LLM(model, max_model_len=256, max_num_seqs=8, num_blocks=256, **options) as llm:

        def rate() -> float:
            times = [output.metrics for output in llm.generate(prompts, params, use_tqdm=False)]
            began, ended = max(m.first_token_time for m in times), max(m.finished_time for m in times)
            return batch * (NEW - 1) / (ended - began)

        rate()
        native = llm.engine._model.ops._native  # type: ignore[attr-defined]
        regions, barriers = native.meetings
        rates = [rate() for _ in range(rounds)]
        steps = rounds * NEW
        regions, barriers = (
            (after - b) / steps for after, b in zip(native.meetings, (regions, barriers), strict=True)
        )
        return statistics.median(rates), regions, barriers


def main() -> None:
    """Parse, run, print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=MODELS, default="S576")
    p.add_argument("--weights", choices=("int4", "int8", "bf16"), default="int4")
    p.add_argument("--beyond", type=int, default=64, help="threads of the oversubscribed run; 0: none")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--cache", type=lambda d: Path(d).resolve(), default=Path.home() / ".cache/farthing/bench")
    p.add_argument("--into", type=Path, metavar="FILE", help="file to write the curve to")
    a = p.parse_args()
    cores = own_cpus().threads()
    model = make_model(a.model, a.cache)
    file = packed(model, a.weights, cores)
    rows: list[dict[str, Any]] = []
    for threads in counts(cores, a.beyond):
        log.print(f"{threads} threads")
        row: dict[str, Any] = {"threads": threads, "cores": cores}
        row["read_gb_s"] = round(_native.read_bandwidth(threads, READ), 1)
        row["region_us"], row["barrier_us"] = (round(t, 2) for t in meeting_microseconds(threads))
        for batch in (1, 8):
            rate, regions, barriers = decoding(model, file, threads, batch, a.rounds)
            row[f"batch_{batch}_regions"], row[f"batch_{batch}_barriers"] = round(regions), round(barriers)
            row[f"batch_{batch}"] = round(rate, 1)
            alone = rows[0][f"batch_{batch}"] if rows else rate
            row[f"batch_{batch}_share"] = round(rate / alone / min(threads, cores), 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if a.into:
        a.into.write_text(json.dumps({"model": a.model, "weights": a.weights, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
