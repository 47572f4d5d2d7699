"""Write the results of bench/decode.py and bench/startup.py into a page: tables and a chart.

    python bench/page.py RESULTS.json docs/performance.md

Replaces only the text between `<!-- measured: decode -->` and `<!-- end -->`, and draws
`figures/performance.png` next to the page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BITS = {"int4": "4-bit", "int8": "8-bit", "bf16": "bf16"}
PHASES = ["prefill", "decode"]
# What readers know the models by, in the order of the table: real shapes first.
NAMES = {
    "qwen3.6-35b-a3b": "Qwen3.6-35B-A3B", "gpt-oss-20b": "gpt-oss-20b", "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "glm-4.5-air": "GLM-4.5-Air", "gemma-4-26b-a4b": "gemma-4-26B-A4B", "V3S": "V3 layer", "V2L": "V2-Lite",
    "L576": "3B random", "S576": "0.3B random",
}  # fmt: skip
MODELS = list(NAMES)
DEFAULT_CONTEXT = 128
# Targets: (times the best peer, share of the limit) by (model, weights, phase, batch, context).
Target = tuple[float, float | None]
TARGETS: dict[tuple[str, str, str, int, int], Target] = {
    ("V3S", "int4", "decode", 1, 128): (1.2, 0.85),
    ("V3S", "int4", "decode", 8, 128): (1.5, 0.75),
    ("V3S", "int4", "decode", 16, 128): (2.2, 0.75),
    ("V2L", "int4", "decode", 1, 128): (1.2, 0.85),
    ("V2L", "int4", "decode", 8, 128): (1.5, 0.75),
    ("V2L", "int4", "decode", 16, 128): (2.2, 0.75),
    ("L576", "int4", "decode", 1, 128): (1.2, 0.85),
    ("L576", "int4", "decode", 8, 128): (1.35, 0.75),
    ("L576", "int4", "decode", 16, 128): (2.2, 0.75),
    ("L576", "int4", "decode", 4, 4096): (1.5, None),
    ("L576", "int8", "decode", 1, 128): (1.3, 0.85),
    ("L576", "bf16", "decode", 1, 128): (1.1, 0.85),
    ("S576", "int4", "decode", 1, 128): (1.2, None),
    ("S576", "int4", "decode", 8, 128): (1.5, None),
    ("S576", "int4", "decode", 16, 128): (3.0, None),
}
PREFILL_TARGETS: dict[str, Target] = {
    "V3S": (1.4, 0.7),
    "V2L": (1.5, 0.7),
    "L576": (1.6, 0.7),
    "S576": (1.3, None),
}
Row = dict[str, Any]


def ordered(rows: list[Row]) -> list[Row]:
    """Real shapes first, then fewer bits first, then prefill before decode."""
    weights = list(BITS)

    def place(r: Row) -> tuple[Any, ...]:
        model = MODELS.index(r["model"]) if r["model"] in MODELS else len(MODELS)
        phase = PHASES.index(r["phase"])
        return model, r["model"], weights.index(r["weights"]), phase, r["context"], r["batch"]

    return sorted(rows, key=place)


def label(r: Row) -> str:
    """The row's label."""
    model = f"{NAMES.get(r['model'], r['model'])}, {BITS[r['weights']]}"
    if r["phase"] == "prefill":
        return f"{model}: prefill {r['context']:,}"
    cached = "" if r["context"] == DEFAULT_CONTEXT else f", {r['context']:,} cached tokens each"
    return f"{model}: decode, batch {r['batch']}{cached}"


def target(r: Row) -> tuple[float | None, float | None]:
    """(times the best peer, share of the limit) targets of a row; None if unset."""
    if r["phase"] == "prefill" and r["weights"] == "int4":
        return PREFILL_TARGETS.get(r["model"], (None, None))
    key = (r["model"], r["weights"], r["phase"], r["batch"], r["context"])
    return TARGETS.get(key, (None, None))


def line(r: Row) -> str:
    """A row of the table; ratios or shares below target are bold."""
    wanted, share = target(r)
    best, ratio, name = "–", "–", ""
    if r["peers"]:
        name = max(r["peers"], key=lambda peer: r["peers"][peer])
        times = r["ours_tok_s"] / r["peers"][name]
        low, high = r["peers_spread"][name]
        best, ratio = f"{r['peers'][name]:,.1f} ({low:,.1f}–{high:,.1f}; {name})", f"{times:.2f}x"
        ratio = f"**{ratio}**" if wanted and times < wanted else ratio
    of_limit = f"{r['share_of_limit']:.0%}"
    of_limit = f"**{of_limit}**" if share and r["share_of_limit"] < share else of_limit
    targets = [f"{wanted}x" if wanted else "", f"{share:.0%}" if share else ""]
    aims = ", ".join(filter(None, targets)) or "–"
    low, high = r["ours_spread"]
    ours = f"{r['ours_tok_s']:,.1f} ({low:,.1f}–{high:,.1f})"
    steps = [r["step_bytes"], r.get("peers_step_bytes", {}).get(name)]
    step = " / ".join(f"{b / 1e9:.3f}" for b in steps if b)
    return f"| {label(r)} | {r['rounds']} | {ours} | {best} | {ratio} | {step} | {of_limit} | {aims} |"


def table(rows: list[Row]) -> str:
    """All rows, headed by the machine's limits."""
    m, dates = rows[-1]["machine"], sorted({r["date"] for r in rows})
    reads = sorted(r["machine"]["read_gb_s"] for r in rows)
    tiles = f", {m['amx_int8_gop_s']:,.0f} on tiles" if m["amx_int8_gop_s"] else ""
    head = (
        f"Measured {' and '.join(dates)}, {m['threads']:.0f} threads; memory reads {reads[0]:.1f} to "
        f"{reads[-1]:.1f} GB/s in the same runs, INT8 {m['int8_gop_s']:,.0f} GOP/s on vectors{tiles}. "
        "Medians (least–most). Bold: below target.\n\n"
        "| | rounds | ours, tok/s | best peer | ratio | GB per step, ours / peer's | share of the limit "
        "| target |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(map(line, rows)) + "\n"


def all_peers(rows: list[Row]) -> str:
    """The other peers of every row with several."""
    several = [r for r in rows if len(r["peers"]) > 1]
    lines = [
        f"- {label(r)}: " + ", ".join(f"{name} {rate:,.1f}" for name, rate in sorted(r["peers"].items()))
        for r in several
    ]
    return "\nEvery peer, where several ran (tok/s):\n\n" + "\n".join(lines) + "\n" if lines else ""


def start(section: dict[str, Any] | None) -> str:
    """The section on time to first token and memory."""
    if section is None:
        return ""
    lines = []
    for r in section["rows"]:
        cold = r.get("cold_first_token_s")
        first = f"{r['first_token_s']:.2f} | {f'{cold:.2f}' if cold else '–'}"
        memory = "– | – | –"
        if "peak_bytes" in r:
            peak, weights = r["peak_bytes"] / 1e9, r["weights_bytes"] / 1e9
            memory = f"{peak:.2f} | {weights:.2f} | {peak / weights - 1:+.0%}"
        lines.append(f"| {r['system']} | {first} | {memory} |")
    return (
        f"\n{section['model']}, {BITS[section['weights']]}, `bench/startup.py`, {section['date']} (warm: "
        "files in the page cache; memory: peak resident pages, including mapped files, after 16 sequences):"
        "\n\n| | launch to first token, s | cold | peak memory, GB | file of weights, GB | above it |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def plot(rows: list[Row], file: Path) -> None:
    """Draw our speed as a multiple of the best peer's, with both speeds next to each bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in rows if r["peers"]]
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(rows) + 1.1), layout="constrained")
    for i, r in enumerate(rows):
        best = max(r["peers"].values())
        times = r["ours_tok_s"] / best
        axes.barh(i, times, 0.7, color="#1f6f54" if times >= 1 else "#c08a3e")
        speeds = f"{times:.2f}x   {r['ours_tok_s']:,.4g} against {best:,.4g} tok/s"
        axes.text(max(times, 1) + 0.03, i, speeds, va="center", fontsize=7)
    axes.axvline(1, color="#a03020")
    axes.set_yticks(range(len(rows)), [label(r) for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max((r["ours_tok_s"] / max(r["peers"].values()) for r in rows), default=1))
    axes.set_xlabel("Farthing's speed as a multiple of the best peer's (line: equal)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=110)
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
    """Fill the page's decode section and draw its figure. SystemExit on a share above 100 %."""
    stored = json.loads(results.read_text())
    rows = ordered(stored["rows"])
    for r in rows:
        if r["share_of_limit"] > 1:
            raise SystemExit(
                f"{label(r)}: share_of_limit is {r['share_of_limit']:.2f}; expected at most 1: the limit is "
                "counted wrongly, or a ceiling was measured too low"
            )
    picture = page.parent / "figures/performance.png"
    parts = table(rows).strip(), (all_peers(rows) + start(stored.get("start"))).strip()
    fill(page, "decode", parts[0], f"![Speed against the best peer](figures/{picture.name})", parts[1])
    plot(rows, picture)


def main() -> None:
    """Parse and write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("results", type=Path)
    p.add_argument("page", type=Path)
    a = p.parse_args()
    write(a.results, a.page)


if __name__ == "__main__":
    main()
