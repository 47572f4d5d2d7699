"""Log probabilities in the two shapes that OpenAI's API has."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from farthing.engine.request import Logprob
from farthing.engine.tokenizer import Tokenizer

_FLOOR = -9999.0  # JSON has no minus infinity

Position = dict[int, Logprob] | None  # None: the first token of a prompt, which nothing predicts


def token_text(token: int, tokenizer: Tokenizer | None) -> str:
    """The text of one token; its bytes where it is part of a character, its id without a tokenizer."""
    if tokenizer is None:
        return f"token_id:{token}"
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(
    tokens: Sequence[int], positions: Sequence[Position], top: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """{"content": [{token, logprob, bytes, top_logprobs}, …]}."""

    def entry(token: int, logprob: Logprob) -> dict[str, Any]:
        text = token_text(token, tokenizer)
        raw = text.encode() if tokenizer is None else tokenizer.token_bytes(token)
        return {"token": text, "logprob": max(logprob.logprob, _FLOOR), "bytes": list(raw)}

    content = []
    for token, position in zip(tokens, positions, strict=True):
        assert position is not None
        best = sorted(position.items(), key=lambda item: item[1].rank)[:top]
        content.append(
            entry(token, position[token]) | {"top_logprobs": [entry(other, lp) for other, lp in best]}
        )
    return {"content": content}


def completion_logprobs(
    tokens: Sequence[int],
    positions: Sequence[Position],
    top: int,
    tokenizer: Tokenizer | None,
    offset: int = 0,
) -> dict[str, Any]:
    """{tokens, token_logprobs, top_logprobs, text_offset}; offset: characters that came before."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, position in zip(tokens, positions, strict=True):
        own = None if position is None else position[token]
        result["tokens"].append(token_text(token, tokenizer))
        result["token_logprobs"].append(None if own is None else max(own.logprob, _FLOOR))
        result["top_logprobs"].append(None if position is None else _top(position, top, tokenizer))
        result["text_offset"].append(offset)
        if tokenizer is not None and token not in tokenizer.special_ids:  # those are not in the text
            offset += len(decoder.decode(tokenizer.token_bytes(token)))
    return result


def _top(position: dict[int, Logprob], top: int, tokenizer: Tokenizer | None) -> dict[str, float]:
    best = sorted(position.items(), key=lambda item: item[1].rank)[:top]
    return {token_text(token, tokenizer): max(lp.logprob, _FLOOR) for token, lp in best}


def prompt_logprobs(positions: Sequence[Position] | None, tokenizer: Tokenizer | None) -> list[Any] | None:
    """vLLM's form: for each token of the prompt {id: {logprob, rank, decoded_token}}, None for the first."""
    if positions is None:
        return None
    return [
        position and {str(t): _entry(t, lp, tokenizer) for t, lp in position.items()}
        for position in positions
    ]


def _entry(token: int, logprob: Logprob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {
        "logprob": max(logprob.logprob, _FLOOR),
        "rank": logprob.rank,
        "decoded_token": token_text(token, tokenizer),
    }
