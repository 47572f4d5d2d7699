"""Every field of every API at 0, 1, its bounds, beyond them and absent, on an engine as the server has it.

The fields and their bounds come from the schemas, so a new field is tested on the day it is added. Each
request gets an answer, or a 4xx that names the field; none a 500, and none ends the engine.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from farthing.engine.request import RANGES
from farthing.server.api.messages_protocol import MessagesRequest
from farthing.server.api.ollama_protocol import ChatRequest, Options
from farthing.server.api.openai_protocol import ChatCompletionRequest, CompletionRequest
from farthing.server.api.responses_protocol import ResponsesRequest
from farthing.server.app import create_app
from farthing.server.config import ServerConfig
from farthing.server.service import Service
from tests.server.harness import running, tiny_engine

TURN = [{"role": "user", "content": "hi"}]
# What a request has besides the field: few tokens, and a seed, so that a failure is the same in the next run.
APIS: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "hi", "max_tokens": 2, "seed": 1}),
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": TURN, "max_tokens": 2, "seed": 1}),
    "/v1/responses": (ResponsesRequest, {"input": "hi", "max_output_tokens": 2}),
    "/v1/messages": (MessagesRequest, {"model": "tiny", "messages": TURN, "max_tokens": 2}),
    "/api/chat": (
        ChatRequest, {"model": "tiny", "messages": TURN, "stream": False, "options": {"num_predict": 2}},
    ),
}  # fmt: skip
EDGES = {"minimum": -1, "exclusiveMinimum": 1, "maximum": 1, "exclusiveMaximum": -1}  # and a step over each


def values(schema: dict[str, Any], definitions: dict[str, Any]) -> Iterator[Any]:
    """Of a field: what its schema accepts at the edges, and what it does not."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from values(part, definitions)
    yield from schema.get("enum", ())
    if "const" in schema:
        yield schema["const"]
    kind = schema.get("type")
    if kind in ("integer", "number"):
        yield from (0, 1, -1, 2, 2**31 - 1, 2**63, 0.5, 1e308, "1", True)
        for name, step in (
            ("minimum", -1),
            ("exclusiveMinimum", 1),
            ("maximum", 1),
            ("exclusiveMaximum", -1),
        ):
            if (edge := schema.get(name)) is not None:
                yield from (edge, edge + step, edge + step * 1e-6)
    elif kind == "boolean":
        yield from (False, True, 0, "yes")
    elif kind == "string":
        yield from ("", "a", "json", "a" * (schema.get("maxLength", 16) + 1), 0)
    elif kind == "array":
        yield from ([], "a", [None])
        items = [item for item in values(schema.get("items", {}), definitions) if item is not None]
        yield from ([item] for item in items[:6])
        yield [*items[:1], *items[:1]] * 600
    elif kind == "object":
        yield from ({}, {"0": 1}, {"1": -100, "2": 100.0}, {"299": 1}, {"a": "b"}, [])
        properties = schema.get("properties", {})
        for name, field in properties.items():
            yield from ({name: value} for value in list(values(field, definitions))[:4])


def fields(path: str) -> dict[str, list[Any]]:
    """The values of every field of an API; those of Ollama's options are fields of their own."""
    model, base = APIS[path]
    schema = model.model_json_schema()
    found = {
        name: [None, *_distinct(values(field, schema.get("$defs", {})))]
        for name, field in schema["properties"].items()
        if name not in ("model", "messages", "prompt", "input", "stream") or name not in base
    }
    if path == "/api/chat":
        options = Options.model_json_schema()
        del found["options"]
        for name, field in options["properties"].items():
            found[f"options.{name}"] = [None, *_distinct(values(field, options.get("$defs", {})))]
    for name, low, high, kind in RANGES:
        for field in (name, f"options.{name}"):
            if field in found:
                edges = [kind(low), kind(high), low - 1, high + 1, *([0, 1] if low <= 0 <= high else [1])]
                found[field] = _distinct([*found[field], *edges])
    return found


def _distinct(found: Any) -> list[Any]:
    return list({json.dumps(value): value for value in found}.values())


def body_of(path: str, chosen: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(json.dumps(APIS[path][1]))
    for name, value in chosen.items():
        outer, _, inner = name.partition(".")
        if inner:
            body[outer][inner] = value
        else:
            body[outer] = value
    return body


def judge(path: str, chosen: dict[str, Any], answer: httpx.Response) -> None:
    """An answer that makes sense, or an error that names a field of those that were chosen."""
    said = f"{path} {json.dumps(chosen)[:300]}: {answer.status_code} {answer.text[:400]}"
    if answer.status_code == 200:
        assert answer.content, said
        if not answer.headers["content-type"].startswith("application/json"):
            assert "error" not in answer.text.partition(":")[0], said
            assert '"error": {' not in answer.text and '"error":{' not in answer.text, said
            return
        document = json.loads(answer.text)
        counted = {
            "/v1/completions": lambda: len(document["choices"]) and document["usage"]["total_tokens"],
            "/v1/chat/completions": lambda: len(document["choices"]) and document["usage"]["total_tokens"],
            "/v1/responses": lambda: document["usage"]["total_tokens"],
            "/v1/messages": lambda: document["usage"]["input_tokens"],
            "/api/chat": lambda: document["done"] and document["prompt_eval_count"],
        }[path]
        assert counted() > 0, said
        return
    assert 400 <= answer.status_code < 500, said
    fixed = APIS[path][1] if len(chosen) > 1 else ()  # what a limit of both together may name
    names = {part for name in (*chosen, *fixed) for part in name.split(".")}
    if any(name.startswith("guided_") for name in names):  # vLLM's older names of its fields
        names.add("structured_outputs")
    assert any(name in answer.text for name in names), said


@asynccontextmanager
async def served(service: Service) -> Any:
    """Requests to an application in this event loop, a few at a time."""
    transport = httpx.ASGITransport(app=create_app(service))
    places = asyncio.Semaphore(16)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:

        async def send(path: str, body: dict[str, Any]) -> httpx.Response:
            async with places:
                return await client.post(path, json=body)

        yield send


def tried(requests: list[tuple[str, dict[str, Any]]]) -> list[int]:
    """Send and judge all; then the engine is whole, and no request is left. Returns the statuses."""
    service = Service(ServerConfig(), "tiny")
    engine = tiny_engine(max_model_len=64, max_num_seqs=16, max_queue=10_000)
    assert engine._model.ops.arrays and engine._model.ops.packed_from is not None
    service.engine = engine

    async def main() -> list[int]:
        async with served(service) as send:
            answers = await asyncio.gather(*(send(path, body_of(path, chosen)) for path, chosen in requests))
            for (path, chosen), answer in zip(requests, answers, strict=True):
                judge(path, chosen, answer)
            return [answer.status_code for answer in answers]

    try:
        statuses = asyncio.run(main())
        engine.health()
        engine.between_steps(lambda core: core.scheduler.check()).result()
        assert engine.num_live == 0 and engine.stats.snapshot().failed_steps == 0
        return statuses
    finally:
        engine.shutdown()


@pytest.mark.parametrize("path", APIS)
def test_every_field_at_its_edges(path: str) -> None:
    tried([(path, {name: value}) for name, found in fields(path).items() for value in found] + [(path, {})])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_log_probabilities_with_every_way_of_sampling(path: str) -> None:
    """The plainest form of OpenAI's API among them: `logprobs` without a number, or 0."""
    wanted: list[dict[str, Any]] = [{"logprobs": 0}, {"logprobs": 1}, {"logprobs": 20}]
    wanted += [{"logprobs": 0, "echo": True}]
    if path == "/v1/chat/completions":
        wanted = [{"logprobs": True, "top_logprobs": top} for top in (None, 0, 1, 20)]
    wanted += [{"prompt_logprobs": 0}]
    ways: list[dict[str, Any]] = [
        {}, {"temperature": 0}, {"temperature": 1, "top_p": 0.5}, {"top_k": 1}, {"min_p": 1},
        {"min_tokens": 2}, {"repetition_penalty": 1.5}, {"presence_penalty": 2}, {"frequency_penalty": -2},
        {"logit_bias": {"5": 100}}, {"allowed_token_ids": [5]}, {"bad_words": ["a"]}, {"guided_regex": "a+"},
        {"n": 2}, {"stream": True},
    ]  # fmt: skip
    pairs = [one | way for one in wanted for way in ways]
    tried([(path, pair) for pair in pairs if not ("prompt_logprobs" in pair and "stream" in pair)])


@pytest.mark.slow
@pytest.mark.parametrize("path", APIS)
def test_random_combinations(path: str) -> None:
    """1,000 of each API: two to eight fields, mostly with values that are accepted alone."""
    pick = random.Random(path)
    known = fields(path)
    alone = [(path, {name: value}) for name, found in known.items() for value in found]
    accepted: dict[str, list[Any]] = {}
    for (_, chosen), status in zip(alone, tried(alone), strict=True):
        for name, value in chosen.items():
            if status == 200:
                accepted.setdefault(name, []).append(value)
    requests: list[tuple[str, dict[str, Any]]] = []
    for _ in range(1000):
        names = pick.sample(list(accepted), min(len(accepted), pick.randint(2, 8)))
        ways = [known if pick.random() < 0.05 else accepted for _ in names]
        requests.append((path, {n: pick.choice(way[n]) for n, way in zip(names, ways, strict=True)}))
    statuses = tried(requests)
    assert statuses.count(200) > 200, "most fields fit together"


def test_over_a_socket() -> None:
    """The same engine behind the server itself."""
    with (
        running(tiny_engine(max_model_len=64)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        for path, chosen in [
            ("/v1/chat/completions", {"logprobs": True}),
            ("/v1/completions", {"logprobs": 0}),
            ("/v1/completions", {"logprobs": 0, "echo": True, "max_tokens": 0}),
            ("/v1/responses", {"temperature": 0}),
            ("/v1/messages", {"top_k": 1}),
            ("/api/chat", {"options.top_k": 0}),
        ]:
            answer = client.post(path, json=body_of(path, chosen))
            assert answer.status_code == 200
            judge(path, chosen, answer)
        assert client.get("/ready").status_code == 200
