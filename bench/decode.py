"""Tokens per second on the CPU: ours, the peers found, and the limit of the machine, in one run.

    python bench/decode.py --model L576 --weights int4 \\
        --llama-bench ik_llama.cpp=PATH/build/bin/llama-bench --converter PATH/convert_hf_to_gguf.py

Models are random (see random_model.py) and kept in --cache. Ours goes through `farthing.LLM`. Rounds
alternate between ours and the peers; figures are medians. `batch` is the prompt's length for prefill, else
the sequences that decode together, each behind a prompt of 128 tokens. The limit is bandwidth over the bytes
of weights a step must read (decode), or the peak of INT8 arithmetic on vectors over the operations of a
token (prefill).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from farthing import LLM, SamplingParams, _native
from random_model import SIZES, active_parameters, config, make_model

log = Console(stderr=True)
PROMPT, NEW = 128, 64
PHASES = [("prefill", 512), ("decode", 1), ("decode", 8), ("decode", 16)]
BYTES_A_WEIGHT = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 64}  # group scales of 16 bits
GGUF_TYPE = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
Measure = Callable[[str, int], float]

# The peer's converter knows tokenizers by a hash; a random model's tokenizer has no place in its list.
CONVERT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("convert", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["convert"] = module
sys.argv = sys.argv[1:]
spec.loader.exec_module(module)
for c in vars(module).values():
    if isinstance(c, type) and "get_vocab_base_pre" in vars(c):
        c.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
module.main()
"""


def machine(threads: int) -> dict[str, float]:
    """The limits: GB/s of reading, GOP/s of INT8 on vectors and on tiles."""
    return {
        "threads": threads,
        "read_gb_s": _native.read_bandwidth(threads, 1 << 30),
        "int8_gop_s": _native.peak_ops("vnni_int8", threads),
        "amx_int8_gop_s": _native.peak_ops("amx_int8", threads),
    }


def limit(size: str, weights: str, phase: str, batch: int, m: dict[str, float]) -> float:
    """Tokens per second the machine allows at most."""
    c = config(size)
    experts, k = c["n_routed_experts"], c["num_experts_per_tok"]
    if phase == "prefill":
        return m["int8_gop_s"] * 1e9 / (2 * active_parameters(c, k))
    touched = experts * (1 - (1 - k / experts) ** batch)  # of random routing, in expectation
    return batch * m["read_gb_s"] * 1e9 / (active_parameters(c, touched) * BYTES_A_WEIGHT[weights])


def ours(path: Path, weights: str, threads: int) -> Measure:
    """Farthing through its Python API."""
    llm = LLM(
        path, backend="cpu", threads=threads, quantization=None if weights == "bf16" else weights,
        skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=512,
        enable_prefix_caching=False, num_blocks=1024,
    )  # fmt: skip
    numbers = random.Random(0)

    def seconds(batch: int, prompt: int, new: int) -> float:
        prompts = [[numbers.randrange(3, 32000) for _ in range(prompt)] for _ in range(batch)]
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    seconds(1, 32, 4)

    def measure(phase: str, batch: int) -> float:
        if phase == "prefill":
            return batch / seconds(1, batch, 1)
        before = seconds(batch, PROMPT, 1)
        return batch * NEW / (seconds(batch, PROMPT, NEW + 1) - before)

    return measure


def gguf(path: Path, weights: str, converter: Path, quantize: Path) -> Path:
    """The model in the peer's own format, converted by the peer's own tools."""
    whole = path.with_suffix(".gguf")
    if not whole.exists():
        command = [sys.executable, "-c", CONVERT, converter, path, "--outtype", "bf16", "--outfile", whole]
        subprocess.run([str(c) for c in command], check=True, stdout=sys.stderr)
    if weights == "bf16":
        return whole
    kind = GGUF_TYPE[weights]
    out = path.with_name(f"{path.name}-{kind.lower()}.gguf")
    if not out.exists():
        subprocess.run([str(c) for c in (quantize, whole, out, kind)], check=True, stdout=sys.stderr)
    return out


def llama(bench: Path, model: Path, threads: int) -> Measure:
    """llama-bench and its sibling llama-batched-bench, weights repacked at load."""
    batched = bench.with_name("llama-batched-bench")

    def output(command: list[Any]) -> str:
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, errors="replace", check=True
        )
        return done.stdout + done.stderr

    def measure(phase: str, batch: int) -> float:
        if phase == "prefill" or batch == 1:
            shape = (
                ["-p", batch, "-n", 0]
                if phase == "prefill"
                else ["-p", 0, "-n", NEW, "-gp", f"{PROMPT},{NEW}"]
            )
            text = output([bench, "-m", model, "-t", threads, "-r", 1, "-rtr", 1, "-o", "json", *shape])
            rows = json.loads(text[text.index("[\n") : text.rindex("]") + 1])
            return float(rows[-1]["avg_ts"])
        text = output(
            [batched, "-m", model, "-t", threads, "-rtr", "-c", 4096, "-b", 2048, "-ub", 512,
             "-npp", PROMPT, "-ntg", NEW, "-npl", batch]
        )  # fmt: skip
        row = [line for line in text.splitlines() if re.match(rf"\|\s*{PROMPT} \|", line)][-1]
        return float(row.split("|")[8])  # S_TG

    return measure


def find_peers(a: argparse.Namespace, path: Path) -> dict[str, Measure]:
    """The peers given on the command line that run here."""
    peers: dict[str, Measure] = {}
    for given in [] if a.no_peers else a.llama_bench:
        name, binary = given.split("=")[0] if "=" in given else "llama.cpp", Path(given.split("=")[-1])
        if a.converter is None:
            raise SystemExit("--llama-bench needs --converter, the peer's convert_hf_to_gguf.py")
        model = gguf(path, a.weights, a.converter, binary.with_name("llama-quantize"))
        peers[f"{name} {GGUF_TYPE[a.weights]}"] = llama(binary, model, a.threads)
    return peers


def run(a: argparse.Namespace) -> dict[str, Any]:
    """Every phase, ours and the peers in turn."""
    path = make_model(a.model, a.cache)
    peers = find_peers(a, path)
    systems = {"ours": ours(path, a.weights, a.threads)} | peers
    readings: dict[tuple[str, str, int], list[float]] = {}
    limits = []
    for turn in range(a.rounds):
        limits.append(machine(a.threads))
        for phase, batch in PHASES:
            for name, measure in systems.items():
                rate = measure(phase, batch)
                readings.setdefault((name, phase, batch), []).append(rate)
                log.print(f"round {turn + 1}: {phase} {batch}: {name} {rate:.1f} tok/s")
    m = {key: statistics.median(reading[key] for reading in limits) for key in limits[0]}
    rows = []
    for phase, batch in PHASES:
        best = limit(a.model, a.weights, phase, batch, m)
        mine = statistics.median(readings["ours", phase, batch])
        rows.append({
            "phase": phase, "batch": batch, "weights": a.weights, "ours_tok_s": mine, "limit_tok_s": best,
            "share_of_limit": mine / best,
            "peers": {name: statistics.median(readings[name, phase, batch]) for name in peers},
        })  # fmt: skip
    return {"machine": m, "model": a.model, "rows": rows}


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
    p.add_argument("--no-peers", action="store_true")
    p.add_argument(
        "--llama-bench", action="append", default=[], metavar="NAME=PATH", help="a peer's llama-bench"
    )
    p.add_argument("--converter", type=Path, help="the peer's convert_hf_to_gguf.py")
    p.add_argument("--cache", type=Path, default=Path.home() / ".cache/farthing/bench")
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(1)
    result = run(a)
    print(json.dumps(result)) if a.json else show(result)


if __name__ == "__main__":
    main()
