"""Rates of systems that generate, and the commands that run a peer's benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


FAKE = """
import sys
from types import SimpleNamespace as Made

def made(*_):
    return Made()

llama_backend_init = llama_memory_clear = llama_get_memory = llama_batch_free = lambda *_: None
llama_model_default_params = llama_context_default_params = made
llama_get_logits_ith = lambda *_: None
llama_model_load_from_file = lambda file, how: file if file.endswith(b"good.gguf") else None
llama_init_from_model = lambda model, shape: shape

def llama_batch_init(tokens, *_):
    return Made(token=[0] * tokens, pos=[0] * tokens, n_seq_id=[0] * tokens, logits=[0] * tokens,
                seq_id=[[0] for _ in range(tokens)])

def llama_decode(context, batch):
    print(list(zip(batch.pos, (s[0] for s in batch.seq_id), batch.logits)), file=sys.stderr)
"""


def loaded(tmp_path: Path, file: str, asked: str) -> subprocess.CompletedProcess[str]:
    """Run bench/peer/peer_llama.py, as decode.py does, with bindings that print what they compute."""
    (tmp_path / "llama_cpp.py").write_text(FAKE)
    command = [sys.executable, str(BENCH / "peer/peer_llama.py"), file, "2", "64", "2"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    return subprocess.run(command, input=asked, capture_output=True, text=True, env=environment, timeout=60)


def test_bindings_feed_each_sequence_its_prompt_and_then_all_one_token_a_step(tmp_path: Path) -> None:
    done = loaded(tmp_path, "good.gguf", "2 3 2\n")
    lines = done.stderr.splitlines()[4:]  # after the warm-up: a prompt of 32, then three tokens
    assert lines == [
        "[(0, 0, False), (1, 0, False), (2, 0, True)]",
        "[(0, 1, False), (1, 1, False), (2, 1, True)]",
        "[(3, 0, True), (3, 1, True)]",
    ]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ready", "seconds"]


def test_bindings_that_cannot_load_the_file_say_so(tmp_path: Path) -> None:
    done = loaded(tmp_path, "bad.gguf", "")
    assert done.returncode == 1 and done.stderr == "bad.gguf: the bindings cannot load it\n"
