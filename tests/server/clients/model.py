"""A scripted model that speaks every chat format of the server, and does what the conversation tells it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from farthing.config import EngineConfig
from tests.conversation.published import SHAPES
from tests.conversation.test_parse import (
    Calls,
    dsml,
    gemma4,
    glm,
    glm47,
    harmony,
    hermes,
    kimi,
    listed,
    minimax,
    mistral,
    qwen3_coder,
    v3,
    v31,
)
from tests.server.clients.drivers.common import DONE, HELLO, RESULT, THOUGHT
from tests.server.harness import ScriptedEngine, letters

_CALL = re.compile(r"Call the tool (\w+) with (\{.*?\})\.")
_JSON = re.compile(r"Answer as JSON: (\{.*?\})\.")
_ROOM = 200_000  # Claude Code asks for 32,000 after a prompt of 77,000
_REFUSED = "does not allow"  # what `farthing chat` returns to the model for a refused call


@dataclass(frozen=True)
class Spoken:
    """How models of a format write calls and answers. thought: the reasoning, where no prompt opens it.
    template: the published template (its shape) that selects the format; None: it is a packaged one."""

    write: Callable[[Calls], str]
    thought: str = ""
    reasons: bool = False
    template: str | None = None
    text: str = "{}"


def _llama(calls: Calls) -> str:
    return json.dumps({"name": calls[0][0], "parameters": calls[0][1]})


def _granite(calls: Calls) -> str:
    return "<|tool_call|>" + json.dumps([{"name": n, "arguments": a} for n, a in calls])


_TAGGED = f"<think>{THOUGHT}</think>"
FORMATS = {
    "deepseek_v3": Spoken(v3),
    "deepseek_r1": Spoken(v3, reasons=True),
    "deepseek_v31": Spoken(v31, reasons=True),
    "deepseek_v32": Spoken(dsml("function_calls"), reasons=True),
    "deepseek_v4": Spoken(dsml("tool_calls"), reasons=True),
    "kimi_k2": Spoken(kimi),
    "kimi_k2_thinking": Spoken(kimi, _TAGGED, True),
    "kimi_k25": Spoken(kimi, reasons=True),
    "glm45": Spoken(glm, f"\n{_TAGGED}", True),
    "glm47": Spoken(glm47, reasons=True),
    "harmony": Spoken(
        harmony, f"<|channel|>analysis<|message|>{THOUGHT}<|end|>", True,
        text="<|start|>assistant<|channel|>final<|message|>{}<|return|>",
    ),
    "gemma4": Spoken(gemma4, f"<|channel>thought\n{THOUGHT}\n<channel|>", True, "gemma4"),
    "qwen3": Spoken(hermes, _TAGGED, True, "qwen3"),
    "qwen3_coder": Spoken(qwen3_coder, template="qwen3_coder"),
    "qwen3_5": Spoken(qwen3_coder, "", True, "qwen3_5"),
    "minimax_m2": Spoken(minimax, "", True, "minimax_m2"),
    "mistral_7b": Spoken(listed, template="mistral_7b"),
    "mistral_small_4": Spoken(mistral, f"[THINK]{THOUGHT}[/THINK]", True, "mistral_small_4"),
    "llama3_1": Spoken(_llama, template="llama3_1"),
    "granite": Spoken(_granite, template="granite"),
}  # fmt: skip


def answer(spoken: Spoken, prompt: str) -> str:
    """What the model writes after a prompt."""
    end = prompt.rstrip()
    opened = spoken.reasons and end.endswith("<think>")
    thought = f"{THOUGHT}</think>" if opened else "" if end.endswith("</think>") else spoken.thought
    if RESULT in prompt or _REFUSED in prompt:
        return thought + spoken.text.format(DONE)
    if (call := _CALL.search(prompt)) and _declared(call[1], prompt):
        return thought + spoken.write([(call[1], json.loads(call[2]))])
    if asked := _JSON.search(prompt):
        # The server's grammar begins with the object, unless the prompt or the format's marks open a thought.
        thought = thought if opened or spoken.text != "{}" else ""
        return thought + spoken.text.replace("{}", asked[1])
    return thought + spoken.text.format(HELLO)


def _declared(tool: str, prompt: str) -> bool:
    """Agents repeat the user's words in requests without tools: for a title, or a summary."""
    return len(re.findall(rf"\b{tool}\b", prompt)) > prompt.count(f"Call the tool {tool} ")


def engine(name: str) -> ScriptedEngine:
    """A server's engine with the model of a format."""
    spoken = FORMATS[name]
    source = SHAPES[spoken.template].source if spoken.template else None
    found = ScriptedEngine(chat_template=source, max_model_len=_ROOM)
    if spoken.template is None:
        found.config = EngineConfig(max_model_len=_ROOM, num_blocks=64, chat_template=name)
    found.script = lambda prompt: letters(answer(spoken, prompt), 3)
    return found
