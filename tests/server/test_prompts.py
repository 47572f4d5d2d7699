"""The tokens that a model reads are its template's rendering, in every format and with every API.

Random conversations of four APIs with a model that splits its text in its own way: turns, tools, edits,
forks, truncated and continued answers, ends that the template does not write, and restarts.
`Splitting.submit` checks every prompt.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farthing.engine.tokenizer import Tokenizer
from farthing.server.memory import AnswerMemory
from tests.conversation.published import SHAPES
from tests.server.api.sessions import Cache, common
from tests.server.harness import Running
from tests.server.splitting import NAMES, PACKAGED, TOOL, Splitting, backend, serving


class Client:
    """One session with one of the APIs; messages are as its clients send them."""

    def __init__(self, server: Running, api: str, tools: bool) -> None:
        self.http, self.api, self.tools = httpx.Client(base_url=server.url, timeout=60), api, tools
        self.messages: list[Any] = []
        self.open: list[tuple[str, str]] = []  # calls without a result

    def send(self, resume: bool = False) -> bool:
        """Let the model answer; False if the format cannot express the conversation."""
        path, body = getattr(self, f"_{self.api}")(resume)
        answer = self.http.post(path, json={"model": "tiny", "stream": False, **body})
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            return False
        getattr(self, f"_read_{self.api}")(answer.json())
        return True

    def _chat(self, resume: bool) -> tuple[str, dict[str, Any]]:
        tools = {"tools": [{"type": "function", "function": TOOL}]} if self.tools else {}
        go_on = {"continue_final_message": True, "add_generation_prompt": False} if resume else {}
        return "/v1/chat/completions", {"messages": self.messages, **tools, **go_on}

    def _read_chat(self, document: Any) -> None:
        said = document["choices"][0]["message"]
        calls = said.get("tool_calls") or []
        self.open = [(call["id"], call["function"]["name"]) for call in calls]
        self.messages.append({key: value for key, value in said.items() if value is not None})

    def _responses(self, resume: bool) -> tuple[str, dict[str, Any]]:
        return "/v1/responses", {"input": self.messages, **({"tools": [{"type": "function", **TOOL}]} if self.tools else {})}  # fmt: skip  # noqa: E501

    def _read_responses(self, document: Any) -> None:
        items = document["output"]
        self.open = [(item["call_id"], item["name"]) for item in items if item["type"] == "function_call"]
        self.messages += items

    def _messages(self, resume: bool) -> tuple[str, dict[str, Any]]:
        tool = {"name": "look", "input_schema": TOOL["parameters"]}
        return "/v1/messages", {"max_tokens": 999, "messages": self.messages, "tools": [tool] * self.tools}

    def _read_messages(self, document: Any) -> None:
        blocks = document["content"]
        self.open = [(block["id"], block["name"]) for block in blocks if block["type"] == "tool_use"]
        self.messages.append({"role": "assistant", "content": blocks or ""})

    def _ollama(self, resume: bool) -> tuple[str, dict[str, Any]]:
        tools = {"tools": [{"type": "function", "function": TOOL}]} if self.tools else {}
        return "/api/chat", {"messages": self.messages, **tools}

    def _read_ollama(self, document: Any) -> None:
        said = document["message"]
        self.open = [("", call["function"]["name"]) for call in said.get("tool_calls") or []]
        self.messages.append(said)

    def ask(self, text: str) -> None:
        """The user's next message, after the results of open calls."""
        for identity, name in self.open:
            self.messages.append(
                {
                    "chat": {"role": "tool", "tool_call_id": identity, "content": text},
                    "responses": {"type": "function_call_output", "call_id": identity, "output": text},
                    "messages": {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": identity, "content": text}],
                    },
                    "ollama": {"role": "tool", "tool_name": name, "content": text},
                }[self.api]
            )
        if not self.open:
            self.messages.append({"role": "user", "content": text})
        self.open = []

    def asked(self) -> list[int]:
        """Where the user's own messages are."""
        return [
            at for at, each in enumerate(self.messages)
            if each.get("role") == "user" and isinstance(each["content"], str)
        ]  # fmt: skip

    def edit_answer(self, text: str, random: Random) -> None:
        """Change the text of an earlier answer."""
        said = [each for each in self.messages if each.get("role") == "assistant" and each.get("content")]
        if not said:
            return
        each = random.choice(said)
        if isinstance(each["content"], str):
            each["content"] = text
        for block in [*each["content"]] * (not isinstance(each["content"], str)):
            if "text" in block:
                block["text"] = text


def restart(server: Running, folder: Path) -> None:
    server.service.answers.close()
    server.service.answers = AnswerMemory()
    server.service.answers.persist(folder)


def talk(client: Client, random: Random, server: Running, engine: Splitting, folder: Path) -> None:
    """One thing that a client, its user or the operator does."""
    kind, before = random.randrange(9), json.loads(json.dumps(client.messages))
    opened = list(client.open)
    asked = client.asked()
    if kind == 0 and asked:  # an earlier question is edited
        client.messages[random.choice(asked)]["content"] = engine.words()
    elif kind == 1 and asked:  # forked
        at = random.choice(asked)
        client.messages, client.open = client.messages[:at], []
    elif kind == 2:
        client.edit_answer(engine.words(), random)
    elif kind == 3:
        restart(server, folder)
    resume = kind == 4 and client.api in ("chat", "messages") and bool(asked) and not client.open
    if not resume:
        client.ask(engine.words())
    if not client.send(resume):
        client.messages, client.open = before, opened


def has_tools(name: str) -> bool:
    return name.startswith(PACKAGED) or SHAPES[name].tools


def sessions(name: str, api: str, seeds: Sequence[int], folder: Path) -> Splitting:
    """Several sessions of one client, of eight turns each."""
    with serving(name, folder / "identity") as (server, engine):
        for seed in seeds:
            random = engine.random = Random(seed)
            client = Client(server, api, tools=has_tools(name) and random.random() < 0.6)
            if random.random() < 0.5:
                client.messages.append({"role": "user", "content": "Hello"})
                client.send()
            for _ in range(8):
                talk(client, random, server, engine, folder / "identity")
    assert len(engine.asked) >= 2 * len(seeds)
    return engine


APIS = ("chat", "responses", "messages", "ollama")


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_the_templates_text(name: str, tmp_path: Path) -> None:
    """With each format, one API."""
    sessions(name, APIS[NAMES.index(name) % len(APIS)], range(2), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds=st.lists(st.integers(0, 1 << 32), min_size=1, max_size=3))
def test_prompts_of_any_session(name: str, api: str, seeds: list[int], tmp_path: Path) -> None:
    with TemporaryDirectory(dir=tmp_path) as folder:  # no answers of another example's model
        sessions(name, api, seeds, Path(folder))


def repeats(engine: Splitting) -> list[tuple[int, int]]:
    """For each prompt, how many of its tokens repeat the text of an earlier prompt and its answer, and how
    many of these are computed again."""
    cache, own, texts = Cache(), engine.tokenizer, list[bytes]()
    found: list[tuple[int, int]] = []
    for prompt, answer in engine.asked:
        pieces = [own.token_bytes(token) for token in prompt]
        text = b"".join(pieces)
        same = max((common(text, earlier) for earlier in texts), default=0)
        known = bisect_right(list(accumulate(map(len, pieces))), same)
        found.append((known, max(0, known - cache.compute(prompt, answer).num_cached)))
        texts.append(text + b"".join(map(own.token_bytes, answer)))
    return found


QUICK = ("chatml", "gemma3", "gpt_oss", "packaged deepseek_v3")
# Their templates write earlier answers otherwise than the prompt that asks for one begins them, within a
# block of the cache, whose part before the difference is computed again.
PARTIAL = {
    *("qwen3", "mistral_7b", "mistral_small", "mixtral", "deepseek_v2", "deepseek_r1", "deepseek_v31"),
    "packaged deepseek_r1",
}


@pytest.mark.parametrize("splits", [True, False], ids=["own splits", "the tokenizer's splits"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_twenty_turns_compute_only_what_is_new(name: str, splits: bool, tmp_path: Path) -> None:
    """A fresh server would get the same prompts from a model that splits text as the tokenizer does."""
    with serving(name, tmp_path / "identity") as (server, engine):
        engine.steady, engine.splits = True, splits
        client = Client(server, "chat", has_tools(name))
        client.messages.append({"role": "system", "content": "You work in a repository. " * 40})
        while len(engine.asked) < 20:
            client.ask(f"{len(engine.asked)}: {engine.words()}")
            assert client.send()
            restart(server, tmp_path / "identity")
    found = repeats(engine)
    share = sum(again for _, again in found) / sum(known for known, _ in found)
    print(f"{name}: {share:.2%} computed again, {engine.reused} texts with the model's split")
    assert bool(engine.reused) == splits or name not in QUICK
    assert share <= (0.015 if name in PARTIAL else 0.005)


@pytest.mark.parametrize("left_out", [("description",), ("parameters",), ("description", "parameters")])
def test_a_tool_may_leave_out_what_clients_may_leave_out(left_out: tuple[str, ...]) -> None:
    """Only where a template refuses such a tool, it gets what it lacks."""
    function = {field: value for field, value in TOOL.items() if field not in left_out}
    whole = {"description": "", "parameters": {"type": "object", "properties": {}}} | function
    tools = [{"type": "function", "function": function}]
    messages = [{"role": "user", "content": "Where?"}]
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    for name in filter(has_tools, SHAPES):
        own = Tokenizer(backend(name), config, chat_template=SHAPES[name].source)
        prompt = own.render_chat(messages, tools)
        assert "look" in prompt, name
        try:
            expected = own._render(messages=messages, tools=tools, add_generation_prompt=True)
        except ValueError:
            expected = own.render_chat(messages, [{"type": "function", "function": whole}])
        assert prompt == expected, name
