"""Fields, tools and events of /v1/messages: handled, or rejected by name in Anthropic's error format."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import pytest

from farthing.config import EngineConfig
from farthing.engine.request import StructuredOutputsParams
from tests.conversation.test_parse import v3
from tests.server.api.loops import FORMATS
from tests.server.harness import Running, ScriptedEngine, letters, running

USER = [{"role": "user", "content": "hi"}]
BODY: dict[str, Any] = {"messages": USER, "max_tokens": 9}


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("tools", [{"type": "web_search_20250305", "name": "web_search"}], "'web_search_20250305'"),
        ("tools", [{"type": "code_execution_20250825", "name": "code_execution"}], "does not run"),
        ("tools", [{"type": "computer_20250124", "name": "computer"}], "'computer_20250124'"),
        ("tools", [{"name": "f"}], "input_schema"),
        ("mcp_servers", [{"type": "url", "url": "http://x", "name": "x"}], "mcp_servers"),
        ("container", "container_1", "container"),
        ("messages", [{"role": "user", "content": [{"type": "document", "source": {}}]}], "document"),
        ("messages", [{"role": "assistant", "content": [{"type": "server_tool_use"}]}], "server_tool_use"),
        ("stop_sequences", [""], "stop_sequences"),
    ],
)
def test_unsupported_fields_are_rejected_by_name(tiny: Running, field: str, value: Any, named: str) -> None:
    answer = httpx.post(f"{tiny.url}/v1/messages", json=BODY | {field: value}, timeout=30)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert named in answer.json()["error"]["message"]


def test_default_values_are_accepted() -> None:
    body = BODY | {
        "metadata": {"user_id": "me"},
        "service_tier": "auto",
        "container": None,
        "mcp_servers": [],
        "thinking": {"type": "adaptive"},
        "stop_sequences": [],
    }
    with running(ScriptedEngine()) as server:
        answer = httpx.post(f"{server.url}/v1/messages", json=body)
        assert answer.status_code == 200, answer.text


def test_tools_declared_by_anthropic_and_run_by_the_client() -> None:
    write, _ = FORMATS["deepseek_v4"]
    calls: Any = [
        ("bash", {"command": "echo '</x>'"}),
        ("str_replace_based_edit_tool", {"command": "view", "path": "a.py", "view_range": [1, -1]}),
    ]
    engine = ScriptedEngine(letters("</think>" + write(calls)))
    engine.config = EngineConfig(max_model_len=100_000, num_blocks=64, chat_template="deepseek_v4")
    tools: Any = [
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool", "max_characters": 100},
        {"type": "memory_20250818", "name": "memory"},
    ]
    with running(engine) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        answer = client.messages.create(model="tiny", max_tokens=99, messages=USER, tools=tools)  # type: ignore[arg-type]
        used = [(block.name, block.input) for block in answer.content if block.type == "tool_use"]
        assert used == calls and answer.stop_reason == "tool_use"
        for text in ("view_range", "restart", "new_path"):
            assert text in engine.prompts[0]


@pytest.mark.parametrize("field", ["output_format", "output_config"])
def test_structured_output_under_either_name(field: str) -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    engine = ScriptedEngine()
    with running(engine) as server:
        body = BODY | {field: form if field == "output_format" else {"format": form}}
        assert httpx.post(f"{server.url}/v1/messages", json=body).status_code == 200
        assert engine.params[-1].structured_outputs == StructuredOutputsParams(json=form["schema"])  # type: ignore[arg-type]
        both = body | {"output_format": form, "output_config": {"format": form}}
        assert httpx.post(f"{server.url}/v1/messages", json=both).status_code == 400


def test_stream_starts_with_a_ping() -> None:
    with running(ScriptedEngine(["a", "b"])) as server:
        text = httpx.post(f"{server.url}/v1/messages", json=BODY | {"stream": True}).text
        kinds = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
        assert kinds[:3] == ["message_start", "ping", "content_block_start"] and kinds[-1] == "message_stop"


def whole_and_streamed(written: str) -> tuple[list[Any], list[Any]]:
    """The blocks of an answer, whole and as the SDK assembles them from a stream."""
    with running(ScriptedEngine(letters(written))) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        options: Any = {"model": "tiny", "max_tokens": 99, "messages": USER}
        options["tools"] = [{"name": "f", "input_schema": {"type": "object"}}]
        whole = client.messages.create(**options).content
        with client.messages.stream(**options) as stream:
            streamed = stream.get_final_message().content
    return list(whole), list(streamed)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("no JSON", {"_raw": "no JSON"}),
        ("{'a': 1}", {"_raw": "{'a': 1}"}),
        ('{"a": 1, b: 2}', {"a": 1, "_raw": '{"a": 1, b: 2}'}),
        ('{"a": 1, "b": "two"}', {"a": 1, "b": "two"}),
        ("", {}),
        ('{"a": 1e999}', {"_raw": '{"a": 1e999}'}),
        ('{"a": ' + "9" * 5000 + "}", {"_raw": '{"a": ' + "9" * 5000 + "}"}),
    ],
)
def test_arguments_that_are_no_object_are_kept(written: str, value: Any) -> None:
    call = v3([("f", {"x": 1})]).replace('{"x": 1}', written)
    assert written in call
    for content in whole_and_streamed(call):
        assert [block.input for block in content if block.type == "tool_use"] == [value]


def test_blocks_of_whole_answers_are_in_the_order_written() -> None:
    written = f"First.{v3([('f', {'x': 1})])} Then.{v3([('f', {'x': 2}), ('f', {'x': 3})])}"
    for content in whole_and_streamed(written):
        said = [block.input if block.type == "tool_use" else block.text for block in content]
        assert said == ["First.", {"x": 1}, "Then.", {"x": 2}, {"x": 3}]
