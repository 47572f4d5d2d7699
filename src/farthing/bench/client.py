"""Stream a completion or chat over HTTP/1.1 and time every token.

Built on asyncio streams, because a load generator that shares two cores with the server must be cheap. Works
with any OpenAI-compatible server. If the server reports usage in every chunk (`continuous_usage_stats`,
vLLM's extension), inter-token latency is per token; otherwise it is per chunk.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Target:
    """An OpenAI-compatible server."""

    url: str  # http://127.0.0.1:8000
    model: str
    api_key: str | None = None
    timeout: float = 300.0  # seconds per request

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url: got {self.url!r}; expected http://host:port or https://host:port")


@dataclass(slots=True)
class Timing:
    """Timings of one request, in seconds on the monotonic clock."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    start: float = 0.0
    first: float | None = None  # first token
    end: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of every streamed chunk
    counts: list[int] = field(default_factory=list)  # output tokens so far at each arrival, if reported
    text: str = ""
    reasoning: str = ""  # of a chat
    calls: list[dict[str, Any]] = field(default_factory=list)  # tool calls of a chat
    finished: bool = False  # a finish_reason has come
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return (self.first or self.end) - self.start

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first."""
        return (self.end - (self.first or self.end)) / max(self.output_tokens - 1, 1)

    @property
    def e2e(self) -> float:
        """Seconds from sending to the last token."""
        return self.end - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens.

        A chunk may contain several tokens: accepted drafts, or the bytes of a completed character.
        Its gap is divided evenly among them.
        """
        between = [b - a for a, b in zip(self.arrivals[:-1], self.arrivals[1:], strict=True)]
        if len(self.counts) != len(self.arrivals):
            return between
        gaps: list[float] = []
        for gap, before, now in zip(between, self.counts[:-1], self.counts[1:], strict=True):
            tokens = now - before
            gaps += [gap / tokens] * tokens if tokens > 0 else []
        return gaps


async def complete(
    target: Target, prompt: str | list[int], max_tokens: int, into: Timing | None = None, **options: Any
) -> Timing:
    """Stream one /v1/completions request. A failure is recorded in `error`, never raised.

    into: updated while the response streams, for live display.
    """
    return await _stream(
        target, "/v1/completions", {"prompt": prompt, "max_tokens": max_tokens, **options}, into
    )


async def chat(target: Target, messages: list[dict[str, Any]], max_tokens: int, **options: Any) -> Timing:
    """Stream one /v1/chat/completions request. A failure is recorded in `error`, never raised."""
    fields = {"messages": messages, "max_tokens": max_tokens, **options}
    return await _stream(target, "/v1/chat/completions", fields, None)


async def _stream(target: Target, path: str, fields: dict[str, Any], into: Timing | None) -> Timing:
    body = {
        "model": target.model,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **fields,
    }
    timing = into if into is not None else Timing()
    timing.start = time.perf_counter()
    try:
        await asyncio.wait_for(_exchange(target, path, json.dumps(body).encode(), timing), target.timeout)
    except TimeoutError:
        timing.error = f"no answer within {target.timeout:g} s"
    except (OSError, ValueError, EOFError) as error:
        timing.error = f"{type(error).__name__}: {error}"
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        timing.error = f"malformed event: {type(error).__name__}: {error}"
    timing.end = timing.end or time.perf_counter()
    # A server that sends no usage sends one chunk per token.
    timing.output_tokens = timing.output_tokens or len(timing.arrivals)
    return timing


async def _exchange(target: Target, path: str, body: bytes, timing: Timing) -> None:
    parts = urlsplit(target.url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(
        parts.hostname, port, ssl=ssl.create_default_context() if secure else None
    )
    try:
        key = f"Authorization: Bearer {target.api_key}\r\n" if target.api_key else ""
        head = (
            f"POST {parts.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = _status(await reader.readline())
        while (await reader.readline()).strip():
            pass
        if status != 200:
            timing.error = f"HTTP {status}: {(await reader.read(2000)).decode(errors='replace')}"
            return
        # Chunk sizes are lines that never start with "data:", so reading lines is enough.
        while line := await reader.readline():
            if line.startswith(b"data: ") and _event(line[6:].strip(), timing):
                return
        if not timing.finished:
            count = len(timing.arrivals)
            raise EOFError(
                f"the stream ended after {count} chunk{'s' * (count != 1)}, without a finish_reason or [DONE]"
            )
    finally:
        writer.close()


def _status(line: bytes) -> int:
    """The status code of a response's first line."""
    parts = line.split()
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/") or not parts[1].isdigit():
        raise ValueError(f"response: got {line[:40]!r}; expected an HTTP status line")
    return int(parts[1])


def _event(data: bytes, timing: Timing) -> bool:
    """Record one server-sent event; True at the end of the stream."""
    if data == b"[DONE]":
        timing.end = time.perf_counter()
        return True
    event = json.loads(data)
    if "error" in event:
        timing.error = json.dumps(event["error"])
        return True
    now = time.perf_counter()
    if choices := event.get("choices"):
        timing.first = timing.first or now
        timing.end = now
        timing.arrivals.append(now)
        _content(choices[0], timing)
    if usage := event.get("usage"):
        if choices:
            timing.counts.append(usage["completion_tokens"])
        timing.prompt_tokens = usage["prompt_tokens"]
        timing.output_tokens = usage["completion_tokens"]
        timing.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return False


def _content(choice: dict[str, Any], timing: Timing) -> None:
    """The text a chunk adds to a completion or a chat response."""
    timing.finished |= bool(choice.get("finish_reason"))
    delta = choice.get("delta") or {}
    timing.text += choice.get("text") or delta.get("content") or ""
    timing.reasoning += delta.get("reasoning_content") or ""
    for part in delta.get("tool_calls") or ():
        function = part.get("function") or {}
        if part.get("id"):
            empty = {"name": function.get("name"), "arguments": ""}
            timing.calls.append({"id": part["id"], "type": "function", "function": empty})
        timing.calls[part["index"]]["function"]["arguments"] += function.get("arguments") or ""
