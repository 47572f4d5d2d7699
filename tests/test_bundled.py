"""The embedded model, and one of DeepSeek-V4's architecture: what they answer, how well they predict text."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("farthing._native")

from farthing import LLM, SamplingParams
from farthing.compress.evaluate import evaluate, load_corpus
from farthing.hub import EMBEDDED, resolve_model
from farthing.model.load import load
from farthing.ops.select import select

BUNDLED = (EMBEDDED, str(Path(__file__).parent / "assets" / "mite-v4"))
PROMPT = "class Stack:\n    def __init__(self, items):\n        self.items ="


@pytest.mark.parametrize("name", BUNDLED)
def test_it_completes_python(name: str) -> None:
    with LLM(name, threads=1, max_num_seqs=1) as llm:
        (done,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert done.outputs[0].text.startswith(" items\n")


@pytest.mark.parametrize("name", BUNDLED)
def test_it_predicts_held_out_text(name: str) -> None:
    """Of the first model, 0.84 bits per byte of all held-out files; the limit is what was asked of it."""
    model = load(resolve_model(name), select("cpu", threads=1))
    held_out = resolve_model(EMBEDDED) / "heldout.jsonl"
    quality = evaluate(model, load_corpus(held_out, resolve_model(name), model.config, 1024, 4096))
    assert quality.bits_per_byte is not None and quality.bits_per_byte < 1.35
