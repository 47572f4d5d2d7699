"""Seeded answers do not depend on speculation, prefix hits or the company of other requests."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("farthing._native")

from farthing import LLM, SamplingParams

FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}
HEAD = "def merge(first, second):\n    result = []\n    while first and second:\n        "


def answers(llm: LLM, count: int, together: bool, tokens: int) -> list[list[int]]:
    prompts = [f"{HEAD * (1 + i % 3)}# {i}\n" for i in range(count)]
    params = [
        SamplingParams(max_tokens=tokens, temperature=1.0, seed=i, ignore_eos=True) for i in range(count)
    ]
    if together:
        done = llm.generate(prompts, params)
    else:
        done = [r for p, s in zip(prompts, params, strict=True) for r in llm.generate([p], s)]
    return [list(r.outputs[0].token_ids) for r in done]


def compare(name: str, count: int, tokens: int) -> None:
    options = {"backend": "cpu", "threads": 2, **FORMATS[name]}
    with LLM(max_num_seqs=1, enable_prefix_caching=False, **options) as llm:
        alone = answers(llm, count, together=False, tokens=tokens)
    with LLM(max_num_seqs=16, **options) as llm:
        assert answers(llm, count, together=True, tokens=tokens) == alone  # in a batch of 16
        assert answers(llm, count, together=True, tokens=tokens) == alone  # prefix hits
    with LLM(max_num_seqs=16, speculate="ngram:4", **options) as llm:
        assert answers(llm, count, together=True, tokens=tokens) == alone


@pytest.mark.parametrize("name", list(FORMATS))
def test_some_answers(name: str) -> None:
    compare(name, 6, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FORMATS))
def test_200_answers(name: str) -> None:
    compare(name, 200, 32)
