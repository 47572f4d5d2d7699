"""The pictures: the curves of all runs, and the latencies, with top-1 if the nets are trained."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from bench.resnet50.compare import OURS


def plot(out: Path, into: Path, top1: dict[str, float] | None) -> list[Path]:
    """Draw training.png and race.png from the records in `out`. top1: percent by run."""
    import matplotlib

    matplotlib.use("Agg")
    into.mkdir(parents=True, exist_ok=True)
    made = []
    records = {part: out / part / "record.json" for part in ("float", "w4a4", "control")}
    records = {part: file for part, file in records.items() if file.is_file()}
    if "w4a4" in records:
        made.append(_curves({part: json.loads(file.read_text()) for part, file in records.items()}, into))
    races = {
        (int(size), int(threads)): json.loads(file.read_text())
        for file in out.glob("race-*-*.json")
        for _, size, threads in [file.stem.split("-")]
    }
    if races:
        made.append(_race(races, into, top1))
    return made


def _curves(records: dict[str, list[dict[str, Any]]], into: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3))
    for part, record in records.items():
        steps = [point["step"] for point in record]
        axes[0].plot(steps, [point["loss"] for point in record], ".-", label=part)
        axes[1].plot(steps, [100 * point["top1"] for point in record], ".-", label=part)
    student = records["w4a4"]
    axes[2].plot([p["step"] for p in student], [100 * p["sparsity"] for p in student], ".-", color="C1")
    for axis, title in zip(axes, ("training loss", "top-1, %", "zero blocks, %"), strict=True):
        axis.set(title=title, xlabel="step of the run")
    axes[0].legend()
    return _save(figure, into / "resnet50-training.png")


def _race(
    races: dict[tuple[int, int], dict[str, list[float]]], into: Path, top1: dict[str, float] | None
) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(races), figsize=(5 * len(races), 3), squeeze=False)
    for axis, ((size, threads), rounds) in zip(axes[0], sorted(races.items()), strict=True):
        times = {name: statistics.median(values) for name, values in rounds.items()}
        names = sorted(times, key=lambda name: -times[name])
        bars = axis.barh(names, [times[n] for n in names], color=["C1" if n == OURS else "C0" for n in names])
        axis.bar_label(bars, [f"{times[n]:.1f}" for n in names], padding=2)
        axis.set(
            title=f"{threads} thread{'s' if threads > 1 else ''}", xlabel=f"ms per picture, {size} x {size}"
        )
        axis.margins(x=0.15)
    if top1:
        figure.suptitle("top-1: " + ", ".join(f"{part} {value:.1f} %" for part, value in top1.items()))
    return _save(figure, into / "resnet50-race.png")


def _save(figure: Any, file: Path) -> Path:
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    return file
