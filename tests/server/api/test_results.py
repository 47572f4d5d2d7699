"""Every tool result answers a call of the conversation, once, in all three APIs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.conversation.test_parse import v3
from tests.server.clients.model import engine as scripted
from tests.server.harness import Running, ScriptedEngine, running

USER = {"role": "user", "content": "hi"}
Turns = list[tuple[str, str]]  # ("call" or "result", id)


def chat(turns: Turns) -> dict[str, Any]:
    """The turns in a body of /v1/chat/completions."""
    messages: list[dict[str, Any]] = [USER]
    for kind, identity in turns:
        call = {"id": identity, "type": "function", "function": {"name": "f", "arguments": "{}"}}
        messages.append(
            {"role": "assistant", "tool_calls": [call]}
            if kind == "call"
            else {"role": "tool", "tool_call_id": identity, "content": "found"}
        )
    return {"messages": messages}


def responses(turns: Turns) -> dict[str, Any]:
    """The turns in a body of /v1/responses."""
    return {
        "input": [
            USER,
            *(
                {"type": "function_call", "call_id": identity, "name": "f", "arguments": "{}"}
                if kind == "call"
                else {"type": "function_call_output", "call_id": identity, "output": "found"}
                for kind, identity in turns
            ),
        ]
    }


def messages(turns: Turns) -> dict[str, Any]:
    """The turns in a body of /v1/messages."""
    blocks = [
        {"role": "assistant", "content": [{"type": "tool_use", "id": identity, "name": "f", "input": {}}]}
        if kind == "call"
        else {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": identity, "content": "found"}],
        }
        for kind, identity in turns
    ]
    return {"messages": [USER, *blocks], "max_tokens": 9}


APIS: dict[str, tuple[Callable[[Turns], dict[str, Any]], str]] = {
    "/v1/chat/completions": (chat, "messages[{}].tool_call_id"),
    "/v1/responses": (responses, "input[{}].call_id"),
    "/v1/messages": (messages, "messages[{}].content[0].tool_use_id"),
}


@pytest.fixture(scope="module")
def server() -> Any:
    with running(ScriptedEngine()) as server:
        yield server


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize(
    ("turns", "position", "reason"),
    [
        ([("result", "a")], 1, "got 'a'; no earlier call is without a result"),
        (
            [("call", "a"), ("result", "b")],
            2,
            "got 'b'; expected the id of an earlier call without a result: 'a'",
        ),
        ([("result", "a"), ("call", "a")], 1, "got 'a'; no earlier call"),
        ([("call", "a"), ("result", "a"), ("result", "a")], 3, "got 'a', whose call already has a result"),
    ],
)
def test_a_result_without_a_call_is_refused(
    server: Running, path: str, turns: Turns, position: int, reason: str
) -> None:
    body, field = APIS[path]
    field = field.format(position)
    answer = httpx.post(server.url + path, json=body(turns))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and f"{field}: {reason}" in error["message"]
    assert path == "/v1/messages" or error["param"] == field


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize(
    "turns",
    [
        [("call", "a")],
        [("call", "a"), ("call", "b"), ("result", "b")],
        [("call", "a"), ("result", "a"), ("call", "a"), ("result", "a")],
    ],
)
def test_unanswered_calls_and_repeated_ids_are_accepted(server: Running, path: str, turns: Turns) -> None:
    answer = httpx.post(server.url + path, json=APIS[path][0](turns))
    assert answer.status_code == 200, answer.text


def test_counting_and_tokenizing_refuse_them_too(server: Running) -> None:
    turns: Turns = [("result", "a")]
    for path, body in (
        ("/tokenize", chat(turns)),
        ("/v1/responses/input_tokens", responses(turns)),
        ("/v1/messages/count_tokens", messages(turns)),
    ):
        answer = httpx.post(server.url + path, json=body)
        assert answer.status_code == 400 and "no earlier call" in answer.json()["error"]["message"], path


def test_calls_of_stored_responses_are_answered() -> None:
    with running(ScriptedEngine([v3([("f", {})])])) as server:
        tools: Any = [{"type": "function", "name": "f"}]
        first = server.client().responses.create(model="tiny", input="hi", tools=tools)
        (item,) = first.output
        output: Any = {"type": "function_call_output", "call_id": item.call_id, "output": "found"}  # type: ignore[union-attr]
        body = {"input": [output], "previous_response_id": first.id}
        answer = httpx.post(f"{server.url}/v1/responses", json=body)
        assert answer.status_code == 200, answer.text
        output["call_id"] = "call_of_another"
        error = httpx.post(f"{server.url}/v1/responses", json=body).json()["error"]
        assert error["param"] == "input[0].call_id" and repr(item.call_id) in error["message"]  # type: ignore[union-attr]


def test_results_without_ids_answer_calls_in_turn(server: Running) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    bare: dict[str, Any] = {"role": "tool", "content": "found"}
    older = {"role": "function", "name": "f", "content": "found"}
    made = {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}
    for turns, status in (
        ([{"role": "assistant", "tool_calls": [call, call]}, bare, bare], 200),
        ([{"role": "assistant", "tool_calls": [call | {"id": "a"}]}, bare], 200),
        ([made, older], 200),
        ([made, bare], 200),
        ([bare], 400),
    ):
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": [USER, *turns]})
        assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == "messages[1].tool_call_id"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
@pytest.mark.parametrize("name", ["mistral_7b", "kimi_k2"])
def test_calls_without_ids_get_some(name: str, path: str) -> None:
    """Ollama's clients send none. Mistral's template refuses that, and Kimi's results name their calls."""
    written: Any = (lambda given: given) if path == "/api/chat" else json.dumps
    calls = [{"function": {"name": "f", "arguments": written({"n": n})}} for n in (1, 2)]
    results = [{"role": "tool", "content": f"found {n}"} for n in (1, 2)]
    engine = scripted(name)
    with running(engine) as server:
        for content in ("", "more"):  # the ids are the same in the next turn
            turns = [USER, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
            turns += [{"role": "assistant", "content": "ok"}, USER | {"content": content}] * bool(content)
            answer = httpx.post(server.url + path, json={"model": "tiny", "messages": turns}, timeout=60)
            assert answer.status_code == 200, answer.text
    first, second = engine.prompts
    made = r'"id": "(\w{9})"' if name == "mistral_7b" else r"<\|tool_call_begin\|>(functions\.f:\d)"
    found = r'"call_id": "(\w{9})"' if name == "mistral_7b" else r"## Return of (functions\.f:\d)"
    identities = re.findall(made, first)
    assert len(set(identities)) == 2 and re.findall(found, first) == identities == re.findall(made, second)
