"""Prompts by a model's own template, from the internal conversation, are those of `apply_chat_template`."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from zlib import crc32

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from farthing.conversation.formats.template import arguments, finished
from farthing.conversation.types import Conversation, ToolCall, Turn
from farthing.engine.tokenizer import Tokenizer
from tests.conversation.published import SHAPES
from tests.conversation.talks import NAMES, declared, messages, talks

COUNT = 400
BACKEND = HfTokenizer(models.WordLevel({"x": 0}, unk_token="x"))
THEIRS = PreTrainedTokenizerFast(tokenizer_object=BACKEND, bos_token="<s>", eos_token="</s>")
CONFIG = {"bos_token": "<s>", "eos_token": "</s>"}


def nine(identity: str | None) -> str:
    """An id as Mistral's templates want it."""
    return f"{crc32((identity or '').encode()):09x}"


def with_short_ids(talk: Conversation) -> Conversation:
    turns = (
        replace(
            turn,
            call_id=turn.call_id and nine(turn.call_id),
            calls=tuple(replace(call, id=nine(call.id)) for call in turn.calls),
        )
        for turn in talk.turns
    )
    return replace(talk, turns=tuple(turns))


def apart(talk: Conversation) -> Conversation:
    """As gpt-oss's template takes it: one call in a turn, with text or reasoning."""
    turns = (
        replace(turn, text=f"{turn.reasoning}\n\n{turn.text}", reasoning="")
        if turn.calls and turn.text and turn.reasoning
        else turn
        for turn in talk.with_single_calls().turns
    )
    return replace(talk, turns=tuple(turns))


def kept(talk: Conversation) -> Conversation:
    """As Mistral 7B's template takes it: with a tool's result, the system turn is in the last user's turn."""
    first, *rest = talk.turns
    if first.role != "system" or not talk.has_calls or rest[-1].role == "user":
        return talk
    last = max(place for place, turn in enumerate(rest) if turn.role == "user")
    rest[last] = replace(rest[last], text=f"{first.text}\n\n{rest[last].text}")
    return replace(talk, turns=tuple(rest))


@pytest.mark.parametrize("name", SHAPES)
def test_prompts_are_those_of_transformers(name: str) -> None:
    shape, random, refused, looped = SHAPES[name], Random(name), 0, 0
    ours = Tokenizer(BACKEND, CONFIG, chat_template=shape.source)
    taken = apart if ours.habits().single else kept if shape.drops else lambda same: same
    assert ours.habits().drops is shape.drops
    assert ours.habits().calls is shape.tools and ours.habits().short_ids is shape.short_ids
    for talk in talks(crc32(name.encode()), COUNT, tools=shape.tools):
        talk = with_short_ids(talk) if shape.short_ids else talk
        switches = (
            {} if talk.thinking is None else dict.fromkeys(("thinking", "enable_thinking"), talk.thinking)
        )
        try:
            expected = THEIRS.apply_chat_template(
                messages(taken(talk), shape.arguments, random),
                tools=declared(talk),
                chat_template=shape.source,
                tokenize=False,
                add_generation_prompt=talk.generate,
                **switches,
            )
        except TemplateError:
            refused += 1
            with pytest.raises(ValueError, match="do not fit the chat template"):
                ours.render_chat(**arguments(talk, shape.source))
            continue
        looped += talk.has_calls
        prompt = ours.render_chat(**arguments(talk, shape.source))
        assert prompt == expected
        assert (shape.drops and not talk.has_calls) or finished(talk, prompt) == prompt
    assert refused <= COUNT * 3 // 4 and (looped >= COUNT // 20) is shape.tools


def test_a_turn_of_several_calls_is_read_by_every_template_that_reads_calls() -> None:
    """A model writes several calls at will. A template that takes one call in a turn gets one in a turn."""
    calls = tuple(ToolCall(f"functions.{call}:{at}", call, "{}") for at, call in enumerate(NAMES))
    results = [Turn("tool", f"result {call.name}", call_id=call.id) for call in calls]
    talk = Conversation((Turn("user", "Hi"), Turn("assistant", calls=calls), *results))
    for name, shape in SHAPES.items():
        if shape.tools:
            ours = Tokenizer(BACKEND, CONFIG, chat_template=shape.source)
            prompt = ours.render_chat(**arguments(talk, shape.source))
            assert all(call.name in prompt and f"result {call.name}" in prompt for call in calls), name
