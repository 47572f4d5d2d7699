"""What clients request of the reasoning is mapped to what the format can do, or ignored with a header."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import pytest

from farthing.config import EngineConfig
from farthing.conversation.base import EFFORTS
from farthing.conversation.select import FORMATS
from tests.server.harness import Running, ScriptedEngine, running
from tests.server.test_chat import USER

HEADER = "X-Farthing-Ignored"
ON, OFF = "<think>", "</think>"
# Whether the prompt reasons by default, and what the formats can express besides that.
DEFAULT = {
    "deepseek_r1": True,
    "deepseek_v31": False,
    "deepseek_v32": False,
    "deepseek_v4": True,
    "kimi_k25": True,
    "glm47": True,
}
NEVER = {"deepseek_v3", "kimi_k2"}
# A published template's rule: effort none or high, and nothing else.
STRICT = (
    "{% set effort = reasoning_effort | default('none') %}{% if effort not in ['none', 'high'] %}"
    "{{ raise_exception('reasoning_effort must be none or high') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}[{{ effort }}]"
    "{% if effort == 'high' %}<think>{% endif %}"
)
SWITCH = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>' if enable_thinking else '</think>' }}"
)


@contextmanager
def serving(
    format_: str | None = None, template: str | None = None
) -> Iterator[tuple[Running, ScriptedEngine]]:
    engine = ScriptedEngine(chat_template=template)
    engine.config = EngineConfig(max_model_len=10_000, chat_template=format_)
    with running(engine) as server:
        yield server, engine


def ask(server: Running, effort: Any) -> list[httpx.Response]:
    """The same effort through the three APIs, by the official SDKs, whole and streamed."""
    client = server.client()
    claude = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    found: list[httpx.Response] = []
    for stream in (False, True):
        chat = client.chat.completions.with_raw_response.create(
            model="tiny",
            messages=USER,
            reasoning_effort=effort,
            stream=stream,  # type: ignore[call-overload]
        )
        answer = client.responses.with_raw_response.create(
            model="tiny",
            input="hi",
            reasoning={"effort": effort},
            stream=stream,  # type: ignore[call-overload]
        )
        message = claude.messages.with_raw_response.create(
            model="tiny", messages=USER, max_tokens=2048, output_config={"effort": effort}, stream=stream
        )  # type: ignore[call-overload]
        found += [chat.http_response, answer.http_response, message.http_response]
    return found


NAMES = ["reasoning_effort", "reasoning.effort", "output_config.effort"] * 2


@pytest.mark.parametrize("format_", FORMATS)
def test_every_effort_is_mapped_or_ignored_by_every_sdk(format_: str) -> None:
    with serving(format_) as (server, engine):
        for effort in (*EFFORTS, "ultra"):
            answers = ask(server, effort)
            assert [answer.status_code for answer in answers] == [200] * 6
            headers = [answer.headers.get(HEADER) for answer in answers]
            unknown = effort == "ultra" or format_ == "deepseek_r1"
            unknown |= format_ == "harmony" and effort == "none"  # its models always reason
            expected = effort != "none" if format_ in NEVER else unknown
            assert headers == (NAMES if expected else [None] * 6), effort
            if format_ in DEFAULT:
                wants = DEFAULT[format_] if expected else effort != "none"
                assert all(prompt.rstrip().endswith(ON if wants else OFF) for prompt in engine.prompts[-6:])


def test_thinking_is_ignored_where_it_means_nothing(caplog: pytest.LogCaptureFixture) -> None:
    claude_fields: list[tuple[dict[str, Any], str | None]] = [
        ({"type": "enabled", "budget_tokens": 1024}, "thinking, thinking.budget_tokens"),
        ({"type": "disabled"}, None),
        ({"type": "adaptive"}, None),
        ({"type": "between_tools"}, "thinking.type"),
    ]
    with serving("deepseek_v3") as (server, _):
        claude = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        for thinking, expected in claude_fields:
            options: Any = {"model": "tiny", "messages": USER, "max_tokens": 2048, "thinking": thinking}
            raw = claude.messages.with_raw_response.create(**options)
            assert raw.http_response.headers.get(HEADER) == expected, thinking
            assert claude.messages.count_tokens(model="tiny", messages=USER, thinking=thinking).input_tokens  # type: ignore[arg-type]
            chat = server.client().chat.completions.with_raw_response.create(
                model="tiny",
                messages=USER,
                extra_body={"thinking": thinking},  # type: ignore[arg-type]
            )
            assert chat.http_response.headers.get(HEADER) == expected
        with caplog.at_level(logging.WARNING, "farthing.server.thinking"):
            server.client().responses.create(model="tiny", input="hi", extra_body={"max_thinking_tokens": 4})
        assert "ignored max_thinking_tokens: the chat format 'deepseek_v3'" in caplog.text


def test_a_switch_is_an_object_or_a_boolean() -> None:
    with serving("glm47") as (server, engine):
        for thinking, end in ((True, ON), (False, OFF), ({"type": "disabled"}, OFF), ({"type": "auto"}, ON)):
            body = {"messages": USER, "thinking": thinking}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
            assert answer.status_code == 200 and HEADER not in answer.headers
            assert engine.prompts[-1].endswith(end)


def test_a_model_that_always_reasons_says_so() -> None:
    with serving(template="{{ messages[0]['content'] }}<think>\n{# </think> #}") as (server, _):
        for path, fields, name in (
            ("chat/completions", {"thinking": {"type": "disabled"}}, "thinking"),
            ("chat/completions", {"reasoning_effort": "none"}, "reasoning_effort"),
            ("messages", {"thinking": {"type": "disabled"}, "max_tokens": 9}, "thinking"),
        ):
            answer = httpx.post(f"{server.url}/v1/{path}", json={"messages": USER} | fields)
            assert (answer.status_code, answer.headers.get(HEADER)) == (200, name), answer.text


@pytest.mark.parametrize(
    ("template", "effort", "end"),
    [
        (STRICT, "none", "[none]"),
        (STRICT, "low", "[high]<think>"),
        (STRICT, "max", "[high]<think>"),
        (SWITCH, "none", "</think>"),
        (SWITCH, "low", "<think>"),
    ],
)
def test_efforts_that_a_template_refuses_become_the_nearest(template: str, effort: str, end: str) -> None:
    with serving(template=template) as (server, engine):
        assert [answer.headers.get(HEADER) for answer in ask(server, effort)] == [None] * 6
        assert all(prompt.endswith(end) for prompt in engine.prompts)


def test_effort_and_switch_in_the_forms_of_other_servers() -> None:
    for format_, header in (("glm47", None), ("deepseek_v3", "{}")):
        with serving(format_) as (server, engine):
            for name, fields, end in (
                ("enable_thinking", {"enable_thinking": True}, ON),
                ("enable_thinking", {"enable_thinking": False}, OFF),
                ("reasoning.effort", {"reasoning": {"effort": "high"}}, ON),
                ("reasoning.effort", {"reasoning": {"effort": "none"}}, OFF),
            ):
                body = {"messages": USER, **fields}
                answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
                assert answer.status_code == 200, answer.text
                unfit = header is not None and end == ON
                assert answer.headers.get(HEADER) == (name if unfit else None)
                assert header is not None or engine.prompts[-1].rstrip().endswith(end)


@pytest.mark.parametrize(
    "fields",
    [{"best_of": 2}, {"structural_tag": "x"}, {"chat_template": "{{ 1 }}"}],
    ids=lambda f: next(iter(f)),
)
def test_chats_refuse_what_would_change_the_answer(fields: dict[str, Any]) -> None:
    with serving("glm47") as (server, _):
        body = {"messages": USER, **fields}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(fields))
        body = {"messages": USER, "n": 2, "best_of": 2}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30).status_code == 200
