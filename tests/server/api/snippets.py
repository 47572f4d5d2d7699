"""The code blocks of the guide, as readers copy them."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[3] / "docs" / "guide"


def blocks(page: str, language: str, heading: str = "") -> list[str]:
    """The blocks of a language on a page, or in its section of a heading."""
    text = (GUIDE / f"{page}.md").read_text(encoding="utf-8")
    if heading:
        text = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


def pointed_at(code: str, url: str) -> str:
    """A block for a server of the tests and its model."""
    return (
        code.replace("http://127.0.0.1:8000", url)
        .replace("deepseek-v3.2", "tiny")
        .replace("farthing(MODEL)", 'farthing("tiny")')
    )
