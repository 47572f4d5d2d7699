"""The request bodies of Ollama's API."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from farthing.engine.request import StructuredOutputsParams
from farthing.server.api.openai_protocol import MAX_MESSAGES, StopString
from farthing.server.api.openai_protocol import Tool as ToolField
from farthing.server.schema import TEXT_ONLY, Body, FieldError, FieldNames, Strict, words

_CHAT = FieldNames(
    max_tokens="options.num_predict", effort="think", thinking="think", budget="think", structured="format"
)


class Options(Strict):
    """How to sample. Others of Ollama's options are ignored."""

    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    num_predict: int | None = Field(default=None, ge=-2, lt=2**31)  # below 0: until the model stops
    repeat_penalty: float | None = Field(default=None, gt=0.01, le=100, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of SamplingParams, except the number of tokens."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "num_predict"}
        return values | {"repetition_penalty": values.pop("repeat_penalty")}

    @property
    def limit(self) -> int | None:
        """Tokens at most; None: as many as fit."""
        return self.num_predict if self.num_predict and self.num_predict > 0 else None


def _no_images(value: Any) -> Any:
    if value:
        raise FieldError(problem=f": {TEXT_ONLY['image']}")
    return value


_Images = Annotated[list[Any] | None, BeforeValidator(_no_images)]


class CallFunction(Strict):
    """A call of an earlier turn."""

    known = words("index")

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class Call(Strict):
    """A tool call in the history."""

    known = words("type")

    id: str | None = None
    function: CallFunction


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str = ""
    images: _Images = None
    tool_calls: list[Call] = Field(default_factory=list, max_length=1024, fail_fast=True)
    tool_name: str | None = None
    name: str | None = None
    tool_call_id: str | None = None


class ApiRequest(Body):
    """What bodies of /api/chat and /api/generate share. names: of its fields, in messages of errors."""

    names: ClassVar[FieldNames] = _CHAT
    known = words("truncate shift")

    model: str
    stream: bool = True
    options: Options = Options()
    format: Literal["", "json"] | dict[str, Any] = ""
    think: bool | Annotated[str, Field(max_length=64)] | None = None
    keep_alive: float | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _asks_for_probabilities(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", problem=" needs logprobs = true")
        return self

    @property
    def probable(self) -> int | None:
        """Number of the likeliest tokens to name at each position; None without log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def structured(self) -> StructuredOutputsParams | None:
        """The constraint on the answer."""
        if isinstance(self.format, dict):
            return StructuredOutputsParams(json=self.format)
        return StructuredOutputsParams(json_object=True) if self.format else None

    @property
    def thinking(self) -> dict[str, Any]:
        """Fields of a conversation."""
        if isinstance(self.think, str):
            return {"thinking": True, "effort": self.think}
        return {"thinking": self.think}

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of options without effect."""
        names = [name for name in self.options.model_extra or () if name.isidentifier() and name.isascii()]
        return tuple(f"options.{name[:64]}" for name in names[:32])


class ChatRequest(ApiRequest):
    """Body of /api/chat."""

    messages: list[Message] = Field(default_factory=list, max_length=MAX_MESSAGES, fail_fast=True)
    tools: list[ToolField] = Field(default_factory=list, max_length=128, fail_fast=True)


class GenerateRequest(ApiRequest):
    """Body of /api/generate."""

    names = replace(_CHAT, prompt="prompt")
    known = words("context truncate shift")

    prompt: str = ""
    system: str = ""
    raw: bool = False  # without a chat template
    images: _Images = None
    suffix: str = ""
    template: str = ""

    @model_validator(mode="after")
    def _supported(self) -> GenerateRequest:
        if self.suffix:
            raise FieldError("suffix", problem=": the model was not trained to fill in the middle")
        if self.template:
            raise FieldError("template", problem=": requests bring no template of their own")
        return self


class NamedRequest(Body):
    """Body of /api/show and /api/pull."""

    known = words("verbose insecure stream options system template")

    model: str | None = None
    name: str | None = None  # the older form

    @property
    def wanted(self) -> str:
        """The model."""
        return self.model or self.name or ""
