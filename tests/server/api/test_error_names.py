"""Every API answers every kind of error with its own shape, and the names that its publisher uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import anthropic
import httpx
import openai
import pytest

from farthing.engine.request import QueueFull
from farthing.server.config import KeyRing
from tests.server.harness import Running, ScriptedEngine, running

USER = [{"role": "user", "content": "hi"}]
OPENAI = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": USER},
    "/v1/responses": {"input": "hi"},
    "/v1/responses/input_tokens": {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
}
ANTHROPIC = {
    "/v1/messages": {"messages": USER, "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": USER},
}
BODIES: dict[str, dict[str, Any]] = OPENAI | ANTHROPIC
GENERATES = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
JSON = {"Content-Type": "application/json"}
INVALID, KEY = "invalid_request_error", {"keys": KeyRing(["me:secret"])}
Send = Callable[[str, dict[str, Any]], httpx.Response]


def post(url: str, body: dict[str, Any], **options: Any) -> httpx.Response:
    return httpx.post(url, json=body, timeout=30, **options)


def full(engine: ScriptedEngine) -> None:
    engine.error = QueueFull("8 requests wait")


def broken(engine: ScriptedEngine) -> None:
    engine.error = RuntimeError("a defect")


def short(engine: ScriptedEngine) -> None:
    engine.config = replace(engine.config, max_model_len=4)


@dataclass(frozen=True)
class Case:
    """A kind of error: how to cause it, and what each API answers. reason: X-Error-Code, if not the code."""

    status: int
    kind: str
    code: str | None
    anthropic: str
    send: Send = post
    config: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[ScriptedEngine], None] | None = None
    paths: tuple[str, ...] = tuple(BODIES)
    reason: str | None = None


def changed(**fields: Any) -> Send:
    return lambda url, body: post(url, body | fields)


CASES = {
    "no JSON": Case(400, INVALID, None, INVALID, lambda url, _: httpx.post(url, content=b"{", headers=JSON)),
    "not said to be JSON": Case(400, INVALID, None, INVALID, lambda url, _: httpx.post(url, content=b"{}")),
    "a field is missing": Case(
        400, INVALID, "missing_required_parameter", INVALID, lambda url, _: post(url, {}),
        paths=tuple(path for path in BODIES if path not in ("/tokenize",)),
    ),
    "a wrong type": Case(400, INVALID, "invalid_type", INVALID, changed(model=5)),
    "a wrong value": Case(
        400, INVALID, "invalid_value", INVALID, changed(temperature=-1, prompt="hi"), paths=GENERATES
    ),
    "an unknown field": Case(
        400, INVALID, "unknown_parameter", INVALID, changed(foo=1), config={"strict_fields": True}
    ),
    "too long a prompt": Case(
        400, INVALID, "context_length_exceeded", INVALID, prepare=short, paths=GENERATES
    ),
    "no key": Case(401, INVALID, "invalid_api_key", "authentication_error", config=KEY),
    "another host": Case(
        403, INVALID, "host_not_allowed", "permission_error",
        lambda url, body: post(url, body, headers={"Host": "example.com"}),
    ),
    "another model": Case(404, INVALID, "model_not_found", "not_found_error", changed(model="gpt")),
    "an unknown path": Case(
        404, INVALID, "unknown_url", "not_found_error", lambda url, body: post(f"{url}/more/of/it", body)
    ),
    "another method": Case(
        405, INVALID, "method_not_supported", INVALID, lambda url, _: httpx.put(url, json={})
    ),
    "too large a body": Case(
        413, INVALID, "request_too_large", "request_too_large", config={"max_body_bytes": 9}
    ),
    "a full queue": Case(
        429, "requests", "rate_limit_exceeded", "rate_limit_error",
        prepare=full, paths=GENERATES, reason="queue_full",
    ),
    "too many tokens": Case(
        429, "tokens", "rate_limit_exceeded", "rate_limit_error",
        config={"tokens_per_minute": 1}, paths=GENERATES, reason="tokens_quota_exceeded",
    ),
    "a defect": Case(500, "server_error", None, "api_error", prepare=broken, paths=GENERATES),
}  # fmt: skip


def check(answer: httpx.Response, path: str, case: Case) -> None:
    assert answer.status_code == case.status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("x-error-code") == (case.reason or case.code)
    document = answer.json()
    error = document["error"]
    assert error["message"]
    if path in ANTHROPIC:
        assert (set(document), document["type"]) == ({"type", "error"}, "error")
        assert error == {"type": case.anthropic, "message": error["message"]}
    else:
        assert set(document) == {"error"} and set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == (case.kind, case.code)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_names(case: Case) -> None:
    engine = ScriptedEngine()
    with running(engine, **case.config) as server:
        if case.prepare is not None:
            case.prepare(engine)
        for path in case.paths:
            check(case.send(server.url + path, BODIES[path]), path, case)


def test_loading() -> None:
    loading = Case(503, "service_unavailable_error", "not_ready", "overloaded_error")
    with running(None) as server:
        for path, body in BODIES.items():
            answer = post(server.url + path, body)
            check(answer, path, loading)
            assert int(answer.headers["retry-after"]) > 0


CLASSES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
}


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.status in CLASSES])
def test_clients_recognize_them(case: Case) -> None:
    if case.send is not post:
        return
    engine = ScriptedEngine()
    with running(engine, **case.config) as server:
        if case.prepare is not None:
            case.prepare(engine)
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        with pytest.raises(getattr(anthropic, CLASSES[case.status])):
            client.messages.create(model="tiny", max_tokens=9, messages=[{"role": "user", "content": "hi"}])
        with pytest.raises(getattr(openai, CLASSES[case.status])) as refused:
            server.client().responses.create(model="tiny", input="hi")
        assert (refused.value.type, refused.value.code) == (case.kind, case.code)


def test_continuing_a_response_that_is_not_stored(tiny: Running) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        tiny.client().responses.create(model="tiny", input="hi", previous_response_id="resp_0")
    error = refused.value
    assert (error.code, error.param) == ("previous_response_not_found", "previous_response_id")
