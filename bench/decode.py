"""Tokens/s on the CPU: Farthing, installed peers, and the machine's limit, in one run.

    python bench/decode.py --model L576 --weights int4 [--no-peers] \\
        --llama-bench ik_llama.cpp=PATH/llama-bench --llama-bench llama.cpp=PATH/llama-bench
    python bench/decode.py --model FILE.gguf --bindings ik_llama.cpp=PYTHON

Models are random (see random_model.py) and kept in --cache, or a GGUF file that both sides read. Ours goes
through `farthing.LLM`, a random model from a packed file. Rounds alternate between ours and the peers, every
second one in the reverse order; figures are medians with their spread. --bindings runs a peer through its
Python package, which stays loaded and feeds every sequence tokens of its own. The machine's
ceilings are measured before and after each of our readings, since a shared machine's bandwidth changes from
second to second; a share is the median over rounds of a reading divided by its own limit (see limits.py; a
share above 100 % is an error). `--into bench/results.json` keeps rows from run to run, for bench/page.py.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Collection, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from farthing import LLM, SamplingParams, _native
from farthing.cpus import cpu_name
from farthing.model.pack import pack_checkpoint
from harness import CACHE, ceilings, log, medians, parser, report
from limits import BYTES_PER_WEIGHT, PEER_BYTES, Point, bytes_read, limit
from page import key, text_of
from peers import GGUF_TYPES, NEW, PROMPT, WARM_UP, Child, LlamaCpp, Measure, Seconds, by_generating
from random_model import MODELS, config, make_model

PEERS = Path(__file__).with_name("peer")  # apart, as peers' own imports must not find our scripts
PREFILL, BATCHES = (512,), (1, 8, 16)


def repeated(arguments: Sequence[str]) -> str:
    """The command that repeats a run: paths become their last part, and --into is left out."""
    words = list(arguments)
    if "--into" in words:
        del words[words.index("--into") : words.index("--into") + 2]
    return " ".join(["bench/decode.py", *(re.sub(r"(^|=)[^ =]*/", r"\1", word) for word in words)])


def gb_s(ceilings: Sequence[dict[str, float]]) -> str:
    """The bandwidths in words."""
    return " and ".join(f"{m['read_gb_s']:.1f}" for m in ceilings)


def packed(model: Path, weights: str, threads: int) -> Path:
    """The model's packed file, written first if missing or older than the native module."""
    out = model.with_name(f"{model.name}-{weights}.packed")
    if not out.exists() or out.stat().st_mtime < Path(_native.__file__).stat().st_mtime:
        log.print(f"packing {out.name}")
        pack_checkpoint(model, out, None if weights == "bf16" else weights, threads)  # type: ignore[arg-type]
    return out


def generating(llm: LLM, cached: Collection[int], vocabulary: int = 32000) -> Seconds:
    """Times `LLM.generate`: (batch, prompt tokens, new tokens) -> seconds."""

    def seconds(batch: int, prompt: int, new: int) -> float:
        # Prompts of decode runs never change, so they hit the prefix cache; other prompts are always new.
        numbers = random.Random(prompt if prompt in cached else None)
        prompts = [[numbers.randrange(3, vocabulary) for _ in range(prompt)] for _ in range(batch)]
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    return seconds


def needed(points: Sequence[Point], new: int) -> int:
    """Tokens that the caches of all sequences hold together, at most."""
    return max(WARM_UP + 2 * new, *(p.batch * (p.context + 2 * new) for p in points))


def ours(model: Path, weights: str, threads: int, points: Sequence[Point], new: int = NEW) -> Measure:
    """Farthing through its Python API."""
    longest = max(WARM_UP, *(p.context for p in points)) + 2 * new
    decoding = [p for p in points if p.kind == "decode"]
    blocks = needed(points, new) // 16 + 64
    made = model.name in MODELS
    llm = LLM(
        model, backend="cpu", threads=threads, packed=packed(model, weights, threads) if made else None,
        skip_tokenizer_init=True, max_model_len=longest, max_num_seqs=max(p.batch for p in points),
        max_num_batched_tokens=1024, kv_cache_dtype="bfloat16", num_blocks=blocks,
    )  # fmt: skip
    vocabulary = config(model.name)["vocab_size"] if made else 32000
    seconds = generating(llm, {p.context for p in decoding}, vocabulary)
    seconds(1, WARM_UP, 4)
    for point in decoding:
        seconds(point.batch, point.context, 4)
    return by_generating(seconds, new)


def find_peers(a: argparse.Namespace, model: Path) -> dict[str, Measure]:
    """The peers given on the command line, by name and format."""
    peers: dict[str, Measure] = {}
    if a.no_peers:
        return peers
    for given in a.llama_bench:
        name, _, binary = given.rpartition("=")
        build = LlamaCpp(name or "llama.cpp", Path(binary).resolve().parent, a.new)
        for kind in a.gguf or GGUF_TYPES[a.weights]:
            peers[f"{build.name} {kind}"] = build.measure(model, kind, a.threads, a.repack)
    for given in a.bindings:
        name, _, python = given.partition("=")
        file, kind = a.gguf_file or model, a.gguf[0] if a.gguf else model.stem
        sizes = file, a.threads, needed(chosen(a), a.new) + 256, max(a.batches, default=1)
        for form in (" repack", "")[not a.repack :]:
            child = Child([python, PEERS / "peer_llama.py", *sizes, *form.split()])
            peers[f"{name}{form} {kind}"] = partial(child.measure, new=a.new)
    return peers


def chosen(a: argparse.Namespace) -> list[Point]:
    """The points given on the command line."""
    return [Point("prefill", 1, length) for length in a.prefill] + [
        Point("decode", batch, context) for context in a.cached for batch in a.batches
    ]


def run(a: argparse.Namespace) -> dict[str, Any]:
    """Measure every point, alternating between Farthing and the peers."""
    points = chosen(a)
    shape = a.model if a.model in MODELS else None  # of which a limit is known
    model = make_model(shape, a.cache) if shape else Path(a.model).resolve()
    systems = {"ours": ours(model, a.weights, a.threads, points, a.new)} | find_peers(a, model)
    readings: dict[tuple[str, Point], list[float]] = {}
    shares: dict[Point, list[float]] = {}
    machine = [ceilings(a.threads)]
    for turn in range(a.rounds):
        for point in points:
            for name, measure in list(systems.items())[:: -1 if turn % 2 else 1]:
                before = ceilings(a.threads) if name == "ours" else {}
                rate = measure(point)
                if rate is None:
                    continue
                readings.setdefault((name, point), []).append(rate)
                log.print(f"round {turn + 1}: {point}: {name} {rate:.1f} tok/s")
                if name == "ours":
                    machine += [before, ceilings(a.threads)]
                if name == "ours" and shape:
                    ceiling = statistics.mean(limit(shape, a.weights, point, m) for m in machine[-2:])
                    shares.setdefault(point, []).append(rate / ceiling)
                    log.print(f"{rate / ceiling:.0%} of the limit; reads of {gb_s(machine[-2:])} GB/s")
    median = medians({key: [reading[key] for reading in machine] for key in machine[0]})
    rows = [row(a, point, readings, shares.get(point), median) for point in points]
    about = {"machine": a.machine, "model": shape or model.stem, "command": repeated(sys.argv[1:])}
    return about | {"ceilings": median, "rows": rows}


def row(
    a: argparse.Namespace,
    point: Point,
    readings: dict[tuple[str, Point], list[float]],
    shares: list[float] | None,
    m: dict[str, float],
) -> dict[str, Any]:
    """One point: medians, spreads (min and max); of a known shape, bytes per step and share of the limit."""
    found = {name: values for (name, where), values in readings.items() if where == point}
    mine = found.pop("ours")
    known: dict[str, Any] = {}
    if shares is not None:
        share, shape = statistics.median(shares), config(a.model)
        if share > 1:
            log.print(f"error: {point} reached {share:.0%} of its limit; the count or a ceiling is wrong")
        known = {
            "step_bytes": bytes_read(shape, a.weights, point),
            "limit_tok_s": limit(a.model, a.weights, point, m),
            "share_of_limit": share,
            "peers_step_bytes": {
                name: bytes_read(shape, kind, point)
                for name in found
                if (kind := name.rpartition(" ")[2].removesuffix("_R8")) in PEER_BYTES
            },
        }  # fmt: skip
    return known | {
        "phase": point.kind, "batch": point.batch, "context": point.context, "weights": a.weights,
        "rounds": len(mine), "ours_tok_s": statistics.median(mine), "ours_spread": [min(mine), max(mine)],
        "peers": {name: statistics.median(values) for name, values in found.items()},
        "peers_spread": {name: [min(values), max(values)] for name, values in found.items()},
    }  # fmt: skip


def keep(result: dict[str, Any], file: Path) -> None:
    """Add a run's rows to a file, replacing older ones of the same kind."""
    stored: dict[str, Any] = {"peers": {}, "rows": []}
    if file.exists():
        stored = json.loads(file.read_text())
    about = {name: result[name] for name in ("machine", "model", "ceilings", "command")}
    new = [about | {"date": str(date.today())} | row for row in result["rows"]]
    replaced = {key(row) for row in new}
    stored["rows"] = [row for row in stored["rows"] if key(row) not in replaced] + new
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text_of(stored))


HEADINGS = ("phase", "batch", "context", "weights", "ours tok/s", "spread", "limit", "share", "peers")


def cells(r: dict[str, Any]) -> list[object]:
    """A row as printed."""
    peers = ", ".join(
        f"{name} {rate:.1f} ({r['ours_tok_s'] / rate:.2f}x)" for name, rate in r["peers"].items()
    )
    known = (r["limit_tok_s"], f"{r['share_of_limit']:.0%}") if "limit_tok_s" in r else ("–", "–")
    spread = "–".join(f"{rate:.1f}" for rate in r["ours_spread"])
    ours = [r[name] for name in ("phase", "batch", "context", "weights", "ours_tok_s")]
    return [*ours, spread, *known, peers]


def main() -> None:
    """Parse, run, print."""
    p = parser(__doc__)
    p.add_argument("--model", default="L576", help=f"{', '.join(MODELS)}, or a GGUF file")
    name = cpu_name() or "unknown processor"
    p.add_argument("--machine", default=name, help="its name in the rows; default the processor's")
    p.add_argument("--weights", choices=BYTES_PER_WEIGHT, default="int4")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--prefill", nargs="*", type=int, default=PREFILL, metavar="TOKENS", help="prompt lengths")
    p.add_argument("--batches", nargs="*", type=int, default=BATCHES, help="sequences that decode together")
    p.add_argument(
        "--cached", nargs="+", type=int, default=[PROMPT], metavar="TOKENS", help="cached tokens per sequence"
    )
    p.add_argument("--new", type=int, default=NEW, help="tokens per sequence of a decode rate")
    p.add_argument("--no-peers", action="store_true")
    p.add_argument(
        "--no-repack", action="store_false", dest="repack", help="run the peer with weights as stored only"
    )
    p.add_argument(
        "--llama-bench", action="append", default=[], metavar="NAME=PATH",
        help="llama-bench in a build of llama.cpp or ik_llama.cpp, under its source tree; repeatable",
    )  # fmt: skip
    p.add_argument(
        "--gguf", action="append", metavar="TYPE", help="formats of the peer; default Q4_0, Q8_0, BF16"
    )
    p.add_argument(
        "--bindings", action="append", default=[], metavar="NAME=PYTHON",
        help="interpreter with ik_llama_cpp or llama_cpp (needs --gguf-file for a random model); repeatable",
    )  # fmt: skip
    p.add_argument("--gguf-file", type=Path, metavar="FILE", help="what --bindings reads; default the model")
    p.add_argument("--cache", type=Path, default=CACHE)
    p.add_argument("--into", type=Path, metavar="FILE", help="file to add the rows to, for bench/page.py")
    a = p.parse_args()
    if a.model not in MODELS and not (a.model.endswith(".gguf") and Path(a.model).is_file()):
        p.error(f"--model: got {a.model!r}; expected {', '.join(MODELS)}, or a GGUF file that exists")
    if a.bindings and a.model in MODELS and not a.gguf_file:
        p.error("--bindings: expected --gguf-file, the random model in GGUF")
    torch.set_num_threads(1)
    result = run(a)
    possible = [r for r in result["rows"] if r.get("share_of_limit", 0) <= 1]
    if a.into:
        keep(result | {"rows": possible}, a.into)
    title = f"{result['model']}: " + ", ".join(f"{name} {x:.1f}" for name, x in result["ceilings"].items())
    report(result, a.json, title, HEADINGS, map(cells, result["rows"]))
    if len(possible) < len(result["rows"]):
        raise SystemExit("a row is above 100 % of its limit: the count or a ceiling is wrong")


if __name__ == "__main__":
    main()
