"""Seeded answers do not depend on speculation, prefix hits, other requests or ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("farthing._native")

from farthing import LLM, SamplingParams, _native
from farthing.hub import EMBEDDED, resolve_model
from farthing.model.load import load
from farthing.ops.select import select

pytestmark = pytest.mark.usefixtures("exact_on_amx")

FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}
ISAS = _native.instruction_sets().split()
SIZES: dict[str, Any] = {"max_model_len": 256, "num_blocks": 320}
DRAFTS = ("ngram:4", "mtp", "mtp+ngram:4")
RANKS: dict[str, dict[str, Any]] = {
    "ep": {"expert_parallel_size": 2},
    "pp": {"pipeline_parallel_size": 2},
    "pp and ep": {"pipeline_parallel_size": 2, "expert_parallel_size": 2},
}
HALVES: dict[str, dict[str, Any]] = {  # with --deterministic
    "one rank": {},
    "tp": {"tensor_parallel_size": 2},
    "pp": {"pipeline_parallel_size": 2},
    "tp and pp": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}
HEAD = "def merge(first, second):\n    result = []\n    while first and second:\n        "

Answers = list[list[int]]


def answers(llm: LLM, count: int, together: bool, tokens: int) -> Answers:
    """Answers to fixed prompts and seeds; every second request is greedy."""
    prompts = [f"{HEAD * (1 + i % 3)}# {i}\n" for i in range(count)]
    params = [
        SamplingParams(max_tokens=tokens, temperature=float(i % 2), seed=i, ignore_eos=True)
        for i in range(count)
    ]
    if together:
        done = llm.generate(prompts, params, use_tqdm=False)
    else:
        one = [llm.generate([p], s, use_tqdm=False) for p, s in zip(prompts, params, strict=True)]
        done = [r for results in one for r in results]
    return [list(r.outputs[0].token_ids) for r in done]


def options(isa: str, name: str) -> dict[str, Any]:
    return {"backend": f"cpu/{isa}", "threads": 1, **SIZES, **FORMATS[name]}


def alone(isa: str, name: str, count: int, tokens: int, **more: Any) -> Answers:
    with LLM(max_num_seqs=1, enable_prefix_caching=False, **options(isa, name), **more) as llm:
        return answers(llm, count, together=False, tokens=tokens)


def together(isa: str, name: str, count: int, tokens: int, **more: Any) -> Answers:
    """Answers of an engine that runs batches of 16."""
    with LLM(max_num_seqs=16, **(options(isa, name) | more)) as llm:
        return answers(llm, count, together=True, tokens=tokens)


def twice(isa: str, name: str, count: int, tokens: int, **more: Any) -> list[Answers]:
    """Answers of two runs; in the second, every prefix is cached."""
    with LLM(max_num_seqs=16, **(options(isa, name) | more)) as llm:
        return [answers(llm, count, together=True, tokens=tokens) for _ in range(2)]


@pytest.mark.parametrize("name", list(FORMATS))
def test_some_answers(name: str) -> None:
    expected = alone(ISAS[0], name, 6, 12)
    assert twice(ISAS[0], name, 6, 12) == [expected, expected]
    assert together(ISAS[0], name, 6, 12, speculate="mtp+ngram:4") == expected


@pytest.mark.parametrize("isa", [isa for isa in ISAS if not isa.startswith("avx512")])
def test_some_answers_of_every_instruction_set(isa: str) -> None:
    assert together(isa, "bfloat16", 6, 12, speculate="mtp") == alone(isa, "bfloat16", 6, 12)


def test_some_answers_of_two_ranks() -> None:
    exact = {"deterministic": True} if ISAS[0] == "amx" else {}  # in the ranks' processes
    ranks = together(ISAS[0], "int8", 6, 12, **exact, **RANKS["ep"])
    assert ranks == alone(ISAS[0], "int8", 6, 12)


def test_some_deterministic_answers() -> None:
    expected = alone(ISAS[0], "int4", 6, 12, deterministic=True)
    assert together(ISAS[0], "int4", 6, 12, deterministic=True, **HALVES["tp"]) == expected


def test_some_deterministic_answers_of_a_packed_file_and_of_experts_on_two_ranks(tmp_path: Path) -> None:
    """Undivided matrices: these two agree with each other."""
    file = str(tmp_path / "mite.packed")
    ops = select(f"cpu/{ISAS[0]}", threads=1, quantization="int8")
    load(resolve_model(EMBEDDED), ops).ops.save_packed(file)
    expected = together(ISAS[0], "int8", 6, 12, deterministic=True, packed=file)
    assert together(ISAS[0], "int8", 6, 12, deterministic=True, **RANKS["ep"]) == expected


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", list(FORMATS))
def test_200_answers(isa: str, name: str) -> None:
    expected = alone(isa, name, 200, 32)
    assert twice(isa, name, 200, 32) == [expected, expected]
    for speculate in DRAFTS:
        assert together(isa, name, 200, 32, speculate=speculate) == expected, speculate
    for layout, sizes in RANKS.items() if isa != "amx" else ():  # there --deterministic promises it, below
        assert together(isa, name, 200, 32, **sizes) == expected, layout


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", list(FORMATS))
def test_200_deterministic_answers(isa: str, name: str) -> None:
    expected = alone(isa, name, 200, 32, deterministic=True)
    for layout, sizes in HALVES.items():
        more: dict[str, Any] = {"deterministic": True, "speculate": "mtp+ngram:4", **sizes}
        assert together(isa, name, 200, 32, **more) == expected, layout


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_200_answers_of_ranks_without_shared_memory_and_with_drafts() -> None:
    expected = alone(ISAS[0], "bfloat16", 200, 32)
    for sizes in (RANKS["ep"], RANKS["pp"]):
        for more in ({"transport": "gloo"}, {"speculate": "mtp"}):
            assert together(ISAS[0], "bfloat16", 200, 32, **sizes, **more) == expected
