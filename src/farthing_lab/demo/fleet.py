"""Scale replicas of the embedded model through hours of real load in a minute, and the demo's report."""

from __future__ import annotations

import asyncio
import base64
import html
import io
import random
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from farthing.bench.load import LoadResult, Request, Slo, Target, Timing, run_load, summarize
from farthing_fleet.types import Decision
from farthing_lab.demo.levers import Measured, free_port, prompts, running
from farthing_lab.replay.trace import EXAMPLE
from farthing_lab.series import read_series

# The demo's table, on the terminal and as one self-contained HTML page.

COLUMNS = (
    "",
    "tokens/s, 1 user",
    "tokens/s, 8 users",
    "TTFT, ms",
    "TPOT, ms",
    "memory, MB",
    "mJ/token",
    "$/M tokens",
    "perplexity",
)

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
td:first-child, th:first-child { text-align: left; }
.scroll { overflow-x: auto; } img { max-width: 100%; background: white; } pre { overflow-x: auto; }
"""


def cells(row: Measured) -> list[str]:
    """One row of the table."""
    return [
        row.name,
        f"{row.single_tokens_per_second:,.0f}",
        f"{row.batch_tokens_per_second:,.0f}",
        f"{row.ttft_ms:,.0f}",
        f"{row.tpot_ms:.2f}",
        f"{row.memory_bytes / 1e6:,.0f}",
        f"{row.joules_per_token * 1e3:.2f}",
        f"{row.usd_per_million_tokens:.4f}",
        row.quality,
    ]


def print_table(rows: Sequence[Measured]) -> None:
    """Print one column per lever, which fits a terminal."""
    table = Table("", *(row.name for row in rows), title="Cost per token, lever by lever")
    for name, *values in list(zip(COLUMNS, *map(cells, rows), strict=True))[1:]:
        table.add_row(name, *values)
    Console().print(table)


def bars(rows: Sequence[Measured]) -> str:
    """Bar chart of tokens per second by lever, as a PNG data URI."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.7 * len(rows) + 1.2))
    at = range(len(rows))
    batch = [r.batch_tokens_per_second for r in rows]
    axis.barh(at, batch, color="#93c5fd", label="8 users")
    axis.barh(at, [r.single_tokens_per_second for r in rows], height=0.4, color="#1d4ed8", label="1 user")
    axis.set_yticks(list(at), [r.name for r in rows])
    axis.invert_yaxis()
    axis.set_xlabel("generated tokens per second")
    axis.legend()
    figure.tight_layout()
    return data_uri(figure)


def data_uri(figure: Any) -> str:
    """A matplotlib figure as a PNG data URI."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_html(path: Path, rows: Sequence[Measured], sections: Sequence[tuple[str, str, str | None]]) -> None:
    """Write the report. sections below the table: (heading, text, picture's data URI or None)."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(r)) + "</tr>" for r in rows)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Farthing demo</title><style>{STYLE}</style><h1>Cost per token, lever by lever</h1>",
        "<p>Every number was measured in this run. Each row adds a lever to the row above it. Quality is the "
        "change of perplexity on held-out text against the first row, with its 95 % interval; speculation "
        "changes no token. Energy is CPU time × declared watts; dollars follow the declared price of a "
        "core-hour.</p>",
        f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>",
        f"<img alt='tokens per second' src='{bars(rows)}'>",
    ]
    for heading, text, picture in sections:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in text.splitlines())
        parts.append(f"<h2>{html.escape(heading)}</h2>{lines}")
        if picture:
            parts.append(f"<img alt='{html.escape(heading)}' src='{picture}'>")
    path.write_text("".join(parts), encoding="utf-8")


SPEED = 150  # two and a half hours a minute
WINDOWS = 20  # of 600 s
QUIET = 6  # of them at the end, long enough for the fleet to scale down
CAPACITY = 5.0  # declared requests per second per replica
PEAK_REPLICAS = 1.7  # replicas needed at the peak, before headroom
ANSWER = 16  # tokens
# Five minutes of the policy on the demo's clock: outlasts a dip, yet shows the scale-down.
POLICY = {
    "interval_s": 1.0, "cold_start_s": 5.0, "stale_after_s": 10.0, "drain_s": 5.0,
    "cooldown_s": 4.0, "max_replicas": 3, "capacity": CAPACITY,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FleetRun:
    """Load, replicas and decisions of one run."""

    result: LoadResult
    times: list[float]  # seconds, of each decision
    replicas: list[int]  # ready
    wanted: list[int]
    rates: list[float]  # requests per second, of each window
    reasons: list[str]  # of the decisions that changed the count

    @property
    def replica_seconds(self) -> float:
        """The integral of ready replicas between the first and the last decision."""
        steps = zip(self.times[:-1], self.times[1:], self.replicas[:-1], strict=True)
        return sum((b - a) * n for a, b, n in steps)

    @property
    def text(self) -> str:
        """A summary in sentences."""
        static = max(self.replicas) * (self.times[-1] - self.times[0])
        lines = [
            f"{self.result.requests} requests, {self.result.failed} failed, "
            f"p99 TTFT {self.result.ttft_ms.get('p99', 0):.0f} ms.",
            f"{self.replica_seconds:.0f} replica-seconds; running the peak count throughout takes "
            f"{static:.0f}.",
            *self.reasons,
        ]
        return "\n".join(lines)


def busy_hours() -> list[float]:
    """The consecutive rates of the trace with the highest peak above their first two and last QUIET, scaled
    so that the peak needs PEAK_REPLICAS."""
    rates = [float(rate) for rate in read_series(EXAMPLE).values]

    def prominence(i: int) -> float:
        part = rates[i : i + WINDOWS]
        return (max(part[2:-QUIET]) - max(part[:2] + part[-QUIET:])) / max(part)

    best = max(range(len(rates) - WINDOWS + 1), key=prominence)
    part = rates[best : best + WINDOWS]
    return [r / max(part) * PEAK_REPLICAS * CAPACITY for r in part]


def run_fleet(model: str, say: Callable[[str], None]) -> FleetRun:
    """Run `farthing fleet up MODEL` under the load and collect its decisions."""
    rates = busy_hours()
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="farthing-fleet-") as state:
        config = Path(state) / "fleet.yaml"
        config.write_text(yaml.safe_dump({"policy": POLICY, "signals": {"window_s": 5.0, "timeout_s": 2.0}}))
        arguments = ["fleet", "up", model, "--port", str(port), "--config", str(config), "--state", state]
        arguments += ["--metrics", "127.0.0.1:0", "--serve-args", "--threads 1"]
        url = f"http://127.0.0.1:{port}"
        with running(arguments, url, 60, signal.SIGINT, 30):
            say(f"fleet is up; sending {WINDOWS * 600 // SPEED} s of load")
            began = time.time()
            timings = asyncio.run(_load(Target(url, "mite"), rates))
        lines = [line for f in Path(state).glob("**/decisions.jsonl") for line in f.read_text().splitlines()]
    decisions = [d for d in map(Decision.from_json, lines) if d.time >= began]
    return FleetRun(
        result=summarize(timings, Slo()),
        times=[d.time - began for d in decisions],
        replicas=[d.current for d in decisions],
        wanted=[d.target for d in decisions],
        rates=rates,
        reasons=[
            f"{d.time - began:5.1f} s  {d.current} -> {d.target}: {d.reason}"
            for d in decisions
            if d.target != d.current
        ],
    )


async def _load(target: Target, rates: list[float]) -> list[Timing]:
    rng, texts, workload = random.Random(0), prompts(64, seed=3), []
    width = 600 / SPEED
    for i, rate in enumerate(rates):
        at = i * width
        while (at := at + rng.expovariate(rate)) < (i + 1) * width:
            workload.append(Request(at, rng.choice(texts), ANSWER))
    return await run_load(target, workload, ignore_eos=True)


def picture(run: FleetRun) -> str:
    """Plot of load and replicas over time, as a data URI."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, left = plt.subplots(figsize=(9, 3.2))
    edges = [i * 600 / SPEED for i in range(len(run.rates) + 1)]
    left.stairs(run.rates, edges, color="#64748b", label="requests per second", fill=True, alpha=0.3)
    left.set_xlabel("seconds (one is two and a half minutes of the trace)")
    left.set_ylabel("requests per second")
    right = left.twinx()
    right.step(run.times, run.wanted, where="post", color="#f59e0b", label="requested")
    right.step(run.times, run.replicas, where="post", color="#1d4ed8", label="replicas")
    right.set_ylim(0, 3.5)
    right.set_ylabel("replicas")
    right.legend(loc="upper left")
    figure.tight_layout()
    return data_uri(figure)
