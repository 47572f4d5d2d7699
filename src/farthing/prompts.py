"""The prompt of a request as a chain of block hashes, by which a gateway routes and a server reports.

Both sides hash the text of the prompt, as the gateway has no tokenizer. A block's hash covers everything
before it, so that equal hashes mean equal prefixes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

BLOCK = 512  # bytes of text
# A body with more bytes, or more commas and opening brackets, is hashed unparsed: parsing a megabyte of empty
# objects takes 0.2 s, during which a gateway serves no other request.
_PARSED, _MARKS = 1 << 20, 65_536


@dataclass(frozen=True)
class Prompt:
    """The features of a request that decide its replica."""

    blocks: tuple[int, ...]  # chained hashes, 64 bits each
    size: int  # bytes of prompt text
    streamed: bool = False  # the request is for a stream
    previous: str | None = None  # id of the stored response that the request continues
    model: str | None = None  # that the request names
    parsed: bool = False  # the body is a JSON object


def read_prompt(body: bytes, limit: int, block: int = BLOCK) -> Prompt:
    """The prompt of a request body: blocks of `block` bytes of its text, at most `limit` of them."""
    request = _parsed(body)
    text = body if request is None else prompt_text(request) or body
    fields = request or {}
    previous, model = fields.get("previous_response_id"), fields.get("model")
    return Prompt(
        chain(text, block, limit),
        len(text),
        bool(fields.get("stream")),
        previous if isinstance(previous, str) else None,
        model if isinstance(model, str) else None,
        request is not None,
    )


def _parsed(body: bytes) -> dict[str, Any] | None:
    if len(body) > _PARSED or body.lstrip()[:1] != b"{" or sum(map(body.count, (b",", b"[", b"{"))) > _MARKS:
        return None
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return request if isinstance(request, dict) else None


def prompt_text(request: Mapping[str, Any]) -> bytes:
    """The prompt as text in the order in which a template renders it, without fields that do not reach the
    model (`user`, sampling parameters): they often differ between requests with the same prefix.

    Empty if the request has neither messages nor a prompt.
    """
    parts = [str(request.get("model", ""))]
    parts += [_plain(request[name]) for name in ("tools", "system", "instructions") if request.get(name)]
    turns = request.get("messages", request.get("input"))
    if isinstance(turns, list):
        for turn in turns:
            parts += _turn(turn)
    elif (prompt := request.get("prompt", turns)) is not None:
        parts.append(_plain(prompt))
    else:
        return b""
    return "\x00".join(parts).encode("utf-8", "surrogatepass")


def _turn(turn: Any) -> list[str]:
    """Role, text and tool calls of one message."""
    if not isinstance(turn, Mapping):
        return [_plain(turn)]
    content = turn.get("content")
    parts = [str(turn.get("role", ""))]
    if isinstance(content, list):
        parts += [
            part["text"] if isinstance(part, Mapping) and isinstance(part.get("text"), str) else _plain(part)
            for part in content
        ]
    elif content is not None:
        parts.append(_plain(content))
    if turn.get("tool_calls"):
        parts.append(_plain(turn["tool_calls"]))
    return parts


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def chain(text: bytes, block: int, limit: int) -> tuple[int, ...]:
    """Hashes of the full blocks of `text`, each chained with the one before."""
    hashes = []
    parent = b""
    for start in range(0, min(len(text) // block, limit) * block, block):
        parent = blake2b(parent + text[start : start + block], digest_size=8).digest()
        hashes.append(int.from_bytes(parent, "little"))
    return tuple(hashes)
