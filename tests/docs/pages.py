"""The documentation pages, and the `farthing` commands in their code blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\s*$")
SHELL = {"", "sh", "bash", "shell", "console"}


def pages() -> list[Path]:
    """Every Markdown page that belongs to the product, README first."""
    return sorted(ROOT.glob("*.md"), key=lambda p: p.name != "README.md") + sorted(ROOT.glob("docs/**/*.md"))


@dataclass(frozen=True, slots=True)
class Command:
    """One `farthing …` invocation of a code block."""

    page: str
    line: int
    words: tuple[str, ...]  # without the leading "farthing"

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: farthing {' '.join(self.words)}"


def commands(page: Path) -> Iterator[Command]:
    """The commands in the shell blocks of a page; continued lines are joined, comments dropped."""
    fence: str | None = None
    pending, start = "", 0
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if match := FENCE.match(line.strip()):
            fence = match.group(1) if fence is None else None
            continue
        if fence is None or fence not in SHELL:
            continue
        start = start if pending else number
        if line.endswith("\\"):
            pending += line[:-1] + " "
            continue
        text, pending = pending + line, ""
        for part in _split(text):
            if part[:1] == ["farthing"]:
                yield Command(str(page.relative_to(ROOT)), start, tuple(part[1:]))


def _split(line: str) -> list[list[str]]:
    """`a && b | c` → the words of a, b and c. Empty for lines that are not shell (a diagram, a log)."""
    try:
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;<>()")
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:
        return []
    parts: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("&|;"):
            parts.append([])
        else:
            parts[-1].append(word)
    return parts
