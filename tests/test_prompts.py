"""Prompts as chains of block hashes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from farthing.prompts import BLOCK, chain, read_prompt

CHAT = {
    "model": "m",
    "messages": [{"role": "system", "content": "s" * 2000}, {"role": "user", "content": "q"}],
}


def blocks(request: Any) -> tuple[int, ...]:
    return read_prompt(json.dumps(request).encode(), 1024).blocks


def test_fields_that_do_not_reach_the_model_change_nothing() -> None:
    plain = blocks(CHAT)
    assert len(plain) == 3
    assert blocks({"user": "alice", "temperature": 0.5, **CHAT}) == plain
    assert blocks({"metadata": {"id": 7}, "stream": True, **CHAT}) == plain
    assert blocks({**CHAT, "model": "other"})[0] != plain[0]
    assert blocks({**CHAT, "tools": [{"type": "function"}]})[0] != plain[0]


def test_growing_conversation_keeps_its_prefix() -> None:
    longer = {**CHAT, "messages": [*CHAT["messages"], {"role": "assistant", "content": "a" * 3000}]}
    assert blocks(longer)[:3] == blocks(CHAT)


def test_every_api_has_a_prompt() -> None:
    text = "t" * 1500
    for request in (
        {"prompt": text},
        {"prompt": [1, 2, 3] * 500},
        {"prompt": [text, text]},
        {"input": text},
        {"input": [{"role": "user", "content": text}], "instructions": "be brief"},
        {"system": text, "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": text}}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": text}]}]},
    ):
        assert len(blocks(request)) >= 2, request


@given(st.binary(max_size=3000))
def test_any_body_has_a_prompt(body: bytes) -> None:
    prompt = read_prompt(body, 4)
    assert len(prompt.blocks) <= 4 and prompt.size >= 0


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(["model", "messages", "prompt", "tools", "input", "stream"]), json_values)
)
def test_any_request_has_a_prompt(request: Any) -> None:
    read_prompt(json.dumps(request).encode(), 4)


@given(st.binary(max_size=4000), st.binary(max_size=600), st.binary(max_size=600))
def test_chains_are_equal_exactly_up_to_the_common_text(shared: bytes, one: bytes, two: bytes) -> None:
    first, second = chain(shared + one, BLOCK, 1024), chain(shared + two, BLOCK, 1024)
    common = len(shared) // BLOCK
    assert first[:common] == second[:common]
    for i, (a, b) in enumerate(zip(first, second, strict=False), 1):
        assert (a == b) == ((shared + one)[: i * BLOCK] == (shared + two)[: i * BLOCK])
