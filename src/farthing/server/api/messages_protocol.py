"""Request bodies of /v1/messages, validated field by field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, Tag, model_validator

from farthing.server.api.openai_protocol import Count, StopString, Tokens, Word
from farthing.server.schema import (
    TEXT_ONLY,
    Body,
    FieldError,
    Parameters,
    Strict,
    by_type,
    check_choice,
    missing,
    words,
    wrong,
)

# Tools that Anthropic declares by type and the client runs; the model sees functions with these schemas.


@dataclass(frozen=True, slots=True)
class Known:
    """The description and schema of such a tool for the model."""

    description: str
    schema: dict[str, Any]


def _schema(required: tuple[str, ...], **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


_LINES = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
_RANGE = {
    **_LINES,
    "description": "For view: the first and last line, counted from 1; -1 is the end of the file.",
}
_LINE = {"type": "integer", "description": "For insert: the line after which to insert; 0 is the beginning."}
_PATH = _text("Path of the file or directory.")
_OLD = _text("For str_replace: the exact text to replace, which must occur once.")
_NEW = _text("For str_replace: the new text. For insert: the text to insert.")
_FILE = _text("For create: the content of the file.")

_BASH = Known(
    "Run a command in a persistent bash session.",
    _schema(
        (),
        command=_text("The command to run. Required unless the session is restarted."),
        restart={"type": "boolean", "description": "Restart the session."},
    ),
)


def _editor(*commands: str) -> Known:
    command = {"type": "string", "enum": list(commands)}
    return Known(
        "View, create and edit text files.",
        _schema(
            ("command", "path"),
            command=command,
            path=_PATH,
            file_text=_FILE,
            old_str=_OLD,
            new_str=_NEW,
            insert_line=_LINE,
            view_range=_RANGE,
        ),
    )


_MEMORY = Known(
    "Keep notes in files under /memories that last beyond this conversation.",
    _schema(
        ("command",),
        command={"type": "string", "enum": ["view", "create", "str_replace", "insert", "delete", "rename"]},
        path=_PATH,
        file_text=_FILE,
        old_str=_OLD,
        new_str=_text("For str_replace: the new text."),
        insert_line=_LINE,
        insert_text=_text("For insert: the text to insert."),
        old_path=_text("For rename: the current path."),
        new_path=_text("For rename: the new path."),
        view_range=_RANGE,
    ),
)
_EDITOR = _editor("view", "create", "str_replace", "insert")

CLIENT_TOOLS = {
    "bash_20241022": _BASH,
    "bash_20250124": _BASH,
    "text_editor_20241022": _editor("view", "create", "str_replace", "insert", "undo_edit"),
    "text_editor_20250124": _editor("view", "create", "str_replace", "insert", "undo_edit"),
    "text_editor_20250429": _EDITOR,
    "text_editor_20250728": _EDITOR,
    "memory_20250818": _MEMORY,
}


MAX_BLOCKS = 4096  # of one message
_PREFIX = "x-anthropic-billing-header"  # sent by Claude Code; it changes with every request


_IMPOSSIBLE = {
    "mcp_servers": "no MCP servers are contacted; list their tools in `tools` and run them in the client",
    "container": "this server executes no code; leave it out",
}


class TextBlock(Strict):
    """Text. cache_control is accepted anywhere: every prefix is cached."""

    known = words("cache_control citations")

    type: Literal["text"]
    text: str


class ThinkingBlock(Strict):
    """Reasoning from an earlier turn; the signature is not checked."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedBlock(Strict):
    """Reasoning encrypted by another server, which this one cannot read."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Strict):
    """A call from an earlier turn."""

    known = words("cache_control caller toolset_name")

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


_TEXT_RESULTS = dict.fromkeys(
    (*TEXT_ONLY, "search_result", "tool_reference"), "tool results are text only here"
)
ResultBlock = Annotated[Annotated[TextBlock, Tag("TextBlock")], by_type(TextBlock, hints=_TEXT_RESULTS)]


class ToolResultBlock(Strict):
    """The result of a call."""

    known = words("cache_control toolset_name")

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[ResultBlock], Field(max_length=MAX_BLOCKS, fail_fast=True)] | None = None
    is_error: bool | None = None

    @property
    def text(self) -> str:
        """The result as one string, marked if it is an error."""
        text = self.content if isinstance(self.content, str) else texts(self.content or [])
        return f"Error: {text}" if self.is_error else text


Block = Annotated[
    Annotated[TextBlock, Tag("TextBlock")]
    | Annotated[ThinkingBlock, Tag("ThinkingBlock")]
    | Annotated[RedactedBlock, Tag("RedactedBlock")]
    | Annotated[ToolUseBlock, Tag("ToolUseBlock")]
    | Annotated[ToolResultBlock, Tag("ToolResultBlock")],
    by_type(TextBlock, ThinkingBlock, RedactedBlock, ToolUseBlock, ToolResultBlock, hints=TEXT_ONLY),
]


class InputMessage(Strict):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=MAX_BLOCKS, fail_fast=True)]


class ToolDefinition(Strict):
    """A tool that the client runs: its own, or one declared by Anthropic."""

    known = words(
        "cache_control eager_input_streaming allowed_callers defer_loading input_examples", "max_characters"
    )

    type: str | None = None
    name: str = Field(pattern=r"^[^\s\"'<>\x00-\x1f]{1,256}$")
    description: str | None = None
    input_schema: Parameters | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_known(self) -> ToolDefinition:
        own = self.type in (None, "custom")
        if not own and self.type not in CLIENT_TOOLS:
            known = ", ".join(map(repr, CLIENT_TOOLS))
            expected = f"'custom' or one of {known}, which the client runs: this server does not run tools"
            raise wrong("type", got=self.type, expected=expected)
        if own and self.input_schema is None:
            raise missing("input_schema", why=f"the tool {self.name!r} needs it")
        return self


class Choice(Strict):
    """Whether a tool must be used, and which one."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> Choice:
        if (self.type == "tool") != (self.name is not None):
            raise FieldError("name", problem=" goes with type 'tool', and only with it")
        return self


class ThinkingConfig(Strict):
    """Whether the model reasons first, and for how many tokens."""

    type: Word  # enabled, disabled, adaptive or auto
    budget_tokens: Count | None = None
    display: str | None = None


class OutputFormat(Strict):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """Requirements on the answer."""

    effort: Word | None = None
    format: OutputFormat | None = None


class CountRequest(Body):
    """Body of /v1/messages/count_tokens."""

    model: str | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=100_000, fail_fast=True)]
    system: str | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS, fail_fast=True)] | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=1024, fail_fast=True)] | None = None
    tool_choice: Choice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # the older name of output_config.format
    # rejected unless empty
    mcp_servers: list[Any] | None = None
    container: Any = None

    @model_validator(mode="after")
    def _is_possible(self) -> CountRequest:
        for name, why in _IMPOSSIBLE.items():
            if getattr(self, name):
                raise FieldError(name, problem=f" is not supported: {why}")
        if self.output_format and self.output_config and self.output_config.format:
            problem = " is the older name of output_config.format; set only one of them"
            raise FieldError("output_format", problem=problem)
        return self

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the answer."""
        form = self.output_format or (self.output_config.format if self.output_config else None)
        return None if form is None else form.json_schema

    @model_validator(mode="after")
    def _tools_fit(self) -> CountRequest:
        choice = self.tool_choice
        chosen = [choice.name] if choice and choice.name is not None else []
        required = choice is not None and choice.type == "any"
        check_choice([tool.name for tool in self.tools or ()], chosen, required=required)
        return self

    @property
    def system_text(self) -> str:
        """The system prompt as one string."""
        if self.system is None or isinstance(self.system, str):
            return self.system or ""
        return texts([block for block in self.system if not block.text.startswith(_PREFIX)])


class MessagesRequest(CountRequest):
    """Body of /v1/messages."""

    known = words(
        "cache_control context_management diagnostics inference_geo metadata service_tier speed",
        "user_profile_id workspace_id",
    )

    max_tokens: Tokens
    stop_sequences: Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    # extensions
    cache_salt: str | None = Field(default=None, max_length=1024)
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)


class MessagesErrorDetail(BaseModel):
    """The kind of error and its message."""

    type: str
    message: str


class MessagesError(BaseModel):
    """The shape of every error of this API."""

    type: Literal["error"]
    error: MessagesErrorDetail


def texts(blocks: list[TextBlock]) -> str:
    """Text blocks as one string."""
    return "\n\n".join(block.text for block in blocks)
