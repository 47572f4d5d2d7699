"""Outputs that follow a grammar, with and without drafts."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models

from farthing.engine import structured
from farthing.engine.constraints import ReasoningBudget, Vocabulary
from farthing.engine.engine import Engine
from farthing.engine.request import CallParams, ReasoningParams, SamplingParams, StructuredOutputsParams
from farthing.engine.structured import (
    GrammarCompiler,
    MaskTime,
    Openers,
    TokenTexts,
    TriggeredGrammar,
    translate,
)
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
    with pytest.raises(ValueError, match=r"needs llguidance: pip install --upgrade llguidance"):
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


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_credit_is_spent_and_refilled() -> None:
    clock = Clock()
    credit = MaskTime(clock)
    assert not credit.spent("a")
    credit.charge("a", 0.2)
    assert credit.spent("a") and not credit.spent("b")
    clock.now = 10.0
    assert not credit.spent("a")


def test_slow_grammars_of_a_client_without_credit_fail(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(structured.time, "thread_time", clock)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    compiler.mask_time = MaskTime(lambda: 0.0)
    grammar = translate(StructuredOutputsParams(regex="[a-z]*"))
    slow, quick = (compiler.build(grammar, "regex", client="a") for _ in range(2))
    twin = slow.copy()
    token = tokenizer.encode("a", add_special_tokens=False)[0]

    class Late:
        """A grammar whose masks take 40 ms."""

        def __getattr__(self, name: str) -> object:
            clock.now += 0.04 if name == "unsafe_compute_mask_ptr" else 0.0
            return getattr(inner, name)

    inner = slow._matcher
    slow._matcher = twin._matcher = Late()  # type: ignore[assignment]
    for _ in range(3):
        assert not slow.masks([], tokenizer.vocab_size).all()
        slow.consume(token)
    for refused in (slow, twin):
        before = clock.now
        assert np.all(refused.masks([], tokenizer.vocab_size))
        assert clock.now == before  # nothing is computed
        with pytest.raises(ValueError, match="grammars of this key"):
            refused.consume(token)
    assert not quick.masks([], tokenizer.vocab_size).all()
    quick.consume(token)  # a fast grammar continues


# Pieces that overlap the opener "<c>" in every way, and some that extend past it.
PIECES = ["</s>", "<", "c", ">", "a", "1", "2", "/", "<c", "c>", "<c>", ">1", "c>a", "<c>1", "a<c>2", "a<"]
VOCAB = len(PIECES)


def tokenizer() -> Tokenizer:
    backend = HfTokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


TEXTS = TokenTexts(tokenizer(), VOCAB)
COMPILER = GrammarCompiler(tokenizer(), VOCAB)
FRESH = COMPILER.compile(StructuredOutputsParams(grammar='start: /[12]{2}/ "/"'))


def constraint(outside: ReasoningBudget | Vocabulary | None = None) -> TriggeredGrammar:
    return TriggeredGrammar(FRESH, Openers(("<c>",), TEXTS), outside)


def walk(over: TriggeredGrammar, rng: random.Random, length: int) -> list[int]:
    text = []
    for _ in range(length):
        allowed = np.flatnonzero(over.masks([], VOCAB)[0]).tolist()
        assert allowed
        text.append(rng.choice(allowed))
        over.consume(text[-1])
    return text


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_every_opener_is_followed_by_the_grammar(seed: int) -> None:
    text = "".join(PIECES[token] for token in walk(constraint(), random.Random(seed), 40))
    for after in text.split("<c>")[1:]:
        assert all(letter in "12/" for letter in after[:3][: len(after)])
        assert len(after) < 3 or (after[0] in "12" and after[1] in "12" and after[2] == "/")


def test_only_the_special_token_opens_where_there_is_one() -> None:
    pieces = ["</s>", "<c>", "<", "c", ">", "1", "2", "/", "c>1"]
    backend = HfTokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(pieces[:2])
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"})
    compiler = GrammarCompiler(tokenizer, len(pieces))
    fresh = compiler.compile(StructuredOutputsParams(grammar='start: /[12]{2}/ "/"'))
    here = TriggeredGrammar(fresh, Openers(("<c>",), TokenTexts(tokenizer, len(pieces))))
    for token in (2, 3, 4, 2, 8):  # spells it twice
        assert here.masks([], len(pieces)).all()
        here.consume(token)
    here.consume(1)
    assert np.flatnonzero(here.masks([], len(pieces))).tolist() == [5, 6]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, VOCAB - 1), max_size=6))
def test_drafts_are_masked_like_single_tokens(seed: int, drafts: list[int]) -> None:
    here = constraint(ReasoningBudget(ReasoningParams(end=(4,), budget=9)))
    walk(here, random.Random(seed), seed % 17)
    masks, accepted = here.masks(drafts, VOCAB), here.valid_prefix(drafts)
    alone = here.copy()
    for position, token in enumerate(drafts[: accepted + 1]):
        (row,) = alone.masks([], VOCAB)
        assert (masks[position] == row).all()
        assert row[token] == (position < accepted)
        if position < accepted:
            alone.consume(token)
    assert (here.masks([], VOCAB)[0] == masks[0]).all()  # state is unchanged


def test_text_constraint_applies_only_to_free_text() -> None:
    here = constraint(Vocabulary([1, 2, 3], ()))
    assert np.flatnonzero(here.masks([], VOCAB)[0]).tolist() == [1, 2, 3]
    for token in (1, 2, 3):
        here.consume(token)
    assert np.flatnonzero(here.masks([], VOCAB)[0]).tolist() == [5, 6]
    with pytest.raises(ValueError, match="not allowed"):
        here.consume(0)


@pytest.mark.parametrize("speculate", [None, "ngram:3"])
def test_engine_with_a_model_that_keeps_calling(
    make_engine: Callable[..., Engine], speculate: str | None
) -> None:
    engine = make_engine(speculate=speculate)
    grammar = '%llguidance {}\nstart: call "</c>"\ncall: %json ' + json.dumps(
        {
            "type": "object",
            "properties": {"x": {"enum": [1, "é"]}},
            "required": ["x"],
            "additionalProperties": False,
        }
    )
    tokens = engine.tokenizer.encode("<c>", False)  # type: ignore[union-attr]
    params = SamplingParams(
        max_tokens=120,
        seed=1,
        logit_bias=dict.fromkeys(tokens, 30.0),
        calls=CallParams(openers=("<c>",), grammar=grammar),
    )
    text = engine.submit("x", params).result().outputs[0].text
    whole = [part.partition("</c>")[0] for part in text.split("<c>")[1:] if "</c>" in part]
    assert whole and all(json.loads(call)["x"] in (1, "é") for call in whole)
