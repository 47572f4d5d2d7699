"""Conversion of /v1/responses items to a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from farthing.conversation.types import Conversation, Tool, ToolCall, ToolChoice, Turn
from farthing.server.api.responses_protocol import (
    AllowedTools,
    ChosenTool,
    Declared,
    ForeignItem,
    FunctionTool,
    Item,
    Reference,
    ResponsesRequest,
    text_of,
)
from farthing.server.calls import IssuedCalls
from farthing.server.errors import ApiError
from farthing.server.fields import short

# For the model, a custom tool is a function with one argument.
_TEXT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


def conversation_of(body: ResponsesRequest, turns: tuple[Turn, ...]) -> Conversation:
    """The conversation in a body. turns: those of earlier responses, without instructions, and its own."""
    effort = body.reasoning.effort if body.reasoning else None
    said = [body.instructions] if body.instructions else []
    if hosted := body.hosted():
        said.append(f"These tools are not available: {', '.join(hosted)}.")
    instructions = (Turn("system", "\n\n".join(said)),) if said else ()
    return Conversation(
        turns=(*instructions, *turns),
        tools=tuple(map(_tool, body.declared())),
        choice=_choice(body),
        parallel_calls=body.parallel_tool_calls is not False,
        effort=effort,
    )


def _tool(declared: Declared) -> Tool:
    tool = declared.tool
    if isinstance(tool, FunctionTool):
        return Tool(declared.name, tool.description, tool.parameters, tool.strict)
    grammar = (tool.format or {}).get("definition")
    described = (
        f"{tool.description or ''}\n\nThe input follows this grammar:\n{grammar}"
        if grammar
        else tool.description
    )
    return Tool(declared.name, described, _TEXT)


def _choice(body: ResponsesRequest) -> ToolChoice:
    choice = body.tool_choice
    if isinstance(choice, ChosenTool):
        return ToolChoice("required", (choice.name,), single=True)
    if isinstance(choice, AllowedTools):
        return ToolChoice(choice.mode, tuple(tool.name for tool in choice.tools))
    return ToolChoice(choice or "auto")


def turns_of(body: ResponsesRequest, earlier: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns of the input. Consecutive reasoning, text and calls are one turn of the assistant.

    Raises ApiError (400) for outputs of calls that are neither in the input before them nor in earlier turns.
    """
    if isinstance(body.input, str):
        return (Turn("user", body.input),)
    issued = IssuedCalls(earlier)
    turns: list[Turn] = []
    for position, item in enumerate(body.input):
        assert not isinstance(item, Reference)  # replaced by `resolved`
        for turn in (_turn(item),) if isinstance(item, Item) else _foreign(item):
            if turn.role == "tool":
                issued.answer(turn.call_id, f"input[{position}].call_id")
            issued.issue(turn)
            if turn.role == "assistant" and turns and turns[-1].role == "assistant":
                turns[-1] = _joined(turns[-1], turn)
            else:
                turns.append(turn)
    return tuple(turns)


def resolved(body: ResponsesRequest, find: Callable[[str], dict[str, Any] | None]) -> ResponsesRequest:
    """A body with its references replaced by the items they name. Raises ApiError (404)."""
    if isinstance(body.input, str) or not any(isinstance(item, Reference) for item in body.input):
        return body
    items: list[Any] = []
    for position, item in enumerate(body.input):
        found = find(item.id) if isinstance(item, Reference) else None
        if isinstance(item, Reference) and found is None:
            raise ApiError(
                404,
                f"input[{position}] refers to the item {short(item.id)}, which is not stored; "
                "expected an item of a recent response, created with the same key and without "
                "`store: false`, or the item itself",
                param=f"input[{position}].id",
                code="item_not_found",
            )
        items.append(item if found is None else Item.model_validate(found))
    return body.model_copy(update={"input": items})


def _turn(item: Item) -> Turn:
    match item.type:
        case "function_call":
            return Turn("assistant", calls=(ToolCall(item.call_id or "", _name(item), item.arguments or ""),))
        case "custom_tool_call":
            arguments = json.dumps({"input": item.input}, ensure_ascii=False)
            return Turn("assistant", calls=(ToolCall(item.call_id or "", _name(item), arguments),))
        case "function_call_output" | "custom_tool_call_output":
            return Turn("tool", text_of(item.output), call_id=item.call_id)
        case "reasoning":
            return Turn("assistant", reasoning=text_of(item.content) or text_of(item.summary))
        case _:
            assert item.role is not None
            return Turn(item.role, text_of(item.content))


_RESULTS = ("output", "outputs", "results", "error", "status")  # of a tool that ran elsewhere
_ABOUT = {"id", "call_id", "type", "status", "environment", "caller", "max_output_length", *_RESULTS}


def _foreign(item: ForeignItem) -> tuple[Turn, ...]:
    """A call as a function call of that name, or its output; for a tool that OpenAI ran, both."""
    fields = {name: value for name, value in (item.model_extra or {}).items() if name in item.known}
    result = next((fields[name] for name in _RESULTS if fields.get(name) is not None), "")
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    answer = Turn("tool", text, call_id=item.identity)
    if item.type.endswith("_output"):
        return (answer,)
    given = {name: value for name, value in fields.items() if name not in _ABOUT and value is not None}
    for name in ("action", "operation"):
        if isinstance(given.get(name), dict) and len(given) == 1:
            given = given[name]
    call = ToolCall(
        item.identity or "", item.type.removesuffix("_call"), json.dumps(given, ensure_ascii=False)
    )
    turn = Turn("assistant", calls=(call,))
    return (turn,) if item.type in ("local_shell_call", "shell_call", "apply_patch_call") else (turn, answer)


def _name(item: Item) -> str:
    return f"{item.namespace}.{item.name}" if item.namespace else item.name or ""


def _joined(one: Turn, other: Turn) -> Turn:
    return replace(
        one,
        text=one.text + other.text,
        reasoning=one.reasoning + other.reasoning,
        calls=one.calls + other.calls,
    )
