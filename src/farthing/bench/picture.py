"""Plots of a load run: cumulative latency distributions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from farthing.bench.client import Timing


def plot_latencies(timings: Sequence[Timing], path: Path) -> None:
    """Plot cumulative curves of TTFT and TPOT. Requires matplotlib (extra `train`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [t for t in timings if t.error is None]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    series = {"TTFT": [t.ttft for t in good], "TPOT": [t.tpot for t in good if t.output_tokens > 1]}
    for axis, (name, seconds) in zip(axes, series.items(), strict=True):
        values = np.sort(np.asarray(seconds) * 1000)
        axis.plot(values, np.arange(1, len(values) + 1) / max(len(values), 1), color="#2563eb")
        axis.set(xlabel=f"{name}, ms", xlim=(0, None), ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
