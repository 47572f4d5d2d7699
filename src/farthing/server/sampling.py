"""From a checked request to the engine's sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from farthing.engine.request import SamplingParams, StructuredOutputsParams
from farthing.server.errors import ApiError
from farthing.server.protocol import ChatCompletionRequest, CompletionRequest, NamedChoice, Sampling
from farthing.server.tools import calls_schema

# Fields that reach SamplingParams under their own name; None: the model's default, then the engine's.
_DIRECT = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "min_tokens", "stop_token_ids"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens"),
)


def completion_params(body: CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """max_tokens = 0 (with echo: score the prompt) samples one token that the answer leaves out."""
    values = _common(body, defaults)
    values["max_tokens"] = 1 if body.max_tokens == 0 else body.max_tokens
    values["logprobs"] = body.logprobs
    if body.echo and body.logprobs is not None:
        values["prompt_logprobs"] = body.logprobs
    values["structured_outputs"] = _structured(body, body.response_format)
    return _build(values)


def chat_params(body: ChatCompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """Tool calls need the special tokens that mark them; a demanded call is forced by its schema."""
    values = _common(body, defaults)
    values["max_tokens"] = body.max_completion_tokens or body.max_tokens
    if body.logprobs:
        values["logprobs"] = body.top_logprobs or 0
    values["structured_outputs"] = _forced_call(body) or _structured(body, body.response_format)
    if body.tools and body.tool_choice != "none":
        values["skip_special_tokens"] = False
    return _build(values)


def _common(body: Sampling, defaults: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(defaults)
    values |= {name: value for name in _DIRECT if (value := getattr(body, name)) is not None}
    if body.logit_bias:
        values["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    return values


def _build(values: dict[str, Any]) -> SamplingParams:
    try:
        return SamplingParams(**values)
    except ValueError as error:
        raise ApiError(400, str(error), param=str(error).split(" ", 1)[0], code="invalid_value") from error


def _structured(body: Sampling, response_format: Any) -> StructuredOutputsParams | None:
    chosen: dict[str, Any] = {}
    if body.structured_outputs is not None:
        given = body.structured_outputs
        values = {
            field.alias or name: getattr(given, name) for name, field in type(given).model_fields.items()
        }
        chosen |= {name: value for name, value in values.items() if value is not None}
    for name in ("json", "regex", "choice", "grammar"):
        if (value := getattr(body, f"guided_{name}")) is not None:
            chosen[name] = value
    if response_format is not None and response_format.type == "json_object":
        chosen["json_object"] = True
    elif response_format is not None and response_format.type == "json_schema":
        chosen["json"] = response_format.json_schema.json_schema
    if not chosen and body.structured_outputs is None:
        return None
    try:
        return StructuredOutputsParams(**chosen)
    except ValueError as error:
        raise ApiError(400, str(error), param="structured_outputs", code="invalid_value") from error


def _forced_call(body: ChatCompletionRequest) -> StructuredOutputsParams | None:
    """The grammar of a call that the caller demands: by name, or any of the tools."""
    functions = {tool.function.name: tool.function.parameters for tool in body.tools or []}
    if isinstance(body.tool_choice, NamedChoice):
        return StructuredOutputsParams(json=_object_schema(functions[body.tool_choice.function.name]))
    if body.tool_choice != "required":
        return None
    schemas = [(name, _object_schema(parameters)) for name, parameters in functions.items()]
    return StructuredOutputsParams(json=calls_schema(schemas, body.parallel_tool_calls is not False))


def _object_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """A function's parameters as the schema of an object; without any, an object without fields."""
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object"} | parameters
