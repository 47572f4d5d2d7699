"""All attacks known to have delayed other clients, and variants: functions called in a loop."""

from __future__ import annotations

import itertools
import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

BAD = "sk-bad"
JSON = {"content-type": "application/json", "authorization": f"Bearer {BAD}"}
CHAT, COMPLETE, RESPOND, MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
USER = {"role": "user", "content": "x"}
PART = {"type": "text", "text": "x"}
NUMBERS = itertools.count()
DIALECTS = {"farthing": "/ready", "vllm": "/health", "llama.cpp": "/health"}  # and the path once they serve
SPOKEN = ["farthing"]  # how the server under attack spells a grammar

Once = Callable[[int], str]  # port -> summary of the response


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack that runs in `threads` loops."""

    name: str
    once: Once
    threads: int = 4


def url(port: int) -> str:
    """URL of the server."""
    return f"http://127.0.0.1:{port}"


def post(path: str, document: Any, timeout: float = 60.0) -> Once:
    """Send the same body each time."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()

    def once(port: int) -> str:
        return str(httpx.post(url(port) + path, content=body, headers=JSON, timeout=timeout).status_code)

    return once


def fresh(path: str, make: Callable[[int], Any], timeout: float = 60.0) -> Once:
    """Send a body that no cache has: `make` gets an unused number."""

    def once(port: int) -> str:
        document = spoken(make(next(NUMBERS) + time.time_ns() % 10**9 * 1000), SPOKEN[0])
        return str(httpx.post(url(port) + path, json=document, headers=JSON, timeout=timeout).status_code)

    return once


def spoken(document: Any, dialect: str) -> Any:
    """A body whose field `guided_…`, if it has one, is spelt as the server of this dialect expects it."""
    guided = [name for name in document if name.startswith("guided_")] if isinstance(document, dict) else []
    if dialect == "farthing" or not guided:
        return document
    rest = {name: value for name, value in document.items() if name not in guided}
    kind, value = guided[0].removeprefix("guided_"), document[guided[0]]
    if dialect == "vllm":
        return rest | {"structured_outputs": {kind: value}}
    if kind in ("json", "regex"):
        return rest | {
            "json_schema": value if kind == "json" else {"type": "string", "pattern": f"^{value}$"}
        }
    if kind == "choice":
        return rest | {"grammar": "root ::= " + " | ".join(map(json.dumps, value))}
    rules = re.sub(r"^(\w+):", r"\1 ::=", value, flags=re.M)  # of Lark, whose names and strings GBNF shares
    return rest | {"grammar": rules.replace("start", "root", 1)}


def guided(**fields: Callable[[int], Any]) -> Once:
    """Send a completion with a new grammar."""
    base = {"prompt": "x", "max_tokens": 4}
    return fresh(COMPLETE, lambda number: base | {name: make(number) for name, make in fields.items()})


def abandoned_grammar(make: Callable[[int], str]) -> Once:
    """Send a request and disconnect while its regex is compiled."""

    def once(port: int) -> str:
        document = {"prompt": "x", "max_tokens": 4, "guided_regex": make(next(NUMBERS))}
        return abandoned(COMPLETE, spoken(document, SPOKEN[0]), 0)(port)

    return once


def raw(path: str, document: Any) -> bytes:
    """A request as bytes."""
    body = json.dumps(document).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {BAD}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def connect(port: int) -> socket.socket:
    """A connection to the server."""
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def sent(port: int, data: bytes) -> str:
    """The status line of the answer to these bytes, or that the server closed the connection."""
    with connect(port) as connection:
        try:
            connection.sendall(data)
        except ConnectionError:
            return "closed"
        return connection.recv(100).split(b"\r\n")[0].decode("latin-1")


def abandoned(path: str, document: Any, read: int) -> Once:
    """Send a request and disconnect after `read` bytes of the answer."""
    request = raw(path, document)

    def once(port: int) -> str:
        with connect(port) as connection:
            connection.sendall(request)
            got = connection.recv(read) if read else b""
            return got.split(b"\r\n")[0].decode("latin-1") or "left"

    return once


def long_head(port: int) -> str:
    """Send 150 MB of one header."""
    return _endless_head(port, b"x: ", b"y" * 1_000_000, 150)


def many_headers(port: int) -> str:
    """Send a million headers."""
    return _endless_head(port, b"", b"x: y\r\n" * 1000, 1000)


def _endless_head(port: int, start: bytes, piece: bytes, times: int) -> str:
    with connect(port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + start)
        for _ in range(times):
            connection.sendall(piece)
        return connection.recv(100).split(b"\r\n")[0].decode()


def half_open(port: int) -> str:
    """Open 500 sockets that send the start of a request; the last 3,000 stay open."""
    for _ in range(500):
        connection = connect(port)
        connection.sendall(b"GET /health HTT")
        _HELD.append(connection)
    while len(_HELD) > 3000:
        _HELD.pop(0).close()
    return "held"


_HELD: list[socket.socket] = []


def slow_body(port: int) -> str:
    """Send a body one byte at a time."""
    head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {BAD}\r\n"
    with connect(port) as connection:
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        for _ in range(10):
            connection.sendall(b"x")
            time.sleep(0.1)
    return "left"


def tiny_chunks(port: int) -> str:
    """Send a body in 200,000 chunks of one byte."""
    return sent(port, _TINY)


_TINY = (
    f"POST {COMPLETE} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {BAD}\r\n"
    "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
).encode() + b"1\r\n \r\n" * 200_000


def trailers(port: int) -> str:
    """Send a million fields after a chunked body."""
    head = _TINY[: _TINY.index(b"\r\n\r\n") + 4]
    return sent(port, head + b"2\r\n{}\r\n0\r\n" + b"x: y\r\n" * 1_000_000)


def pipelined(port: int) -> str:
    """Send 2,000 small requests in one write."""
    one = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {BAD}\r\n\r\n".encode()
    return sent(port, one * 2000)


def burst(port: int) -> str:
    """500 requests on as many connections, sent at once."""
    request = raw(COMPLETE, {"prompt": "x", "max_tokens": 1})
    while len(_OPEN) < 500:
        _OPEN.append(connect(port))
    try:
        for connection in _OPEN:
            connection.sendall(request)
        return {connection.recv(65536)[9:12].decode() for connection in _OPEN}.__repr__()
    except OSError:
        _OPEN.clear()
        raise


_OPEN: list[socket.socket] = []


def nested(count: int) -> dict[str, Any]:
    """Schemas within schemas."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(count):
        schema = {"allOf": [schema]}
    return schema


def chained(count: int) -> dict[str, Any]:
    """Definitions that refer to each other."""
    definitions = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{count}": {"type": "string"}}}


def parts(count: int, part: dict[str, Any] = PART) -> dict[str, Any]:
    """A conversation of `count` parts, in messages of 4,096."""
    return {"messages": [{"role": "user", "content": [part] * min(4096, count - start)}
                         for start in range(0, count, 4096)], "max_tokens": 1}  # fmt: skip


def grammars() -> list[Attack]:
    """Grammars that must be rejected or are slow to compile."""
    rules = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3500)) + '\nr3500: "x"'
    optional = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}}
    number = {"type": "integer", "multipleOf": 999_983}
    alternatives = "start: r0\n" + "\n".join(f'r{i}: r{i + 1} | "y{i}"' for i in range(700)) + '\nr700: "x"'
    huge, wide = "(x{900}){1000}", "(.|\\n)*a(.|\\n)"
    late = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}
    masks = {"prompt": "x", "max_tokens": 400, "n": 8}
    return [
        Attack("schema: 3,000 chained $ref", guided(guided_json=lambda n: chained(3000) | {"title": f"{n}"})),
        Attack("schema: 2,000 nested allOf", guided(guided_json=lambda n: nested(490) | {"title": f"{n}"})),
        Attack("schema: multipleOf", guided(guided_json=lambda n: number | {"title": f"{n}"})),
        Attack("schema: 1,000 optional", guided(guided_json=lambda n: optional | {"title": f"{n}"})),
        Attack("schema: [[[", guided(guided_json=lambda n: "[" * 5_000 + f"{n}")),
        Attack("grammar: 3,500 Lark rules", guided(guided_grammar=lambda n: f'{rules}\nother{n}: "y"')),
        Attack("regex: (x{1000}){1000}", guided(guided_regex=lambda n: f"(x{{1000}}){{1000}}{n}")),
        Attack("regex: 12 x (x{900}){1000}", guided(guided_regex=lambda n: f"(x{{900}}){{1000}}{n}"), 12),
        Attack("regex: ((a{30}){30}){30}", guided(guided_regex=lambda n: f"((a{{30}}){{30}}){{30}}{n}"), 12),
        Attack("regex: slow from token 65 on",
               fresh(COMPLETE, lambda n: late | {"guided_regex": f"[a-z]{{{65 + n % 900}}}{huge}"}), 12),
        Attack("regex: slow masks, n = 8",
               fresh(COMPLETE, lambda n: masks | {"guided_regex": f"(x{{100}}){{100}}z{{{n % 900}}}"}), 12),
        Attack("regex: many states, n = 8",
               fresh(COMPLETE, lambda n: masks | {"guided_regex": f"{wide}{{{100 + n % 400}}}"}), 12),
        Attack("regex: clients that leave",
               abandoned_grammar(lambda n: "(x{900}){1000}" + "y" * (n % 997)), 16),
        Attack("grammar: 700 alternatives",
               guided(guided_grammar=lambda n: f'{alternatives}\nother{n}: "y"'), 12),
        Attack("choices: 16,000", guided(guided_choice=lambda n: [f"{n} {i}" for i in range(16_000)])),
    ]  # fmt: skip


def bodies() -> list[Attack]:
    """Long bodies, and bodies with many values."""
    long_text = "a b " * 1_975_000
    biases = dict.fromkeys(map(str, range(300_000)), 1)
    calls = [{"function": {"name": "f", "arguments": "{}"}}] * 1000
    words = [f"{i} ab c" * 24 for i in range(1024)]
    deep: Any = "x"
    for _ in range(120):
        deep = [deep]
    written = "{" + ",".join(f'"k{i}":"\\n<"' for i in range(190_000)) + "}"
    escaped = [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": written}}]}]
    strings = {"return_token_strs": True}
    called = [USER] + [{"role": "assistant", "tool_calls": calls}] * 4
    many = {"prompt": ["x"] * 64, "max_tokens": 1, "allowed_token_ids": [10, 11] * 100_000}
    item = {"role": "user", "content": [{"type": "input_text", "text": "x"}] * 3500}
    return [
        Attack("prompt: 7.9 MB", post(COMPLETE, {"prompt": long_text})),
        Attack("chat: 7.9 MB", post(CHAT, {"messages": [USER | {"content": long_text}]})),
        Attack("tokenize: 7.9 MB", post("/tokenize", {"prompt": long_text})),
        Attack("tokenize: 100 kB", post("/tokenize", {"prompt": "a b " * 25_000})),
        Attack("tokenize: token_strs", post("/tokenize", {"prompt": "a b " * 900} | strings)),
        Attack("tokenize: 200 messages",
               post("/tokenize", {"messages": [USER | {"content": "x y " * 900}] * 200}), 12),
        Attack("detokenize: 260,000 ids", post("/detokenize", {"tokens": [5] * 260_000}), 8),
        Attack("detokenize: 2,000 ids", post("/detokenize", {"tokens": [5] * 2_000}), 8),
        Attack("chat: 200,000 messages", post(CHAT, {"messages": [USER] * 200_000})),
        Attack("chat: 2,000 messages", post(CHAT, {"messages": [USER] * 2_000, "max_tokens": 1})),
        Attack("chat: 10,000 parts", post(CHAT, parts(10_000))),
        Attack("chat: 2,000 parts in 60 kB", post(CHAT, parts(2_000)), 16),
        Attack("chat: 8,000 parts, a field each", post(CHAT, parts(8_000, PART | {"z": 0}))),
        Attack("chat: 4,000 calls", post(CHAT, {"messages": called, "max_tokens": 1})),
        Attack("chat: 190,000 strings in arguments", post(CHAT, {"messages": escaped, "max_tokens": 1})),
        Attack("chat: deep kwargs", post(CHAT, {"messages": [USER], "chat_template_kwargs": {"x": deep}})),
        Attack("responses: 10,500 parts", post(RESPOND, {"input": [item] * 3, "max_output_tokens": 1})),
        Attack("messages: 7,000 blocks", post(MESSAGES, parts(7_000))),
        Attack("logit_bias: 300,000", post(COMPLETE, {"prompt": "x", "logit_bias": biases})),
        Attack("bad_words: 1,024 x 32 prompts",
               post(COMPLETE, {"prompt": ["x"] * 32, "max_tokens": 1, "bad_words": words})),
        Attack("allowed ids: 200,000 x 64 prompts",
               post(COMPLETE, many)),
        Attack("ids: 200,000 bad", post(COMPLETE, {"prompt": [1, -1] * 100_000})),
        Attack("json: 8 MB of [", post(COMPLETE, b"[" * 8_000_000)),
        Attack("json: 32,000 values", post(COMPLETE, {"prompt": "x", "max_tokens": 1, "z": [{}] * 16_000})),
    ]  # fmt: skip


def work() -> list[Attack]:
    """Valid but heavy requests. Token 80 is "a" and 236 a space in the embedded model."""
    crowd = {"prompt": ["x" * 200] * 8, "n": 60, "max_tokens": 1500, "ignore_eos": True}
    scored = {"prompt": [[5 + i] * 2_000 for i in range(16)], "max_tokens": 1}
    answers = {"n": 64, "max_tokens": 200, "ignore_eos": True}
    begun = ["a" * 1023 + "b", *("a" * (500 + k) + "b" * 500 for k in range(15))]
    held = {"prompt": "x", "n": 64, "max_tokens": 1500, "logit_bias": {"80": 100}, "stop": begun}
    blanks = {"messages": [USER], "max_tokens": 1200, "logit_bias": {"236": 100}, "ignore_eos": True}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    shown = {"messages": [USER], "logprobs": True, "top_logprobs": 20, "stream": True}
    kept = {"input": "x" * 100_000, "max_output_tokens": 1, "metadata": {"a": "x" * 500}}
    return [
        Attack("queue: 480 sequences per request", post(COMPLETE, crowd, timeout=3.0), 8),
        Attack("prompt_logprobs: 16 x 2,000", post(COMPLETE, scored | {"prompt_logprobs": 20})),
        Attack("echo, logprobs, stream: 16 x 2,000",
               post(COMPLETE, scored | {"logprobs": 20, "echo": True, "stream": True})),
        Attack("logprobs: n = 64", post(COMPLETE, answers | {"prompt": "x", "logprobs": 20})),
        Attack("top_logprobs, stream: n = 64",
               post(CHAT, answers | shown)),
        Attack("stop: 16 strings that nearly match", post(COMPLETE, held)),
        Attack("tools: 1,200 blanks", post(CHAT, blanks | {"tools": [tool], "stream": True})),
        Attack("responses: a full store", fresh(RESPOND, lambda n: kept | {"user": str(n)})),
        Attack("clients that leave", abandoned(COMPLETE, answers | {"prompt": "x", "stream": True}, 100), 16),
        Attack("clients that read nothing of a stream", silent, 1),
        Attack("clients that never read",
               abandoned(COMPLETE, {"prompt": [5] * 2_000, "max_tokens": 1, "prompt_logprobs": 20}, 0), 16),
    ]  # fmt: skip


def document(port: int) -> str:
    """Get the OpenAPI document without a key."""
    return str(httpx.get(f"{url(port)}/openapi.json", timeout=60).status_code)


def silent(port: int) -> str:
    """Ask for a stream of 64 answers and read none of it; the last 16 connections stay open."""
    fields = {"prompt": "x", "n": 64, "max_tokens": 1500, "logprobs": 20, "stream": True, "ignore_eos": True}
    connection = connect(port)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(raw(COMPLETE, fields))
    _SILENT.append(connection)
    while len(_SILENT) > 16:
        _SILENT.pop(0).close()
    time.sleep(0.5)
    return "held"


_SILENT: list[socket.socket] = []


def release() -> None:
    """Close what attacks hold open, which would delay others in the windows without an attack too."""
    for held in (_HELD, _OPEN, _SILENT):
        while held:
            held.pop().close()


def sockets() -> list[Attack]:
    """Connections and request heads before authentication."""
    return [
        Attack("head: 150 MB", long_head),
        Attack("head: a million headers", many_headers),
        Attack("sockets: 3,000 half-open", half_open, 1),
        Attack("bodies: slow", slow_body, 50),
        Attack("bodies: chunks of one byte", tiny_chunks, 8),
        Attack("bodies: a million trailers", trailers, 4),
        Attack("pipeline: 2,000 requests", pipelined),
        Attack("burst: 500 requests", burst, 1),
        Attack("openapi.json without a key", document, 8),
    ]


CLASSES: dict[str, Callable[[], list[Attack]]] = {
    "grammars": grammars, "bodies": bodies, "work": work, "sockets": sockets
}  # fmt: skip


def attacks(only: str = "") -> list[Attack]:
    """All attacks, those of a class, or those whose name contains `only`."""
    if only in CLASSES:
        return CLASSES[only]()
    return [attack for made in CLASSES.values() for attack in made() if only in attack.name]
