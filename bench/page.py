"""Write what bench/decode.py and bench/startup.py kept into a page: tables and a chart between two markers.

    python bench/page.py RESULTS.json docs/performance.md

Replaces what stands between `<!-- measured: decode -->` and `<!-- end -->`, nothing else, and draws
`figures/performance.png` beside the page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BITS = {"int4": "4-bit", "int8": "8-bit", "bf16": "bf16"}
PHASES = {
    "prefill": "prefill {}",
    "decode": "decode, batch {}",
    "long": "decode, batch {}, 4,096 cached tokens each",
}
# What is wanted: times the best peer, share of the limit. (model, weights, phase, batch)
TARGETS: dict[tuple[str, str, str, int], tuple[float, float | None]] = {
    ("L576", "int4", "prefill", 512): (1.4, 0.55),
    ("L576", "int4", "decode", 1): (1.2, 0.85),
    ("L576", "int4", "decode", 8): (1.35, 0.75),
    ("L576", "int4", "decode", 16): (2.2, 0.75),
    ("L576", "int4", "long", 4): (1.5, None),
    ("L576", "int8", "decode", 1): (1.3, 0.85),
    ("L576", "bf16", "decode", 1): (1.1, 0.85),
    ("S576", "int4", "prefill", 512): (1.3, None),
    ("S576", "int4", "decode", 1): (1.2, None),
    ("S576", "int4", "decode", 8): (1.5, None),
    ("S576", "int4", "decode", 16): (3.0, None),
}
Row = dict[str, Any]


def ordered(rows: list[Row]) -> list[Row]:
    """Large model first, few bits first, in the order of a request's life."""
    weights, phases = list(BITS), list(PHASES)
    return sorted(
        rows,
        key=lambda r: (r["model"], weights.index(r["weights"]), phases.index(r["phase"]), r["batch"]),
    )


def label(r: Row) -> str:
    """What a row measures."""
    return f"{r['model']}, {BITS[r['weights']]}: {PHASES[r['phase']].format(r['batch'])}"


def line(r: Row) -> str:
    """A row of the table; a ratio or a share below its target is bold."""
    wanted, share = TARGETS.get((r["model"], r["weights"], r["phase"], r["batch"]), (None, None))
    best, ratio = "–", "–"
    if r["peers"]:
        name = max(r["peers"], key=lambda peer: r["peers"][peer])
        times = r["ours_tok_s"] / r["peers"][name]
        best, ratio = f"{r['peers'][name]:,.1f} ({name})", f"{times:.2f}x"
        ratio = f"**{ratio}**" if wanted and times < wanted else ratio
    of_limit = f"{r['share_of_limit']:.0%}"
    of_limit = f"**{of_limit}**" if share and r["share_of_limit"] < share else of_limit
    targets = [f"{wanted}x" if wanted else "", f"{share:.0%}" if share else ""]
    target = ", ".join(filter(None, targets)) or "–"
    return f"| {label(r)} | {r['ours_tok_s']:,.1f} | {best} | {ratio} | {of_limit} | {target} |"


def table(rows: list[Row]) -> str:
    """Every row, the machine's limits above."""
    m, dates = rows[-1]["machine"], sorted({r["date"] for r in rows})
    reads = sorted(r["machine"]["read_gb_s"] for r in rows)
    tiles = f", {m['amx_int8_gop_s']:,.0f} on tiles" if m["amx_int8_gop_s"] else ""
    head = (
        f"Measured {' and '.join(dates)}, {m['threads']:.0f} threads; memory reads {reads[0]:.1f} to "
        f"{reads[-1]:.1f} GB/s in the same runs, INT8 {m['int8_gop_s']:,.0f} GOP/s on vectors{tiles}. "
        "Bold: below its target.\n\n"
        "| | ours, tok/s | best peer | ratio | share of the limit | target |\n|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(map(line, rows)) + "\n"


def all_peers(rows: list[Row]) -> str:
    """The peers that are not the best of their row, where there are several."""
    several = [r for r in rows if len(r["peers"]) > 1]
    lines = [
        f"- {label(r)}: " + ", ".join(f"{name} {rate:,.1f}" for name, rate in sorted(r["peers"].items()))
        for r in several
    ]
    return "\nEvery peer, where several ran (tok/s):\n\n" + "\n".join(lines) + "\n" if lines else ""


def start(section: dict[str, Any] | None) -> str:
    """First token and memory."""
    if section is None:
        return ""
    lines = []
    for r in section["rows"]:
        peak, weights = r["peak_bytes"] / 1e9, r["weights_bytes"] / 1e9
        first = f"{r['first_token_s']:.2f}"
        lines.append(f"| {r['system']} | {first} | {peak:.2f} | {weights:.2f} | {peak / weights - 1:+.0%} |")
    return (
        f"\n{section['model']}, {BITS[section['weights']]}, `bench/startup.py`, {section['date']} (files in "
        "the page cache; memory: resident pages at most, mapped files included, after 16 sequences):\n\n"
        "| | launch to first token, s | peak memory, GB | file of weights, GB | above it |\n"
        "|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def draw(rows: list[Row], file: Path) -> None:
    """Bars as shares of each row's limit, which is the line at 100 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    for i, r in enumerate(rows):
        best = max(r["peers"].values(), default=0.0)
        for at, rate, color in ((i - 0.19, r["ours_tok_s"], "#1f6f54"), (i + 0.19, best, "#b9b4a8")):
            axes.barh(at, 100 * rate / r["limit_tok_s"], 0.36, color=color)
            if rate:
                axes.text(100 * rate / r["limit_tok_s"] + 1, at, f"{rate:,.0f}", va="center", fontsize=7)
    axes.barh([0], [0], color="#1f6f54", label="Farthing, tok/s")
    axes.barh([0], [0], color="#b9b4a8", label="best peer, tok/s")
    axes.axvline(100, color="#a03020", label="limit of the machine")
    axes.set_yticks(range(len(rows)), [label(r) for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 115)
    axes.set_xlabel("% of the limit")
    axes.legend(fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def fill(page: Path, name: str, *parts: str) -> None:
    """Put paragraphs between `<!-- measured: name -->` and `<!-- end -->`. SystemExit without markers."""
    begin, end = f"<!-- measured: {name} -->", "<!-- end -->"
    text = page.read_text()
    if text.count(begin) != 1 or end not in text.partition(begin)[2]:
        raise SystemExit(f"{page}: expected {begin!r} once and {end!r} after it")
    before, _, rest = text.partition(begin)
    page.write_text(before + "\n\n".join((begin, *parts, end)) + rest.partition(end)[2])


def write(results: Path, page: Path) -> None:
    """Fill the page's part about decoding, and draw its figure."""
    stored = json.loads(results.read_text())
    rows = ordered(stored["rows"])
    picture = page.parent / "figures/performance.png"
    parts = table(rows).strip(), (all_peers(rows) + start(stored.get("start"))).strip()
    fill(page, "decode", parts[0], f"![Shares of the limit](figures/{picture.name})", parts[1])
    draw(rows, picture)


def main() -> None:
    """Parse and write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("results", type=Path)
    p.add_argument("page", type=Path)
    a = p.parse_args()
    write(a.results, a.page)


if __name__ == "__main__":
    main()
