"""Conversion of a validated request to the engine's sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from farthing.engine.request import SamplingParams, StructuredOutputsParams
from farthing.server.errors import ApiError
from farthing.server.protocol import ChatCompletionRequest, CompletionRequest, ResponseFormat, Sampling

# Fields with the same name in SamplingParams; None: the model's default, then the engine's.
_DIRECT = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "min_tokens", "stop_token_ids"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens", "bad_words", "allowed_token_ids"),
)


def completion_params(body: CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """max_tokens = 0 (with echo, to score the prompt) samples one token, which the answer omits."""
    values = _common(body, defaults)
    values["max_tokens"] = 1 if body.max_tokens == 0 else body.max_tokens
    values["logprobs"] = body.logprobs
    if body.echo and body.logprobs is not None:
        values["prompt_logprobs"] = body.logprobs
    elif body.prompt_logprobs is not None:
        values["prompt_logprobs"] = body.prompt_logprobs
    values["structured_outputs"] = structured(body, body.response_format)
    return build_params(values)


def chat_sampling(body: ChatCompletionRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams, except structured output."""
    values = _common(body, defaults)
    values["max_tokens"] = body.max_completion_tokens or body.max_tokens
    if body.logprobs:
        values["logprobs"] = body.top_logprobs or 0
    values["prompt_logprobs"] = body.prompt_logprobs
    return values


def with_defaults(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The request's settings, over the model's recommendations."""
    return dict(defaults) | {name: value for name, value in fields.items() if value is not None}


def _common(body: Sampling, defaults: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(defaults)
    values |= {name: value for name in _DIRECT if (value := getattr(body, name)) is not None}
    if body.logit_bias:
        values["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    return values


def build_params(values: Mapping[str, Any]) -> SamplingParams:
    """The engine's parameters. Raises ApiError (400) with the invalid field."""
    try:
        return SamplingParams(**values)
    except ValueError as error:
        raise ApiError(400, str(error), param=str(error).split(":", 1)[0], code="invalid_value") from error


_GUIDED = ("json", "regex", "choice", "grammar")


def structured_field(body: Sampling, response_format: ResponseFormat | None) -> str:
    """The name of the field with the constraint on the output."""
    if response_format is not None and response_format.json_schema is not None:
        return "response_format.json_schema.schema"
    names = (f"guided_{name}" for name in _GUIDED)
    return next((name for name in names if getattr(body, name) is not None), "structured_outputs")


def structured(body: Sampling, response_format: ResponseFormat | None) -> StructuredOutputsParams | None:
    """The constraint on the output, from any of the fields for it. Raises ApiError (400)."""
    chosen: dict[str, Any] = {}
    if body.structured_outputs is not None:
        given = body.structured_outputs
        values = {
            field.alias or name: getattr(given, name) for name, field in type(given).model_fields.items()
        }
        chosen |= {name: value for name, value in values.items() if value is not None}
    for name in _GUIDED:
        if (value := getattr(body, f"guided_{name}")) is not None:
            chosen[name] = value
    if response_format is not None and response_format.type == "json_object":
        chosen["json_object"] = True
    elif response_format is not None and response_format.json_schema is not None:
        chosen["json"] = response_format.json_schema.json_schema
    if not chosen and body.structured_outputs is None:
        return None
    try:
        return StructuredOutputsParams(**chosen)
    except ValueError as error:
        raise ApiError(400, str(error), param="structured_outputs", code="invalid_value") from error
