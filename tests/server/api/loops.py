"""A tool loop of five turns for each official client, and a scripted model for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from farthing.config import EngineConfig
from tests.conversation.test_parse import Calls, dsml, glm, glm47, kimi, v3, v31
from tests.server.harness import Running, ScriptedEngine, letters, running

TURNS = 5
ASK = "Add them up: é 日 🎉"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"step": {"type": "integer"}, "note": {"type": "string"}, "tags": {"type": "array"}},
    "required": ["step", "note"],
}
DESCRIPTION = "Adds a number."
NOTE = 'é "quoted" \\ </x> 2>&1\n日'
THOUGHT = "I should add."

# Packaged format -> markup of calls, and whether the prompt opens the reasoning by default.
FORMATS: dict[str, tuple[Callable[[Calls], str], bool]] = {
    "deepseek_v3": (v3, False),
    "deepseek_r1": (v3, True),
    "deepseek_v31": (v31, False),
    "deepseek_v32": (dsml("function_calls"), False),
    "deepseek_v4": (dsml("tool_calls"), True),
    "kimi_k2": (kimi, False),
    "kimi_k2_thinking": (kimi, False),
    "kimi_k25": (kimi, True),
    "glm45": (glm, False),
    "glm47": (glm47, True),
}
# What such a model writes before an answer without reasoning.
THOUGHTLESS = {"glm45": "\n<think></think>\n", "kimi_k2_thinking": "<think></think>"}


def arguments(step: int) -> dict[str, Any]:
    """Arguments of the model's call in one step."""
    return {"step": step, "note": NOTE, "tags": [step, {"deep": None}]}


def result(step: int) -> str:
    """The tool's result."""
    return f"RESULT-{step}"


def script(format_: str) -> Callable[[str], list[str]]:
    """Single characters: reasoning if the format has it, text, and a call until all is added."""
    write, opened = FORMATS[format_]

    def say(prompt: str) -> list[str]:
        done = prompt.count("RESULT-")
        text = f"{THOUGHT}</think>" if opened else ""
        text += "Done." if done == TURNS else f"Step {done}." + write([("add", arguments(done))])
        return letters(text)

    return say


@contextmanager
def scripted(format_: str, **config: Any) -> Iterator[tuple[Running, ScriptedEngine]]:
    """A server with the scripted model."""
    engine = ScriptedEngine(script(format_))
    engine.config = EngineConfig(max_model_len=100_000, num_blocks=64, chat_template=format_)
    with running(engine, **config) as server:
        yield server, engine


def check_call(name: str, text: str, step: int) -> None:
    """Check that a parsed call is the one the model wrote."""
    assert name == "add" and json.loads(text) == arguments(step)
