"""Tool loops over HTTP with published templates, which want arguments as an object or as text."""

from __future__ import annotations

import json
import logging
from typing import Any

import anthropic
import pytest

from tests.conversation.published import SHAPES
from tests.server.api.loops import FORMATS as PACKAGED
from tests.server.clients.drivers.common import CITY, LOOP, THOUGHT
from tests.server.clients.model import FORMATS, engine
from tests.server.harness import ScriptedEngine, running

TOOL: dict[str, Any] = {"name": "look", "description": "Looks up.", "parameters": {"type": "object", "properties": {}}}  # fmt: skip  # noqa: E501
WANTED = {
    "glm45": "<arg_key>city</arg_key>\n<arg_value>Zürich</arg_value>",
    "glm47": "<arg_key>city</arg_key><arg_value>Zürich</arg_value>",
    "minimax_m2": '<parameter name="city">Zürich</parameter>',
    "qwen3_coder": "<parameter=city>\nZürich\n</parameter>",
    "kimi_k2": '<|tool_call_argument_begin|>{"city": "Zürich"}',
    "deepseek_v31": '<｜tool▁sep｜>{"city": "Zürich"}',
    "mistral_small": '"arguments": {"city": "Zürich"}',
}


@pytest.mark.parametrize("name", WANTED)
def test_the_second_turn_of_a_tool_loop(name: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine(chat_template=SHAPES[name].source)
    with caplog.at_level(logging.INFO, "farthing.server.formats"), running(engine) as server:
        for arguments in ('{"city": "Zürich"}', "Zürich"):  # a model may write an invalid call
            function = {"name": "look", "arguments": arguments}
            server.client().chat.completions.create(
                model="tiny",
                messages=[
                    {"role": "user", "content": "Where?"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"id": "call_abc", "type": "function", "function": function}],  # type: ignore[typeddict-item]
                    },
                    {"role": "tool", "content": "Here.", "tool_call_id": "call_abc"},
                ],
                tools=[{"type": "function", "function": TOOL}],  # type: ignore[typeddict-item]
            )
            assert "Zürich" in engine.prompts[-1] and "Here." in engine.prompts[-1]
        claude = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        use: Any = {"type": "tool_use", "id": "toolu_abc", "name": "look", "input": {"city": "Zürich"}}
        result: Any = {"type": "tool_result", "tool_use_id": "toolu_abc", "content": "Here."}
        claude.messages.create(
            model="tiny",
            max_tokens=9,
            messages=[
                {"role": "user", "content": "Where?"},
                {"role": "assistant", "content": [use]},
                {"role": "user", "content": [result]},
            ],
            tools=[{"name": "look", "input_schema": TOOL["parameters"]}],
        )
    assert WANTED[name] in engine.prompts[0] and WANTED[name] in engine.prompts[-1]
    form = "text" if name in ("kimi_k2", "deepseek_v31") else "an object"
    assert f"reads the arguments of earlier calls as {form}" in caplog.text


# The formats that test_tool_loops does not run.
OTHERS = [name for name in FORMATS if name not in PACKAGED]


@pytest.mark.parametrize("name", OTHERS)
def test_calls_and_reasoning_of_a_stream(name: str) -> None:
    properties = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    with running(engine(name)) as server:
        stream = server.client().chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": LOOP}],
            tools=[{"type": "function", "function": TOOL | {"parameters": properties}}],  # type: ignore[list-item]
            stream=True,
        )
        thought, text, called, ends = "", "", "", []
        for chunk in stream:
            delta = chunk.choices[0].delta
            thought += getattr(delta, "reasoning_content", None) or ""
            text += delta.content or ""
            for call in delta.tool_calls or ():
                assert call.function is not None and call.function.name in ("look", None)
                called += call.function.arguments or ""
            ends.append(chunk.choices[0].finish_reason)
    assert (thought, text) == (THOUGHT if FORMATS[name].reasons else "", "")
    assert json.loads(called) == CITY and ends[-1] == "tool_calls"
