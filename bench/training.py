"""Training-side compression, measured: FP8 against bfloat16, weight traffic, and the serving speed of the
results.

  python bench/training.py roofline                          # bytes per weight read, by projection
  python bench/training.py precision --out runs/precision     # 1,500 steps, one seed; resumes
  python bench/training.py serve mite runs/qat/checkpoint runs/prune/checkpoint:int4
  python bench/training.py tradeoff float=mite W4A4=runs/qat/checkpoint pruned=runs/prune/checkpoint:int4

A model followed by `:int4` or `:int8` is rounded while loading, as `farthing serve --quantization` does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from farthing.compress.api import held_out_sample, load_for
from farthing.compress.evaluate import PAGE, compare_with, load_corpus, paged_batch, remember
from farthing.config import Quantization
from farthing.files import replace_json
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.load import load
from farthing.ops.api import CacheDtype
from farthing.ops.cpu import CpuOps
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing_lab.train.data import find_sources
from farthing_lab.train.evaluate import plot, plot_tradeoff
from farthing_lab.train.export import load_checkpoint
from farthing_lab.train.finetune import weights_sha256
from farthing_lab.train.fp8 import Fp8Config, use_fp8
from farthing_lab.train.loop import check_start
from farthing_lab.train.mite import Recipe, apply_settings, determining, train_mite

ARITHMETIC: dict[str, tuple[str, list[str]]] = {  # run: its precision and settings
    "bf16": ("bf16", []),
    "fp8": ("fp8", []),
    "fp8-delayed": ("fp8", ['fp8_scaling="delayed"']),
}
EVERY, FINAL = 125, 10_000  # steps between evaluations; held-out tokens of the stored checkpoint's score
KEPT = ("step", "tokens", "main", "eval_loss", "bits_per_byte", "minutes")
PREFILL = 512
PROMPT = 64
WARMUP, ROUNDS = 10, 200


def roofline(model: Path, tokens: int, gbytes: float, gflops: float) -> list[dict[str, Any]]:
    """Bytes of weights read by one forward pass in bfloat16 and in FP8, by kind of projection.

    FP8 bytes are those of the tensors passed to the products. Arithmetic intensity is FLOPs per byte of
    weights at `tokens` tokens; below `gflops / gbytes` weights are the limit.
    """
    net = load_checkpoint(model).eval()
    net.set_compute_dtype(torch.bfloat16)
    projections = use_fp8(net, Fp8Config())
    numbers = {}
    for name, module in net.projections():
        for part in ("weight", "gate_up", "down"):
            value = getattr(module, part, None)
            if isinstance(value, torch.Tensor):
                numbers[name if part == "weight" else f"{name}.{part}"] = value.numel()
    ids = torch.arange(tokens)[None] % net.cfg.vocab_size
    with torch.no_grad():
        hidden = net(ids)
        if net.mtp is not None:
            net.draft(hidden[:, :-1], ids[:, 1:])
    rows: dict[str, dict[str, float]] = {}
    for name, projection in projections.items():
        kind = name.rpartition(".")[2] if "shared" not in name else f"shared {name.rpartition('.')[2]}"
        row = rows.setdefault(kind, {"weights": 0, "bf16": 0, "fp8": 0})
        row["weights"] += numbers[name]
        row["bf16"] += 2 * numbers[name]
        row["fp8"] += projection.weight_bytes
    total = {key: sum(row[key] for row in rows.values()) for key in ("weights", "bf16", "fp8")}
    table: list[dict[str, Any]] = [
        {"projection": kind, **row} for kind, row in [*rows.items(), ("all", total)]
    ]
    for row in table:
        row["ratio"] = row["fp8"] / row["bf16"]
        row["bf16_us"], row["fp8_us"] = (row[k] / gbytes / 1e3 for k in ("bf16", "fp8"))
    balance = gflops / gbytes
    for key, size in (("bf16", 2.0), ("fp8", total["fp8"] / total["weights"])):
        print(f"{key}: weights are the limit below {balance * size / 2:.1f} tokens per weight read")
    return table


def precision(
    out: Path, tokens: int, batch_tokens: int, seed: int, device: str, names: list[str]
) -> dict[str, Any]:
    """Train with each arithmetic, or reuse finished runs in `out`, and compare the last records."""
    finals: dict[str, Any] = {}
    curves = {}
    windows = [[start, min(length, batch_tokens)] for start, length in Recipe().window_stages]
    batch = [
        f"micro_tokens={batch_tokens}",
        f"batch_stages=[[0.0, {batch_tokens}]]",
        f"window_stages={json.dumps(windows)}",
    ]
    for name in names:
        kind, settings = ARITHMETIC[name]
        run = out / name
        record = run / "record.json"
        if (run / "state.pt").is_file():  # of the same seed, batch and recipe?
            recipe = apply_settings(Recipe(precision=kind), batch + settings)
            check_start(run / "state.pt", determining(recipe, seed, find_sources()), resume=True)
        done = (record.is_file() and json.loads(record.read_text())) or []
        if done and done[-1]["tokens"] >= tokens + batch_tokens:
            raise SystemExit(
                f"tokens: got {tokens}; expected {done[-1]['tokens']} or more, as in {record} "
                "(or another --out)"
            )
        if not done or done[-1]["tokens"] < tokens:
            resume = (run / "state.pt").is_file()
            shared = out / names[0] / "tokenizer.json"
            if name != names[0] and shared.is_file():
                run.mkdir(parents=True, exist_ok=True)
                shutil.copy(shared, run)
            trained = train_mite(
                run, None, tokens, resume, None, device, 1, seed, batch + settings, kind, EVERY, FINAL
            )
            if trained is None:
                raise SystemExit("interrupted; run the same command to continue")
            done = json.loads(record.read_text())
        finals[name] = {k: done[-1][k] for k in KEPT}
        hooks = torch.load(run / "state.pt", weights_only=True, mmap=True)["hooks"]
        finals[name]["skipped_steps"] = sum(state.get("skipped", 0) for state in hooks)
        curves[name] = [(p["tokens"], p["eval_loss"]) for p in done]
        finals[name]["curve"] = [{k: p[k] for k in ("step", "tokens", "main", "eval_loss")} for p in done]
        finals[name]["checkpoint_sha256"] = weights_sha256(run / "checkpoint")
    for final in finals.values() if "bf16" in finals else ():
        rise = final["eval_loss"] / finals["bf16"]["eval_loss"] - 1
        final |= {"relative_loss": rise, "within_half_a_percent": abs(rise) <= 0.005}
    plot(out / "fp8.png", curves, "held-out loss, nats per token")
    summary = {"tokens": tokens, "batch_tokens": batch_tokens, "seed": seed, "runs": finals}
    replace_json(out / "precision.json", summary)
    return summary


def _named(model: str) -> tuple[Path, Quantization | None]:
    """The path of MODEL[:QUANTIZATION], and the format its dense weights are rounded to while loading."""
    path, _, kind = model.rpartition(":")
    return (resolve_model(path), kind) if kind in ("int4", "int8") else (resolve_model(model), None)  # type: ignore[return-value]


def serve(models: list[str], threads: int | None, count: int = ROUNDS) -> list[dict[str, Any]]:
    """Prefill of 512 tokens and decode of 1 and 16 sequences; medians, models interleaved.

    `x` columns are the median over rounds of the first model's time divided by this one's in the same round,
    with the quartiles: the speedup without the machine's noise.
    """
    loaded = {}
    for name in models:
        path, kind = _named(name)
        loaded[name] = load(path, select("auto", threads=threads, quantization=kind))
    kinds = {"prefill": (PREFILL, _prefill), "decode 1": (1, decode(1)), "decode 16": (16, decode(16))}
    times = {kind: rounds(loaded, run, count) for kind, (_, run) in kinds.items()}
    rows = []
    for name in loaded:
        row: dict[str, Any] = {"model": name, "bytes": served_bytes(loaded[name])}
        for kind, (tokens, _) in kinds.items():
            own, first = times[kind][name], times[kind][models[0]]
            row[f"{kind} tok/s"] = tokens / statistics.median(own)
            low, middle, high = statistics.quantiles([a / b for a, b in zip(first, own, strict=True)])
            row[f"{kind} x"] = f"{middle:.3f} ({low:.3f}-{high:.3f})"
        rows.append(row | {"backend": loaded[name].ops.name})
    return rows


def tradeoff(
    models: dict[str, str], threads: int | None, max_tokens: int, count: int, out: Path
) -> list[dict[str, Any]]:
    """Perplexity increase over the first model (paired interval) and time per token, with a picture.

    Quality is `farthing eval FIRST --against MODEL --backend cpu`.
    """
    paths = {label: _named(name) for label, name in models.items()}
    first, *others = paths
    config = ModelConfig.from_directory(paths[first][0])
    corpus = load_corpus(held_out_sample(), paths[first][0], config, 1024, max_tokens)
    base = remember(load_for(paths[first][0], "cpu"), corpus)
    lost = {first: (0.0, 0.0, 0.0)}
    for label in others:
        path, kind = paths[label]
        found = compare_with(base, remember(load_for(path, "cpu", quantization=kind), corpus), corpus)
        lost[label] = (found.relative_increase, *found.interval)
    rows = serve(list(models.values()), threads, count)
    for row, label in zip(rows, models, strict=True):
        middle, low, high = lost[label]
        row |= {"model": label, "perplexity": f"{middle:+.1%}", "interval": f"{low:+.1%} {high:+.1%}"}
    out.mkdir(parents=True, exist_ok=True)
    (out / "tradeoff.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    latency = {
        "decode of one sequence, ms per token": [1e3 / row["decode 1 tok/s"] for row in rows],
        "prefill, us per token": [1e6 / row["prefill tok/s"] for row in rows],
    }
    plot_tradeoff(
        out / "tradeoff.png", {k: dict(zip(models, v, strict=True)) for k, v in latency.items()}, lost
    )
    return rows


def served_bytes(model: DecoderModel) -> int:
    """Bytes of the packed matrices and vectors, and of the embedding, that the CPU backend serves from."""
    assert isinstance(model.ops, CpuOps)
    table = 0 if model.embedding is model.head else model.embedding.nbytes
    return table + sum(packed.nbytes for _, packed in model.ops.packed_weights())


def rounds(
    loaded: dict[str, DecoderModel],
    run: Callable[[DecoderModel, Any], tuple[float, Any]],
    count: int = ROUNDS,
) -> dict[str, list[float]]:
    """Seconds of every round by model; the first model rotates, so that the order varies."""
    state: dict[str, Any] = dict.fromkeys(loaded)
    times: dict[str, list[float]] = {name: [] for name in loaded}
    names = list(loaded)
    for i in range(WARMUP + count):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds, state[name] = run(loaded[name], state[name])
            if i >= WARMUP:
                times[name].append(seconds)
    return times


def _cache(model: DecoderModel, blocks: int) -> Any:
    kind: CacheDtype = "float32" if model.ops.dtype == torch.float32 else "bfloat16"
    return model.new_cache(blocks, PAGE, kind)


def _prefill(model: DecoderModel, cache: Any) -> tuple[float, Any]:
    batch, blocks = paged_batch([PREFILL])
    cache = cache or _cache(model, blocks)
    ids = torch.arange(PREFILL) % model.config.vocab_size
    start = time.perf_counter()
    model.forward(ids, batch, cache)
    return time.perf_counter() - start, cache


def decode(sequences: int) -> Callable[[DecoderModel, Any], tuple[float, Any]]:
    """A decode step of this many sequences, each with a prompt of 64 different tokens."""
    each = -(-(PROMPT + 1) // PAGE)
    tables = [range(i * each, (i + 1) * each) for i in range(sequences)]

    def run(model: DecoderModel, cache: Any) -> tuple[float, Any]:
        ids = torch.arange(sequences * PROMPT) * 37 % model.config.vocab_size
        if cache is None:
            cache = _cache(model, sequences * each)
            prompts = make_batch([PROMPT] * sequences, [0] * sequences, tables, PAGE)
            model.forward(ids, prompts, cache)
        batch = make_batch([1] * sequences, [PROMPT] * sequences, tables, PAGE)
        start = time.perf_counter()
        model.logits(model.forward(ids[:sequences] + 1, batch, cache))
        return time.perf_counter() - start, cache

    return run


def show(rows: list[dict[str, Any]]) -> None:
    """One table of rows with the same keys."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{v:,.4g}" if isinstance(v, float) else f"{v}" for v in row.values()))
    Console().print(table)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("roofline")
    one.add_argument("--model", default="mite")
    one.add_argument("--tokens", type=int, default=512)
    one.add_argument("--gbytes", type=float, default=33.0, help="memory bandwidth, GB/s (farthing doctor)")
    one.add_argument("--gflops", type=float, default=455.0, help="bfloat16 GFLOP/s")
    one = commands.add_parser("precision")
    one.add_argument("--out", type=Path, default=Path("runs/precision"))
    one.add_argument("--tokens", type=int, default=768_000)
    one.add_argument("--batch-tokens", type=int, default=512, help="per step")
    one.add_argument("--only", nargs="+", choices=list(ARITHMETIC), default=list(ARITHMETIC))
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--device", default="cpu", help="cpu (FP8 is emulated) or cuda")
    one = commands.add_parser("serve")
    one.add_argument("models", nargs="+")
    one.add_argument("--threads", type=int)
    one.add_argument("--rounds", type=int, default=ROUNDS)
    one = commands.add_parser("tradeoff")
    one.add_argument("models", nargs="+", metavar="LABEL=MODEL", help="the first is the baseline")
    one.add_argument("--threads", type=int)
    one.add_argument("--rounds", type=int, default=ROUNDS)
    one.add_argument("--max-tokens", type=int, default=12_000)
    one.add_argument("--out", type=Path, default=Path("runs/tradeoff"))
    args = parser.parse_args()
    if args.command == "roofline":
        show(roofline(resolve_model(args.model), args.tokens, args.gbytes, args.gflops))
    elif args.command == "precision":
        found = precision(args.out, args.tokens, args.batch_tokens, args.seed, args.device, args.only)
        print(json.dumps(found, indent=1))
    elif args.command == "serve":
        show(serve(args.models, args.threads, args.rounds))
    else:
        pairs = dict(pair.split("=", 1) for pair in args.models)
        show(tradeoff(pairs, args.threads, args.max_tokens, args.rounds, args.out))


if __name__ == "__main__":
    main()
