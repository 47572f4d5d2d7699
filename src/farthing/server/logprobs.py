"""Log probabilities in the three formats that clients expect, written in pieces."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any

from farthing.engine.logprobs import Position
from farthing.engine.tokenizer import Tokenizer
from farthing.server.events import to_json
from farthing.server.pieces import Pieces, listed

_FLOOR = -9999.0  # JSON has no minus infinity

Positions = Sequence[Position | None]  # None: the first token of a prompt, which is not predicted


class TokenTexts:
    """Tokens as JSON texts, each encoded once: an answer may repeat the same few 100,000 times."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._entries: dict[int, str] = {}

    def text(self, token: int) -> str:
        """The text of one token; its bytes where it is part of a character, its id without a tokenizer."""
        known = self._texts.get(token)
        if known is None:
            known = self._texts[token] = to_json(token_text(token, self.tokenizer))
        return known

    def entry(self, token: int) -> str:
        """`"token": …, "bytes": …`."""
        known = self._entries.get(token)
        if known is None:
            tokenizer = self.tokenizer
            text = token_text(token, tokenizer)
            raw = text.encode() if tokenizer is None else tokenizer.token_bytes(token)
            known = self._entries[token] = f'"token":{self.text(token)},"bytes":{to_json(list(raw))}'
        return known


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

    def entry(position: Position) -> str:
        token, logprob, _ = position.own()
        best = ",".join(
            f'{{{texts.entry(other)},"logprob":{max(value, _FLOOR)!r}}}'
            for other, value in position.best(top)
        )
        own = f'{texts.entry(token)},"logprob":{max(logprob, _FLOOR)!r}'
        return f'{{{own},"top_logprobs":[{best}]}}'

    return {"content": Pieces(listed(map(entry, positions)))}


def completion_logprobs(
    tokens: Sequence[int], positions: Positions, top: int, texts: TokenTexts, offset: int
) -> dict[str, Any]:
    """{tokens, token_logprobs, top_logprobs, text_offset}: four lists of equal length. `offset`: number of
    characters before the first token."""

    def own(position: Position | None) -> str:
        return "null" if position is None else repr(max(position.logprob, _FLOOR))

    def best(position: Position | None) -> str:
        if position is None:
            return "null"
        # In a mapping, tokens of equal text share one entry, with the lowest of their probabilities.
        found = {texts.text(token): max(value, _FLOOR) for token, value in position.best(top)}
        return "{" + ",".join(f"{text}:{value!r}" for text, value in found.items()) + "}"

    return {
        "tokens": Pieces(listed(map(texts.text, tokens))),
        "token_logprobs": Pieces(listed(map(own, positions))),
        "top_logprobs": Pieces(listed(map(best, positions))),
        "text_offset": Pieces(listed(map(str, _offsets(tokens, texts.tokenizer, offset)))),
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

    def member(token: int, logprob: float, rank: int) -> str:
        values = f'"logprob":{max(logprob, _FLOOR)!r},"rank":{rank}'
        return f'"{token}":{{{values},"decoded_token":{texts.text(token)}}}'

    def entry(position: Position | None) -> str:
        if position is None:
            return "null"
        return "{" + ",".join(member(*each) for each in position.entries()) + "}"

    return Pieces(listed(map(entry, positions)))
