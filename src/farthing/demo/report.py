"""The demo's table, on the terminal and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from farthing.demo.levers import Measured

COLUMNS = (
    "",
    "ready, s",
    "tokens/s, 1 user",
    "tokens/s, 8 users",
    "TTFT, ms",
    "TPOT, ms",
    "weights, MB",
    "memory, MB",
    "cache hits",
    "drafts accepted",
    "mJ/token (CPU time × declared watts)",
    "$/M tokens",
    "perplexity",
)

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
td:first-child, th:first-child { text-align: left; }
.scroll { overflow-x: auto; } img { max-width: 100%; background: white; } pre { overflow-x: auto; }
"""


def cells(row: Measured) -> list[str]:
    """One row of the table."""
    kept = "-" if row.drafts_accepted is None else f"{row.drafts_accepted:.0%}"
    return [
        row.name,
        f"{row.seconds_to_ready:.1f}",
        f"{row.single_tokens_per_second:,.0f}",
        f"{row.batch_tokens_per_second:,.0f}",
        f"{row.ttft_ms:,.0f}",
        f"{row.tpot_ms:.2f}",
        f"{row.weight_bytes / 1e6:.1f}",
        f"{row.memory_bytes / 1e6:,.0f}",
        f"{row.cached_share:.0%}",
        kept,
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
