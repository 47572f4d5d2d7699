"""Texts that try to become control tokens, and what counts as one that did."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.forged import LOOP, PLACES, SHAPES, conversation, hostile, measure, tokens_of


@pytest.mark.parametrize("name", SHAPES)
def test_every_template_has_control_tokens_of_which_texts_are_made(name: str) -> None:
    tokens = tokens_of(SHAPES[name])
    assert {"<s>", "</s>"} <= set(tokens) and not {"<tools>", "<invoke name=", "[0]"} & set(tokens)
    texts = [hostile(random.Random(seed), tokens) for seed in range(200)]
    assert all(text.strip() for text in texts)
    assert {any(token in text for token in tokens) for text in texts} == {True, False}
    assert texts == [hostile(random.Random(seed), tokens) for seed in range(200)]


def test_tokens_are_those_that_templates_write() -> None:
    assert {"<|im_start|>", "<|im_end|>", "<think>", "</tool_call>"} < set(tokens_of(SHAPES["qwen3"]))
    assert {"[gMASK]", "<sop>", "<|observation|>", "<arg_key>"} < set(tokens_of(SHAPES["glm45"]))
    assert {"]~!b[", "]~b]", "[e~[", "</minimax:tool_call>"} < set(tokens_of(SHAPES["minimax_m2"]))
    assert {"<|turn>", "<turn|>", '<|"|>'} < set(tokens_of(SHAPES["gemma4"]))


@pytest.mark.parametrize("place", [*PLACES, *LOOP])
def test_a_text_is_in_one_place(place: str) -> None:
    document = conversation(place, "hostile", SHAPES["qwen3"])
    assert json.dumps(document).count("hostile") == 1
    assert json.dumps(conversation(place, "word", SHAPES["qwen3"])).count("hostile") == 0


def test_a_text_is_forged_if_it_adds_or_takes_away_control_tokens() -> None:
    known = {token: i for i, token in enumerate(tokens_of(SHAPES["chatml"]))}

    def read(document: dict[str, Any]) -> list[int]:  # as a tokenizer that knows the whole document's tokens
        text = json.dumps(document, ensure_ascii=False)
        found = ((text.find(token), i) for token, i in known.items())
        return [1 << 20, *(i for at, i in sorted(found) if at >= 0)]

    row = measure("chatml", read, known, 100)
    assert row["texts"] == 100 and row["refused"] == 0
    assert 30 < row["forged"] < 100 and set(row["places"]) == set(PLACES)
    safe = measure("chatml", lambda document: [0, 1, 1 << 20], known, 100)
    assert safe["forged"] == 0
    assert measure("chatml", lambda document: None, known, 100) == {"template": "chatml", "loads": False}


def test_a_refused_text_is_not_forged() -> None:
    answers = iter([[0]])
    row = measure("chatml", lambda document: next(answers, None), {"<s>": 0, "</s>": 1, "<|im_start|>": 2,
                                                                   "<|im_end|>": 3}, 10)  # fmt: skip
    assert (row["forged"], row["refused"]) == (0, 10)
