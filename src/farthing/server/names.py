"""What clients of each API call the fields that errors name."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldNames:
    """The names of fields with a common meaning; the defaults are those of /v1/chat/completions."""

    prompt: str = "messages"
    max_tokens: str = "max_tokens"
    effort: str = "reasoning_effort"
    thinking: str = "thinking"
    budget: str = "max_thinking_tokens"
    structured: str = "structured_outputs"


CHAT = FieldNames()
COMPLETIONS = FieldNames(prompt="prompt")
MESSAGES = FieldNames(
    effort="output_config.effort", budget="thinking.budget_tokens", structured="output_config.format.schema"
)
RESPONSES = FieldNames(
    prompt="input", max_tokens="max_output_tokens", effort="reasoning.effort", structured="text.format.schema"
)

_STRUCTURED = re.compile(r"^structured_outputs(\.\w+)?")  # the engine's name of every constraint


def about_grammar(message: str, field: str) -> str:
    """The engine's error about a grammar, in terms of the field that the client sent."""
    if field != "tools":
        return message if field == COMPLETIONS.structured else _STRUCTURED.sub(field, message)
    why = message.partition("%llguidance")[0].removesuffix(" 1 | ").rpartition(": failed to ")[2]
    why = re.sub(r"^structured_outputs\.\w+ is not accepted: ", "", why)
    return f"tools: the schema of a tool is not accepted: {why}"
