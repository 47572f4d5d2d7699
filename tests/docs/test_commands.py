"""Every documented `farthing` command parses: the command, its options and values exist."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from farthing.cli.app import app
from tests.docs.pages import Command, commands, pages

COMMANDS = [command for page in pages() for command in commands(page)]


def test_pages_contain_commands() -> None:
    assert len({c.page for c in COMMANDS}) >= 8


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_documented_command_parses(command: Command) -> None:
    parse(typer.main.get_command(app), command.words)


def test_nonexistent_command_fails() -> None:
    with pytest.raises(typer.Exit):
        parse(typer.main.get_command(app), ("serv",))
    for words in (("serve", "--no-such-option"), ("bench", "serve", "--concurrency", "many")):
        with pytest.raises(Exception, match=r"No such|Input should be"):
            parse(typer.main.get_command(app), words)


def parse(tool: Any, words: tuple[str, ...]) -> None:
    """Descend through groups and let click check every option and value, without running anything."""
    parent, args = None, list(words)
    while hasattr(tool, "list_commands") and args and not args[0].startswith("-"):
        parent = tool.context_class(tool, parent=parent, info_name=tool.name)
        name, child, args = tool.resolve_command(parent, args)
        assert child is not None, f"No such command: {name}"
        tool = child
    if "--help" in args or "--version" in args:
        return
    with tool.make_context(tool.name, args, parent=parent):
        pass
