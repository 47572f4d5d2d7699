"""Endpoints that do not exist here are refused by name, in the shape of the API that has them."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.server.harness import ScriptedEngine, running

CALLS = [
    ("POST", "/v1/responses/compact", "compaction"),
    ("POST", "/v1/conversations", "previous_response_id"),
    ("GET", "/v1/conversations/conv_1/items", "previous_response_id"),
    ("POST", "/v1/batches", "batches"),
    ("GET", "/v1/files/file_1/content", "files"),
    ("POST", "/v1/audio/speech", "audio"),
    ("POST", "/v1/images/generations", "images"),
    ("POST", "/v1/moderations", "moderations"),
    ("POST", "/v1/fine_tuning/jobs", "fine-tuning"),
    ("POST", "/v1/messages/batches", "message batches"),
    ("GET", "/v1/messages/batches/b_1/results", "message batches"),
    ("POST", "/v1/complete", "/v1/messages"),
]


@pytest.fixture(scope="module")
def server() -> Any:
    with running(ScriptedEngine()) as server:
        yield server


@pytest.mark.parametrize(("method", "path", "named"), CALLS)
def test_endpoints_are_refused_by_name(server: Any, method: str, path: str, named: str) -> None:
    answer = httpx.request(method, server.url + path, json={} if method == "POST" else None)
    assert answer.status_code == 404, answer.text
    error = answer.json()["error"]
    assert error["message"].startswith(f"{path} is not served: ") and named in error["message"]
    if path.startswith(("/v1/messages", "/v1/complete")):
        assert answer.json()["type"] == "error" and error["type"] == "not_found_error"
    else:
        assert error["code"] == "unknown_url" and error["type"] == "invalid_request_error"


def test_the_sdks_understand_the_refusals(server: Any) -> None:
    theirs = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    with pytest.raises(anthropic.NotFoundError, match="message batches"):
        theirs.messages.batches.list()
    with pytest.raises(openai.NotFoundError, match="previous_response_id"):
        server.client().conversations.create()


def test_cancelling_names_the_response(server: Any) -> None:
    answer = server.client().responses.create(model="tiny", input="hi")
    with pytest.raises(openai.BadRequestError, match="only background responses"):
        server.client().responses.cancel(answer.id)
    with pytest.raises(openai.NotFoundError, match="'resp_x' is not stored"):
        server.client().responses.cancel("resp_x")


def test_models_as_either_sdk_reads_them(server: Any) -> None:
    theirs = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    assert [model.id for model in theirs.models.list()] == ["tiny"]
    model = theirs.models.retrieve("tiny")
    assert (model.type, model.display_name) == ("model", "tiny") and model.created_at.year > 2000
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="'gpt'"):
        server.client().models.retrieve("gpt")
    with pytest.raises(anthropic.NotFoundError) as refused:
        theirs.models.retrieve("claude")
    assert refused.value.body == {  # the SDK says that it is Anthropic's
        "type": "error",
        "error": {"type": "not_found_error", "message": "model: got 'claude'; expected one of 'tiny'"},
    }
