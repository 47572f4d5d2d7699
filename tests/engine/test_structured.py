"""Outputs that follow a grammar, with and without drafts."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from farthing.engine.engine import Engine
from farthing.engine.request import SamplingParams, StructuredOutputsParams
from farthing.engine.structured import GrammarCompiler
from farthing.engine.tokenizer import Tokenizer

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def ask(engine: Engine, seed: int, temperature: float = 1.0, **constraint: Any) -> str:
    params = SamplingParams(
        max_tokens=200,
        temperature=temperature,
        seed=seed,
        structured_outputs=StructuredOutputsParams(**constraint),
    )
    completion = engine.submit("x", params).result().outputs[0]
    assert completion.finish_reason == "stop"
    return completion.text


@pytest.mark.parametrize("speculate", [None, "ngram:3", "mtp:2"])
def test_every_kind_of_constraint(make_engine: Callable[..., Engine], speculate: str | None) -> None:
    engine = make_engine(speculate=speculate)
    for seed in range(2):
        value = json.loads(ask(engine, seed, json=SCHEMA))
        assert set(value) == {"name", "age"} and value["age"] <= 99 and len(value["name"]) <= 5
        assert re.fullmatch(r"(ab|c){3}-\d\d", ask(engine, seed, regex=r"(ab|c){3}-[0-9]{2}"))
        assert ask(engine, seed, choice=["yes", 'n"o', "été"]) in ("yes", 'n"o', "été")
        assert re.fullmatch("x+y", ask(engine, seed, grammar='start: /x{1,4}/ "y"'))
        assert ask(engine, seed, grammar='root ::= "a" | "b"') in "ab"


def test_speculation_does_not_change_the_answer(make_engine: Callable[..., Engine]) -> None:
    plain, drafting = make_engine(), make_engine(speculate="ngram:3")
    for temperature in (0.0, 1.0):
        wanted = {"seed": 4, "temperature": temperature, "regex": "((one|two|three)-){12}"}
        assert ask(plain, **wanted) == ask(drafting, **wanted)
    assert drafting.stats.draft_tokens > 0 and drafting.stats.accepted_tokens > 0


def test_masks_follow_drafts_without_side_effects(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    matcher = compiler.compile(StructuredOutputsParams(regex="[a][b][c]"))
    a, b, c = (tokenizer.encode(x, add_special_tokens=False)[0] for x in "abc")
    masks = matcher.masks([a, b], tokenizer.vocab_size + 3)
    assert masks.shape == (3, tokenizer.vocab_size + 3)
    assert [mask.nonzero()[0].tolist() for mask in masks] == [[a], [b], [c]]
    assert matcher.valid_prefix([a, b, b]) == 2
    twin = matcher.copy()
    for token in (a, b, c):
        matcher.consume(token)
    assert matcher.stopped and not twin.stopped
    with pytest.raises(ValueError, match=r"structured_outputs\.regex: token"):
        twin.consume(b)


@pytest.mark.parametrize("given", [{}, {"regex": "a", "json": {}}, {"choice": "abc"}, {"choice": [""]}])
def test_exactly_one_constraint_is_accepted(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        StructuredOutputsParams(**given)


def test_missing_extra_names_the_install_command(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[structured\]'"):
        GrammarCompiler(tokenizer, tokenizer.vocab_size)


def test_a_version_with_another_interface_is_named(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions before 1.7 take a single token for `eos_token`."""

    def old(text: str, n_vocab: int, eos_token: Any) -> None:
        raise TypeError("argument 'eos_token': 'list' object cannot be interpreted as an integer")

    monkeypatch.setattr("llguidance.LLTokenizer", old)
    with pytest.raises(ValueError, match=r"does not work with llguidance [\d.]+ \(argument 'eos_token'"):
        GrammarCompiler(tokenizer, tokenizer.vocab_size)
