"""The tokens that a model reads are its template's rendering, in every format and with every API.

Random conversations of four APIs with a model that splits its text in its own way: turns, tools, edits,
forks, truncated and continued answers, ends that the template does not write, and restarts.
`Splitting.submit` checks every prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizer

import farthing.conversation.formats as packaged
from farthing.config import EngineConfig
from farthing.conversation.scan import MARK, plain
from farthing.conversation.select import FORMATS
from farthing.conversation.types import ToolCall, Turn
from farthing.engine.generation import Detokenizer
from farthing.engine.request import FinishReason, Rendering, RequestStream, SamplingParams
from farthing.engine.sandbox.sandbox import Sandbox
from farthing.engine.tokenizer import Tokenizer
from farthing.server import turn as server_turn
from farthing.server.memory import AnswerMemory
from tests.conversation.published import SHAPES
from tests.server.harness import RAW, Running, ScriptedEngine, running

PACKAGED = "packaged "  # before the name of a format that Farthing renders itself
NAMES = [*SHAPES, *(f"{PACKAGED}{name}" for name in FORMATS)]
WORDS = ("Hello", " there", ",", " und", " 日本", "\n\n", " x = 1", "  ", "é", " Step", ".", "<think>", "\n")
_MARK = re.compile(
    r"<\|[\w/]+\|?>|<\w+\|>|<｜[^｜<>\s{}]+｜>|\[/?[A-Z][A-Z_]+\]|</?think>|<(?:start|end)_of_turn>|</?s>|<bos>"
    r"|\]~!?b[\[\]]|\[e~\[|\[gMASK\]|<sop>|</?tool_call>"
)
_SHOWN = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # not special where they are tokens
TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}  # fmt: skip  # noqa: E501


@cache
def backend() -> HfTokenizer:
    """Merges, and every mark of the known formats as one token."""
    files = Path(packaged.__file__).parent.glob("*.py")
    sources = [*(shape.source for shape in SHAPES.values()), *(file.read_text() for file in files)]
    found = HfTokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator([" ".join(WORDS), "user assistant system tool\n", *sources], trainer)
    marks = sorted({"<s>", "</s>", *(mark for source in sources for mark in _MARK.findall(source))})
    found.add_tokens([AddedToken(mark, special=mark not in _SHOWN, normalized=False) for mark in marks])
    return found


def encode(own: Tokenizer, text: str) -> list[int]:
    return own.encode(text, add_special_tokens=False)


def runs(own: Tokenizer, ids: Sequence[int]) -> list[tuple[int, ...]]:
    """Control tokens and the tokens between them, alternating."""
    return [tuple(group) for _, group in groupby(ids, lambda token: token in own.control_ids and object())]


def text_of(own: Tokenizer, ids: Sequence[int]) -> str:
    return b"".join(map(own.token_bytes, ids)).decode()


def split(own: Tokenizer, text: str, random: Random) -> list[int]:
    """Tokens of a rendered text, split at random places as well."""
    ids: list[int] = []
    for run in runs(own, encode(own, text)):
        if run[0] in own.control_ids:
            ids += run
            continue
        said = text_of(own, run)
        cuts = sorted({0, len(said), *(random.randrange(len(said)) for _ in range(random.randrange(4)))})
        for start, end in pairwise(cuts):
            ids += encode(own, MARK + said[start:end])  # no control token
    return ids


class Inline(Sandbox):
    """Renders in this process."""

    def prompt(self, rendering: Rendering, max_tokens: int, client: str = "") -> Any:
        return self._at_once(lambda: self._tokenizer.prompt(rendering), client)

    def habits(self) -> Any:
        return self._at_once(lambda: asdict(self._tokenizer.habits()), "")


class Splitting(ScriptedEngine):
    """A model that splits its text at random, and mostly writes what its template would render."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.sandbox.close()
        template = SHAPES[name].source if name in SHAPES else None
        config = {"bos_token": "<s>", "eos_token": "</s>"}
        self.tokenizer = Tokenizer(backend(), config, chat_template=template)
        self.sandbox = Inline(self.tokenizer, RAW["vocab_size"])
        self.config = EngineConfig(
            max_model_len=100_000,
            num_blocks=64,
            chat_template=None if template else name.removeprefix(PACKAGED),
        )
        self.random = Random(0)
        self.rendered: tuple[str, Rendering] = ("", None)  # type: ignore[assignment]
        self.known: set[tuple[int, ...]] = set()  # texts between control tokens that were computed
        self.computed: list[list[int]] = []  # prompts with their answers
        self.reused = 0  # texts in prompts that are split otherwise than by the tokenizer

    def submit(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> RequestStream:
        """Check the prompt, and answer."""
        prompt = list(prompt)
        self.check(prompt)
        answer, self.finish_reason = self.answer()
        self.script = [answer]  # type: ignore[list-item]
        self.computed.append([*prompt, *answer])
        self.known.update(runs(self.tokenizer, self.computed[-1]))
        return super().submit(prompt, params, **options)

    def check(self, prompt: list[int]) -> None:
        """Control tokens and texts are those of the rendering; only what was computed before is split
        otherwise than by the tokenizer."""
        (text, rendering), own = self.rendered, self.tokenizer
        fresh = encode(own, text)
        assert text_of(own, prompt) == plain(text)
        for one, other in zip(runs(own, prompt), runs(own, fresh), strict=True):
            assert one == other or one in self.known
            assert text_of(own, one) == text_of(own, other)
            assert one == other or own.control_ids.isdisjoint(one)
            self.reused += one != other
        if not any(turn.role == "assistant" for turn in rendering.conversation.turns):
            assert prompt == fresh

    def answer(self) -> tuple[list[int], FinishReason]:
        """An answer as the template renders it, cut off or with another end at times."""
        text, rendering = self.rendered
        random, talk = self.random, rendering.conversation
        thought = random.choice(("", "", "", self.words()))
        calls = [ToolCall("functions.look:0", "look", random.choice(('{"city": "Rom"}', '{"city":"é"}')))]
        said = random.choice((self.words(), self.words().strip(), self.words().strip()))
        turn = Turn(
            "assistant", said, thought, tuple(calls) if talk.offered and random.random() < 0.5 else ()
        )
        told = self.told(rendering, turn)
        if told is None or not told.startswith(text):
            told = text + self.words() + "</s>"
        own = self.tokenizer
        ids = split(own, told[len(text) :], random)
        while ids and ids[-1] not in own.control_ids:
            ids.pop()  # what the template writes after the end
        kind = random.randrange(6)
        if kind == 0 and ids:
            return ids[: random.randrange(len(ids))] or ids[:1], "length"
        if kind == 1:
            ids = [*ids[:-1], random.choice(sorted(own.control_ids))]
        return ids or encode(own, "</s>"), "stop"

    def told(self, rendering: Rendering, turn: Turn) -> str | None:
        """The conversation with an answer; None if the template refuses it."""
        talk = rendering.conversation
        if talk.resume:
            return None
        whole = replace(talk, turns=(*talk.turns, turn), generate=False)
        try:
            return self.tokenizer.prompt(replace(rendering, conversation=whole))
        except ValueError:
            return None

    def words(self) -> str:
        return "".join(self.random.choices(WORDS, k=self.random.randint(1, 9)))

    def _play(self, stream: RequestStream, pieces: list[Any], stop: Any) -> None:
        (ids,), params = pieces, stream.request.params
        text = Detokenizer(self.tokenizer, params.skip_special_tokens, params.marked_token_ids)
        shown = ids[:-1] if self.finish_reason == "stop" else ids
        self.running -= 1
        self._say(stream, "".join(map(text.push, shown)) + text.flush(), ids, self.finish_reason)
        stop.set()


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


@contextmanager
def serving(name: str, folder: Path) -> Iterator[tuple[Running, Splitting]]:
    """A server that stores answers in a folder, whose prompts are checked."""
    engine = Splitting(name)
    render = server_turn.render

    async def kept(service: Any, rendering: Rendering, client: str, param: str) -> str:
        text = await render(service, rendering, client, param)
        engine.rendered = (text, rendering)
        return text

    with pytest.MonkeyPatch.context() as patch, running(engine) as server:
        patch.setattr(server_turn, "render", kept)
        server.service.answers.persist(folder)
        yield server, engine
        server.service.answers.close()


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


def sessions(name: str, api: str, seeds: Sequence[int], folder: Path) -> Splitting:
    """Several sessions of one client, of eight turns each."""
    with serving(name, folder / "identity") as (server, engine):
        for seed in seeds:
            random = engine.random = Random(seed)
            client = Client(server, api, tools=random.random() < 0.6)
            if random.random() < 0.5:
                client.messages.append({"role": "user", "content": "Hello"})
                client.send()
            for _ in range(8):
                talk(client, random, server, engine, folder / "identity")
    assert len(engine.computed) >= 4 * len(seeds)
    return engine


APIS = ("chat", "responses", "messages", "ollama")
# Their templates write earlier answers otherwise than the prompt that asks for one begins them.
APART = {
    *("glm45", "glm46", "glm47", "glm5", "minimax_m2", "qwen3", "qwen3_5", "mixtral", "deepseek_v2"),
    *("deepseek_r1", "deepseek_v31", "packaged deepseek_r1", "packaged deepseek_v4", "packaged glm47"),
}


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_the_templates_text(name: str, tmp_path: Path) -> None:
    """With each format, one API."""
    engine = sessions(name, APIS[NAMES.index(name) % len(APIS)], range(2), tmp_path)
    assert engine.reused or name in APART


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds=st.lists(st.integers(0, 1 << 32), min_size=1, max_size=3))
def test_prompts_of_any_session(name: str, api: str, seeds: list[int], tmp_path: Path) -> None:
    sessions(name, api, seeds, tmp_path)
