"""Log probabilities in the three formats that clients expect, written in pieces."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

from farthing.engine.logprobs import Position
from farthing.engine.tokenizer import Tokenizer
from farthing.server.pieces import Pieces

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
