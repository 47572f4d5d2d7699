"""Malformed and hostile bodies: always a clear error in OpenAI's format, never a 500 or a dead server."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.harness import Running, running, tiny_engine

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    """A server that rejects unknown fields, so that each body below is invalid on every path."""
    with running(tiny_engine(), strict_fields=True) as server:
        yield server


def check(answer: httpx.Response) -> None:
    assert answer.status_code in (400, 404, 405, 413, 415), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]


BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe",
    b"{" * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"prompt": NaN}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"prompt": "x", "max_tokens": true}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "user": "\\ud800"}',
    b'{"\\ud800": 1, "prompt": "x"}',
    b'{"prompt": "x", "__proto__": {}}',
    b'{"messages": [{"role": "user", "content": "\\udfff"}]}',
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("number", range(len(BODIES)))
def test_malformed(tiny: Running, path: str, number: int) -> None:
    check(httpx.post(tiny.url + path, content=BODIES[number], headers={"content-type": "application/json"}))


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/json; charset=x"]
)
def test_content_types(tiny: Running, kind: str | None) -> None:
    headers = {"content-type": kind} if kind else {}
    answer = httpx.post(f"{tiny.url}/v1/completions", content=b'{"prompt": 7}', headers=headers)
    check(answer)


FREE_FORM = [
    {"messages": [{"role": "user", "content": "x", "extra": "\ud800"}]},
    {
        "messages": USER,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"\ud800": 1}}}],
    },
    {"messages": USER, "chat_template_kwargs": {"x": "\ud800"}},
    {"messages": USER, "guided_json": {"const": "\ud800"}},
    {
        "messages": USER,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "\ud800"}}},
    },
    {"messages": USER, "guided_grammar": "start: /(/"},
    {"messages": USER, "guided_json": {"$ref": "#/nowhere"}},
    {"messages": USER, "guided_json": "{not json"},
    {"messages": USER, "guided_choice": []},
    {"messages": USER, "guided_choice": ["\ud800"]},
    {"messages": USER, "guided_regex": "\ud800"},
    {"messages": USER, "stop": "\ud800"},
]


@pytest.mark.parametrize("number", range(len(FREE_FORM)))
def test_free_form_fields(tiny: Running, number: int) -> None:
    body = json.dumps(FREE_FORM[number]).encode()
    check(
        httpx.post(
            f"{tiny.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("prompt", "messages", "n", "stop", "seed", "logprobs", "tools", "tool_choice", "response_format"),
        *("stream_options", "logit_bias", "structured_outputs", "guided_json", "chat_template_kwargs"),
        *("cache_salt", "metadata"),
    ]
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS[:2]), st.dictionaries(FIELDS, JSON, max_size=3))
def test_any_json_gets_an_answer_or_a_client_error(
    tiny: Running, path: str, fields: dict[str, object]
) -> None:
    base = {"prompt": "x"} if path == PATHS[0] else {"messages": USER}
    body = json.dumps(base | {"max_tokens": 1} | fields).encode()
    answer = httpx.post(tiny.url + path, content=body, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        check(answer)


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: ::1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
    ],
)
def test_malformed_http_does_no_harm(tiny: Running, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=10) as connection:
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except OSError:
            pass  # the server may close the connection at any point
    assert httpx.get(f"{tiny.url}/ready").status_code == 200
