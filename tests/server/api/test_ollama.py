"""/api/…: Ollama's API, by plain HTTP and with its own client where that is installed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import pytest

from farthing.engine.request import RequestMetrics
from farthing.server.api.ollama import FOREVER, seconds
from tests.server.harness import Running, ScriptedEngine, letters, running, tiny_engine
from tests.server.test_chat import CALL, PARAMETERS, THINKING, TOOLS, USER


def post(server: Running, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/api/{path}", json={"model": "tiny"} | body, timeout=60)


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


def check_end(document: dict[str, Any]) -> None:
    assert document["done"] is True and document["done_reason"] in ("stop", "length")
    counts = {name: document[name] for name in document if name.endswith(("_count", "_duration"))}
    assert len(counts) == 6 and all(isinstance(count, int) for count in counts.values())
    spent = counts["prompt_eval_duration"], counts["eval_duration"]
    assert min(spent) > 0 and counts["total_duration"] >= sum(spent)


def test_durations_are_those_of_the_engine() -> None:
    engine = ScriptedEngine(["Pa", "ris"])
    for number in (1, 2):
        engine.metrics[f"scripted-{number}"] = RequestMetrics(99.0, 100.0, 102.0, 107.0)
    with running(engine) as server:
        whole = post(server, "generate", prompt="a", stream=False).json()
        for end in (whole, lines(post(server, "generate", prompt="a"))[-1]):
            assert (end["prompt_eval_duration"], end["eval_duration"]) == (2 * 10**9, 5 * 10**9)


@pytest.mark.parametrize("path", ["chat", "generate"])
@pytest.mark.parametrize("top", [None, 0, 2])
def test_log_probabilities_are_those_of_chat_completions_in_one_piece_and_in_many(
    path: str, top: int | None
) -> None:
    with running(tiny_engine()) as server:
        asked = {"messages": USER} if path == "chat" else {"prompt": "a"}
        wish: dict[str, Any] = {"logprobs": True, **({} if top is None else {"top_logprobs": top})}
        options = {"temperature": 0, "num_predict": 12}
        whole = post(server, path, **asked, **wish, options=options, stream=False).json()
        found = [
            line.get("logprobs", []) for line in lines(post(server, path, **asked, **wish, options=options))
        ]
        body = {
            "model": "tiny",
            "messages": USER if path == "chat" else [{"role": "user", "content": "a"}],
            "temperature": 0,
            "max_tokens": 12,
            **wish,
        }
        chat = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert whole["logprobs"] == chat["choices"][0]["logprobs"]["content"] != []
        assert [entry for entries in found for entry in entries] == whole["logprobs"]
        assert {len(entry["top_logprobs"]) for entry in whole["logprobs"]} == {top or 0}
        assert "logprobs" not in post(server, path, **asked, options=options, stream=False).json()
        refused = post(server, path, **asked, top_logprobs=1)
        assert refused.status_code == 400 and "needs logprobs" in refused.json()["error"]


def test_only_web_pages_must_declare_json() -> None:
    form, body = "application/x-www-form-urlencoded", b'{"model": "tiny", "prompt": "a", "stream": false}'
    with running(ScriptedEngine(["Pa", "ris"])) as server:

        def status(path: str = "/api/generate", **headers: str) -> int:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return httpx.post(server.url + path, content=body, headers=named).status_code

        assert status() == status(content_type=form) == 200
        assert status(content_type="text/plain") == status("/v1/completions", content_type=form) == 400
        for page in ({"origin": "null"}, {"referer": "http://a.example"}, {"sec_fetch_site": "cross-site"}):
            assert status(content_type=form, **page) == status(**page) == 400


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        (ScriptedEngine(chat_template=THINKING), ["completion", "tools", "thinking"]),
        (
            ScriptedEngine(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"),
            ["completion", "tools"],
        ),
        ("Org/Some-Embedding-GGUF.gguf", ["embedding"]),
    ],
)
def test_capabilities_are_those_of_the_chat_format(engine: Any, expected: list[str]) -> None:
    if isinstance(engine, str):
        name, engine = engine, ScriptedEngine()
        engine.config = replace(engine.config, model=name)
    with running(engine) as server:
        shown = post(server, "show").json()
    assert shown["capabilities"] == expected
    stored = "gguf" if expected == ["embedding"] else "safetensors"
    assert shown["details"]["format"] == stored


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_chat_streams_text_thinking_and_whole_calls(size: int) -> None:
    script = letters(f"Hm.</think>{CALL}", size)
    with running(ScriptedEngine(script, chat_template=THINKING)) as server:
        streamed = lines(post(server, "chat", messages=USER, tools=TOOLS))
        whole = post(server, "chat", messages=USER, tools=TOOLS, stream=False).json()
    messages = [line["message"] for line in streamed]
    assert "".join(each["content"] for each in messages) == whole["message"]["content"] == "Let me look."
    assert "".join(each.get("thinking", "") for each in messages) == whole["message"]["thinking"] == "Hm."
    (calls,) = [each["tool_calls"] for each in messages if "tool_calls" in each]
    for made in (calls, whole["message"]["tool_calls"]):
        assert [call["function"] for call in made] == [
            {"index": 0, "name": "weather", "arguments": {"city": "Paris", "days": 2}},
            {"index": 1, "name": "now", "arguments": {}},
        ]
    check_end(streamed[-1])
    check_end(whole)
    assert not any(line["done"] for line in streamed[:-1])


def test_results_of_calls_reach_the_prompt() -> None:
    engine = ScriptedEngine(["ok"])
    call = {"function": {"name": "weather", "arguments": {"city": "Rome", "days": 1}}}
    turns = [*USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with running(engine) as server:
        turns.append({"role": "tool", "tool_name": "weather", "content": "18 degrees"})
        assert lines(post(server, "chat", messages=turns, tools=TOOLS))[-1]["done"]
        assert "18 degrees" in engine.prompts[0] and '"Rome"' in engine.prompts[0]
        stray = post(server, "chat", messages=turns[-1:])
        assert stray.status_code == 400 and "no earlier call" in stray.json()["error"]


def test_options_become_sampling_parameters_and_unknown_ones_are_named() -> None:
    engine = ScriptedEngine(["ok"])
    options = {
        "temperature": 0, "top_k": 5, "top_p": 0.5, "seed": 7, "stop": ["\n"], "num_predict": 9,
        "repeat_penalty": 1.5, "num_ctx": 8192, "mirostat": 1,
    }  # fmt: skip
    with running(engine) as server:
        answer = post(server, "generate", prompt="a", options=options, stream=False)
        assert answer.headers["x-farthing-ignored"] == "options.num_ctx, options.mirostat", answer.headers
        params = engine.params[0]
        assert (params.temperature, params.top_k, params.top_p, params.seed) == (0, 5, 0.5, 7)
        assert (params.max_tokens, params.stop, params.repetition_penalty) == (9, ["\n"], 1.5)
        post(server, "generate", prompt="a", options={"num_predict": -1}, stream=False)
        assert engine.params[1].max_tokens is None
        for wrong in ({"temperature": -1}, {"top_k": "x"}, {"seed": 0.5}):
            refused = post(server, "generate", prompt="a", options=wrong)
            (name,) = wrong
            assert refused.status_code == 400 and f"options.{name}" in refused.json()["error"]


def test_generate_with_and_without_a_template() -> None:
    engine = ScriptedEngine(["Pa", "ris"])
    with running(engine) as server:
        streamed = lines(post(server, "generate", prompt="Capital?", system="Be brief."))
        assert "".join(line["response"] for line in streamed) == "Paris"
        assert "Be brief." in engine.prompts[0] and engine.prompts[0] != "Capital?"
        raw = post(server, "generate", prompt="Capital?", raw=True, stream=False).json()
        assert raw["response"] == "Paris" and engine.prompts[1].endswith("Capital?")
        assert "<｜User｜>" not in engine.prompts[1]
        check_end(raw)


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_a_limit_ends_an_answer_with_its_reason(tiny: Running, limit: int) -> None:
    """Whole and streamed, in both routes: so many tokens, and the word for why it ended."""
    options = {"num_predict": limit, "temperature": 0}
    for path, body in (("generate", {"prompt": "a"}), ("chat", {"messages": USER})):
        for stream in (False, True):
            answer = post(tiny, path, options=options, stream=stream, **body)
            end = lines(answer)[-1] if stream else answer.json()
            check_end(end)
            assert end["eval_count"] <= limit
            assert end["done_reason"] == ("length" if end["eval_count"] == limit else "stop")


def test_an_answer_that_ends_by_itself_says_stop() -> None:
    with running(ScriptedEngine(["ok"])) as server:
        for path, body in (("generate", {"prompt": "a"}), ("chat", {"messages": USER})):
            answer = post(server, path, options={"num_predict": 50}, stream=False, **body)
            assert answer.json()["done_reason"] == "stop"


def test_a_raw_prompt_has_no_system_text() -> None:
    engine = ScriptedEngine(["ok"])
    with running(engine) as server:
        for system in (None, "Be brief."):
            post(server, "generate", prompt="Capital?", raw=True, stream=False, system=system)
        assert engine.prompts[0] == engine.prompts[1] and "Be brief." not in engine.prompts[1]


def test_format_constrains_the_answer(tiny: Running) -> None:
    options = {"num_predict": 300, "seed": 1}
    body = {"messages": USER, "options": options, "stream": False}
    answer = post(tiny, "chat", format=PARAMETERS, **body).json()
    jsonschema.validate(json.loads(answer["message"]["content"]), PARAMETERS)
    assert post(tiny, "chat", format="json", **body).json()["message"]["content"].startswith("{")


def test_what_cannot_be_done_is_refused_clearly() -> None:
    with running(ScriptedEngine(["ok"])) as server:
        image = [{"role": "user", "content": "What is this?", "images": ["aGk="]}]
        for answer, said in (
            (post(server, "chat", messages=image), "reads text only"),
            (post(server, "generate", prompt="a", images=["aGk="]), "reads text only"),
            (post(server, "generate", prompt="a", suffix="b"), "fill in the middle"),
            (post(server, "generate", prompt="a", model="other"), "expected one of 'tiny'"),
            (post(server, "pull", model="other"), "expected one of 'tiny'"),
            (post(server, "delete"), "farthing pull"),
            (post(server, "chat", messages=USER, format="xml"), "format"),
        ):
            assert answer.status_code in (400, 404) and said in answer.json()["error"], answer.text


def test_lists_and_descriptions(tiny: Running) -> None:
    for path in ("tags", "ps"):
        (entry,) = httpx.get(f"{tiny.url}/api/{path}").json()["models"]
        assert entry["name"] == "tiny" and entry["details"]["family"] == "deepseek_v3" and entry["size"] > 0
    shown = post(tiny, "show", model="tiny:latest").json()
    assert shown["model_info"]["deepseek_v3.context_length"] == 2048
    assert shown["capabilities"] == ["completion", "tools"]
    assert post(tiny, "pull").json() == {"status": "success"}
    assert post(tiny, "chat", messages=[]).json()["done_reason"] == "load"
    assert post(tiny, "generate", keep_alive=0).json()["done_reason"] == "unload"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None), (0, 0.0), (300, 300.0), ("5m", 300.0), ("1h30m", 5400.0), ("100ms", 0.1), ("0", 0.0),
        (-1, FOREVER.total_seconds()), ("-1m", FOREVER.total_seconds()), ("soon", None), ([], None),
        ("9" * 4000 + "s", None), ("9" * 60 + "h", FOREVER.total_seconds()),
        (10**400, FOREVER.total_seconds()), (math.inf, FOREVER.total_seconds()),
        (math.nan, FOREVER.total_seconds()),
    ],
)  # fmt: skip
def test_keep_alive(given: object, expected: float | None) -> None:
    assert seconds(given) == expected


def test_its_own_client() -> None:
    ollama = pytest.importorskip("ollama")
    script = letters(f"Hm.</think>{CALL}", 5)
    with running(ScriptedEngine(script, chat_template=THINKING)) as server:
        client = ollama.Client(host=server.url)
        answer = client.chat(model="tiny", messages=USER, tools=TOOLS, think=True, keep_alive="5m")
        assert answer.message.thinking == "Hm." and answer.message.content == "Let me look."
        assert answer.message.tool_calls[0].function.arguments == {"city": "Paris", "days": 2}
        parts = list(client.chat(model="tiny", messages=USER, tools=TOOLS, stream=True))
        assert "".join(part.message.content for part in parts) == "Let me look." and parts[-1].done
        turns = [*USER, answer.message, {"role": "tool", "tool_name": "weather", "content": "18 degrees"}]
        turns.append({"role": "tool", "tool_name": "now", "content": "noon"})
        assert client.chat(model="tiny", messages=turns, tools=TOOLS).done
        generated = client.generate(model="tiny", prompt="a", options={"num_predict": 5, "num_ctx": 99})
        assert generated.response and generated.total_duration > 0
        assert [model.model for model in client.list().models] == ["tiny"]
        assert client.ps().models[0].expires_at and client.show("tiny").capabilities
        assert client.pull("tiny").status == "success"
        with pytest.raises(ollama.ResponseError, match="expected one of 'tiny'"):
            client.chat(model="other", messages=USER)
