"""Request bodies of /v1/responses: validated field by field, and converted to a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from farthing.conversation.types import Conversation, Tool, ToolCall, ToolChoice, Turn
from farthing.server.errors import ApiError
from farthing.server.sampling import IssuedCalls
from farthing.server.schema import (
    TEXT_ONLY,
    Body,
    FieldError,
    Parameters,
    Strict,
    by_type,
    check_choice,
    missing,
    short,
    words,
)

MAX_ITEMS = 100_000
MAX_PARTS = 4096  # of one item

Name = Annotated[str, Field(pattern=r"^[^\s\"'<>\x00-\x1f]{1,256}$")]


class Part(Strict):
    """Text of an item, under one of several names."""

    known = words("annotations logprobs prompt_cache_breakpoint")

    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _has_text(self) -> Part:
        name = "refusal" if self.type == "refusal" else "text"
        if getattr(self, name) is None:
            raise missing(name, why=f"a part of type {self.type!r} needs it")
        return self


AnyPart = Annotated[Annotated[Part, Tag("Part")], by_type(Part, hints=TEXT_ONLY)]
Parts = Annotated[list[AnyPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class Item(Strict):
    """One item of the input. Its type decides which fields apply; without a type it is a message."""

    known = words("id status phase caller created_by async encrypted_content")

    type: Literal[
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "reasoning",
    ] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | Parts | None = None
    summary: Parts | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | Parts | None = None

    @model_validator(mode="after")
    def _complete(self) -> Item:
        wanted = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
            "custom_tool_call": ("call_id", "name", "input"),
            "custom_tool_call_output": ("call_id", "output"),
            "reasoning": (),
        }[self.type]
        for name in wanted:
            if getattr(self, name) is None:
                raise missing(name, why=f"an item of type {self.type!r} needs it")
        return self


class ForeignItem(Strict):
    """A call of a tool that OpenAI declares, or its output, in a conversation that began elsewhere."""

    known = words(
        "action arguments approval_request_id caller code container_id environment error",
        "max_output_length name operation output outputs queries results server_label status",
    )

    type: Literal[
        "local_shell_call",
        "local_shell_call_output",
        "shell_call",
        "shell_call_output",
        "apply_patch_call",
        "apply_patch_call_output",
        "web_search_call",
        "file_search_call",
        "code_interpreter_call",
        "mcp_call",
    ]
    id: str | None = None
    call_id: str | None = None

    @model_validator(mode="after")
    def _identified(self) -> ForeignItem:
        if self.identity is None:
            raise missing("call_id", why=f"an item of type {self.type!r} needs it, or an id")
        return self

    @property
    def identity(self) -> str | None:
        """The id of the call, repeated by its output."""
        return self.call_id or self.id


class Reference(Strict):
    """A reference to an item of a stored answer."""

    type: Literal["item_reference"] = "item_reference"
    id: str


def _kind(item: Any) -> str:
    """The class of an item. Unknown types go to `Item`, whose error lists the known ones."""
    fields = item if isinstance(item, dict) else getattr(item, "__dict__", {})
    kind = fields.get("type")
    if kind == "item_reference" or (
        kind is None and "id" in fields and not {"role", "content"} & set(fields)
    ):
        return "Reference"
    return "ForeignItem" if kind in get_args(ForeignItem.model_fields["type"].annotation) else "Item"


AnyItem = Annotated[
    Annotated[Item, Tag("Item")]
    | Annotated[ForeignItem, Tag("ForeignItem")]
    | Annotated[Reference, Tag("Reference")],
    Discriminator(_kind),
]


_ABOUT_TOOLS = words("allowed_callers async defer_loading")


class FunctionTool(Strict):
    """A function the client runs."""

    known = _ABOUT_TOOLS | {"output_schema"}

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = None


class CustomTool(Strict):
    """A custom tool, whose argument is text; its grammar is described to the model but not enforced."""

    known = _ABOUT_TOOLS

    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: dict[str, Any] | None = None


NamespaceTool = Annotated[
    Annotated[FunctionTool, Tag("FunctionTool")] | Annotated[CustomTool, Tag("CustomTool")],
    by_type(FunctionTool, CustomTool),
]


class Namespace(Strict):
    """Tools under a common name, which their calls repeat."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Annotated[list[NamespaceTool], Field(max_length=1024, fail_fast=True)]


class HostedTool(Strict):
    """A tool that OpenAI's servers run. It is not available here, and the prompt says so."""

    known = _ABOUT_TOOLS | words(
        "external_web_access filters max_num_results ranking_options search_content_types",
        "search_context_size user_location vector_store_ids description execution parameters",
        "container display_height display_width environment action background complexity",
        "frame_count frame_duration_ms input_fidelity input_image_mask model moderation",
        "output_compression output_format partial_images quality size svg allowed_tools",
        "authorization connector_id headers require_approval server_description server_label",
        "server_url tunnel_id",
    )

    type: Literal[
        "web_search",
        "web_search_preview",
        "file_search",
        "code_interpreter",
        "image_generation",
        "computer",
        "computer_use_preview",
        "mcp",
        "local_shell",
        "shell",
        "apply_patch",
        "tool_search",
    ]


ToolField = Annotated[
    Annotated[FunctionTool, Tag("FunctionTool")]
    | Annotated[CustomTool, Tag("CustomTool")]
    | Annotated[Namespace, Tag("Namespace")]
    | Annotated[HostedTool, Tag("HostedTool")],
    by_type(FunctionTool, CustomTool, Namespace, HostedTool),
]


class ChosenTool(Strict):
    """A tool by name."""

    type: Literal["function", "custom"]
    name: str


class AllowedTools(Strict):
    """tool_choice: some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenTool], Field(min_length=1, max_length=1024, fail_fast=True)]


def _choice_class(value: Any) -> str:
    allowed = isinstance(value, AllowedTools) or (
        isinstance(value, dict) and value.get("type") == "allowed_tools"
    )
    return (AllowedTools if allowed else ChosenTool).__name__


ChoiceObject = Annotated[
    Annotated[ChosenTool, Tag("ChosenTool")] | Annotated[AllowedTools, Tag("AllowedTools")],
    Discriminator(_choice_class),  # so that errors name fields of the intended class
]


class TextFormat(Strict):
    """text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_present(self) -> TextFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise FieldError("schema", problem=" goes with type 'json_schema', and only with it")
        return self


class TextOptions(Strict):
    """The format of the text; `verbosity` is accepted without effect."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(Strict):
    """How the model reasons; `summary` is accepted without effect."""

    effort: Annotated[str, Field(max_length=64)] | None = None
    summary: str | None = None
    generate_summary: str | None = None


# Most belong to tools that are not available here, so there is nothing to include.
Included = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",  # items of this server contain plain reasoning
    "message.output_text.logprobs",
]
_IMPOSSIBLE = {
    "background": "answers are generated only while the client waits; expected false",
    "conversation": "conversations are not stored; use previous_response_id, or send all items in input",
    "prompt": "prompt templates are not stored; use instructions and input",
    "top_logprobs": "use /v1/chat/completions with logprobs",
}


@dataclass(frozen=True, slots=True)
class Declared:
    """A tool under the name that the model sees."""

    name: str
    namespace: str | None
    tool: FunctionTool | CustomTool


class ResponsesRequest(Body):
    """Body of /v1/responses."""

    model: str | None = None
    input: str | Annotated[list[AnyItem], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[ToolField], Field(max_length=1024, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChoiceObject | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool | None = None
    store: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: Annotated[list[Included], Field(max_length=64, fail_fast=True)] | None = None
    # rejected unless they ask for what happens anyway
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    top_logprobs: int | None = None
    # accepted without effect
    max_tool_calls: int | None = None  # a limit on calls of tools that OpenAI runs
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    stream_options: dict[str, Any] | None = None
    client_metadata: dict[str, Any] | None = None
    user: str | None = None
    # extensions
    max_thinking_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    cache_salt: str | None = Field(default=None, max_length=1024)
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)

    @model_validator(mode="after")
    def _is_possible(self) -> ResponsesRequest:
        for name, why in _IMPOSSIBLE.items():
            if getattr(self, name):
                raise FieldError(name, problem=f" is not supported: {why}")
        if "message.output_text.logprobs" in (self.include or ()):
            why = f"'message.output_text.logprobs' is not supported: {_IMPOSSIBLE['top_logprobs']}"
            raise FieldError("include", problem=f": {why}")
        return self

    @model_validator(mode="after")
    def _tools_fit(self) -> ResponsesRequest:
        names = [declared.name for declared in self.declared()]
        check_choice(names, self.chosen_names(), required=self.tool_choice == "required")
        return self

    def declared(self) -> list[Declared]:
        """The tools that the client runs; those of a namespace are prefixed with its name."""
        found: list[Declared] = []
        for tool in self.tools or ():
            if isinstance(tool, Namespace):
                found += (Declared(f"{tool.name}.{inner.name}", tool.name, inner) for inner in tool.tools)
            elif not isinstance(tool, HostedTool):
                found.append(Declared(tool.name, None, tool))
        return found

    def hosted(self) -> list[str]:
        """The tools that are not available here."""
        return [tool.type for tool in self.tools or () if isinstance(tool, HostedTool)]

    def chosen_names(self) -> list[str]:
        """The tools that tool_choice names."""
        if isinstance(self.tool_choice, ChosenTool):
            return [self.tool_choice.name]
        return (
            [tool.name for tool in self.tool_choice.tools]
            if isinstance(self.tool_choice, AllowedTools)
            else []
        )


class InputTokensRequest(ResponsesRequest):
    """Body of /v1/responses/input_tokens: without input, the tokens of a stored conversation."""

    input: str | Annotated[list[AnyItem], Field(max_length=MAX_ITEMS, fail_fast=True)] = Field(
        default_factory=list
    )
    personality: str | None = None  # accepted and without effect


def text_of(content: str | list[Part] | None) -> str:
    """Parts as one string."""
    if isinstance(content, str):
        return content
    return "".join(part.text or part.refusal or "" for part in content or ())


# Conversion of /v1/responses items to a conversation.

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
    said: list[Turn] = []  # by the assistant, since the last turn of others
    for position, item in enumerate(body.input):
        assert not isinstance(item, Reference)  # replaced by `resolved`
        for turn in (_turn(item),) if isinstance(item, Item) else _foreign(item):
            if turn.role == "tool":
                issued.answer(turn.call_id, f"input[{position}].call_id")
            issued.issue(turn)
            if turn.role == "assistant":
                said.append(turn)
                continue
            turns += (*_joined(said), turn)
            said = []
    return (*turns, *_joined(said))


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


def _joined(said: Sequence[Turn]) -> list[Turn]:
    """Consecutive turns of the assistant as one; none if there are none."""
    if len(said) < 2:
        return [*said]
    text, reasoning = ("".join(map(attrgetter(name), said)) for name in ("text", "reasoning"))
    calls = tuple(chain.from_iterable(turn.calls for turn in said))
    return [replace(said[0], text=text, reasoning=reasoning, calls=calls)]
