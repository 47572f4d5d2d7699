"""The report of a compression: speed and memory against the source, as JSON and as one HTML page."""

from __future__ import annotations

import html
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from farthing.compress.evaluate import PAGE, Comparison, Verdict, paged_batch
from farthing.files import replace_json, replace_text
from farthing.memory import available_memory, gigabytes
from farthing.model.decoder import DecoderModel
from farthing.model.load import load
from farthing.model.pack import pack_checkpoint
from farthing.ops import LatentCache, make_batch
from farthing.ops.select import select
from farthing.planner.fit import weight_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CompressionReport:
    """All measurements of one run."""

    recipe: dict[str, Any]
    source: str
    export: str  # see `export.py`
    transformers_limits: list[str]  # why transformers does not reproduce the result; empty if it does
    size_before: int
    size_after: int
    larger: str | None  # the warning if the result is larger than its source
    sizes: dict[str, dict[str, int]]  # before and after: see `size.Sizes`
    seconds: float
    peak_memory: int
    modules: list[dict[str, Any]]
    coverage: list[dict[str, Any]]
    healed: list[dict[str, Any]]
    plan: dict[str, Any] | None
    quality: Comparison | None
    elsewhere: Comparison | None  # as other programs read the files, if that differs
    verdict: Verdict | None
    serving: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        document = {name: getattr(self, name) for name in self.__dataclass_fields__}
        document["quality"] = self.quality.to_json() if self.quality else None
        document["elsewhere"] = self.elsewhere.to_json() if self.elsewhere else None
        document["verdict"] = str(self.verdict) if self.verdict else None
        return document

    def write(self, directory: Path) -> Path:
        """report.json and report.html; returns the path of the former."""
        file = directory / "report.json"
        replace_json(file, self.to_json())
        replace_text(directory / "report.html", page(self))
        return file


STYLE = (
    "body{font:15px system-ui;margin:2em auto;max-width:60em;padding:0 1em}"
    "table{border-collapse:collapse;width:100%}td,th{padding:.2em .7em;text-align:left;"
    "border-bottom:1px solid #ddd}td:not(:first-child){font-variant-numeric:tabular-nums}"
    "figure{margin:1.5em 0}figcaption{color:#555}svg text{font:11px system-ui}"
)


def page(report: CompressionReport) -> str:
    """The report as one HTML page."""
    parts = [
        f"<h1>{html.escape(str(report.recipe['name']))}</h1><p>of {html.escape(report.source)}</p>",
        _table(_summary(report)),
        bars("Size, MB", *_size_bars(report)),
        bars("Relative output error by layer (root mean square)", *_per_layer(report.modules, "error")),
        bars("Bits per weight by layer", *_per_layer(report.modules, "bits")),
    ]
    if any(m["sparsity"] for m in report.modules):
        parts.append(bars("Zeros by layer", *_per_layer(report.modules, "sparsity")))
    if report.healed:
        labels = [str(h["layer"]) for h in report.healed]
        for when in ("before", "after"):
            title = f"Error of the pruned feed-forward by layer, {when} healing"
            parts.append(bars(title, labels, [h[when] for h in report.healed]))
    parts += [coverage_picture(entry) for entry in report.coverage]
    if report.plan:
        parts.append(f"<h2>Plan</h2><p>{html.escape(report.plan['explanation'])}</p>")
        parts.append(_grid(report.plan["choices"]))
    if report.serving:
        parts += ["<h2>Served</h2>", _grid(report.serving)]
    parts += ["<h2>Worst modules</h2>", _grid(_worst(report.modules))]
    body = "\n".join(parts)
    return (
        f"<!doctype html><meta charset=utf-8><title>compression report</title><style>{STYLE}</style>{body}\n"
    )


def _summary(report: CompressionReport) -> list[tuple[str, str]]:
    limits = report.transformers_limits
    rows = [
        ("size before", f"{report.size_before:,} bytes"),
        ("size after", f"{report.size_after:,} bytes ({report.size_after / report.size_before:.1%})"),
        *([("larger than the source", report.larger)] if report.larger else []),
        *(_both(name, report.sizes, key) for name, key in _MEASURES),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", f"{report.peak_memory / 2**20:,.0f} MiB"),
        ("format", report.export),
        ("transformers 5.24", "; ".join(["does not reproduce it", *limits]) if limits else "loads it"),
    ]
    q = report.quality
    if q is not None:
        rows += [
            ("perplexity", f"{q.perplexity_a:.4f} → {q.perplexity_b:.4f}"),
            (
                "relative increase",
                f"{q.relative_increase:+.3%}  [{q.interval[0]:+.3%}, {q.interval[1]:+.3%}]",
            ),
            ("KL divergence", f"{q.kl:.6f} nats per token"),
            ("same greedy token", f"{q.greedy_agreement:.2%}"),
            ("measured on", f"{q.tokens:,} held-out tokens, {q.windows} windows"),
        ]
    if report.elsewhere is not None:
        rows.append(("KL divergence elsewhere", f"{report.elsewhere.kl:.6f}: other programs read even steps"))
    if report.verdict is not None:
        rows.append(("verdict", str(report.verdict)))
    return rows


_MEASURES = (
    ("weights in the kernels' layout", "memory"),
    ("weights read per decoded token", "token"),
)


def _size_bars(report: CompressionReport) -> tuple[list[str], list[float]]:
    """Pairs of bars: files, memory, bytes per token."""
    labels, values = ["files before", "after"], [report.size_before / 1e6, report.size_after / 1e6]
    for label, key in (("in kernels before", "memory"), ("per token before", "token")):
        labels += [label, "after"]
        values += [report.sizes[when][key] / 1e6 for when in ("before", "after")]
    return labels, values


def _both(name: str, sizes: dict[str, dict[str, int]], key: str) -> tuple[str, str]:
    before, after = (sizes[when][key] for when in ("before", "after"))
    return name, f"{before:,} → {after:,} bytes ({after / before:.1%})"


def _per_layer(modules: Sequence[dict[str, Any]], field: str) -> tuple[list[str], list[float]]:
    """Mean over the modules of each layer, as a root for squared errors."""
    layers: dict[int, list[float]] = {}
    for module in modules:
        layers.setdefault(int(module["module"].split(".")[2]), []).append(float(module[field]))
    means = [sum(v) / len(v) for v in layers.values()]
    return [str(i) for i in layers], [m**0.5 for m in means] if field == "error" else means


def _worst(modules: Sequence[dict[str, Any]], count: int = 20) -> list[dict[str, Any]]:
    worst = sorted(modules, key=lambda m: -m["error"])[:count]
    return [
        {
            "module": m["module"],
            "format": m["format"],
            "bits": round(m["bits"], 2),
            "relative error": f"{m['error'] ** 0.5:.4f}",
            "activations": m.get("observer") or "",
            "statistics": m.get("statistics") or "own",
        }
        for m in worst
    ]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{html.escape(a)}<td>{html.escape(b)}" for a, b in rows) + "</table>"


def _grid(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(str(k))}" for k in rows[0])
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}" for v in row.values()) for row in rows)
    return f"<table><tr>{head}{lines}</table>"


def bars(title: str, labels: Sequence[str], values: Sequence[float], height: int = 160) -> str:
    """A bar chart as inline SVG."""
    width, gap = 720, 4
    top = max([*values, 1e-12])
    step = width / max(len(values), 1)
    shapes = []
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        h = (height - 40) * value / top
        x, y = i * step + gap / 2, height - 20 - h
        middle = x + (step - gap) / 2
        shapes.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{step - gap:.1f}" height="{h:.1f}" fill="#3b6fb5"/>'
            f'<text x="{middle:.1f}" y="{height - 5}" text-anchor="middle">{html.escape(label)}</text>'
            f'<text x="{middle:.1f}" y="{y - 4:.1f}" text-anchor="middle">{value:.3g}</text>'
        )
    svg = f'<svg viewBox="0 0 {width} {height}" width="100%">{"".join(shapes)}</svg>'
    return f"<figure>{svg}<figcaption>{html.escape(title)}</figcaption></figure>"


def coverage_picture(entry: dict[str, Any]) -> str:
    """Calibration tokens per expert of one layer, as a chart."""
    tokens = entry["tokens_per_expert"]
    labels = [str(e) for e in range(len(tokens))]
    fallbacks = len(entry["fallbacks"])
    title = f"Layer {entry['layer']}: calibration tokens per expert; {fallbacks} inputs used a fallback"
    return bars(title, labels, [float(t) for t in tokens], height=110)


# Speed and memory of a compressed model on this machine, compared with its source.

STEPS = 24
PROMPT = 256
PREFILLS = 5
ROUND = 8  # decode steps of one model before switching to the next


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of one sequence."""

    prefill: float
    decode: float


def serving_figures(source: Path) -> Callable[[Path], list[dict[str, Any]]]:
    """A function of OUT for `api.compress(after=…)`: size, memory and decode speed of both models."""

    def rows(out: Path) -> list[dict[str, Any]]:
        needed, free = weight_bytes(source) + weight_bytes(out), available_memory()
        if needed > free:
            log.info("not timed: both models take %s of %s", gigabytes(needed), gigabytes(free))
            return []
        backend = select("auto").name
        models = {"source": load(source, select("auto")), "compressed": load(out, select("auto"))}
        speed = speeds(models)
        paths = {"source": source, "compressed": out}
        size = {name: _size(path) for name, path in paths.items()}
        resident = {name: resident_bytes(path) for name, path in paths.items()}
        return [
            {
                "model": name,
                "bytes": size[name],
                "memory": resident[name],
                "prefill_tokens_per_second": round(speed[name].prefill, 2),
                "decode_tokens_per_second": round(speed[name].decode, 2),
                "backend": backend,
            }
            for name in models
        ]

    return rows


def resident_bytes(path: Path) -> int | None:
    """Memory that a separate process needs for the loaded model, beyond the program itself.

    None if the system does not report it (no /proc).
    """
    if not Path("/proc/self/status").is_file():
        return None
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(result.stdout)


_MEASURE = """
import sys
from pathlib import Path
from farthing.model import load
from farthing.ops import select

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

ops = select("auto")
before = anonymous()
model = load(Path(sys.argv[1]), ops)
print(anonymous() - before)
"""


def speeds(models: dict[str, DecoderModel], steps: int = STEPS) -> dict[str, Speed]:
    """Speeds of one sequence on the engine's kernels, interleaved so that noise affects all models alike."""
    caches = {name: _cache(model, steps) for name, model in models.items()}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(PREFILLS):
        for name, model in models.items():
            prompt = _prompt(model, steps)
            batch, _ = paged_batch([prompt])
            ids = torch.arange(prompt) % model.config.vocab_size
            start = time.perf_counter()
            model.forward(ids, batch, caches[name])
            prefill[name].append((time.perf_counter() - start) / prompt)
    for first in range(0, steps, ROUND):
        for name, model in models.items():
            took = _decode(model, caches[name], _prompt(model, steps) + first, min(ROUND, steps - first))
            decode[name] += took[1:] or took  # the first step refills the CPU caches
    return {
        name: Speed(1 / statistics.median(prefill[name]), 1 / statistics.median(decode[name]))
        for name in models
    }


def _decode(model: DecoderModel, cache: LatentCache, position: int, steps: int) -> list[float]:
    """Seconds of each of `steps` steps of one sequence with `position` tokens."""
    took = []
    for step in range(steps):
        batch = make_batch([1], [position + step], [range(cache.num_blocks)], PAGE)
        start = time.perf_counter()
        model.logits(model.forward(torch.tensor([step % model.config.vocab_size]), batch, cache))
        took.append(time.perf_counter() - start)
    return took


def _prompt(model: DecoderModel, steps: int) -> int:
    return min(PROMPT, model.config.max_position_embeddings - steps - 1)


def _cache(model: DecoderModel, steps: int) -> LatentCache:
    blocks = -(-(_prompt(model, steps) + steps + 1) // PAGE)
    return model.new_cache(blocks, PAGE, "float32" if model.ops.dtype == torch.float32 else "bfloat16")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def pack_for_cpu(out: Path) -> Path:
    """Write OUT/packed.bin, the CPU kernels' layout, which a replica only needs to map."""
    target = out / "packed.bin"
    pack_checkpoint(out, target)
    return target
