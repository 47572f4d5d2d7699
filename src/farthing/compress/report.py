"""The report of a compression: a JSON document and a self-contained HTML page with charts."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farthing.compress.evaluate import Comparison, Verdict
from farthing.files import replace_json, replace_text


@dataclass(frozen=True, slots=True)
class CompressionReport:
    """All measurements of one run."""

    recipe: dict[str, Any]
    source: str
    export: str  # see `export/layout.py`
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
    verdict: Verdict | None
    serving: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        document = {name: getattr(self, name) for name in self.__dataclass_fields__}
        document["quality"] = self.quality.to_json() if self.quality else None
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
