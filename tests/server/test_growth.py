"""The event loop's work on a body grows in proportion to it, for every field of every API.

Requests go through the whole application within this thread, so that its CPU time is what the event loop
would be held for; tokenizing, templates and grammars run in other processes and threads, and are not counted.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from tokenizers import Tokenizer as HfTokenizer

from farthing.engine.admission import Admission
from farthing.engine.sandbox.sandbox import Sandbox
from farthing.engine.tokenizer import Tokenizer
from farthing.server.api import messages, responses_protocol, routes
from farthing.server.api.messages_protocol import MessagesRequest
from farthing.server.api.responses_protocol import ResponsesRequest
from farthing.server.app import create_app
from farthing.server.config import ServerConfig
from farthing.server.service import Service
from tests.growth import HARD, Grown, chained, cost, excess, grown
from tests.server.harness import BOS, EOS, ScriptedEngine

USER = {"role": "user", "content": "hi"}
# A valid body of each class, to which the field that grows is added.
BASES: dict[str, dict[str, Any]] = {
    "CompletionRequest": {"prompt": "hi", "max_tokens": 1},
    "ChatCompletionRequest": {"messages": [USER]},
    "TokenizeRequest": {"messages": [USER]},
    "DetokenizeRequest": {"tokens": [5]},
    "ResponsesRequest": {"input": "hi"},
    "InputTokensRequest": {"input": "hi"},
    "MessagesRequest": {"messages": [USER], "max_tokens": 1},
    "CountRequest": {"messages": [USER]},
    "ChatRequest": {"model": "tiny", "messages": [USER]},
    "GenerateRequest": {"model": "tiny", "prompt": "hi"},
    "NamedRequest": {"model": "tiny"},
    "EmbeddingsRequest": {"input": "hi"},
    "RerankRequest": {"query": "hi", "documents": ["a"]},
    "EmbedRequest": {"model": "tiny", "input": "hi"},
}
# What validators want besides the fields that are required.
COMPLETE: dict[str, dict[str, Any]] = {
    "Message": {"content": "hi"},
    "Part": {"text": "a", "refusal": "a"},
    "Item": {
        "role": "user", "content": "a", "call_id": "#", "name": "a", "arguments": "{}", "input": "a",
        "output": "a",
    },
    "ForeignItem": {"id": "#"},
    "ToolDefinition": {"input_schema": {}, "strict": True},
    "Function": {"strict": True},
    "FunctionTool": {"strict": True},
}  # fmt: skip


class Scripted(ScriptedEngine):
    """Answers at once, but admits requests as the engine does."""

    def __init__(self) -> None:
        super().__init__(max_model_len=1 << 20)
        backend = HfTokenizer.from_str(self.tokenizer.backend.to_str())
        backend.add_tokens(["yes", "no"])  # for /v1/rerank
        self.tokenizer = Tokenizer(backend, {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True})
        self.sandbox = Sandbox(self.tokenizer, backend.get_vocab_size())
        self._admission = Admission(self.config, self.model_config, self.tokenizer, self.sandbox)

    def submit(self, prompt: Any, params: Any, **options: Any) -> Any:
        options = {"request_id": None, "add_special_tokens": True, "prompt_text": None} | options
        self._admission.admit(prompt, params, **options)
        return super().submit(prompt[:8], params, **options)


class App:
    """The application in this thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = Scripted()
        self.status = self.largest = 0  # largest: bytes of a part of the answer

        async def create() -> Any:
            service = Service(ServerConfig(), "tiny")
            service.engine = self.engine
            await service.formats()
            return create_app(service)

        self._app = self.loop.run_until_complete(create())

    def post(self, path: str, body: bytes) -> None:
        """Send a request and wait for the whole answer."""
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                await asyncio.Event().wait()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        self.largest = 0

        async def send(message: Any) -> None:
            self.status = message.get("status", self.status)
            self.largest = max(self.largest, len(message.get("body", b"")))

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "scheme": "http",
            "http_version": "1.1", "root_path": "",
        }  # fmt: skip
        self.loop.run_until_complete(self._app(scope, receive, send))

    def close(self) -> None:
        """End the child processes and the loop."""
        self.engine.shutdown()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    made = App()
    yield made
    made.close()


def bodies() -> dict[str, type[BaseModel]]:
    """The class of the body of every route, by path."""
    api = FastAPI()
    routes.add_routes(api, Service(ServerConfig(), "tiny"))
    found: dict[str, type[BaseModel]] = {}
    for route in api.routes:
        field = getattr(route, "body_field", None)
        if field is not None:
            found[route.path] = field.field_info.annotation  # type: ignore[attr-defined]
    return found


def fields() -> list[tuple[str, Grown]]:
    """Every field of every API; one that bodies inherit, once."""
    found: dict[tuple[type[BaseModel], str, str], tuple[str, Grown]] = {}
    for path, model in bodies().items():
        for field in grown(model, BASES[model.__name__], COMPLETE):
            name = field.path.partition("<")[0].partition("[")[0].partition(".")[0].partition(" ")[0]
            owner = next(
                each for each in reversed(model.__mro__) if name in vars(each).get("__annotations__", {})
            )
            found.setdefault((owner, field.path, field.kind), (path, field))
    return list(found.values())


FIELDS = fields()


def test_every_class_of_bodies_has_fields() -> None:
    assert {model.__name__ for model in bodies().values()} == set(BASES)
    assert len(FIELDS) > 300


SIZES = {"string": 8192, "array": 500, "object": 500}


def check(app: App, path: str, make: Callable[[int], Any], sizes: tuple[int, ...]) -> None:
    """The work on a body grows with it; its last size may be too large to be accepted, but never fails."""
    for size in sizes:
        sent = {each: json.dumps(make(each)).encode() for each in (size, 4 * size)}
        wrong = excess(lambda each, sent=sent: app.post(path, sent[each]), size)
        assert wrong is None, wrong
        assert app.status in (200, 400, 404, 413)


@pytest.mark.parametrize("path", sorted({path for path, _ in FIELDS}))
def test_every_field(app: App, path: str) -> None:
    for where, field in FIELDS:
        if where == path:
            check(app, path, lambda size, field=field: field.make(size, "1"), (SIZES[field.kind],))


@pytest.mark.slow
@pytest.mark.parametrize("text", HARD)
def test_every_text_that_is_hard(app: App, text: str) -> None:
    for path, field in FIELDS:
        if field.kind == "string":
            check(app, path, lambda size, field=field: field.make(size, text), (1024, 65_536))


# Bodies of which several fields together are what takes long.


def calls(size: int, order: int = 1, named: bool = True, each: int = 100) -> dict[str, Any]:
    """A chat of calls and their results. order: -1 for results from the last call to the first."""
    messages: list[dict[str, Any]] = [USER]
    for start in range(0, size, each):
        numbers = range(start, start + each)
        function = {"name": "f", "arguments": "{}"}
        asked = [({"id": f"c{n}"} if named else {}) | {"function": function} for n in numbers]
        messages.append({"role": "assistant", "tool_calls": asked})
        for n in numbers[::order]:
            messages.append({"role": "tool", "content": "a"} | ({"tool_call_id": f"c{n}"} if named else {}))
    return {"messages": messages}


def unanswered(size: int) -> dict[str, Any]:
    return {"messages": [each for each in calls(size, each=size)["messages"] if each["role"] != "tool"]}


def items(size: int, order: int = 1) -> dict[str, Any]:
    made = [
        {"type": "function_call", "call_id": f"c{n}", "name": "f", "arguments": "{}"} for n in range(size)
    ]
    results = [{"type": "function_call_output", "call_id": f"c{n}", "output": "a"} for n in range(size)]
    return {"input": [*made, *results[::order]]}


def said(size: int) -> dict[str, Any]:
    """One long text of the assistant, and many short ones."""
    message = {"type": "message", "role": "assistant"}
    return {"input": [message | {"content": text} for text in ("a" * 1000 * size, *("b" * size))]}


def blocks(size: int, role: str) -> dict[str, Any]:
    content = [{"type": "text", "text": text} for text in ("a" * 1000 * size, *("b" * size))]
    return {"messages": [{"role": role, "content": content}], "max_tokens": 1}


def tool_of(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": schema, "strict": True}
    return {"messages": [USER], "tools": [{"type": "function", "function": function}], **more}


CHAT = "/v1/chat/completions"
SHAPES: dict[str, tuple[str, Callable[[int], Any], int]] = {
    "calls": (CHAT, calls, 400),
    "calls, results reversed": (CHAT, lambda size: calls(size, -1), 400),
    "calls without ids": (CHAT, lambda size: calls(size, named=False), 400),
    "calls without results": (CHAT, unanswered, 250),
    "items": ("/v1/responses", items, 500),
    "items, results reversed": ("/v1/responses", lambda size: items(size, -1), 500),
    "query before documents": (
        "/v1/rerank",
        lambda size: {"query": "a" * 100 * size, "documents": ["b"] * size},
        200,
    ),
    "chained references": (CHAT, lambda size: tool_of(chained(size)), 700),
    "chained references, required": (CHAT, lambda size: tool_of(chained(size), tool_choice="required"), 700),
    "keep_alive": ("/api/generate", lambda size: {"model": "tiny", "keep_alive": "1" * size + "x"}, 1000),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_known_shapes(app: App, shape: str) -> None:
    path, make, size = SHAPES[shape]
    check(app, path, make, (size,))


@pytest.mark.parametrize("part", ["/a", "/v1", "/..", "/v1/chat/completions", "//", "/%2f"])
def test_paths_that_are_not_served(app: App, part: str) -> None:
    sent = {size: part * (size // len(part)) + "/x" for size in (7_000, 28_000)}
    assert excess(lambda size: app.post(sent[size], b"{}"), 7_000) is None
    assert app.status == 404


def test_long_integers_cost_what_short_ones_do(app: App) -> None:
    """Python's conversion of an integer takes quadratic time up to a limit of 4,300 digits."""
    size = 2_000_000
    sent = {digits: ",".join(["9" * digits] * (size // digits)) for digits in (64, 640, 4200)}
    seconds = {}
    for digits, numbers in sent.items():
        body = f'{{"messages": [], "x": [{numbers}]}}'.encode()
        seconds[digits] = min(cost(lambda body=body: app.post(CHAT, body)) for _ in range(3))
        assert app.status == 400
    assert max(seconds[640], seconds[4200]) < 2 * seconds[64] + 0.01, seconds


def test_texts_are_joined_once() -> None:
    """What is joined is the same, however many pieces it has."""
    sizes = (500, 2000)
    bodies = {size: ResponsesRequest.model_validate(said(size)) for size in sizes}
    assert excess(lambda size: responses_protocol.turns_of(bodies[size], ()), 500) is None
    for role in ("user", "assistant"):
        asked = {size: MessagesRequest.model_validate(blocks(size, role)) for size in sizes}
        assert excess(lambda size, asked=asked: messages.conversation_of(asked[size]), 500) is None


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/embed"])
def test_long_answers_are_written_in_pieces(app: App, path: str) -> None:
    app.post(path, json.dumps({"model": "tiny", "input": ["a"] * 1000}).encode())
    assert app.status == 200 and app.largest < 70_000
