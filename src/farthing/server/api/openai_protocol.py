"""Request bodies of OpenAI's older APIs, validated field by field; `api` has those of the others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

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
)

Word = Annotated[str, Field(max_length=64)]  # of a list that grows with the publishers' models
Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[int, Field(ge=1, lt=2**31)]  # of an answer
# Clients of llama.cpp and Ollama send -1 for as many tokens as fit.
Limit = BeforeValidator(lambda value: None if type(value) is int and value == -1 else value)
# Validation of a list stops at its first invalid item: describing 200,000 would take seconds.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=16_384, fail_fast=True)
]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]


MAX_BIASES = 1024
MAX_MESSAGES = 2048


def _few_biases(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise FieldError(problem=f" has {len(value)} entries; expected at most {MAX_BIASES}")
    return value


class StreamOptions(Strict):
    """Options of a stream; `include_obfuscation` is accepted without effect."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False  # every chunk carries the usage so far
    include_obfuscation: bool | None = None


class JsonSchema(Strict):
    """A named JSON schema."""

    name: str = "answer"
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


_TAGS = "structural tags are not supported; use tools, whose calls follow their schemas, or a grammar"


class ResponseFormat(Strict):
    """text, any JSON object, or JSON that matches a schema. schema: of `json_object`, as llama.cpp has it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    object_schema: dict[str, Any] | None = Field(default=None, alias="schema")

    @field_validator("type", mode="before")
    @classmethod
    def _no_tags(cls, value: Any) -> Any:
        if value == "structural_tag":
            raise FieldError(problem=f": got {value!r}; {_TAGS}")
        return value

    @model_validator(mode="after")
    def _schema_present(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise FieldError("json_schema", problem=" goes with type 'json_schema', and only with it")
        if self.object_schema is not None and self.type != "json_object":
            raise FieldError("schema", problem=" goes with type 'json_object', and only with it")
        return self


class StructuredOutputs(Strict):
    """vLLM's structured_outputs: exactly one field."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _without_tags(self) -> StructuredOutputs:
        if (self.model_extra or {}).get("structural_tag") is not None:
            raise FieldError("structural_tag", problem=f": {_TAGS}")
        return self


class Sampling(Body):
    """The fields common to completions and chats. Extensions have vLLM's names.

    OpenAI's fields without a meaning here (user, metadata, store, …) are accepted and ignored.
    """

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias] | None,
        BeforeValidator(_few_biases),
        Field(json_schema_extra={"maxProperties": MAX_BIASES}),
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # extensions
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: Unit | None = None
    repetition_penalty: float | None = Field(default=None, gt=0.01, le=100, allow_inf_nan=False)
    min_tokens: Count | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = None
    ignore_eos: bool | None = False
    include_stop_str_in_output: bool | None = False
    skip_special_tokens: bool | None = True
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    cache_salt: str | None = Field(default=None, max_length=1024)
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    bad_words: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=1024, fail_fast=True)
        ]
        | None
    ) = None
    allowed_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=2**20, fail_fast=True)] | None
    ) = None
    request_id: str | None = Field(default=None, pattern=r"^[\x21-\x7e]{1,256}$")
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None  # only as many as n: answers are not ranked
    x_farthing: bool = False  # the cost of the request, in `jobs.x_farthing`

    @model_validator(mode="after")
    def _options_agree(self) -> Sampling:
        if self.best_of not in (None, self.n or 1):
            problem = f": got {self.best_of}; expected n, which is {self.n or 1}: answers are not ranked"
            raise FieldError("best_of", problem=f"{problem}; request more with n and logprobs, and choose")
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", problem=" needs stream = true")
        if self.prompt_logprobs is not None and self.stream:
            problem = " is not available in a stream; expected stream = false"
            raise FieldError("prompt_logprobs", problem=problem)
        return self


class CompletionRequest(Sampling):
    """Body of /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=1024, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=1024, fail_fast=True)]
    )
    suffix: str | None = None
    max_tokens: Annotated[Count | None, Limit] = 16
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    add_special_tokens: bool = True
    response_format: ResponseFormat | None = None


class TextPart(Strict):
    """Text of a message."""

    known = words("cache_control prompt_cache_breakpoint")

    type: Literal["text"]
    text: str


class RefusalPart(Strict):
    """An assistant's refusal in an earlier turn, treated as text."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """The text of the refusal."""
        return self.refusal


ContentPart = Annotated[
    Annotated[TextPart, Tag("TextPart")] | Annotated[RefusalPart, Tag("RefusalPart")],
    by_type(TextPart, RefusalPart, hints=TEXT_ONLY),
]


class FunctionCall(Strict):
    """A call from an earlier turn; arguments are JSON text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A tool call in the history."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Strict):
    """One turn of a conversation. Unknown fields go to the model's own chat template."""

    known = words("refusal annotations audio cache_control")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Field(max_length=4096, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=1024, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None  # the older form of a call; its result has role "function"
    reasoning_content: str | None = None
    reasoning: str | None = None  # another name for it

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise missing("content", why=f"a message of role {self.role!r} needs it")
        return self


class Function(Strict):
    """A function the model may call; parameters is a JSON schema."""

    name: str = Field(pattern=r"^[^\s\"'<>\x00-\x1f]{1,256}$")
    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool, which is always a function."""

    known = words("cache_control")

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The function of a named choice."""

    name: str


class NamedChoice(Strict):
    """tool_choice: this function must be called."""

    type: Literal["function"]
    function: NamedFunction


class Thinking(Strict):
    """Whether the model reasons first, and for how many tokens."""

    type: Word  # enabled, disabled, adaptive or auto
    budget_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class Reasoning(Strict):
    """How much the model reasons, in the form of /v1/responses and of some routers."""

    effort: Word | None = None


def _thinking(value: Any) -> Any:
    """Some clients send a switch instead of an object."""
    return {"type": "enabled" if value else "disabled"} if isinstance(value, bool) else value


class AllowedTools(Strict):
    """The tools that may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=128, fail_fast=True)]


class AllowedChoice(Strict):
    """tool_choice: some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_class(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return (AllowedChoice if kind == "allowed_tools" else NamedChoice).__name__


ChoiceObject = Annotated[
    Annotated[NamedChoice, Tag("NamedChoice")] | Annotated[AllowedChoice, Tag("AllowedChoice")],
    Discriminator(_choice_class),  # so that errors name fields of the intended class
]


class ChatCompletionRequest(Sampling):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[Tokens | None, Limit] = None
    max_completion_tokens: Annotated[Tokens | None, Limit] = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChoiceObject | None = None
    functions: Annotated[list[Function], Field(max_length=128, fail_fast=True)] | None = (
        None  # the older form of tools
    )
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    # accepted without effect
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=16, fail_fast=True)] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None
    safety_identifier: str | None = None
    # accepted only to be refused: ignoring them would change the answer
    structural_tag: Any = None
    chat_template: Any = None
    # extensions
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool = True
    reasoning_effort: Word | None = None
    reasoning: Reasoning | None = None
    enable_thinking: bool | None = None
    thinking: Annotated[Thinking | None, BeforeValidator(_thinking)] = None
    max_thinking_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatCompletionRequest:
        if self.functions and self.tools:
            raise FieldError("functions", problem=" is the older form of tools; set only one of them")
        if self.tools or self.functions or self.tool_choice or self.function_call:
            self._check_tools()
        if self.structural_tag is not None:
            raise FieldError("structural_tag", problem=f": {_TAGS}")
        if self.chat_template is not None:
            problem = ": requests bring no template of their own; expected chat_template_kwargs, or a server "
            raise FieldError("chat_template", problem=problem + "with another --chat-template")
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", problem=" needs logprobs = true")
        if self.continue_final_message and (
            self.add_generation_prompt or self.messages[-1].role != "assistant"
        ):
            problem = " needs add_generation_prompt = false and a last assistant message"
            raise FieldError("continue_final_message", problem=problem)
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or []]
        names += [function.name for function in self.functions or []]
        older = bool(self.functions) or self.function_call is not None
        check_choice(
            names,
            self._chosen_names(),
            required=self.tool_choice == "required",
            tools="functions" if self.functions else "tools",
            choice="function_call" if older and self.tool_choice is None else "tool_choice",
        )

    def _chosen_names(self) -> list[str]:
        if isinstance(self.tool_choice, NamedChoice):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedChoice):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return [self.function_call.name] if isinstance(self.function_call, NamedFunction) else []


class TokenizeRequest(Body):
    """Body of /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None
    ) = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected exactly one of prompt and messages")
        return self


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20, fail_fast=True)]


class ErrorDetail(BaseModel):
    """The kind of error and its message."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The shape of every error."""

    error: ErrorDetail


class OllamaError(BaseModel):
    """The shape of errors below /api."""

    error: str
