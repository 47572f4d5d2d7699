"""Fields and items of /v1/responses that affect an answer: handled, or rejected by name."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from farthing.config import EngineConfig
from farthing.server.config import KeyRing
from tests.server.api.loops import FORMATS
from tests.server.harness import Running, ScriptedEngine, letters, running


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("background", True),
        ("conversation", "conv_1"),
        ("conversation", {"id": "conv_1"}),
        ("prompt", {"id": "pmpt_1"}),
        ("top_logprobs", 3),
        ("include", ["message.output_text.logprobs"]),
        ("include", ["everything"]),
        ("truncation", "middle"),
        ("max_output_tokens", 0),
        ("input", [5]),
        ("input", [None]),
        ("input", [{"type": ["message"]}]),
        ("input", [{"id": 5}]),
        ("input", [{"type": "computer_call", "call_id": "c"}]),
        ("input", [{"type": "image_generation_call", "id": "c"}]),
        ("input", [{"type": "local_shell_call", "action": {}}]),
        ("input", [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}]),
    ],
)
def test_unsupported_fields_are_rejected_by_name(tiny: Running, field: str, value: Any) -> None:
    answer = httpx.post(f"{tiny.url}/v1/responses", json={"input": "hi"} | {field: value}, timeout=30)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert field in f"{error['message']} {error['param']}" and error["type"] == "invalid_request_error"


def test_default_values_are_accepted() -> None:
    body = {
        "input": "hi",
        "background": False,
        "conversation": None,
        "include": ["reasoning.encrypted_content", "web_search_call.results"],
        "max_tool_calls": 3,
        "truncation": "disabled",
        "top_logprobs": 0,
        "service_tier": "flex",
    }
    with running(ScriptedEngine()) as server:
        answer = httpx.post(f"{server.url}/v1/responses", json=body)
        assert answer.status_code == 200 and answer.json()["truncation"] == "disabled", answer.text


def test_oldest_turns_are_dropped_until_the_rest_fits() -> None:
    engine = ScriptedEngine(max_model_len=300)
    items: list[Any] = []
    for number in range(12):
        items += [
            {"role": "user", "content": f"question {number} " + "x" * 30},
            {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": f"c{number}", "output": f"result {number}"},
        ]
    body = {"input": items, "instructions": "Be brief.", "max_output_tokens": 20}
    with running(engine) as server:
        url = f"{server.url}/v1/responses"
        assert httpx.post(url, json=body).json()["error"]["code"] == "context_length_exceeded"
        answer = httpx.post(url, json=body | {"truncation": "auto"})
        assert answer.status_code == 200 and answer.json()["truncation"] == "auto", answer.text
        prompt = engine.prompts[-1]
        assert answer.json()["usage"]["input_tokens"] <= 280
        assert "Be brief." in prompt and "question 11" in prompt and "result 11" in prompt
        assert "question 0" not in prompt and "result 0" not in prompt
        kept = [number for number in range(12) if f"question {number} " in prompt]
        assert kept == list(range(kept[0], 12))
        hopeless = {"input": "x" * 500, "truncation": "auto"}
        assert httpx.post(url, json=hopeless).json()["error"]["code"] == "context_length_exceeded"


def test_instructions_alone_have_no_turn_to_drop() -> None:
    body = {"input": [], "instructions": "Be brief.", "truncation": "auto"}
    with running(ScriptedEngine()) as server:
        answer = httpx.post(f"{server.url}/v1/responses/input_tokens", json=body)
        assert answer.status_code == 200, answer.text


def test_references_to_items_of_earlier_answers() -> None:
    write, _ = FORMATS["deepseek_v4"]
    engine = ScriptedEngine(letters("A thought.</think>Now: " + write([("f", {"x": "é"})])))
    engine.config = EngineConfig(max_model_len=100_000, num_blocks=64, chat_template="deepseek_v4")
    tools: Any = [{"type": "function", "name": "f"}]
    with running(engine, keys=KeyRing(["a:one", "b:two"])) as server:
        create = server.client("one").responses.create
        first = create(model="tiny", input="hi", tools=tools)
        items: Any = [
            {"role": "user", "content": "hi"},
            *({"type": "item_reference", "id": item.id} for item in first.output),
            {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "done"},  # type: ignore[union-attr]
        ]
        create(model="tiny", input=items, tools=tools)
        assert engine.prompts[1].startswith(engine.prompts[0])
        for said in ("A thought.", "Now:", '"f"', "é", "done"):
            assert said in engine.prompts[1].removeprefix(engine.prompts[0])
        for client, message in (("two", items), ("one", [{"id": "msg_unknown"}])):
            with pytest.raises(openai.NotFoundError, match="not stored"):
                server.client(client).responses.create(model="tiny", input=message, tools=tools)


CARRIED: list[tuple[list[dict[str, Any]], list[str]]] = [
    (
        [
            {
                "type": "local_shell_call",
                "id": "i",
                "call_id": "c",
                "action": {"type": "exec", "command": ["ls"]},
            },
            {"type": "local_shell_call_output", "id": "c", "output": '{"stdout": "a.txt"}'},
        ],
        ["local_shell", "ls", "a.txt"],
    ),
    (
        [
            {"type": "shell_call", "call_id": "c", "action": {"commands": ["ls"]}, "status": "completed"},
            {"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "a.txt", "stderr": ""}]},
        ],
        ["shell", "ls", "a.txt"],
    ),
    (
        [
            {
                "type": "apply_patch_call",
                "call_id": "c",
                "operation": {"type": "delete_file", "path": "b.txt"},
            },
            {"type": "apply_patch_call_output", "call_id": "c", "status": "completed", "output": "gone"},
        ],
        ["apply_patch", "b.txt", "gone"],
    ),
    (
        [
            {
                "type": "web_search_call",
                "id": "w",
                "status": "completed",
                "action": {"type": "search", "query": "q7"},
            }
        ],
        ["web_search", "q7", "completed"],
    ),
    (
        [
            {
                "type": "mcp_call",
                "id": "m",
                "name": "go",
                "server_label": "s",
                "arguments": "{}",
                "output": "came",
            }
        ],
        ["mcp", "go", "came"],
    ),
    (
        [
            {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "zzz"},
            {"role": "assistant", "content": "ok"},
        ],
        ["ok"],
    ),
]


@pytest.mark.parametrize(("items", "printed"), CARRIED, ids=[items[0]["type"] for items, _ in CARRIED])
@pytest.mark.parametrize("format_", ["deepseek_v32", "deepseek_v4", "kimi_k2", "glm45"])
def test_items_of_a_conversation_started_elsewhere(format_: str, items: Any, printed: list[str]) -> None:
    engine = ScriptedEngine()
    engine.config = EngineConfig(max_model_len=100_000, num_blocks=64, chat_template=format_)
    with running(engine) as server:
        said = [{"role": "user", "content": "hi"}, *items, {"role": "user", "content": "and?"}]
        answer = httpx.post(f"{server.url}/v1/responses", json={"input": said})
        assert answer.status_code == 200, answer.text
        assert all(text in engine.prompts[-1] for text in printed)
