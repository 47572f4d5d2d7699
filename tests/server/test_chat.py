"""/v1/chat/completions: the real engine for behavior, a scripted one for exact text."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openai import OpenAI

from tests.server.harness import Running, ScriptedEngine, events, letters, running

USER = [{"role": "user", "content": "Weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"$ref": "#/$defs/n"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Forecast.", "parameters": PARAMETERS},
    },
    {"type": "function", "function": {"name": "now"}},
]
CALL = (
    "Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n'
    "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
THINKING = "{% for m in messages %}{{ m['content'] }}{% endfor %}<think>\n{# </think> #}"
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}{# </think> #}"


class Streamed:
    """A reassembled stream."""

    def __init__(self, chunks: Any) -> None:
        self.content = self.reasoning = ""
        self.calls: list[dict[str, Any]] = []
        self.reason: str | None = None
        self.pieces: list[str] = []
        for chunk in chunks:
            for choice in chunk.choices:
                self._add(choice)

    def _add(self, choice: Any) -> None:
        delta = choice.delta
        self.content += delta.content or ""
        self.reasoning += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or []:
            if call.index == len(self.calls):
                assert call.id.startswith("call_") and call.type == "function"
                self.calls.append({"name": call.function.name, "arguments": ""})
            self.calls[call.index]["arguments"] += call.function.arguments
            self.pieces.append(call.function.arguments)
        self.reason = choice.finish_reason or self.reason


def test_whole_and_streamed_agree(client: OpenAI) -> None:
    options = {"model": "tiny", "messages": USER, "max_tokens": 20, "temperature": 0.0}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        chunks[-1].usage
        and whole.usage
        and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )
    streamed = Streamed(chunks)
    assert streamed.content == whole.choices[0].message.content
    assert streamed.reason == whole.choices[0].finish_reason
    assert whole.id.startswith("chatcmpl-") and whole.object == "chat.completion"


def test_second_turn_reuses_the_first_from_the_cache(client: OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": "a long question " * 4}]
    first = client.chat.completions.create(model="tiny", messages=turns, max_tokens=8, logit_bias={"50": 100})
    turns += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "?"},
    ]
    second = client.chat.completions.create(model="tiny", messages=turns, max_tokens=1)
    assert second.usage and second.usage.prompt_tokens_details
    assert second.usage.prompt_tokens_details.cached_tokens >= 64


def test_the_schema_of_an_object_is_that_of_llama_cpp(tiny: Running) -> None:
    form = {"type": "json_object", "schema": {"const": {"a": 7}}}
    body = {"messages": USER, "max_tokens": 64, "response_format": form}
    said = httpx.post(f"{tiny.url}/v1/chat/completions", json=body).json()
    assert json.loads(said["choices"][0]["message"]["content"]) == {"a": 7}
    form["schema"] = {}  # any object, as without one
    said = httpx.post(f"{tiny.url}/v1/chat/completions", json=body).json()
    assert said["choices"][0]["message"]["content"].lstrip().startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: OpenAI, stream: bool) -> None:
    options = {
        "model": "tiny",
        "messages": USER,
        "max_tokens": 6,
        "logprobs": True,
        "top_logprobs": 3,
        "seed": 1,
    }
    if stream:
        choices = [c.choices[0] for c in client.chat.completions.create(**options, stream=True)]
    else:
        choices = client.chat.completions.create(**options).choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
    assert len(entries) == 6
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0 and entry.bytes
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[2].logprob


def test_response_formats(client: OpenAI) -> None:
    create = client.chat.completions.create
    schema = {"name": "weather", "schema": PARAMETERS}
    text = create(
        model="tiny",
        messages=USER,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": schema},
    ).choices[0]
    assert text.finish_reason == "stop"
    jsonschema.validate(json.loads(text.message.content), PARAMETERS)
    plain = create(
        model="tiny",
        messages=USER,
        max_tokens=4,
        response_format={"type": "text"},
        extra_body={"ignore_eos": True},
    )
    assert plain.choices[0].finish_reason == "length"
    opened = create(model="tiny", messages=USER, max_tokens=4, response_format={"type": "json_object"})
    assert opened.choices[0].message.content.lstrip()[:1] in ("{", "")


def test_a_call_that_a_stop_string_cuts_off_is_not_reported_as_complete(client: OpenAI) -> None:
    named = {"type": "object", "properties": {"x": {"const": "alpha beta"}}, "required": ["x"]}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": named}}
    for stop, reason in ((["beta"], "stop"), (["gamma"], "tool_calls")):
        options: Any = {"model": "tiny", "messages": USER, "tools": [tool], "tool_choice": "required"}
        whole = client.chat.completions.create(**options, stop=stop, max_tokens=200).choices[0]
        streamed = Streamed(client.chat.completions.create(**options, stop=stop, max_tokens=200, stream=True))
        assert whole.finish_reason == streamed.reason == reason
        assert streamed.calls[0]["arguments"].endswith("alpha ") == (reason == "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_required_calls_are_forced_to_their_schema(client: OpenAI, choice: Any, stream: bool) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=USER,
        tools=TOOLS[:1],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=300,
        stream=stream,
    )
    if stream:
        result = Streamed(answer)
        calls, reason = result.calls, result.reason
    else:
        message = answer.choices[0].message
        assert message.content is None
        calls = [
            {"name": c.function.name, "arguments": c.function.arguments} for c in message.tool_calls or []
        ]
        reason = answer.choices[0].finish_reason
    (call,) = calls
    assert call["name"] == "weather"
    jsonschema.validate(json.loads(call["arguments"]), PARAMETERS)
    assert reason == ("tool_calls" if choice == "required" else "stop")


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_with_automatic_choice(size: int) -> None:
    engine = ScriptedEngine(letters(CALL, size))
    with running(engine) as server:
        create = server.client().chat.completions.create
        whole = create(model="tiny", messages=USER, tools=TOOLS).choices[0]
        streamed = Streamed(create(model="tiny", messages=USER, tools=TOOLS, stream=True))
        assert whole.message.content == streamed.content == "Let me look."
        assert whole.finish_reason == streamed.reason == "tool_calls"
        calls = [
            {"name": c.function.name, "arguments": c.function.arguments}
            for c in whole.message.tool_calls or []
        ]
        assert calls == streamed.calls
        assert calls == [
            {"name": "weather", "arguments": '{"city": "Paris", "days": 2}'},
            {"name": "now", "arguments": "{}"},
        ]
        if size == 1:
            assert len(streamed.pieces) > 10  # arguments stream as they are generated
        assert len(engine.params[0].marked_token_ids) == 5
        assert '"name": "weather"' in engine.prompts[0]
        single = create(model="tiny", messages=USER, tools=TOOLS, parallel_tool_calls=False).choices[0]
        assert len(single.message.tool_calls or []) == 1


@pytest.mark.parametrize("older", [True, False])
def test_forced_call_ends_with_stop_and_a_chosen_one_does_not(older: bool) -> None:
    """As with OpenAI and vLLM, also for the older names of tools."""
    name = {"name": "weather"}
    function = TOOLS[0]["function"]
    tools: dict[str, Any] = {"functions": [function]} if older else {"tools": TOOLS[:1]}
    choice: dict[str, Any] = (
        {"function_call": name} if older else {"tool_choice": {"type": "function", "function": name}}
    )
    chosen = "function_call" if older else "tool_calls"
    with running(ScriptedEngine([CALL])) as server:
        create = server.client().chat.completions.create
        for fields, reason in ((tools, chosen), (tools | choice, "stop")):
            whole = create(model="tiny", messages=USER, **fields).choices[0]
            chunks = list(create(model="tiny", messages=USER, stream=True, **fields))
            assert whole.message.function_call or whole.message.tool_calls
            assert whole.finish_reason == chunks[-1].choices[0].finish_reason == reason


def test_no_calls_without_tools() -> None:
    engine = ScriptedEngine([CALL])
    with running(engine) as server:
        create = server.client().chat.completions.create
        message = create(model="tiny", messages=USER).choices[0].message
        assert message.content and "weather" in message.content and not message.tool_calls
        assert "｜" not in message.content
        # Tools that may not be called are omitted from the prompt, and calls in the output are dropped.
        options = {"model": "tiny", "messages": USER, "tools": TOOLS, "tool_choice": "none"}
        choice = create(**options).choices[0]
        streamed = Streamed(create(**options, stream=True))
        assert choice.message.content == streamed.content == "Let me look."
        assert not choice.message.tool_calls and not streamed.calls
        assert choice.finish_reason == streamed.reason == "stop"
        assert all("weather" not in prompt for prompt in engine.prompts)


def test_a_quoted_call_is_text() -> None:
    """The model explains the format in ordinary tokens, which spell its special ones."""
    with running(ScriptedEngine(list(CALL))) as server:
        create = server.client().chat.completions.create
        for options in ({}, {"tools": TOOLS}):
            message = create(model="tiny", messages=USER, **options).choices[0].message
            assert message.content == CALL and not message.tool_calls
        streamed = Streamed(create(model="tiny", messages=USER, tools=TOOLS, stream=True))
        assert streamed.content == CALL and streamed.reason == "stop"


def test_tool_results_reach_the_prompt() -> None:
    engine = ScriptedEngine()
    with running(engine) as server:
        call = {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
        }
        turns: list[Any] = [
            *USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
        ]
        server.client().chat.completions.create(model="tiny", messages=turns, tools=TOOLS)
        assert '{"city": "Rome"}' in engine.prompts[0] and "sunny" in engine.prompts[0]


@pytest.mark.parametrize(
    ("template", "text", "reasoning", "content"),
    [
        (THINKING, "why\n</think>\n\nbecause", "why", "because"),
        (THINKING, "<think>\nwhy</think>because", "why", "because"),
        (PLAIN, "<think>why</think>\nbecause", "why", "because"),
        (PLAIN, "because", None, "because"),
    ],
)
def test_reasoning_content(template: str, text: str, reasoning: str | None, content: str) -> None:
    for pieces in ([text], letters(text)):
        with running(ScriptedEngine(pieces, chat_template=template)) as server:
            create = server.client().chat.completions.create
            answer = create(model="tiny", messages=USER)
            message = answer.choices[0].message
            assert (getattr(message, "reasoning_content", None), message.content) == (reasoning, content)
            streamed = Streamed(create(model="tiny", messages=USER, stream=True))
            assert (streamed.reasoning or None, streamed.content) == (reasoning, content)
            assert answer.usage and answer.usage.completion_tokens_details
            assert bool(answer.usage.completion_tokens_details.reasoning_tokens) is bool(reasoning)
            hidden = {"include_reasoning": False}
            quiet = create(model="tiny", messages=USER, extra_body=hidden).choices[0].message
            assert quiet.content == content and not hasattr(quiet, "reasoning_content")
            silent = Streamed(create(model="tiny", messages=USER, stream=True, extra_body=hidden))
            assert (silent.reasoning, silent.content) == ("", content)


def test_reasoning_then_calls() -> None:
    with running(ScriptedEngine(letters("hm</think>" + CALL), chat_template=THINKING)) as server:
        create = server.client().chat.completions.create
        streamed = Streamed(create(model="tiny", messages=USER, tools=TOOLS, stream=True))
        assert (streamed.reasoning, streamed.content) == ("hm", "Let me look.")
        assert [call["name"] for call in streamed.calls] == ["weather", "now"]


def test_reasoning_parser_can_be_turned_off() -> None:
    with running(ScriptedEngine(["why</think>x"], chat_template=THINKING), reasoning_parser="none") as server:
        message = server.client().chat.completions.create(model="tiny", messages=USER).choices[0].message
        assert message.content == "why</think>x"


def test_continue_the_last_message() -> None:
    engine = ScriptedEngine()
    with running(engine) as server:
        turns: list[Any] = [*USER, {"role": "assistant", "content": "The weather is"}]
        extra = {"continue_final_message": True, "add_generation_prompt": False}
        server.client().chat.completions.create(model="tiny", messages=turns, extra_body=extra)
        assert engine.prompts[0].endswith("The weather is")


def test_engine_abort_is_an_error() -> None:
    with running(ScriptedEngine(["x"], finish_reason="error")) as server:
        create = server.client().chat.completions.create
        with pytest.raises(openai.InternalServerError, match="the engine ended the request"):
            create(model="tiny", messages=USER)
        with pytest.raises(openai.APIError, match="the engine ended the request"):
            list(create(model="tiny", messages=USER, stream=True))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": USER, "tool_choice": "required"},
        {"messages": USER, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
        {"messages": USER, "tools": [TOOLS[0], TOOLS[0]]},
        {"messages": USER, "tools": [{"type": "function", "function": {"name": "bad name"}}]},
        {"messages": USER, "tools": [{"type": "function", "function": {"name": "x" * 257}}]},
        {"messages": USER, "top_logprobs": 2},
        {"messages": USER, "response_format": {"type": "json_schema"}},
        {"messages": USER, "response_format": {"type": "text", "schema": {}}},
        {"messages": USER, "response_format": {"type": "yaml"}},
        {"messages": USER, "chat_template_kwargs": {"messages": []}},
        {"messages": USER, "continue_final_message": True},
        {"messages": USER, "max_tokens": 0},
        {
            "messages": USER,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "what"}}},
        },
    ],
)
def test_bad_requests(tiny: Running, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{tiny.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_raw_stream_ends_with_done(tiny: Running) -> None:
    body = {"messages": USER, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    documents = events(httpx.post(f"{tiny.url}/v1/chat/completions", json=body).text)
    assert documents[-1] == "[DONE]" and documents[-2]["usage"]["completion_tokens"] == 3
    assert all(document["object"] == "chat.completion.chunk" for document in documents[:-1])


def test_empty_list_of_calls_keeps_the_text() -> None:
    template = (
        "{% for m in messages %}{% if 'tool_calls' in m %}calls{% else %}{{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    engine = ScriptedEngine(chat_template=template)
    with running(engine) as server:
        for calls in ([], None):
            turns = [*USER, {"role": "assistant", "content": "kept", "tool_calls": calls}, *USER]
            answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": turns})
            assert answer.status_code == 200, answer.text
            assert "kept" in engine.prompts[-1] and "calls" not in engine.prompts[-1]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 0},
        {"prompt_cache_retention": "24h", "prediction": {"type": "content", "content": "x"}},
        {"tools": [{"type": "function", "function": {"name": "mcp:files:" + "read" * 20}}]},
        {"messages": [*USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]},
    ],
)
def test_fields_sent_by_clients_are_accepted(tiny: Running, fields: dict[str, Any]) -> None:
    body = {"messages": USER, "max_tokens": 1} | fields
    answer = httpx.post(f"{tiny.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
