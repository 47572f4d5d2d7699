"""Gemma 3's turns are those of its published template; answers of Gemma 4 are parsed wherever cut."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from farthing.conversation.base import ControlTokens, FormatError
from farthing.conversation.formats.gemma import GEMMA3, GEMMA4, MARKS
from farthing.conversation.output import OutputParser
from farthing.conversation.select import Checkpoint, choose
from farthing.conversation.types import Tool
from tests.conversation.published import SHAPES
from tests.conversation.talks import messages, talks
from tests.conversation.test_parse import answer

TOKENS = ControlTokens("<bos>", "<eos>")
THEIRS = PreTrainedTokenizerFast(
    tokenizer_object=HfTokenizer(models.WordLevel({"x": 0}, unk_token="x")), bos_token="<bos>"
)
TOOLS = (Tool("look_up", None, {"properties": {"city": {"type": "string"}}}),)


def test_prompts_are_those_of_the_published_template() -> None:
    random, refused = Random(1), 0
    for talk in talks(7, 400, tools=False):
        try:
            expected = THEIRS.apply_chat_template(
                messages(talk, "text", random),
                chat_template=SHAPES["gemma3"].source,
                tokenize=False,
                add_generation_prompt=talk.generate,
            )
        except TemplateError:
            refused += 1
            with pytest.raises(FormatError, match="alternate"):
                GEMMA3.render(talk, TOKENS)
            continue
        assert GEMMA3.render(talk, TOKENS) == expected
    assert refused < 200


ROME = '<|"|>Ro"m\\e{,<|"|>'
TEXTS = {  # an answer -> reasoning, text, calls
    "Hello.": ("", "Hello.", []),
    "<|channel>thought\nWhy?\nSo.\n<channel|>Rome.": ("Why?\nSo.", "Rome.", []),
    "<|channel>thought\n<channel|>Rome.": ("", "Rome.", []),
    f"<|channel>thought\nHm.\n<channel|><|tool_call>call:look_up{{city:{ROME},n:-2.5}}<tool_call|>": (
        "Hm.", "", [("look_up", '{"city": "Ro\\"m\\\\e{,","n": -2.5}')],
    ),
    "<|tool_call>call:look_up{}<tool_call|><|tool_call>call:a{x:[],b:{c:None}}<tool_call|><|tool_response>": (
        "", "", [("look_up", "{}"), ("a", '{"x": [],"b": {"c": null}}')],
    ),
    "<|tool_call>call:look_up<tool_call|>": ("", "", [("look_up", "{}")]),
    "<|tool_call>call:look_up{city:Rome}<tool_call|>": ("", "", [("look_up", '{"city": "Rome"}')]),
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_answers_cut_anywhere(text: str) -> None:
    cuts = [[text], list(text), *([text[:at], text[at:]] for at in range(len(text)))]
    for chunks in cuts:
        found = answer(OutputParser(GEMMA4.calls(TOOLS, frozenset()), None, False), chunks)
        calls = [(name, arguments) for _, name, arguments in found.calls]
        assert (found.reasoning, found.text, calls) == TEXTS[text]


def test_templates_choose_it() -> None:
    """Gemma 4's answers are read whole, with the reasoning; Gemma 3 has neither calls nor thoughts."""
    chosen = choose(Checkpoint("gemma4", SHAPES["gemma4"].source, lambda token: token in MARKS))
    assert chosen.plain.whole and chosen.plain.reasons and chosen.plain.tags is None
    assert chosen.plain.markup == MARKS and chosen.plain.efforts == ("none",)
    for template in (SHAPES["gemma3"].source, None):
        plain = choose(Checkpoint("gemma3_text", template, lambda token: False)).plain
        assert not plain.reasons and "<end_of_turn>" in plain.stops and not plain.markup
    assert all(a == b or not a.startswith(b) for a, b in itertools.product(MARKS, MARKS))
