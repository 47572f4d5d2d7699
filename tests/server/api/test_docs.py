"""Every Python snippet of the API pages runs against a server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.server.harness import ScriptedEngine, running

GUIDE = Path(__file__).parents[3] / "docs" / "guide"
PAGES = ("chat-completions", "responses", "messages", "clients")
SNIPPETS = [
    (page, number, code)
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", (GUIDE / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    )
]


@pytest.mark.parametrize(("page", "number", "code"), SNIPPETS, ids=[f"{p}-{n}" for p, n, _ in SNIPPETS])
def test_snippet(page: str, number: int, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    for module in re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE):
        pytest.importorskip(module)
    with running(ScriptedEngine(["Hello ", "there"])) as server:
        exec(code.replace("http://127.0.0.1:8000", server.url), {"MODEL": "tiny"})
    printed = capsys.readouterr().out
    assert "there" in printed or "Tools" in code or "tools=" in code
