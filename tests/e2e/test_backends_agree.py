"""Greedy text of the embedded model in bfloat16: the CPU kernels and the reference agree."""

from __future__ import annotations

import pytest

pytest.importorskip("farthing._native")

from farthing import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("exact_on_amx")

PROMPTS = ["def fibonacci(n):\n", "import os\nimport sys\n\nclass Path"]
TIE = 0.04  # more than a unit in the last place of the reference's logits, which are bfloat16 up to 8


def generate(backend: str) -> list[tuple[list[int], list[list[tuple[int, float]]]]]:
    """Per prompt: (tokens, the two likeliest tokens with log-probabilities at each position)."""
    greedy = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True, logprobs=2)
    with LLM(
        "mite", backend=backend, dtype="bfloat16", threads=1, max_num_seqs=4, num_blocks=64,
        max_model_len=256,
    ) as llm:  # fmt: skip
        outputs = llm.generate(PROMPTS, greedy, use_tqdm=False)
    answers = []
    for completion in (output.outputs[0] for output in outputs):
        assert completion.logprobs is not None
        top = [[(token, entry.logprob) for token, entry in p.items()] for p in completion.logprobs]
        answers.append((completion.token_ids, [sorted(p, key=lambda item: -item[1])[:2] for p in top]))
    return answers


def test_backends_generate_the_same_128_tokens() -> None:
    for (mine, _), (theirs, top) in zip(generate("cpu"), generate("reference"), strict=True):
        assert len(theirs) == 128
        first = next((i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), None)
        if first is not None:
            (best, high), (second, low) = top[first]
            assert {mine[first], theirs[first]} == {best, second}
            assert high - low < TIE, f"token {first}: {theirs[first]} leads {mine[first]} by {high - low:.4f}"
