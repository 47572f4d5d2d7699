"""Which model is served where none is named."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from farthing import packages
from farthing.catalogue import catalogue
from farthing.cli import offered
from farthing.cli.app import app
from farthing.hub import EMBEDDED, Cached, resolve_model
from farthing.planner.estimate import Machine
from farthing.planner.offers import SLOW, Offer, offers, worth

FOUND = list(offers(Machine(1, 2, 40.0, 450.0), 16 << 30))


class Terminal(Console):
    """Answers the questions that are put to it."""

    def __init__(self, answers: Sequence[str] = ()) -> None:
        super().__init__(file=io.StringIO(), width=120)
        self._answers = list(answers)

    def input(self, prompt: str = "", **_: object) -> str:  # type: ignore[override]
        self.print(prompt)
        return self._answers.pop(0)

    @property
    def said(self) -> str:
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offered, "_reachable", lambda: True)
    monkeypatch.setattr(offered, "_local", lambda: iter(()))
    monkeypatch.setattr(offered, "offers_here", lambda: FOUND)


def test_without_a_terminal_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert offered.named("tiny") == "tiny"
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert offered.named(None) == EMBEDDED


def test_enter_takes_the_first_of_those_that_suit_the_machine(online: None) -> None:
    terminal = Terminal([""])
    assert offered._chosen(terminal) == "gpt-oss-20b"
    assert "MXFP4" in terminal.said and "12.1 GB" in terminal.said
    assert "qwen3-32b" not in terminal.said and "smollm2-135m" in terminal.said


@pytest.mark.parametrize(("answers", "chosen"), [(["2"], 1), (["99", "1"], 0), (["other/name"], None)])
def test_a_number_or_a_name_chooses(online: None, answers: list[str], chosen: int | None) -> None:
    shown = worth(FOUND)
    expected = answers[-1] if chosen is None else shown[chosen].entry.name
    terminal = Terminal(answers)
    assert offered._chosen(terminal) == expected
    assert ("expected a number of 1 to" in terminal.said) == (len(answers) > 1)


def test_models_of_this_machine_come_first(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offered, "_local", lambda: iter(["owner/mine"]))
    assert offered._chosen(Terminal([""])) == "owner/mine"
    monkeypatch.setattr(offered, "_reachable", lambda: False)
    assert offered._chosen(Terminal(["1"])) == "owner/mine"


def test_models_of_this_machine_are_whole_and_can_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Cached(name, Path(name), 1, name != "cut", ()) for name in ("good", "cut", "foreign")]
    monkeypatch.setattr("farthing.hub.cached", lambda: iter(found))
    monkeypatch.setattr("farthing.hub.resolve_config", lambda path: path)

    def judge(path: Path) -> None:
        if path == Path("foreign"):
            raise ValueError("model_type: got 'bert'")

    monkeypatch.setattr("farthing.hub.judge", judge)
    assert list(offered._local()) == ["good"]


def test_without_a_network_it_says_so(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offered, "_reachable", lambda: False)
    monkeypatch.setattr(packages, "fetch", lambda package: None)
    terminal = Terminal()
    assert offered._chosen(terminal) == EMBEDDED and "can be reached" in terminal.said
    monkeypatch.setattr(packages, "fetch", lambda package: Path("model.gguf"))
    assert offered._chosen(Terminal()) == "smollm2-135m"


def test_a_slow_machine_is_offered_its_quickest() -> None:
    slow = list(offers(Machine(1, 1, 0.1, 5.0), 16 << 30))
    assert all(offer.tokens_per_second < SLOW for offer in slow)
    assert [offer.entry.name for offer in worth(slow)] == list(catalogue())[-3:]


def fits(offer: Offer) -> bool:
    return offer.fits


def test_the_list_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farthing.cli.offered.offers_here", lambda: FOUND)
    monkeypatch.setenv("COLUMNS", "120")
    done = CliRunner().invoke(app, ["models"])
    assert done.exit_code == 0 and all(name in done.output for name in catalogue())
    assert "farthing run OWNER/NAME" in done.output, "how to go on"
    assert done.output.count("needs more memory") == sum(not fits(offer) for offer in FOUND) > 0
    shown = json.loads(CliRunner().invoke(app, ["models", "--json"]).output)
    assert [each["entry"]["name"] for each in shown] == list(catalogue())


def test_a_base_model_says_so(tmp_path: Path) -> None:
    assert "does not answer" in (offered.base_note(EMBEDDED, resolve_model(EMBEDDED)) or "")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "no chat template: a base model" in (offered.base_note("tiny", tmp_path) or "")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert offered.base_note("tiny", tmp_path) is None
