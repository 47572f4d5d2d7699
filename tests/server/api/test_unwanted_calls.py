"""Calls of a model that may not call: without tools in the request, or with tool_choice "none"."""

from __future__ import annotations

from typing import Any

import pytest

from farthing.config import EngineConfig
from tests.conversation.test_parse import v31
from tests.server.harness import ScriptedEngine, letters, running, tiny_engine

TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL: Any = {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASK: Any = [{"role": "user", "content": "Hi"}]
HISTORY: Any = [
    *ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_0", "content": "1"},
]
SAID = "Look: " + v31([("f", {"x": 1})])


def answers(engine: Any, stream: bool = False, **body: Any) -> tuple[str, list[Any], str | None]:
    """Content, calls and finish reason."""
    with running(engine) as server:
        create = server.client().chat.completions.create
        if not stream:
            (choice,) = create(model="tiny", **body).choices
            return choice.message.content or "", choice.message.tool_calls or [], choice.finish_reason
        content, calls, reason = "", [], None
        for chunk in create(model="tiny", stream=True, **body):
            (choice,) = chunk.choices
            content += choice.delta.content or ""
            calls += choice.delta.tool_calls or []
            reason = choice.finish_reason or reason
        return content, calls, reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "content", "calls"),
    [
        ({"messages": ASK, "tools": [TOOL]}, "Look:", 1),
        ({"messages": HISTORY, "tools": [TOOL], "tool_choice": "none"}, "Look:", 0),
        ({"messages": HISTORY}, "Look:", 0),
        ({"messages": ASK}, 'Look: f{"x": 1}', 0),  # nothing suggests a call: the text, without its marks
    ],
)
def test_no_special_token_reaches_the_content(
    stream: bool, body: dict[str, Any], content: str, calls: int
) -> None:
    engine = ScriptedEngine(letters(SAID))
    engine.config = EngineConfig(max_model_len=100_000, num_blocks=64, chat_template="deepseek_v31")
    found = answers(engine, stream, **body)
    assert (found[0], bool(found[1])) == (content, bool(calls))
    assert found[2] == ("tool_calls" if calls else "stop")


def test_a_client_may_ask_for_special_tokens() -> None:
    engine = ScriptedEngine(letters(SAID))
    engine.config = EngineConfig(max_model_len=100_000, num_blocks=64, chat_template="deepseek_v31")
    found = answers(engine, messages=ASK, extra_body={"skip_special_tokens": False})
    assert found[0] == SAID


def test_the_model_cannot_begin_a_call_that_would_be_dropped() -> None:
    engine = tiny_engine(chat_template="deepseek_v31")
    mark = engine.tokenizer.backend.token_to_id("<｜tool▁calls▁begin｜>")
    biased = {"logit_bias": {str(mark): 100}, "max_tokens": 8, "temperature": 0}
    assert answers(engine, messages=ASK, **biased)[0] == ""
    for body in ({"messages": HISTORY}, {"messages": HISTORY, "tools": [TOOL], "tool_choice": "none"}):
        engine = tiny_engine(chat_template="deepseek_v31")
        assert answers(engine, **body, **biased)[0] != ""
