"""The command line: version, missing extras, one-line errors, an option for every field."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import farthing
from farthing.cli import app as cli
from farthing.config import EngineConfig, declared
from farthing.server.config import ServerConfig

ENVIRONMENT = os.environ | {"NO_COLOR": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
WITHOUT = """
import sys
sys.modules[{module!r}] = None
from farthing.cli.app import main
sys.argv[1:] = {argv!r}
main()
"""


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=120
    )


def farthing_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "farthing.cli.app", *arguments)


def test_version() -> None:
    result = farthing_command("--version")
    assert result.returncode == 0 and result.stdout == f"farthing {farthing.__version__}\n"


def test_help_lists_every_command() -> None:
    result = farthing_command("--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in (*cli.COMMANDS, *cli.installed()))


def test_alone_it_prints_help_and_three_first_commands() -> None:
    result = farthing_command()
    assert result.returncode == 0 and result.stdout == farthing_command("--help").stdout
    first = re.findall(r"^  farthing (\w+)", result.stdout, re.MULTILINE)
    assert len(first) == 3 and set(first) <= set(cli.COMMANDS)


@pytest.mark.parametrize(
    ("argv", "same"),
    [(["version"], ["--version"]), (["help"], ["--help"]), (["help", "ps"], ["ps", "--help"])],
)
def test_words_stand_for_options(argv: list[str], same: list[str]) -> None:
    assert farthing_command(*argv).stdout == farthing_command(*same).stdout != ""


@pytest.mark.parametrize(
    ("typed", "meant"), [("serv", "serve"), ("modles", "models"), ("chta", "chat"), ("verson", "version")]
)
def test_a_misspelled_command_gets_a_suggestion(typed: str, meant: str) -> None:
    result = farthing_command(typed)
    assert result.returncode == 2 and result.stderr.startswith(
        f"error: command: got '{typed}'; did you mean "
    )
    assert meant in result.stderr and result.stderr.count("\n") == 1
    assert "`farthing help` lists the commands" in farthing_command("xyzzy").stderr


def test_positional_arguments_are_upper_case_in_help() -> None:
    def positional(command: Any) -> Iterator[str]:
        for name in getattr(command, "commands", ()):
            yield from positional(command.commands[name])
        yield from (p.metavar or "" for p in command.params if p.param_type_name == "argument")

    group = typer.main.get_command(cli.app)
    shown = [m for name in group.list_commands(None) for m in positional(group.get_command(None, name))]  # type: ignore[attr-defined]
    assert len(shown) >= len(cli.COMMANDS) and all(m and m == m.upper() for m in shown)


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("aiohttp", ["fleet", "gateway", "--replica", "http://127.0.0.1:1", "--port", "0"]),
        ("triton", ["generate", "--prompt", "x", "--backend", "gpu"]),
        ("matplotlib", ["train", "mite", "--tokens", "1000"]),
    ],
)
def test_a_missing_package_is_one_line(module: str, argv: list[str], tmp_path: Path) -> None:
    result = run("-c", WITHOUT.format(module=module, argv=argv), cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(r": .*pip install .*\b" + module, result.stderr.strip().splitlines()[-1])


def test_every_field_is_an_option_with_help() -> None:
    assert {d.name for d in declared(EngineConfig)} == {f.name for f in fields(EngineConfig)}
    undeclared = {f.name for f in fields(ServerConfig)} - {d.name for d in declared(ServerConfig)}
    assert all(name.endswith("keys") for name in undeclared)  # read from files and the environment
    text = farthing_command("serve", "--help-all").stdout
    for each in (*declared(EngineConfig), *declared(ServerConfig)):
        assert each.option.help and not each.option.help.endswith(".")
        assert each.option.argument or f"--{each.name.replace('_', '-')}" in text
    assert all(short in text for short in ("--tp", "--pp", "--ep"))


def test_help_shows_what_most_users_need() -> None:
    short = re.findall(
        r"(?<=\s)--[a-z-]+", farthing_command("serve", "--help").stdout.partition("Examples")[0]
    )
    assert {"--help-all", "--port", "--quantization", "--api-key-file"} <= set(short)
    assert len(set(short)) <= 18


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (EngineConfig, "threads", 0),
        (EngineConfig, "threads", True),
        (EngineConfig, "max_num_seqs", None),
        (EngineConfig, "max_num_seqs", "4"),
        (EngineConfig, "packed", 3),
        (EngineConfig, "dp_attention", 1),
        (EngineConfig, "transport", "pigeon"),
        (EngineConfig, "priority_step", float("nan")),
        (ServerConfig, "drain_timeout", -0.5),
        (ServerConfig, "port", 70000),
        (ServerConfig, "served_model_name", ("a", 1)),
    ],
)
def test_errors_name_field_value_and_accepted_values(config: type, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: got .*; expected "):
        config(**{field: value})


def test_an_interrupt_during_an_import_arrives_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "interrupted.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nsum(range(1000))\ncomplete = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    try:
        with pytest.raises(KeyboardInterrupt):
            farthing.import_whole("interrupted")
    finally:
        signal.signal(signal.SIGINT, before)
    assert sys.modules["interrupted"].complete


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("--admin-api-key root:k2", ((), ["root:k2"])),  # the models stay open, as the front does
        ("--api-key me:k1 --admin-api-key root:k2", (["me:k1"], ["root:k2"])),
    ],
)
def test_keys_of_several_models(monkeypatch: pytest.MonkeyPatch, keys: str, expected: Any) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        "farthing.server.front.serve_models", lambda _, __, each, *___: given.append(each) or 0
    )
    result = CliRunner().invoke(cli.app, ["serve", "--models", ".", *keys.split()])
    assert result.exit_code == 0, result.output
    assert [(each.keys, each.admin_keys) for each in given] == [expected]
