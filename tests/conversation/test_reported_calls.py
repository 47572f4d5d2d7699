"""Failures reported against other servers' parsers of DeepSeek's, Kimi's and GLM's calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from farthing.conversation.base import CallParser
from farthing.conversation.formats.deepseek_v3 import V3
from farthing.conversation.formats.deepseek_v4 import V4
from farthing.conversation.formats.deepseek_v31 import V31
from farthing.conversation.formats.delimited import DEEPSEEK, KIMI
from farthing.conversation.formats.glm import GLM45
from farthing.conversation.formats.kimi_k2 import KIMI_K2
from farthing.conversation.types import Tool
from tests.conversation.test_parse import Calls, answer, kimi, read, v31

TEXT = {"type": "string"}
TOOLS = (
    Tool("grep_tool", None, {"properties": {"pattern": TEXT, "path": TEXT}, "required": ["pattern"]}),
    Tool("grep", None, {"properties": {"query": TEXT}, "required": ["query"]}),
    Tool("list_files", None, {"properties": {"path": TEXT}, "required": ["path"]}),
    Tool("tool_12", None, None),
)


def reads(make: Callable[[], CallParser], output: str, text: str, calls: Calls) -> None:
    """The output is parsed so, however it is cut."""
    for chunks in ([output], list(output), *([output[:cut], output[cut:]] for cut in range(len(output)))):
        assert read(make(), chunks) == (text, calls), chunks


def glm() -> CallParser:
    return GLM45.calls(TOOLS)


@pytest.mark.parametrize(
    ("call", "name", "arguments"),
    [
        # vllm 54971: a repeated tag became part of the key
        ("grep<arg_key>query</arg_key></arg_key><arg_value>x</arg_value>", "grep", {"query": "x"}),
        ("grep<arg_key><arg_key>query</arg_key><arg_value>x</arg_value>", "grep", {"query": "x"}),
        # vllm 47190: no tag between the function's name and the key
        ("grep_toolpattern</arg_key><arg_value>x</arg_value>", "grep_tool", {"pattern": "x"}),
        ("grep query</arg_key><arg_value>x</arg_value>", "grep", {"query": "x"}),
        # vllm 49248: no tag before the value
        ("grep<arg_key>query</arg_key>how many days</arg_value>", "grep", {"query": "how many days"}),
        (
            "grep_tool<arg_key>path</arg_key>a</arg_value><arg_key>pattern</arg_key><arg_value>b</arg_value>",
            "grep_tool",
            {"path": "a", "pattern": "b"},
        ),
        # fw-ai python-sdk 119: a stray tag became part of the name
        ("tool_12</arg_value>", "tool_12", {}),
        # vllm 41654, 44326: calls without arguments, in one line
        ("tool_12", "tool_12", {}),
        # sglang 20542: white space of a value was stripped
        ("grep<arg_key>query</arg_key><arg_value>  x\n</arg_value>", "grep", {"query": "  x\n"}),
        # mlx-lm 792: JSON instead of tags
        ('{"name": "grep", "arguments": {"query": "<x>"}}', "grep", {"query": "<x>"}),
        ('grep\n{"query": "x"}', "grep", {"query": "x"}),
    ],
)
def test_glm(call: str, name: str, arguments: dict[str, Any]) -> None:
    reads(glm, f"So:\n<tool_call>{call}</tool_call>", "So:", [(name, arguments)])
    # xinfer 392: closed twice
    reads(glm, f"So:\n<tool_call>{call}</tool_call></tool_call>", "So:", [(name, arguments)])


@pytest.mark.parametrize("text", ['{"name": 5}', '{"name": "a b"}', "{5}", '{"name": "f", "arguments": 1}'])
def test_glm_json_that_is_no_call_is_text(text: str) -> None:
    reads(glm, f"<tool_call>{text}</tool_call>", text, [])


def kimi_parser() -> CallParser:
    return KIMI_K2.calls(TOOLS)


def kimi_call(head: str, arguments: str) -> str:
    return f"{KIMI.call_begin}{head}{KIMI.separator}{arguments}{KIMI.call_end}"


@pytest.mark.parametrize(
    ("head", "arguments", "name"),
    [
        # sglang 21377, exo 2281: ids without their punctuation
        ("functionsgrep5", {"query": "x"}, "grep"),
        ("functions.grep5", {"query": "x"}, "grep"),
        ("functions_grep_tool_3", {"pattern": "x"}, "grep_tool"),
        ("grep:0", {"query": "x"}, "grep"),
        # vllm 38441: a new line in the id
        ("\nfunctions.grep:0\n", {"query": "x"}, "grep"),
        # sglang 25362: the id is a number, so the arguments tell the function
        ("call00003", {"path": "x"}, "list_files"),
        ("3", {"pattern": "x", "path": "y"}, "grep_tool"),
        # what tells nothing stays as it is
        ("call_1", {"unknown": 1}, "call_1"),
    ],
)
def test_kimi_ids(head: str, arguments: dict[str, Any], name: str) -> None:
    output = KIMI.calls_begin + kimi_call(head, json.dumps(arguments)) + KIMI.calls_end
    reads(kimi_parser, output, "", [(name, arguments)])


def test_kimi_names_the_function_among_the_arguments() -> None:
    """vllm 32146."""
    output = kimi_call("call_abc123def456", '{"name": "list_files", "path": "/home"}')
    reads(kimi_parser, output, "", [("list_files", {"path": "/home"})])


def test_kimi_misspells_the_section() -> None:
    """llama.cpp 17376."""
    output = f"So.<|tool_call_section_begin|>{kimi_call('functions.grep:0', '{}')}<|tool_call_section_end|>"
    reads(kimi_parser, output, "So.", [("grep", {})])


def test_kimi_repeats_an_id() -> None:
    found = answer(kimi_parser(), [kimi_call("functions.grep:0", "{}") * 3])
    assert len({identity for identity, _, _ in found.calls}) == 3


def test_kimi_call_without_arguments() -> None:
    reads(kimi_parser, f"{KIMI.call_begin}functions.tool_12:0{KIMI.call_end}", "", [("tool_12", {})])


@pytest.mark.parametrize("write", [kimi, v31])
def test_large_arguments(write: Callable[[Calls], str]) -> None:
    """vllm 37184: a section of more than 8 KB was cut."""
    make = kimi_parser if write is kimi else lambda: V31.calls(TOOLS)
    calls: Calls = [("grep", {"query": "x" * 100_000}), ("grep", {"query": "y"})]
    assert read(make(), [write(calls)]) == ("", calls)


def v3() -> CallParser:
    return V3.calls(TOOLS)


def v3_call(name: str, arguments: str = '{"query": "x"}') -> str:
    head = f"{DEEPSEEK.call_begin}function{DEEPSEEK.separator}{name}"
    return f"{head}\n```json\n{arguments}\n```{DEEPSEEK.call_end}"


def test_v3_section_without_a_call() -> None:
    """vllm 48367: an empty list of calls, and the text lost."""
    reads(v3, f"{DEEPSEEK.calls_begin}nothing to call{DEEPSEEK.calls_end}", "nothing to call", [])


def test_v3_malformed_call_does_not_swallow_the_next() -> None:
    """unsloth 5624."""
    bad = f"{DEEPSEEK.call_begin}function{DEEPSEEK.separator}bad"
    reads(v3, bad + v3_call("grep"), "", [("bad", {}), ("grep", {"query": "x"})])
    reads(v3, f"{DEEPSEEK.call_begin}function{v3_call('grep')}", "", [("grep", {"query": "x"})])


def test_blank_names_are_no_calls() -> None:
    reads(v3, "So." + v3_call(""), 'So.```json\n{"query": "x"}\n```', [])
    for name in ("", " "):
        v31_call = f"{DEEPSEEK.call_begin}{name}{DEEPSEEK.separator}{{}}{DEEPSEEK.call_end}"
        reads(lambda: V31.calls(TOOLS), v31_call, "{}", [])
        reads(kimi_parser, kimi_call(f"functions.{name}:0", "{}"), "{}", [])
        reads(glm, f"<tool_call>{name}<arg_key>a</arg_key><arg_value>b</arg_value></tool_call>So.", "So.", [])
        reads(lambda: V4.calls(TOOLS), f'<｜DSML｜invoke name="{name}">\n</｜DSML｜invoke>\nSo.', "So.", [])


def test_text_after_the_arguments() -> None:
    """Nothing is lost, delayed, or taken for arguments, even if the output ends within a mark."""
    begin = f"{DEEPSEEK.call_begin}grep{DEEPSEEK.separator}"
    for rest, text in [
        (DEEPSEEK.call_end[:8], ""),
        ("}\n```" + DEEPSEEK.call_end, ""),
        ("\n\nNow I wait.", "Now I wait."),
        ("\nNow I wait." + DEEPSEEK.call_end + DEEPSEEK.calls_end, "Now I wait."),
    ]:
        reads(lambda: V31.calls(TOOLS), f'{begin}{{"query": "x"}}{rest}', text, [("grep", {"query": "x"})])
    parser = V31.calls(TOOLS)
    parser.push(begin + "{}")
    assert "".join(getattr(delta, "text", "") for delta in parser.push("\n\nNow")) == "Now"


def test_dsml_parameter_without_its_closing_tag() -> None:
    """vllm 54838: the next parameter became part of the value."""
    output = (
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="grep_tool">\n'
        '<｜DSML｜parameter name="pattern" string="true">x'
        '<｜DSML｜parameter name="path" string="true">y</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
    reads(lambda: V4.calls(TOOLS), output, "", [("grep_tool", {"pattern": "x", "path": "y"})])


def test_dsml_tags_with_a_blank_and_another_section() -> None:
    """OmniRoute 13930."""
    output = (
        '<｜｜DSML｜｜ calls>\n<｜｜DSML｜｜ invoke name="grep">\n'
        '<｜｜DSML｜｜ parameter name="query" string="true">x</｜｜DSML｜｜ parameter>\n'
        "</｜｜DSML｜｜ invoke>\n</｜｜DSML｜｜ calls>"
    )
    reads(lambda: V4.calls(TOOLS), output, "", [("grep", {"query": "x"})])


def test_dsml_array_that_is_no_json() -> None:
    """sglang 39632: bytes of the arguments were lost when a value turned out to be a string."""
    text = '[{"a": 1}, {"b": "c"d"}]'
    parameter = f'<｜DSML｜parameter name="query" string="false">{text}</｜DSML｜parameter>'
    output = f'<｜DSML｜invoke name="grep">{parameter}</｜DSML｜invoke>'
    reads(lambda: V4.calls(TOOLS), output, "", [("grep", {"query": text})])
