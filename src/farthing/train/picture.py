"""Plots of training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

Points = Sequence[tuple[float, float]]


def plot(
    path: Path,
    left: Mapping[str, Points],
    ylabel: str,
    right: Mapping[str, Points] | None = None,
    right_label: str = "",
    levels: Mapping[str, float] | None = None,
) -> None:
    """Plot lines over millions of tokens; `right` uses a second axis, `levels` are horizontal lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.6), dpi=90)
    colors = iter(["tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown"])
    for label, points in left.items():
        axis.plot([x / 1e6 for x, _ in points], [y for _, y in points], color=next(colors), label=label)
    for label, value in (levels or {}).items():
        axis.axhline(value, linestyle="--", linewidth=1, color=next(colors), label=f"{label} ({value:.4g})")
    axis.set_xlabel("million tokens")
    axis.set_ylabel(ylabel)
    if right:
        other = axis.twinx()
        for label, points in right.items():
            xs, ys = [x / 1e6 for x, _ in points], [y for _, y in points]
            other.plot(xs, ys, color="tab:red", drawstyle="steps-post", label=label)
        other.set_ylabel(right_label)
    figure.legend(loc="center right", bbox_to_anchor=(0.88, 0.5), frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_tradeoff(
    path: Path, latency: Mapping[str, Mapping[str, float]], lost: Mapping[str, tuple[float, float, float]]
) -> None:
    """One panel per latency {axis: {label: value}}, against perplexity lost (share, low, high)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, _ = plt.subplots(1, len(latency), figsize=(4.6 * len(latency), 3.6), dpi=90, sharey=True)
    for axis, (xlabel, values) in zip(figure.axes, latency.items(), strict=True):
        for label, (middle, low, high) in lost.items():
            spread = [[100 * (middle - low)], [100 * (high - middle)]]
            axis.errorbar(values[label], 100 * middle, yerr=spread, fmt="o", capsize=3, label=label)
            axis.annotate(f" {label}", (values[label], 100 * middle), fontsize=8)
        axis.set_xlabel(xlabel)
        axis.margins(x=0.25)
    figure.axes[0].set_ylabel("perplexity lost, % (95 %)")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
