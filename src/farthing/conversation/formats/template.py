"""A model's own Jinja template as a chat format. Content that a template leaves out is an error."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from farthing.conversation.base import EFFORTS, REASONING, FormatError
from farthing.conversation.types import Conversation, Turn

_SAMPLE = 40  # leading characters that identify a text in the prompt


def arguments(conversation: Conversation, source: str, efforts: tuple[str, ...] = EFFORTS) -> dict[str, Any]:
    """Keyword arguments of `Tokenizer.render_chat`. Developer turns become system turns where the template
    does not know them. efforts: values of reasoning_effort that the template accepts."""
    developer = "developer" if "developer" in source else "system"
    options = dict(conversation.template_options)
    thinking = conversation.wants_reasoning
    if thinking is not None:
        options = {"thinking": thinking, "enable_thinking": thinking} | options
    if conversation.effort in efforts:
        options.setdefault("reasoning_effort", conversation.effort)
    tools = [{"type": "function", "function": tool.document()} for tool in conversation.offered]
    return {
        "messages": [_message(turn, developer) for turn in conversation.turns],
        "tools": tools or None,
        "add_generation_prompt": conversation.generate and not conversation.resume,
        **options,
    }


def _message(turn: Turn, developer: str) -> dict[str, Any]:
    message: dict[str, Any] = dict(turn.extra)
    message["role"] = developer if turn.role == "developer" else turn.role
    message["content"] = turn.text
    if turn.reasoning:  # under every name that templates read
        message |= dict.fromkeys(REASONING, turn.reasoning)
    if turn.name is not None:
        message["name"] = turn.name
    if turn.call_id is not None:
        message["tool_call_id"] = turn.call_id
    if turn.calls:  # a template that only checks for the key would drop the text next to an empty list
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in turn.calls
        ]
    return message


def finished(conversation: Conversation, prompt: str) -> str:
    """The rendered prompt, checked, and cut at the end of a resumed last turn. Raises FormatError."""
    for what, text in _texts(conversation):
        sample = text.strip()[:_SAMPLE]
        if sample not in prompt and json.dumps(sample, ensure_ascii=False)[1:-1] not in prompt:
            raise FormatError(
                f"the chat template does not print {what}; expected a conversation without, or a server with "
                "another --chat-template"
            )
    return _cut(conversation.turns[-1].text, prompt) if conversation.resume else prompt


def _texts(conversation: Conversation) -> Iterable[tuple[str, str]]:
    for tool in conversation.offered:
        yield f"the tool {tool.name!r}", tool.name
    for position, turn in enumerate(conversation.turns):
        if turn.role in ("system", "developer", "tool"):
            yield f"messages[{position}], of role {turn.role!r}", turn.text
        for call in turn.calls:
            yield f"messages[{position}].tool_calls", call.name


def _cut(last: str, prompt: str) -> str:
    """The prompt up to the end of the last message's text, which the model continues."""
    at = prompt.rfind(last.strip())
    if at < 0:
        raise FormatError("the chat template changes the last message, so it cannot be continued")
    return prompt[: at + len(last.strip())]
