"""Write every row that the front page and docs/performance.md show, and their picture, from one file.

    python bench/page.py [bench/results.json]

bench/decode.py adds rows to the file (`--into bench/results.json`), of which each has the command that
repeats it. Replaces only the text between `<!-- measured: NAME -->` and `<!-- end -->`, and draws
docs/figures/performance.svg.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results.json"
PICTURE = Path("docs/figures/performance.svg")
# What readers know the models by, in the order of the tables.
NAMES = {
    "qwen3.6-35b-a3b": "Qwen3.6-35B-A3B", "gpt-oss-20b": "gpt-oss-20b", "glm-4.5-air": "GLM-4.5-Air",
    "qwen3-30b-a3b": "Qwen3-30B-A3B", "gemma-4-26b-a4b": "gemma-4-26B-A4B", "L576": "3B random",
    "S576": "0.3B random", "V3S": "V3, two layers", "V2L": "DeepSeek-V2-Lite",
}  # fmt: skip
FRONT = ("gpt-oss-20b", "qwen3.6-35b-a3b", "glm-4.5-air")
FRONT_MACHINE, OTHER_MACHINE = "Zen 5", "Zen 4"
PHASES = ("prefill", "decode")
# The columns of the other machine's table, and the ratio below which a cell is bold.
POINTS = (("prefill", 1, 512), ("prefill", 1, 2048), ("decode", 1, 64), ("decode", 8, 64), ("decode", 16, 64))
BOLD_BELOW = {"prefill": 1.5, "decode": 1.2}
Row = dict[str, Any]
Key = tuple[Any, ...]


def key(row: Row) -> Key:
    """What a row measures, and where: a file has one row of each."""
    return tuple(row[name] for name in ("machine", "model", "weights", "phase", "batch", "context"))


def text_of(stored: dict[str, Any]) -> str:
    """The file's text: a row a line."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in stored["rows"])
    peers = json.dumps(stored["peers"], indent=1, ensure_ascii=False)
    return f'{{"peers": {peers},\n"rows": [\n{rows}\n]}}\n'


def point(row: Row) -> Key:
    """A row's phase, batch and context."""
    return row["phase"], row["batch"], row["context"]


def ordered(rows: Iterable[Row]) -> list[Row]:
    """By model, in the order of the names, then weights, then prefill before decode."""
    names = list(NAMES)

    def place(r: Row) -> Key:
        model = names.index(r["model"]) if r["model"] in names else len(names)
        return model, r["model"], r["weights"], PHASES.index(r["phase"]), r["context"], r["batch"]

    return sorted(rows, key=place)


def name_of(r: Row) -> str:
    """What readers know a row's model by."""
    return NAMES.get(r["model"], r["model"])


def label(r: Row) -> str:
    """The row's label, with what is not as in most rows."""
    about = "" if r["weights"] == "int4" else f", {r['weights']}"
    about += "" if r["machine"] == FRONT_MACHINE else f" ({r['machine']})"
    what = f"prefill {r['context']:,}" if r["phase"] == "prefill" else f"decode, batch {r['batch']}"
    return f"{name_of(r)}{about}: {what}"


def best(r: Row) -> float | None:
    """The fastest peer's tokens per second."""
    return max(r["peers"].values(), default=None)


def ratio(r: Row) -> float | None:
    """Our speed as a multiple of the fastest peer's; a row whose medians are stored rounded has its own."""
    peer = best(r)
    return r.get("ratio", r["ours_tok_s"] / peer) if peer else None


def rate(value: float | None) -> str:
    """Tokens per second, to three digits or the whole number."""
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def times(value: float | None, bold: bool = False) -> str:
    """A ratio in a table."""
    text = "–" if value is None else f"{value:.2f}x"
    return f"**{text}**" if bold else text


def table(rows: Iterable[Row]) -> str:
    """The rows of the main table; ratios below 1 are bold."""
    lines = [
        "| | Farthing | ik_llama.cpp | ratio | GB per step, ours / peer's | share of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        fraction = ratio(r)
        steps = [r.get("step_bytes"), *r.get("peers_step_bytes", {}).values()]
        step = " / ".join(f"{b / 1e9:.3f}" for b in steps if b and r["phase"] == "decode") or "–"
        share = f"{r['share_of_limit']:.0%}".replace("%", " %") if r.get("share_of_limit") else "–"
        cells = [label(r), rate(r["ours_tok_s"]), rate(best(r)), times(fraction, (fraction or 1) < 1)]
        lines.append(f"| {' | '.join([*cells, step, share])} |")
    return "\n".join(lines)


def ratios(rows: list[Row]) -> str:
    """The other machine's table: a model a row."""
    found = {(r["model"], *point(r)): r for r in rows}
    heads = [f"prompt {p[2]:,}" if p[0] == "prefill" else f"batch {p[1]}" for p in POINTS]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for model in dict.fromkeys(r["model"] for r in rows):
        cells = []
        for where in POINTS:
            row = found.get((model, *where))
            fraction = ratio(row) if row else None
            aim = BOLD_BELOW[where[0]] if where[1] == 1 else 0.0
            cells.append(times(fraction, fraction is not None and fraction < aim))
        lines.append(f"| {NAMES.get(model, model)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def front(rows: list[Row]) -> str:
    """The front page's table, with two columns a model."""
    found = {(r["model"], *point(r)): r for r in rows}
    lines = [f"| | {' | | '.join(NAMES[model] for model in FRONT)} | |", "|---" * (2 * len(FRONT) + 1) + "|"]
    for phase, batch, context in (p for p in POINTS if p[2] != 2048):
        head = f"prefill, {context} tokens" if phase == "prefill" else f"decode, batch {batch}"
        cells = []
        for model in FRONT:
            r = found[model, phase, batch, context]
            ours, fraction = rate(r["ours_tok_s"]), ratio(r)
            cells.append(f"{ours} against {rate(best(r))}" if fraction else f"{ours}, the peer aborts")
            cells.append(times(fraction, (fraction or 0) > 1))
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spans(rows: list[Row]) -> str:
    """The front page's sentence on the other machine."""

    def span(phase: str, batch: int, context: int) -> str:
        found = [value for r in rows if point(r) == (phase, batch, context) and (value := ratio(r))]
        return f"{min(found):.1f}x to {max(found):.1f}x"

    return (
        f"On two {OTHER_MACHINE} cores the ratios of {len({r['model'] for r in rows})} models are "
        f"{span('decode', 1, 64)} at batch 1,\n{span('decode', 8, 64)} at 8 and {span('prefill', 1, 512)} "
        "in prompts of 512 tokens ([each model](docs/performance.md))."
    )


def peers(stored: dict[str, Any]) -> str:
    """The list of peers with their builds."""
    return "\n".join(f"- {name} {p['version']}: `{p['build']}`" for name, p in stored["peers"].items())


def picture(rows: list[Row]) -> str:
    """An SVG of our speed as a multiple of the best peer's, with both speeds next to each bar."""
    rows = [r for r in rows if r["peers"]]
    step, top, left, wide = 22, 12, 235, 330
    most = max((ratio(r) or 0 for r in rows), default=1)
    bottom = top + step * len(rows) + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{bottom + 26}" '
        'font-family="sans-serif" font-size="12">',
        "<title>Farthing's speed as a multiple of the best peer's</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for i, r in enumerate(rows):
        fraction, y = ratio(r) or 0, top + step * i
        length, fill = wide * fraction / most, "#1f6f54" if fraction >= 1 else "#c08a3e"
        speeds = f"{times(fraction)}: {rate(r['ours_tok_s'])} against {rate(best(r))} tok/s"
        end = max(length, wide / most) + 6
        parts += [
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(label(r))}</text>',
            f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="15" fill="{fill}"/>',
            f'<text x="{left + end:.1f}" y="{y + 13}" font-size="11">{speeds}</text>',
        ]
    at = left + wide / most
    note = "Farthing's speed as a multiple of the best peer's (line: equal)"
    return "\n".join([
        *parts, f'<path d="M{at:.1f} {top - 4}V{bottom}" stroke="#a03020" stroke-width="1.5"/>',
        f'<text x="{left}" y="{bottom + 16}">{escape(note)}</text>', "</svg>\n",
    ])  # fmt: skip


def fill(page: Path, name: str, *parts: str) -> None:
    """Put paragraphs between `<!-- measured: name -->` and `<!-- end -->`. SystemExit without markers."""
    begin, end = f"<!-- measured: {name} -->", "<!-- end -->"
    text = page.read_text()
    if text.count(begin) != 1 or end not in text.partition(begin)[2]:
        raise SystemExit(f"{page}: expected {begin!r} once and {end!r} after it")
    before, _, rest = text.partition(begin)
    page.write_text(before + "\n\n".join((begin, *parts, end)) + rest.partition(end)[2])


def write(results: Path, root: Path) -> None:
    """Fill both pages below `root` and draw the picture. SystemExit on a share above 100 %."""
    stored = json.loads(results.read_text())
    rows = ordered(stored["rows"])
    for r in rows:
        if (r.get("share_of_limit") or 0) > 1:
            raise SystemExit(
                f"{label(r)}: share_of_limit is {r['share_of_limit']:.2f}; expected at most 1: the limit is "
                "counted wrongly, or a ceiling was measured too low"
            )
    other = [r for r in rows if r["machine"] == OTHER_MACHINE and point(r) in POINTS]
    shown = [r for r in rows if r not in other]
    page = root / "docs/performance.md"
    drawn = f"![Speed against the best peer]({PICTURE.relative_to('docs')})"
    fill(page, "decode", table(shown), drawn, peers(stored))
    fill(page, "other machine", ratios(other))
    fill(root / "README.md", "front", front(shown), spans(other))
    (root / PICTURE).write_text(picture(shown))


def main() -> None:
    """Parse and write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("results", type=Path, nargs="?", default=RESULTS)
    write(p.parse_args().results, ROOT)


if __name__ == "__main__":
    main()
