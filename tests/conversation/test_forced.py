"""Forced calls: the JSON of the grammar, its schema, and a model that loves blanks."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.conversation.forced import calls_schema
from farthing.conversation.forced import schema as forced_schema
from farthing.conversation.output import ListedCalls, NamedCall
from farthing.conversation.types import Conversation, Tool, ToolChoice
from farthing.engine.request import StructuredOutputsParams
from farthing.engine.structured import GrammarCompiler
from farthing.engine.tokenizer import Tokenizer
from tests.conversation.test_parse import CALLS, CUTS, Calls, chunked, read
from tests.conversation.test_token_ids import byte_tokenizer


@given(CALLS, st.booleans(), CUTS)
def test_json_list_survives_any_chunking(calls: Calls, spaced: bool, cuts: list[int]) -> None:
    document = [{"name": name, "parameters": arguments} for name, arguments in calls]
    text = json.dumps(document, indent=2 if spaced else None)
    assert read(ListedCalls(), chunked(text, cuts)) == ("", calls)


def test_output_of_a_named_call_is_only_arguments() -> None:
    assert read(NamedCall("f"), ['{"a"', ": 1}"]) == ("", [("f", {"a": 1})])


def test_json_that_is_not_a_call_becomes_text() -> None:
    for text in ("sorry", '[{"name": 1}]', '[{"name": "f"}]'):
        assert read(ListedCalls(), list(text)) == (text, [])


def test_call_that_is_cut_before_its_arguments_is_not_text() -> None:
    text = '[{"name": "f", "parameters": {'
    for end in range(len(text)):
        assert read(ListedCalls(), [text[:end]]) == ("", [])


SCHEMA = {"type": "object", "properties": {"x": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}


@pytest.mark.parametrize("parallel", [True, False])
def test_schema_of_calls(parallel: bool) -> None:
    schema = calls_schema([Tool("a/b:f", None, SCHEMA), Tool("g", None, {"type": "object"})], 1 + parallel)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    one = {"name": "a/b:f", "parameters": {"x": 1}}
    assert validator.is_valid([one])
    assert validator.is_valid([one, {"name": "g", "parameters": {}}]) is parallel
    for wrong in (
        [],
        [{"name": "h", "parameters": {}}],
        [{"name": "a/b:f", "parameters": {"x": "1"}}],
        [{"name": "a/b:f"}],
    ):
        assert not validator.is_valid(wrong)


@pytest.mark.parametrize("single", [True, False])
def test_model_that_prefers_blanks_finishes_a_forced_call(single: bool) -> None:
    tool = Tool("f", None, {"properties": {"x": {"type": "boolean"}}, "required": ["x"]} | {"type": "object"})
    closed = replace(tool, parameters={**(tool.parameters or {}), "additionalProperties": False})
    choice = ToolChoice("required", ("f",), single=single)
    schema = forced_schema(Conversation((), (closed,), choice, parallel_calls=False))
    tokenizer = byte_tokenizer(["<s>", "</s>"], [])
    tokenizer = Tokenizer(tokenizer.backend, {"bos_token": "<s>", "eos_token": "</s>"})
    matcher = GrammarCompiler(tokenizer, tokenizer.vocab_size).compile(StructuredOutputsParams(json=schema))
    blanks = tokenizer.encode(" \n\t", add_special_tokens=False)
    text: list[int] = []
    while not matcher.stopped:
        (allowed,) = matcher.masks([], tokenizer.vocab_size)
        candidates = np.flatnonzero(allowed).tolist()
        token = next((blank for blank in blanks if blank in candidates), candidates[-1])
        matcher.consume(token)
        text.append(token)
        assert len(text) < 80
    parser = NamedCall("f") if single else ListedCalls()
    ((name, arguments),) = read(parser, [tokenizer.decode(text)])[1]
    assert name == "f" and isinstance(arguments["x"], bool)
