"""Every API rejects bad input in its own error format, names the field, and never answers 500."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import openai
import pytest

from farthing.config import EngineConfig
from farthing.server.config import KeyRing
from tests.server.api.loops import FORMATS
from tests.server.harness import Running, ScriptedEngine, events, letters, running

USER = [{"role": "user", "content": "hi"}]
TOOL = {"name": "f", "input_schema": {"type": "object"}}
RESULT = {"type": "tool_result", "tool_use_id": "x", "content": "y"}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "messages"),
        ({"messages": USER}, "max_tokens"),
        ({"messages": [], "max_tokens": 1}, "messages"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": []}], "max_tokens": 1}, "messages[0].content: got []"),
        ({"messages": [{"role": "robot", "content": "x"}], "max_tokens": 1}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 1}, "image"),
        ({"messages": [{"role": "assistant", "content": [RESULT]}], "max_tokens": 1}, "tool_result"),
        ({"messages": USER, "max_tokens": 1, "tools": [TOOL, TOOL]}, "another tool named 'f'"),
        (
            {
                "messages": USER,
                "max_tokens": 1,
                "tools": [{"type": "web_search_20250305", "name": "web_search"}],
            },
            "type",
        ),
        ({"messages": USER, "max_tokens": 1, "tool_choice": {"type": "any"}}, "tool_choice"),
        (
            {
                "messages": USER,
                "max_tokens": 1,
                "tools": [TOOL],
                "tool_choice": {"type": "tool", "name": "g"},
            },
            "'g'",
        ),
        ({"messages": USER, "max_tokens": 1, "model": "claude"}, "'claude'"),
        ({"messages": USER, "max_tokens": 10**9}, "max_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_messages(tiny: Running, body: dict[str, Any], named: str, stream: bool) -> None:
    answer = httpx.post(f"{tiny.url}/v1/messages", json=body | {"stream": stream})
    assert answer.status_code in (400, 404), answer.text
    document = answer.json()
    assert document["type"] == "error" and set(document["error"]) == {"type", "message"}
    assert document["error"]["type"] == (
        "not_found_error" if answer.status_code == 404 else "invalid_request_error"
    )
    assert named in document["error"]["message"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "robot"}]}, "type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "call_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "type"),
        ({"input": "x", "previous_response_id": "resp_x"}, "previous_response_id"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        (
            {"input": "x", "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
            "tools: got []; expected at least 1 item",
        ),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "schema"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "model": "gpt"}, "model"),
        (
            {
                "input": [{"type": "function_call", "name": "f", "call_id": "c", "arguments": "{"}],
                "max_output_tokens": 1,
            },
            "",
        ),
    ],
)
def test_responses(tiny: Running, body: dict[str, Any], named: str) -> None:
    answer = httpx.post(f"{tiny.url}/v1/responses", json=body)
    if not named:
        assert answer.status_code == 200  # this format treats arguments as text
        return
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert named in f"{error['message']} {error['param']}"


def test_keys_are_accepted_in_either_header() -> None:
    with running(ScriptedEngine(), keys=KeyRing(["me:secret"])) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0)
        call: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "messages": USER}
        assert client.messages.create(**call).content
        with pytest.raises(anthropic.AuthenticationError) as refused:
            anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0).messages.create(**call)
        assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
        bearer = anthropic.Anthropic(base_url=server.url, auth_token="secret", api_key=None, max_retries=0)
        assert bearer.messages.create(**call).content


def test_responses_are_private_to_their_key() -> None:
    with running(ScriptedEngine(), keys=KeyRing(["a:one", "b:two"])) as server:
        mine = server.client("one").responses
        first = mine.create(model="tiny", input="hi")
        assert mine.retrieve(first.id).output_text == "ok"
        assert mine.create(model="tiny", input="again", previous_response_id=first.id).output_text == "ok"
        other = server.client("two").responses
        with pytest.raises(openai.NotFoundError, match="is not stored"):
            other.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match="is not stored"):
            other.create(model="tiny", input="x", previous_response_id=first.id)
        unkept = mine.create(model="tiny", input="hi", store=False)
        with pytest.raises(openai.NotFoundError):
            mine.retrieve(unkept.id)
        mine.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            mine.retrieve(first.id)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_engine_failure_within_a_stream(path: str) -> None:
    with running(ScriptedEngine(["a", "b"], finish_reason="error")) as server:
        body = {"messages": USER, "max_tokens": 9, "input": "hi", "stream": True}
        text = httpx.post(f"{server.url}{path}", json=body).text
        last = events(text)[-1]
        assert last["type"] == ("error" if path == "/v1/messages" else "response.failed")
        assert "engine ended the request" in text


def test_truncated_and_stopped() -> None:
    call = '<｜DSML｜tool_calls><｜DSML｜invoke name="f"><｜DSML｜parameter name="a" string="true">tex'
    engine = ScriptedEngine(letters("why</think>" + call), finish_reason="length")
    engine.config = EngineConfig(max_model_len=10_000, chat_template="deepseek_v4")
    with running(engine) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        options: dict[str, Any] = {"model": "tiny", "max_tokens": 99, "messages": USER, "tools": [TOOL]}
        whole = client.messages.create(**options)
        assert whole.stop_reason == "max_tokens" and [b.type for b in whole.content] == [
            "thinking",
            "tool_use",
        ]
        tools: Any = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
        cut = server.client().responses.create(model="tiny", input="hi", tools=tools)
        assert cut.status == "incomplete" and cut.output[-1].arguments == '{"a": "tex'  # type: ignore[union-attr]
        assert cut.incomplete_details and cut.incomplete_details.reason == "max_output_tokens"
        # Each client can send the truncated call back, with the result that it was no valid call.
        assert whole.content[-1].input == {"a": "tex"}  # type: ignore[union-attr]
        said: Any = {"role": "assistant", "content": [block.model_dump() for block in whole.content]}
        told: Any = RESULT | {"tool_use_id": whole.content[-1].id}  # type: ignore[union-attr]
        options["messages"] = [*USER, said, {"role": "user", "content": [told]}]
        assert client.messages.create(**options).content
        output: Any = {"type": "function_call_output", "call_id": cut.output[-1].call_id, "output": "y"}  # type: ignore[union-attr]
        sent: Any = [item.model_dump(exclude_none=True) for item in cut.output]
        again = server.client().responses.create(model="tiny", input=[*USER, *sent, output], tools=tools)
        assert again.output
        assert all('string="true">tex</｜DSML｜parameter>' in prompt for prompt in engine.prompts[2:])


def test_count_tokens(tiny: Running) -> None:
    client = anthropic.Anthropic(base_url=tiny.url, api_key="none", max_retries=0)
    options: Any = {"model": "tiny", "messages": USER, "system": "Be brief."}
    count = client.messages.count_tokens(**options).input_tokens
    answer = client.messages.create(max_tokens=1, **options)
    assert count == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert client.messages.count_tokens(tools=[TOOL], **options).input_tokens > count


def test_billing_header_keeps_prefix_cache_hits() -> None:
    engine = ScriptedEngine()
    with running(engine) as server:
        for number in range(2):
            system = [
                {"type": "text", "text": f"x-anthropic-billing-header: {number}"},
                {"type": "text", "text": "S"},
            ]
            body = {"messages": USER, "max_tokens": 9, "system": system}
            assert httpx.post(f"{server.url}/v1/messages", json=body).status_code == 200
        assert engine.prompts[0] == engine.prompts[1]


def test_namespaces_texts_and_unsupported_tools() -> None:
    patch = '*** Begin "Patch"\n+é'
    write, _ = FORMATS["deepseek_v4"]
    calls = [("agents.close", {"target": "a"}), ("patch", {"input": patch})]
    engine = ScriptedEngine(letters("</think>" + write(calls)))
    engine.config = EngineConfig(max_model_len=100_000, chat_template="deepseek_v4")
    tools: Any = [
        {
            "type": "namespace",
            "name": "agents",
            "description": "x",
            "tools": [{"type": "function", "name": "close"}],
        },
        {
            "type": "custom",
            "name": "patch",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"},
        },
        {"type": "web_search", "external_web_access": False},
    ]
    with running(engine) as server:
        create = server.client().responses.create
        close, edit = create(model="tiny", input="hi", tools=tools).output
        assert (close.type, close.name, close.namespace) == ("function_call", "close", "agents")  # type: ignore[union-attr]
        assert (edit.type, edit.name, edit.input) == ("custom_tool_call", "patch", patch)  # type: ignore[union-attr]
        assert "not available: web_search" in engine.prompts[0] and "start: X" in engine.prompts[0]
        items: Any = [
            {"role": "user", "content": "hi"},
            *(item.model_dump(exclude_none=True) for item in (close, edit)),
            {"type": "function_call_output", "call_id": close.call_id, "output": "closed"},  # type: ignore[union-attr]
            {"type": "custom_tool_call_output", "call_id": edit.call_id, "output": "patched"},  # type: ignore[union-attr]
        ]
        create(model="tiny", input=items, tools=tools)
        assert all(text in engine.prompts[1] for text in ("agents.close", patch, "closed", "patched"))
        assert engine.prompts[1].startswith(engine.prompts[0])
        kinds = [event.type for event in create(model="tiny", input="hi", tools=tools, stream=True)]
        assert kinds.count("response.custom_tool_call_input.done") == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": {"a": 1}}, "prompt: got {'a': 1}; expected a string or a list"),
        ({"max_tokens": "many"}, "max_tokens: got 'many'; expected an integer"),
        ({"guided_json": 5}, "guided_json: got 5; expected an object or a string"),
        ({"guided_choice": []}, "guided_choice: got []; expected at least 1 item"),
        ({"stop": 5}, "stop: got 5; expected a string or a list"),
    ],
)
def test_errors_name_the_field_its_value_and_every_accepted_type(
    tiny: Running, fields: dict[str, Any], message: str
) -> None:
    answer = httpx.post(f"{tiny.url}/v1/completions", json={"prompt": "x"} | fields)
    assert answer.status_code == 400 and answer.json()["error"]["message"] == message


def test_errors_do_not_call_a_grammar_of_the_request_a_tool(tiny: Running) -> None:
    answer = httpx.post(f"{tiny.url}/v1/completions", json={"prompt": "x", "guided_grammar": "start: ((("})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("guided_grammar is not accepted")
