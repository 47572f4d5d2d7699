"""Sessions of 20 turns in the shapes of agents: what repeats is cached, with forks and edits, per format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import pytest

from tests.server.api.loops import FORMATS, THOUGHT, THOUGHTLESS
from tests.server.api.sessions import CachingEngine
from tests.server.harness import Running, letters, running

TURNS = 20
SOME = [pytest.param(name, marks=() if name == "deepseek_v4" else pytest.mark.slow) for name in FORMATS]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"command": {"type": "string"}},
    "required": ["command"],
}
FORGETFUL = ("deepseek_v32", "glm47")  # drop all thoughts where the user says more
SYSTEM = "You work in a repository. Keep to its habits. " * 20


@contextmanager
def session(format_: str) -> Iterator[tuple[Running, CachingEngine]]:
    """A model that reasons where the format does, says a line, and calls `bash` until it has 20 results."""
    write, opened = FORMATS[format_]

    def say(prompt: str) -> list[str]:
        done = prompt.count("RESULT-")
        text = f"{THOUGHT} {done}</think>" if opened else THOUGHTLESS.get(format_, "")
        call = write([("bash", {"command": f'grep -n "f_{done}" src >&1'})])
        return letters(text + ("Done." if done >= TURNS else f"Step {done}.{call}"), 7)

    engine = CachingEngine(say, format_)
    with running(engine) as server:
        yield server, engine


def result(step: int) -> str:
    return f"RESULT-{step}: src/module_{step}.py:{step}: def f_{step}(data): return data[{step}:]"


def opencode(server: Running, turns: list[Any], first: int = 0) -> list[Any]:
    """Stream chat completions with usage; text, reasoning and calls come back as they went."""
    tool: Any = {"type": "function", "function": {"name": "bash", "parameters": SCHEMA}}
    for step in range(first, TURNS + 1):
        with server.client().chat.completions.stream(
            model="tiny", messages=turns, tools=[tool], tool_choice="auto", max_tokens=32_000,
            stream_options={"include_usage": True},
        ) as stream:  # fmt: skip
            message = stream.get_final_completion().choices[0].message
        if not message.tool_calls:
            assert message.content == "Done." and step == TURNS
            break
        (call,) = message.tool_calls
        kept = {"role": "assistant", "content": message.content, "tool_calls": [call.model_dump(include={"id", "type", "function"})]}  # fmt: skip  # noqa: E501
        if thought := getattr(message, "reasoning_content", None):
            kept["reasoning_content"] = thought
        turns += [kept, {"role": "tool", "tool_call_id": call.id, "content": result(step)}]
    return turns


def claude_code(server: Running, turns: list[Any], first: int = 0) -> list[Any]:
    """Stream messages; the cache's marks move to the last turn, and reminders stand beside results."""
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    mark = {"cache_control": {"type": "ephemeral"}}
    system: Any = [{"type": "text", "text": SYSTEM, **mark}]
    tool: Any = {"name": "bash", "input_schema": SCHEMA}
    for step in range(first, TURNS + 1):
        *before, last = turns
        content = [*last["content"][:-1], last["content"][-1] | mark]
        with client.beta.messages.stream(
            model="tiny", max_tokens=32_000, system=system, tools=[tool],
            messages=[*before, last | {"content": content}],
            thinking={"type": "enabled", "budget_tokens": 31_999},
            metadata={"user_id": "session"}, betas=["interleaved-thinking-2025-05-14"],
        ) as stream:  # fmt: skip
            message = stream.get_final_message()
        if message.stop_reason == "end_turn":
            assert step == TURNS
            break
        calls = [block for block in message.content if block.type == "tool_use"]
        turns.append(
            {"role": "assistant", "content": [b.model_dump(exclude_none=True) for b in message.content]}
        )
        done = {"type": "tool_result", "tool_use_id": calls[0].id, "content": result(step), "is_error": False}
        reminder = {"type": "text", "text": "<system-reminder>The list is empty.</system-reminder>"}
        turns.append({"role": "user", "content": [done, reminder] if step % 5 == 2 else [done]})
    return turns


@pytest.mark.parametrize("format_", SOME)
def test_opencode(format_: str) -> None:
    with session(format_) as (server, engine):
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Find the function."}]
        opencode(server, turns)
        check(engine)


@pytest.mark.parametrize("format_", SOME)
def test_claude_code(format_: str) -> None:
    with session(format_) as (server, engine):
        claude_code(server, [{"role": "user", "content": [{"type": "text", "text": "Find the function."}]}])
        check(engine, continued=format_ not in FORGETFUL)


def check(engine: CachingEngine, continued: bool = True) -> None:
    """continued: every prompt continues the one before."""
    print(f"{len(engine.counts)} requests: {engine.shares():.2%} of repeating tokens cached")
    assert len(engine.counts) == TURNS + 1
    assert engine.shares() >= 0.995
    for (before, *_), (prompt, repeated, cached) in zip(engine.counts, engine.counts[1:], strict=False):
        least = max(before, repeated) if continued else repeated
        assert cached >= least - 16, (before, prompt, repeated, cached)


@pytest.mark.parametrize("format_", SOME)
def test_forks_and_edits_reuse_what_they_share(format_: str) -> None:
    with session(format_) as (server, engine):
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Find the function."}]
        opencode(server, turns)
        whole = len(engine.counts)
        fork = [*turns[:22], {"role": "user", "content": "Look in the tests instead."}]
        opencode(server, list(fork), 10)
        prompt, repeated, cached = engine.counts[whole]
        assert repeated > (0.4 if format_ in FORGETFUL else 0.8) * prompt and cached >= repeated - 16
        found = engine.metrics[f"scripted-{whole + 1}"].missed
        assert found is not None and found.evicted == found.state == 0 and found.diverged > 0
        edited = [*turns[:11], turns[11] | {"content": "RESULT-4: no such file"}, *turns[12:22]]
        opencode(server, edited, 10)
        assert engine.shares() >= 0.995
