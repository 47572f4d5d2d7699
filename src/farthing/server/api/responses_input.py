"""From the items of /v1/responses to a conversation."""

from __future__ import annotations

import json
from dataclasses import replace

from farthing.conversation.types import Conversation, Tool, ToolCall, ToolChoice, Turn
from farthing.server.api.responses_protocol import (
    AllowedTools,
    ChosenTool,
    Declared,
    FunctionTool,
    Item,
    ResponsesRequest,
    text_of,
)

# A tool that takes a text is, to the model, a function with one argument.
_TEXT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


def conversation_of(body: ResponsesRequest, earlier: tuple[Turn, ...]) -> Conversation:
    """The conversation a body continues. earlier: the turns up to the previous response's end, its
    instructions left out."""
    effort = body.reasoning.effort if body.reasoning else None
    said = [body.instructions] if body.instructions else []
    if hosted := body.hosted():
        said.append(f"These tools are not available: {', '.join(hosted)}.")
    instructions = (Turn("system", "\n\n".join(said)),) if said else ()
    return Conversation(
        turns=(*instructions, *earlier, *turns_of(body)),
        tools=tuple(map(_tool, body.declared())),
        choice=_choice(body),
        parallel_calls=body.parallel_tool_calls is not False,
        effort="max" if effort == "xhigh" else effort,
    )


def _tool(declared: Declared) -> Tool:
    tool = declared.tool
    if isinstance(tool, FunctionTool):
        return Tool(declared.name, tool.description, tool.parameters, tool.strict)
    grammar = (tool.format or {}).get("definition")
    described = (
        f"{tool.description or ''}\n\nThe input obeys this grammar:\n{grammar}"
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


def turns_of(body: ResponsesRequest) -> tuple[Turn, ...]:
    """The input's turns. Reasoning, text and calls that follow one another are one turn of the assistant."""
    if isinstance(body.input, str):
        return (Turn("user", body.input),)
    turns: list[Turn] = []
    for item in body.input:
        turn = _turn(item)
        if turn.role == "assistant" and turns and turns[-1].role == "assistant":
            turns[-1] = _joined(turns[-1], turn)
        else:
            turns.append(turn)
    return tuple(turns)


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


def _name(item: Item) -> str:
    return f"{item.namespace}.{item.name}" if item.namespace else item.name or ""


def _joined(one: Turn, other: Turn) -> Turn:
    return replace(
        one,
        text=one.text + other.text,
        reasoning=one.reasoning + other.reasoning,
        calls=one.calls + other.calls,
    )
