"""The official SDKs run a streamed tool loop of five turns in every format, and on the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from openai import OpenAI

from farthing.config import EngineConfig
from farthing.engine.build import build_engine
from tests.server.api.loops import (
    ASK,
    DESCRIPTION,
    FORMATS,
    SCHEMA,
    THOUGHT,
    TURNS,
    check_call,
    result,
    scripted,
)
from tests.server.harness import Running, running

CHAT_TOOL: Any = {
    "type": "function",
    "function": {"name": "add", "description": DESCRIPTION, "parameters": SCHEMA},
}
RESPONSES_TOOL: Any = {"type": "function", "name": "add", "description": DESCRIPTION, "parameters": SCHEMA}
MESSAGES_TOOL: Any = {"name": "add", "description": DESCRIPTION, "input_schema": SCHEMA}


@pytest.mark.parametrize("format_", FORMATS)
def test_chat(format_: str) -> None:
    with scripted(format_) as (server, engine):
        client = server.client()
        turns: list[Any] = [{"role": "user", "content": ASK}]
        for step in range(TURNS + 1):
            content, thought, calls, reason = "", "", {}, None
            for chunk in client.chat.completions.create(
                model="tiny", messages=turns, tools=[CHAT_TOOL], stream=True
            ):
                (choice,) = chunk.choices
                content += choice.delta.content or ""
                thought += getattr(choice.delta, "reasoning_content", None) or ""
                for part in choice.delta.tool_calls or []:
                    call = calls.setdefault(part.index, {"id": part.id, "name": "", "arguments": ""})
                    call["name"] += part.function.name or ""
                    call["arguments"] += part.function.arguments or ""
                reason = choice.finish_reason or reason
            assert thought == (THOUGHT if FORMATS[format_][1] else "")
            if step == TURNS:
                assert (content, calls, reason) == ("Done.", {}, "stop")
                break
            assert content == f"Step {step}." and reason == "tool_calls"
            check_call(calls[0]["name"], calls[0]["arguments"], step)
            function = {"name": calls[0]["name"], "arguments": calls[0]["arguments"]}
            call = {"id": calls[0]["id"], "type": "function", "function": function}
            turns.append(
                {"role": "assistant", "content": content, "reasoning_content": thought, "tool_calls": [call]}
            )
            turns.append({"role": "tool", "tool_call_id": calls[0]["id"], "content": result(step)})
        assert len(engine.prompts) == TURNS + 1 and ASK in engine.prompts[-1]


@pytest.mark.parametrize(
    ("format_", "stored"), [*((name, False) for name in FORMATS), ("deepseek_v4", True), ("kimi_k2", True)]
)
def test_responses(format_: str, stored: bool) -> None:
    with scripted(format_) as (server, engine):
        client = server.client()
        items: list[Any] = [{"role": "user", "content": ASK}]
        previous = None
        for step in range(TURNS + 1):
            with client.responses.stream(
                model="tiny",
                instructions="Use the tool.",
                input=items,
                tools=[RESPONSES_TOOL],
                previous_response_id=previous,
            ) as stream:
                kinds = [event.type for event in stream]
                final = stream.get_final_response()
            assert kinds[:2] == ["response.created", "response.in_progress"]
            assert kinds[-1] == "response.completed" and final.status == "completed"
            opened = FORMATS[format_][1]
            types = [item.type for item in final.output]
            assert final.output_text == ("Done." if step == TURNS else f"Step {step}.")
            if opened:
                (thought,) = [item for item in final.output if item.type == "reasoning"]
                assert thought.content[0].text == THOUGHT
                assert final.usage.output_tokens_details.reasoning_tokens > 0
            if step == TURNS:
                assert types == ["reasoning"] * opened + ["message"]
                break
            assert types == ["reasoning"] * opened + ["message", "function_call"]
            call = final.output[-1]
            check_call(call.name, call.arguments, step)
            output = {"type": "function_call_output", "call_id": call.call_id, "output": result(step)}
            if stored:
                previous, items = final.id, [output]
            else:
                items += [*(item.model_dump(exclude_none=True) for item in final.output), output]
        prompt = engine.prompts[-1]
        assert ASK in prompt and "Use the tool." in prompt and prompt.count("Use the tool.") == 1


@pytest.mark.parametrize("format_", FORMATS)
def test_messages(format_: str) -> None:
    with scripted(format_) as (server, engine):
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        turns: list[Any] = [{"role": "user", "content": ASK}]
        for step in range(TURNS + 1):
            with client.messages.stream(
                model="tiny", max_tokens=1000, system="Use the tool.", messages=turns, tools=[MESSAGES_TOOL]
            ) as stream:
                kinds = [event.type for event in stream]
                final = stream.get_final_message()
            assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
            opened = FORMATS[format_][1]
            types = [block.type for block in final.content]
            if opened:
                assert final.content[0].thinking == THOUGHT  # type: ignore[union-attr]
            (text,) = [block.text for block in final.content if block.type == "text"]
            if step == TURNS:
                assert (text, final.stop_reason) == ("Done.", "end_turn")
                break
            assert types == ["thinking"] * opened + ["text", "tool_use"]
            assert (text, final.stop_reason) == (f"Step {step}.", "tool_use")
            call = final.content[-1]
            check_call(call.name, json.dumps(call.input), step)  # type: ignore[union-attr]
            turns.append({"role": "assistant", "content": [block.model_dump() for block in final.content]})
            block = {"type": "tool_result", "tool_use_id": call.id, "content": result(step)}  # type: ignore[union-attr]
            turns.append({"role": "user", "content": [block]})
        assert ASK in engine.prompts[-1] and "Use the tool." in engine.prompts[-1]


@pytest.fixture(scope="module")
def embedded() -> Iterator[Running]:
    """The embedded model, which calls a tool only if forced."""
    with running(build_engine(EngineConfig(model="mite", threads=1, max_num_seqs=4))) as server:
        yield server


LIGHT: Any = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}


def test_embedded_chat(embedded: Running) -> None:
    client = embedded.client()
    tool: Any = {"type": "function", "function": {"name": "light", "parameters": LIGHT}}
    turns: list[Any] = [{"role": "user", "content": "Light!"}]
    cached = 0
    for _ in range(TURNS):
        with client.chat.completions.stream(
            model="tiny", messages=turns, tools=[tool], tool_choice="required", parallel_tool_calls=False
        ) as stream:
            for _event in stream:
                pass
            message = stream.get_final_completion().choices[0].message
        (call,) = message.tool_calls or []
        assert isinstance(json.loads(call.function.arguments)["on"], bool)
        turns.append(
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call.model_dump(include={"id", "type", "function"})],
            }
        )
        turns.append({"role": "tool", "tool_call_id": call.id, "content": "done"})
    answer = client.chat.completions.create(model="tiny", messages=turns, tools=[tool], max_tokens=8)
    assert answer.usage and answer.usage.prompt_tokens_details
    cached = answer.usage.prompt_tokens_details.cached_tokens or 0
    assert cached > 0.5 * answer.usage.prompt_tokens


def test_embedded_responses(embedded: Running) -> None:
    client: OpenAI = embedded.client()
    tool: Any = {"type": "function", "name": "light", "parameters": LIGHT}
    items: Any = "Light!"
    previous = None
    for _ in range(TURNS):
        with client.responses.stream(
            model="tiny", input=items, tools=[tool], tool_choice="required", previous_response_id=previous
        ) as stream:
            for _event in stream:
                pass
            final = stream.get_final_response()
        calls = [item for item in final.output if item.type == "function_call"]
        assert calls and all(isinstance(json.loads(call.arguments)["on"], bool) for call in calls)
        previous = final.id
        items = [
            {"type": "function_call_output", "call_id": call.call_id, "output": "done"} for call in calls
        ]


def test_embedded_messages(embedded: Running) -> None:
    client = anthropic.Anthropic(base_url=embedded.url, api_key="none", max_retries=0)
    tool: Any = {"name": "light", "input_schema": LIGHT}
    turns: list[Any] = [{"role": "user", "content": "Light!"}]
    for _ in range(TURNS):
        with client.messages.stream(
            model="tiny",
            max_tokens=200,
            messages=turns,
            tools=[tool],
            tool_choice={"type": "tool", "name": "light"},
        ) as stream:
            final = stream.get_final_message()
        assert final.stop_reason == "tool_use"
        (call,) = [block for block in final.content if block.type == "tool_use"]
        assert isinstance(call.input["on"], bool)  # type: ignore[index]
        turns.append({"role": "assistant", "content": [block.model_dump() for block in final.content]})
        turns.append(
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "done"}]}
        )
