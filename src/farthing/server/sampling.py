"""Between a request and the engine: sampling parameters in, log probabilities out, tool results matched."""

from __future__ import annotations

import codecs
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from farthing.conversation.types import Turn
from farthing.engine.request import Position, SamplingParams, StructuredOutputsParams
from farthing.engine.tokenizer import Tokenizer
from farthing.server.api.openai_protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    ResponseFormat,
    Sampling,
)
from farthing.server.errors import ApiError
from farthing.server.schema import short
from farthing.server.stream import Pieces

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
    if response_format is not None and response_format.object_schema is not None:
        return "response_format.schema"
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
    if response_format is not None and response_format.object_schema:  # an empty one says: any object
        chosen["json"] = response_format.object_schema
    elif response_format is not None and response_format.type == "json_object":
        chosen["json_object"] = True
    elif response_format is not None and response_format.json_schema is not None:
        chosen["json"] = response_format.json_schema.json_schema
    if not chosen and body.structured_outputs is None:
        return None
    try:
        return StructuredOutputsParams(**chosen)
    except ValueError as error:
        raise ApiError(400, str(error), param="structured_outputs", code="invalid_value") from error


# Log probabilities in the three formats that clients expect, written in pieces.

_FLOOR = -9999.0  # JSON has neither minus infinity nor NaN; `max(_FLOOR, NaN)` is the floor

Positions = Sequence[Position | None]  # None: the first token of a prompt, which is not predicted


class TokenLogprob(TypedDict):
    """A token and its log probability in a chat's answer."""

    token: str
    bytes: list[int]
    logprob: float


class ChosenLogprob(TokenLogprob):
    """A generated token, and the likeliest ones at its position."""

    top_logprobs: list[TokenLogprob]


class PromptLogprob(TypedDict):
    """A candidate for a prompt's token, in vLLM's format."""

    logprob: float
    rank: int
    decoded_token: str


class TokenTexts:
    """Texts and bytes of tokens, each decoded once: an answer may repeat the same few 100,000 times."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._raw: dict[int, list[int]] = {}

    def text(self, token: int) -> str:
        """The text of one token; its bytes where it is part of a character, its id without a tokenizer."""
        known = self._texts.get(token)
        if known is None:
            known = self._texts[token] = token_text(token, self.tokenizer)
        return known

    def raw(self, token: int) -> list[int]:
        """The bytes of one token."""
        known = self._raw.get(token)
        if known is None:
            tokenizer = self.tokenizer
            raw = self.text(token).encode() if tokenizer is None else tokenizer.token_bytes(token)
            known = self._raw[token] = list(raw)
        return known

    def entry(self, token: int, logprob: float) -> TokenLogprob:
        """A chat's entry of one token."""
        return {"token": self.text(token), "bytes": self.raw(token), "logprob": max(_FLOOR, logprob)}


def token_text(token: int, tokenizer: Tokenizer | None) -> str:
    """The text of one token; its bytes where it is part of a character, its id without a tokenizer."""
    if tokenizer is None:
        return f"token_id:{token}"
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(positions: Sequence[Position], top: int, texts: TokenTexts) -> dict[str, Any]:
    """{"content": [{token, logprob, bytes, top_logprobs}, …]}."""

    def entry(position: Position) -> ChosenLogprob:
        token, logprob, _ = position.own()
        best = [texts.entry(other, value) for other, value in position.best(top)]
        return {**texts.entry(token, logprob), "top_logprobs": best}

    return {"content": Pieces(map(entry, positions))}


def completion_logprobs(
    tokens: Sequence[int], positions: Positions, top: int, texts: TokenTexts, offset: int
) -> dict[str, Any]:
    """{tokens, token_logprobs, top_logprobs, text_offset}: four lists of equal length. `offset`: number of
    characters before the first token."""

    def own(position: Position | None) -> float | None:
        return None if position is None else max(_FLOOR, position.logprob)

    def best(position: Position | None) -> dict[str, float] | None:
        if position is None:
            return None
        # In a mapping, tokens of equal text share one entry, with the lowest of their probabilities.
        return {texts.text(token): max(_FLOOR, value) for token, value in position.best(top)}

    return {
        "tokens": Pieces(map(texts.text, tokens)),
        "token_logprobs": Pieces(map(own, positions)),
        "top_logprobs": Pieces(map(best, positions)),
        "text_offset": Pieces(_offsets(tokens, texts.tokenizer, offset)),
    }


def _offsets(tokens: Sequence[int], tokenizer: Tokenizer | None, offset: int) -> Iterator[int]:
    """The start of each token's text."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield offset
        if tokenizer is not None and token not in tokenizer.special_ids:  # not part of the text
            offset += len(decoder.decode(tokenizer.token_bytes(token)))


def prompt_logprobs(positions: Positions | None, texts: TokenTexts) -> Pieces | None:
    """vLLM's format: {id: {logprob, rank, decoded_token}} per prompt token, None for the first."""
    if positions is None:
        return None

    def member(logprob: float, rank: int, token: int) -> PromptLogprob:
        return {"logprob": max(_FLOOR, logprob), "rank": rank, "decoded_token": texts.text(token)}

    def entry(position: Position | None) -> dict[int, PromptLogprob] | None:
        if position is None:
            return None
        return {token: member(logprob, rank, token) for token, logprob, rank in position.entries()}

    return Pieces(map(entry, positions))


# Matches tool results with the calls that they answer.

_LISTED = 8  # ids in an error


class IssuedCalls:
    """The ids of a conversation's calls so far. Each call takes one result; it may remain without one."""

    def __init__(self, earlier: Iterable[Turn] = ()) -> None:
        """earlier: turns that were checked before."""
        # How often calls without a result were made, in order: of a dict, finding the first entry takes as
        # long as there were entries before it.
        self._waiting: OrderedDict[str, int] = OrderedDict()
        self._known: set[str] = set()
        for turn in earlier:
            self.issue(turn)
            if turn.role == "tool":
                self._take(turn.call_id)

    def issue(self, turn: Turn) -> None:
        """Add the calls of a turn."""
        for call in turn.calls:
            self._waiting[call.id] = self._waiting.get(call.id, 0) + 1
            self._known.add(call.id)

    def add(self, turn: Turn, field: str) -> Turn:
        """Match a result with its call, or issue calls. Those without an id get one, because some clients
        leave it out and some templates refuse that. Raises ApiError (400)."""
        if turn.role == "tool":
            turn = replace(turn, call_id=self.answer(turn.call_id, field))
        elif not all(call.id for call in turn.calls):
            first = len(self._known)
            calls = (replace(c, id=c.id or f"call_{i}") for i, c in enumerate(turn.calls, first))
            turn = replace(turn, calls=tuple(calls))
        self.issue(turn)
        return turn

    def answer(self, identity: str | None, field: str) -> str:
        """Match a result with its call; one without an id, with the earliest. Raises ApiError (400)."""
        if (found := self._take(identity)) is not None:
            return found
        listed = [short(waiting) for waiting in self._waiting if waiting][:_LISTED]
        more = ", …" if len(self._waiting) > _LISTED else ""
        expected = f"expected the id of an earlier call without a result: {', '.join(listed)}{more}"
        got = "is missing" if identity is None else f"got {short(identity)}"
        got += ", whose call already has a result" if identity in self._known else ""
        why = expected if listed else "no earlier call is without a result"
        separator = " " if identity is None else ": "
        raise ApiError(400, f"{field}{separator}{got}; {why}", param=field, code="invalid_value")

    def _take(self, identity: str | None) -> str | None:
        """The id of a call that waited for this result, and no longer does; None if there is none."""
        found = next(iter(self._waiting), None) if identity is None else identity
        if found is None or found not in self._waiting:
            return None
        self._waiting[found] -= 1
        if not self._waiting[found]:
            del self._waiting[found]
        return found
