"""Prompts as chains of block hashes, and which replica holds which blocks."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

_PARSED = 1 << 20  # a larger body is hashed as it is: parsing it would hold up other requests


@dataclass(frozen=True)
class Prompt:
    """What the choice of a replica needs to know of a request."""

    blocks: tuple[int, ...]  # chained hashes: a block's hash covers everything before it
    size: int  # bytes of prompt text
    streamed: bool = False  # the request asks for a stream


def read_prompt(body: bytes, block: int, limit: int) -> Prompt:
    """The prompt of a request body: blocks of `block` bytes of its text, at most `limit` of them."""
    request = _parsed(body)
    text = body if request is None else prompt_text(request) or body
    return Prompt(chain(text, block, limit), len(text), request is not None and bool(request.get("stream")))


def _parsed(body: bytes) -> dict[str, Any] | None:
    if len(body) > _PARSED or body.lstrip()[:1] != b"{":
        return None
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return request if isinstance(request, dict) else None


def prompt_text(request: Mapping[str, Any]) -> bytes:
    """The prompt as text in the order in which a template renders it, without fields that do not reach the
    model (`user`, sampling parameters): they often differ between requests with the same prefix.

    Empty where the request has neither messages nor a prompt.
    """
    parts = [str(request.get("model", ""))]
    if request.get("tools"):
        parts.append(json.dumps(request["tools"], sort_keys=True))
    if isinstance(messages := request.get("messages"), list):
        for message in messages:
            parts += _message(message)
    elif (prompt := request.get("prompt", request.get("input"))) is not None:
        parts.append(prompt if isinstance(prompt, str) else json.dumps(prompt))
    else:
        return b""
    return "\x00".join(parts).encode("utf-8", "surrogatepass")


def _message(message: Any) -> list[str]:
    if not isinstance(message, Mapping):
        return [str(message)]
    content = message.get("content")
    parts = [str(message.get("role", ""))]
    if isinstance(content, str):
        parts.append(content)
    elif isinstance(content, list):
        parts += [
            p["text"] if isinstance(p, Mapping) and isinstance(p.get("text"), str) else json.dumps(p)
            for p in content
        ]
    if message.get("tool_calls"):
        parts.append(json.dumps(message["tool_calls"]))
    return parts


def chain(text: bytes, block: int, limit: int) -> tuple[int, ...]:
    """64-bit hashes of the full blocks of `text`, each chained with the one before."""
    hashes = []
    parent = b""
    for start in range(0, min(len(text) // block, limit) * block, block):
        parent = blake2b(parent + text[start : start + block], digest_size=8).digest()
        hashes.append(int.from_bytes(parent, "little"))
    return tuple(hashes)


class PrefixIndex:
    """block hash -> the replicas that hold it; the least recently used blocks are forgotten first."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._owners: OrderedDict[int, set[str]] = OrderedDict()

    def held(self, blocks: Sequence[int]) -> dict[str, int]:
        """{replica: leading blocks it holds}; replicas that hold none are left out."""
        counts: dict[str, int] = {}
        alive: set[str] | None = None
        for depth, block in enumerate(blocks, 1):
            owners = self._owners.get(block)
            alive = set(owners or ()) if alive is None else alive & (owners or set())
            if not alive:
                break
            counts.update(dict.fromkeys(alive, depth))
        return counts

    def learn(self, blocks: Sequence[int], replica: str) -> None:
        """A request with these blocks went to `replica`."""
        for block in blocks:
            self._owners.setdefault(block, set()).add(replica)
            self._owners.move_to_end(block)
        while len(self._owners) > self._entries:
            self._owners.popitem(last=False)

    def forget(self, replica: str) -> None:
        """The replica is gone, and its cache with it."""
        for block, owners in list(self._owners.items()):
            owners.discard(replica)
            if not owners:
                del self._owners[block]
