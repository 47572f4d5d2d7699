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

from farthing.engine.admission import Admission
from farthing.server.api import routes
from farthing.server.app import create_app
from farthing.server.config import ServerConfig
from farthing.server.service import Service
from tests.growth import HARD, Grown, excess, grown
from tests.server.harness import ScriptedEngine

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
        "role": "user", "content": "a", "call_id": "#", "name": "a", "arguments": "{}", "input": "a", "output": "a",
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
        self.status = 0

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

        async def send(message: Any) -> None:
            self.status = message.get("status", self.status)

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
    """Every field of every API; of paths with the same class, the first."""
    classes = {model: path for path, model in reversed(bodies().items())}
    return [
        (path, field)
        for model, path in classes.items()
        for field in grown(model, BASES[model.__name__], COMPLETE)
    ]


FIELDS = fields()


def test_every_class_of_bodies_has_fields() -> None:
    assert {model.__name__ for model in bodies().values()} == set(BASES)
    assert len(FIELDS) > 400
if __name__ == "__main__":
    import sys, time
    a = App()
    from collections import Counter
    c=Counter()
    t0=time.time()
    for path, field in FIELDS:
        n = 65536 if field.kind=="string" else 2000
        body=lambda size: json.dumps(field.make(size,"a")).encode()
        b={n:body(n),2*n:body(2*n)}
        t=time.time()
        e=excess(lambda size: a.post(path,b[size]), n)
        c[a.status]+=1
        w=time.time()-t
        if e or w>1: print(path, field.path, a.status, e, f"{w:.1f}",flush=True)
    print(c, time.time()-t0)
    a.close()
