"""Every Python snippet of the API pages runs against a server."""

from __future__ import annotations

import re

import pytest

from tests.server.api.snippets import blocks, pointed_at
from tests.server.harness import ScriptedEngine, running

PAGES = ("chat-completions", "responses", "messages", "clients")
SNIPPETS = [(page, number, code) for page in PAGES for number, code in enumerate(blocks(page, "python"))]


@pytest.mark.parametrize(("page", "number", "code"), SNIPPETS, ids=[f"{p}-{n}" for p, n, _ in SNIPPETS])
def test_snippet(page: str, number: int, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    for module in re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE):
        pytest.importorskip(module)
    with running(ScriptedEngine(["Hello ", "there"])) as server:
        exec(pointed_at(code, server.url), {"MODEL": "tiny"})
    printed = capsys.readouterr().out
    assert "there" in printed or "Tools" in code or "tools=" in code


def test_no_snippet_of_another_client_is_left_out() -> None:
    """Blocks in other languages run in test_agents and in the matrix of clients."""
    assert [len(blocks("clients", language)) for language in ("js", "toml", "json")] == [1, 1, 1]
    assert all(len(blocks("clients", "", heading)) == 1 for heading in ("Claude Code", "qwen-code"))
    for page in PAGES[:3]:
        assert not any(blocks(page, language) for language in ("", "js", "toml", "sh"))
