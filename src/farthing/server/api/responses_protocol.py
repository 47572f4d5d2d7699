"""What clients of /v1/responses send, checked field by field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from farthing.server.schema import Body, Loose, Strict

MAX_ITEMS = 100_000
MAX_PARTS = 4096  # of one item

Name = Annotated[str, Field(pattern=r"^[^\s\"'<>\x00-\x1f]{1,256}$")]
_PARTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")


class Part(Loose):
    """Text of an item, under one of several names."""

    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


class Item(Loose):
    """One item of the input. Which fields count depends on the type; without one it is a message."""

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
        missing = [name for name in wanted if getattr(self, name) is None]
        if missing:
            raise ValueError(f"an item of type {self.type!r} lacks {', '.join(missing)}")
        return self


class ForeignItem(Loose):
    """A call of a tool that OpenAI declares, or its output, in a conversation begun elsewhere."""

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
            raise ValueError(f"an item of type {self.type!r} lacks call_id and id")
        return self

    @property
    def identity(self) -> str | None:
        """The call's id, which its output repeats."""
        return self.call_id or self.id


class Reference(Loose):
    """An item of an answer that is stored here."""

    type: Literal["item_reference"] = "item_reference"
    id: str


def _kind(item: Any) -> str:
    """The class of an item; items of unknown types are left to `Item`, which names those it knows."""
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


class FunctionTool(Strict):
    """A function the client runs."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomTool(Strict):
    """A tool that takes a text; the text's grammar is described to the model and not enforced."""

    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: dict[str, Any] | None = None


class Namespace(Strict):
    """Tools under a common name, which calls of them carry."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Annotated[
        list[Annotated[FunctionTool | CustomTool, Field(discriminator="type")]],
        Field(max_length=1024, fail_fast=True),
    ]


class HostedTool(Loose):
    """A tool that OpenAI's servers run. There is none here: the prompt says so."""

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


ToolField = Annotated[FunctionTool | CustomTool | Namespace | HostedTool, Field(discriminator="type")]


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
    Discriminator(_choice_class),  # so that errors are about the object that was meant
]


class TextFormat(Strict):
    """text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_present(self) -> TextFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("schema belongs to type 'json_schema', and only to it")
        return self


class TextOptions(Strict):
    """How the text is to be; `verbosity` is accepted and has no effect."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(Strict):
    """How the model reasons; `summary` is accepted and has no effect."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = None
    generate_summary: str | None = None


# Most belong to tools that nothing runs here, so there is never anything to include.
Included = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",  # items of this server carry their reasoning as it is
    "message.output_text.logprobs",
]
_IMPOSSIBLE = {
    "background": "answers are made while the client waits; expected false",
    "conversation": "no conversations are kept; expected previous_response_id, or all items in input",
    "prompt": "no prompt templates are kept; expected instructions and input",
    "top_logprobs": "expected /v1/chat/completions with logprobs, which reports log probabilities",
}


@dataclass(frozen=True, slots=True)
class Declared:
    """A tool under the name the model knows it by."""

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
    # refused, unless they say what happens anyway
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    top_logprobs: int | None = None
    # accepted and without effect
    max_tool_calls: int | None = None  # limits calls of tools that OpenAI runs
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
                raise ValueError(f"{name} is not supported: {why}")
        if "message.output_text.logprobs" in (self.include or ()):
            raise ValueError(
                f"include: 'message.output_text.logprobs' is not supported: {_IMPOSSIBLE['top_logprobs']}"
            )
        return self

    @model_validator(mode="after")
    def _tools_fit(self) -> ResponsesRequest:
        names = [declared.name for declared in self.declared()]
        if len(set(names)) != len(names):
            raise ValueError("tools names a tool twice")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is 'required' but tools is empty")
        for name in self.chosen_names():
            if name not in names:
                raise ValueError(f"tool_choice names {name!r}, which tools does not define")
        return self

    def declared(self) -> list[Declared]:
        """The tools the client runs, those of a namespace under its name and theirs."""
        found: list[Declared] = []
        for tool in self.tools or ():
            if isinstance(tool, Namespace):
                found += (Declared(f"{tool.name}.{inner.name}", tool.name, inner) for inner in tool.tools)
            elif not isinstance(tool, HostedTool):
                found.append(Declared(tool.name, None, tool))
        return found

    def hosted(self) -> list[str]:
        """The tools that nothing runs here."""
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


def text_of(content: str | list[Part] | None) -> str:
    """Parts as one text."""
    if isinstance(content, str):
        return content
    return "".join(part.text or part.refusal or "" for part in content or ())
