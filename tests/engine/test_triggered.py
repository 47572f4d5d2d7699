"""Grammars within free text apply from an opener to their end, with and without drafts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models

from farthing.engine.constraints import ReasoningBudget, Vocabulary
from farthing.engine.engine import Engine
from farthing.engine.request import CallParams, ReasoningParams, SamplingParams, StructuredOutputsParams
from farthing.engine.structured import GrammarCompiler
from farthing.engine.tokenizer import Tokenizer
from farthing.engine.triggered import Openers, TokenTexts, TriggeredGrammar

pytest.importorskip("llguidance")

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
