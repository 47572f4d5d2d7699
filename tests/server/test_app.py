"""Responses carry an id of their request."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest

from tests.server.harness import Running, ScriptedEngine, letters, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ScriptedEngine(letters("x", 1))) as started:
        yield started


def test_both_sdks_find_the_id(server: Running) -> None:
    theirs = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    done = theirs.completions.create(model="tiny", prompt="x", max_tokens=1)
    assert (done._request_id or "").startswith("req_")
    with pytest.raises(anthropic.NotFoundError) as refused:
        anthropic.Anthropic(base_url=server.url, api_key="unused").messages.create(
            model="absent", max_tokens=1, messages=[{"role": "user", "content": "x"}]
        )
    assert (refused.value.request_id or "").startswith("req_")


def test_a_client_may_name_its_request(server: Running) -> None:
    for given, kept in (("trace-7", True), ("x" * 129, False), ("a b", False)):
        answer = httpx.get(f"{server.url}/health", headers={"X-Request-Id": given})
        assert (answer.headers["x-request-id"] == given) == kept
        assert answer.headers["request-id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1//responses", "/v1/responses"),
        ("/v1/chat/completions/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/messages", "/v1/messages"),
    ],
)
def test_wrong_base_urls_are_named(server: Running, path: str, meant: str) -> None:
    answer = httpx.post(server.url + path, json={})
    assert answer.status_code == 404
    assert f"{path} is not served; expected {meant}: the base URL" in answer.text
    assert ("address alone" in answer.text) == (meant == "/v1/messages")


def test_a_final_slash_after_models_and_an_unknown_path(server: Running) -> None:
    assert "expected /v1/models: " in httpx.get(f"{server.url}/v1/models/").text
    assert "the base URL" not in httpx.get(f"{server.url}/v1/unknown").text
