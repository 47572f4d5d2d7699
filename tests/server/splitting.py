"""A scripted model of every format that splits its text in its own way and checks its prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
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
def _merges() -> str:
    """A tokenizer with merges and without control tokens."""
    found = HfTokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    sources = [shape.source for shape in SHAPES.values()]
    found.train_from_iterator([" ".join(WORDS), "user assistant system tool\n", *sources], trainer)
    return found.to_str()


def backend(name: str) -> HfTokenizer:
    """A tokenizer in which every mark of a format is one token."""
    found = HfTokenizer.from_str(_merges())
    files = Path(packaged.__file__).parent.glob("*.py")
    sources = [SHAPES[name].source] if name in SHAPES else [file.read_text() for file in files]
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
        self.tokenizer = Tokenizer(backend(name), config, chat_template=template)
        self.sandbox = Inline(self.tokenizer, RAW["vocab_size"])
        self.config = EngineConfig(
            max_model_len=100_000,
            num_blocks=64,
            chat_template=None if template else name.removeprefix(PACKAGED),
        )
        self.random = Random(0)
        self.rendered: tuple[str, Rendering] = ("", None)  # type: ignore[assignment]
        self.known: set[tuple[int, ...]] = set()  # texts between control tokens that were computed
        self.asked: list[tuple[list[int], list[int]]] = []  # prompts and answers
        self.reused = 0  # texts in prompts that are split otherwise than by the tokenizer
        self.steady = (
            False  # write a call after each request and a text after its result, and never stop early
        )
        self.splits = True

    def submit(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> RequestStream:
        """Check the prompt, and answer."""
        prompt = list(prompt)
        self.check(prompt)
        answer, self.finish_reason = self.answer()
        self.script = [answer]  # type: ignore[list-item]
        self.asked.append((prompt, answer))
        self.known.update(runs(self.tokenizer, [*prompt, *answer]))
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
        random, talk, own = self.random, rendering.conversation, self.tokenizer
        thoughts = ("", "Hm.") if self.steady else random.choice((("",), ("",), (self.words(),)))
        said = self.words() if random.random() < 0.3 and not self.steady else self.words().strip()
        calls = [ToolCall("functions.look:0", "look", random.choice(('{"city": "Rom"}', '{"city":"é"}')))]
        if self.steady:
            calls = [replace(calls[0], arguments=f'{{"city": "Rom {len(self.asked)}"}}')]
        called = talk.turns[-1].role == "user" if self.steady else random.random() < 0.5
        turn = Turn("assistant", said, "", tuple(calls) if talk.offered and called else ())
        found = [self.told(rendering, replace(turn, reasoning=thought)) for thought in thoughts]
        told = next((each for each in found if each is not None and each.startswith(text)), None)
        if told is None:
            opened = self.steady and text.rstrip().endswith("<think>")
            end = next(
                each
                for each in runs(own, encode(own, found[0] or "</s>"))[::-1]
                if each[0] in own.control_ids
            )
            told = f"{text}{'Hm.</think>' * opened}{said}{text_of(own, end[-1:])}"
        ids = split(own, told[len(text) :], random) if self.splits else encode(own, told[len(text) :])
        while ids and ids[-1] not in own.control_ids:
            ids.pop()  # what the template writes after the end
        kind = 5 if self.steady else random.randrange(6)
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
        """Random text; `steady` models write no marks."""
        known = [word for word in WORDS if not (self.steady and word in _SHOWN)]
        return "".join(self.random.choices(known, k=self.random.randint(1, 9)))

    def _play(self, stream: RequestStream, pieces: list[Any], stop: Any) -> None:
        (ids,), params = pieces, stream.request.params
        text = Detokenizer(self.tokenizer, params.skip_special_tokens, params.marked_token_ids)
        shown = ids[:-1] if self.finish_reason == "stop" else ids
        self.running -= 1
        self._say(stream, "".join(map(text.push, shown)) + text.flush(), ids, self.finish_reason)
        stop.set()


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
