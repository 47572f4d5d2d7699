"""The demo's report: one self-contained page in the product's colours, and the same on the terminal."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

import farthing.server.dashboard
from farthing.cost.prices import Machine
from farthing_lab.demo.fleet import FleetRun, picture
from farthing_lab.demo.levers import USERS, Lever, Measured

COLUMNS = (
    "", "tokens/s, 1 user", f"tokens/s, {USERS} users", "prompt tokens/s", "TTFT, ms", "TPOT, ms",
    "memory, MB", "mJ/token", "$/M tokens", "perplexity", "against the row above",
)  # fmt: skip
STYLE = """
main { max-width: 1180px; } .card p { margin: 6px 0; } td:first-child { white-space: nowrap; }
.answer { font-size: 17px; line-height: 1.6; white-space: pre-wrap; } td { white-space: normal; }
svg { width: 100%; } .bar { height: 7px; border-radius: 4px; background: var(--s1); }
"""
THEME = """
document.documentElement.dataset.theme = matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'
"""
WHY = """Quality is the change of perplexity on held-out text against the first row, with its 95 % interval;
speculation changes no token. Energy is processor time × declared watts, dollars follow the declared price of
a core-hour. The last column compares with the row above.

This model's experts have 64 columns: what a token saves by leaving one out is of the size of what choosing
costs. Speculation is for few users, whose passes have room for drafts.
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """A question, and what a model said."""

    model: str
    question: str
    text: str
    tokens: int
    first: float  # seconds to the first token
    seconds: float  # to the last


@dataclass(frozen=True, slots=True)
class Compressed:
    """A result of `farthing compress`, compared with the original model. Sizes in MB."""

    recipe: str
    path: str
    before: float
    after: float
    seconds: float
    quality: str  # change of perplexity, with its interval

    def __str__(self) -> str:
        return (
            f"{self.recipe}: {self.before:.1f} MB to {self.after:.1f} MB in {self.seconds:.0f} s; "
            f"perplexity {self.quality} compared with the original."
        )


@dataclass(frozen=True, slots=True)
class Round:
    """One round of the levers' measurements, as fields of `Measured`."""

    rows: list[dict[str, float]]


@dataclass(slots=True)
class Report:
    """What the parts found so far, and why some found nothing."""

    path: Path
    machine: Machine
    answer: Answer | None = None
    compressed: list[Compressed] = field(default_factory=list)
    levers: list[Lever] = field(default_factory=list)
    rows: list[Measured] = field(default_factory=list)  # of the levers
    fleet: FleetRun | None = None
    left_out: dict[str, str] = field(default_factory=dict)  # parts, and why

    @property
    def said(self) -> str:
        """The answer, then its speed and its price: of the whole machine, for as long as it took."""
        if self.answer is None:
            return ""
        tokens, seconds = self.answer.tokens, self.answer.seconds
        speed = (tokens - 1) / max(seconds - self.answer.first, 1e-9)
        usd = seconds * self.machine.usd_per_second
        return (
            f"{self.answer.text}\n\n{self.answer.model}: {tokens} tokens, the first after "
            f"{self.answer.first * 1e3:.0f} ms, then {speed:.0f} a second; ${usd:.2g} for this machine's "
            f"{seconds:.1f} s, ${usd / tokens * 1e6:.2g} per million tokens for one user"
        )

    def cells(self) -> list[list[str]]:
        """The table's rows."""
        return [
            [
                lever.name,
                f"{row.single:,.0f}",
                f"{row.batch:,.0f}",
                f"{row.prompt:,.0f}",
                f"{row.ttft_ms:,.0f}",
                f"{row.tpot_ms:.2f}",
                f"{row.memory_bytes / 1e6:,.0f}",
                f"{row.joules_per_token(self.machine) * 1e3:.2f}",
                f"{row.usd_per_million(self.machine):.4f}",
                lever.quality,
                row.against(before) if before else "",
            ]
            for lever, row, before in zip(self.levers, self.rows, [None, *self.rows], strict=False)
        ]

    def show(self) -> None:
        """Print one column per lever, which fits a terminal."""
        cells = self.cells()
        table = Table("", *(row[0] for row in cells), title="Cost per token, lever by lever")
        for name, *values in list(zip(COLUMNS, *cells, strict=True))[1:]:
            table.add_row(name, *values)
        Console().print(table)
        if self.fleet:
            print(self.fleet.text)
        for title, reason in self.left_out.items():
            print(f"left out: {title}: {reason}")

    def write(self) -> None:
        """Write the page, with what there is."""
        style = Path(farthing.server.dashboard.__file__).with_name("static") / "style.css"
        parts = [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            "<meta name=viewport content='width=device-width'><title>Farthing demo</title>",
            f"<script>{THEME}</script>",
            f"<style>{style.read_text('utf-8')}{STYLE}</style><main>",
        ]
        if self.answer:
            text, facts = self.said.rsplit("\n\n", 1)
            answer = f"<p class=answer>{html.escape(text)}</p>"
            parts.append(_card(self.answer.question, answer + _lines(facts)))
        if self.rows:
            parts.append(_card("Cost per token, lever by lever", self._table() + _lines(WHY, "\n\n")))
        if self.compressed:
            parts.append(_card("Compression", _lines("\n".join(map(str, self.compressed)))))
        if self.fleet:
            parts.append(_card("A fleet that scales", picture(self.fleet) + _lines(self.fleet.text)))
        parts += [_card(title, _lines(f"left out: {reason}")) for title, reason in self.left_out.items()]
        self.path.write_text("".join([*parts, "</main></html>"]), encoding="utf-8")

    def _table(self) -> str:
        most = max(row.batch for row in self.rows)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
        body = ""
        for values, row in zip(self.cells(), self.rows, strict=True):
            cells = [html.escape(value) for value in values]
            cells[2] += f"<div class=bar style='width:{100 * row.batch / most:.0f}%'></div>"
            body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        return f"<div class=scroll tabindex=0><table><tr>{head}</tr>{body}</table></div>"


def _card(title: str, body: str) -> str:
    return f"<section class=card><header><h2>{html.escape(title)}</h2></header>{body}</section>"


def _lines(text: str, between: str = "\n") -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in text.split(between))
