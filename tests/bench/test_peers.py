"""Rates of systems that generate, and the commands that run a peer's benchmarks."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.bench.test_page import BENCH

TABLE = "|    PP |     TG |    B |\n|   128 |     32 |    8 |  1 | 2 | 3 | 4 | 55.5 | 6 | 7 |\n"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return import_module("peers")


@pytest.fixture
def build(peers: ModuleType, tmp_path: Path) -> Any:
    (tmp_path / "convert_hf_to_gguf.py").touch()
    (tmp_path / "examples/llama-bench").mkdir(parents=True)  # as in ik_llama.cpp, which repacks on request
    (tmp_path / "model-ik-Q4_0.gguf").touch()
    (tmp_path / "model-ik.gguf").touch()
    return peers.LlamaCpp("ik", tmp_path / "build/bin", new=32)


@pytest.mark.parametrize("repack", [True, False])
def test_peer_decodes_the_given_number_of_tokens(
    peers: ModuleType, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repack: bool
) -> None:
    commands: list[list[Any]] = []

    def output(*command: Any) -> str:
        commands.append([str(c) for c in command])
        return TABLE if "-npl" in command else json.dumps([{"avg_ts": 9.0}], indent=1)

    monkeypatch.setattr(peers, "_output", output)
    measure = build.measure(tmp_path / "model", "Q4_0", 2, repack)
    assert measure(peers.Point("decode", 8, 128)) == 55.5
    assert measure(peers.Point("decode", 1, 128)) == 9.0
    assert [("-rtr" in c) for c in commands] == ([False, True] * 2 if repack else [False] * 2)
    for command in commands:
        assert "128,32" in command or command[command.index("-ntg") + 1] == "32"


def test_rate_counts_only_the_additional_tokens(peers: ModuleType) -> None:
    def seconds(batch: int, prompt: int, new: int) -> float:
        return prompt / 100 + batch * new / 10

    measure = peers.by_generating(seconds, new=8)
    assert measure(peers.Point("decode", 4, 128)) == pytest.approx(10)
    assert measure(peers.Point("prefill", 1, 512)) == pytest.approx(512 / 5.22)
