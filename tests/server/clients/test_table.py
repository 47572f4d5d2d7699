"""What is declared about the clients: the guide's table, the formats, and the file itself."""

from __future__ import annotations

from typing import Any

import pytest

from farthing.conversation.formats.written import BY_MARKUP
from farthing.conversation.select import CALLS
from farthing.conversation.select import FORMATS as PACKAGED
from tests.conversation.published import SHAPES
from tests.server.api.snippets import GUIDE
from tests.server.clients.install import CLIENTS
from tests.server.clients.model import FORMATS
from tests.server.clients.test_matrix import HERE

CHECKS = ("answer", "stream", "tools", "structured", "reasoning", "errors")


def row(client: dict[str, Any]) -> str:
    """A client's line in the guide."""
    versions = [package.rpartition("@")[2].rpartition("==")[2] for package in client["packages"]]
    works = ["x" if check in client["checks"] else "" for check in CHECKS]
    cells = [client["title"], " + ".join(versions) or "–", client["api"], client["settings"], *works]
    return f"| {' | '.join(cells)} |"


def test_the_guide_lists_what_the_matrix_runs() -> None:
    page = (GUIDE / "clients.md").read_text(encoding="utf-8")
    table = page.split("## What is tested\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows == list(map(row, CLIENTS.values()))


def test_every_format_of_calls_is_spoken() -> None:
    written = [SHAPES[spoken.template].source for spoken in FORMATS.values() if spoken.template]
    found = {next(form.name for mark, form in BY_MARKUP.items() if mark in source) for source in written}
    assert found | (set(FORMATS) & set(PACKAGED)) == set(CALLS)


@pytest.mark.parametrize("name", CLIENTS)
def test_declarations(name: str) -> None:
    client = CLIENTS[name]
    assert client["formats"] == "all" or set(client["formats"]) <= set(FORMATS)
    assert client["checks"] == [check for check in CHECKS if check in client["checks"]]
    assert (HERE / "drivers" / client["driver"]).is_file()
    assert bool(client["packages"]) == (client["registry"] in ("pypi", "npm"))
    assert all(version.rpartition("@")[2].rpartition("==")[2][0].isdigit() for version in client["packages"])


def test_every_format_is_run_by_three_clients() -> None:
    """OpenAI's client, Anthropic's, and an agent."""
    drivers = ("openai_.py", "anthropic_.py", "agents.py")
    for driver in drivers:
        assert any(c["formats"] == "all" and c["driver"] == driver for c in CLIENTS.values())
