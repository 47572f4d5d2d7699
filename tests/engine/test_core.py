"""Prompts whose layers are computed over several steps while others decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

from farthing.config import EngineConfig
from farthing.engine.engine import Engine
from farthing.engine.pace import Limits
from farthing.engine.request import RequestOutput, RequestStream, SamplingParams
from farthing.engine.runner import Step
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from tests.engine.conftest import tokens_of
from tests.served import form_for, served_model
from tests.tiny import tiny

pytestmark = pytest.mark.usefixtures("exact_on_amx")

DEPTH = 4
SHORT, LONG = 4, 48  # prompt tokens of a mixed step, and of divided layers
RAW = tiny(
    vocab_size=320, max_position_embeddings=256, num_hidden_layers=DEPTH, num_nextn_predict_layers=1,
    eos_token_id=1,
)  # fmt: skip
# Long enough that none ends before the prompts of its test arrive.
DECODING = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, logprobs=2)
ANSWER = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=1)


class Fixed(Limits):
    """Prompts of more than SHORT tokens are divided."""

    def prompt_tokens(self, decodes: int, shared: bool) -> int | None:
        return SHORT if decodes else None

    def divided_tokens(self, decodes: int, shared: bool) -> int:
        return LONG


class Watched:
    """An engine that divides every long prompt into single layers, and the layers it computed."""

    def __init__(self, model: DecoderModel, **config: Any) -> None:
        defaults = {"max_num_seqs": 8, "num_blocks": 64, "block_size": 4, "max_num_batched_tokens": 64}
        options = EngineConfig(**(defaults | config))
        self.engine = Engine(form_for(model, options), options)
        self.spans: list[tuple[int, int, int]] = []  # tokens, first layer, layer after the last
        self.before: list[Any] = []  # called before the next layers are computed, one each
        core = self.engine._core
        core.scheduler.limits = Fixed()
        assert core._pace is not None
        core._pace.layers = lambda decodes, shared, tokens: 1  # type: ignore[method-assign]
        advance = core.runner.advance

        def watch(step: Step, hidden: Tensor, first: int, last: int) -> Tensor:
            self.spans.append((len(hidden), first, last))
            if self.before:
                self.before.pop(0)()
            return advance(step, hidden, first, last)

        core.runner.advance = watch  # type: ignore[method-assign]

    def decoding(self, count: int = 2) -> list[RequestStream]:
        """Requests that have begun to decode."""
        streams = [self.engine.submit([7 + i, 9, 11], DECODING) for i in range(count)]
        for stream in streams:
            next(iter(stream))
        return streams

    def arriving(
        self, before: Callable[[list[RequestStream]], object], *prompts: list[int], client: str = ""
    ) -> list[RequestStream]:
        """Requests that arrive between two steps; `before` gets them before their first layers."""

        def submit(core: object) -> list[RequestStream]:
            streams = [self.engine.submit(each, ANSWER, client=client) for each in prompts]
            self.before = [lambda: before(streams)]
            return streams

        return self.engine.between_steps(submit).result()


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    return served_model(ModelConfig.from_json(RAW), seed=3)


@pytest.fixture
def watched(model: DecoderModel) -> Iterator[Watched]:
    made = Watched(model)
    yield made
    made.engine.shutdown()
    made.engine._core.scheduler.check()
    assert made.engine._core.scheduler.pool.num_free == made.engine.config.num_blocks
    assert made.engine.stats.integrity_failures == 0
    made.engine.health()


def prompt(number: int, length: int) -> list[int]:
    return [(number * 31 + 7 * i) % 300 + 3 for i in range(length)]


def texts(output: RequestOutput) -> tuple[list[int], Any, Any]:
    return tokens_of(output), output.outputs[0].logprobs, output.prompt_logprobs


@pytest.mark.parametrize("speculate", [None, "mtp", "ngram"])
def test_divided_prompts_get_the_same_answers(model: DecoderModel, speculate: str | None) -> None:
    prompts = [prompt(i, length) for i, length in enumerate((37, 90, 5, 4))]
    same = form_for(model, EngineConfig(speculate=speculate))  # torch rounds log-probabilities differently
    with Engine(same, EngineConfig(num_blocks=64, block_size=4, max_num_seqs=8)) as plain:
        expected = [texts(plain.submit(p, ANSWER).result()) for p in prompts]
        alone = tokens_of(plain.submit([7, 9, 11], DECODING).result())
    made = Watched(model, speculate=speculate)
    with made.engine as engine:
        first = engine.submit([7, 9, 11], DECODING)
        next(iter(first))
        streams = [engine.submit(p, ANSWER) for p in prompts]
        assert [texts(stream.result()) for stream in streams] == expected
        assert tokens_of(first.result()) == alone[1:]
    assert {last - first for _, first, last in made.spans} >= {1}
    assert max(tokens for tokens, _, _ in made.spans) > SHORT


def test_cancelled_prompt_keeps_its_blocks_until_its_layers_are_done(watched: Watched) -> None:
    engine = watched.engine
    others = watched.decoding()
    kept, gone = watched.arriving(lambda streams: streams[1].cancel(), prompt(1, 20), prompt(2, 20))
    assert gone.result().outputs[0].finish_reason == "abort"
    alone = texts(kept.result())
    for stream in others:
        stream.result()
    assert [first for _, first, _ in watched.spans] == list(range(DEPTH)), "each layer once"
    assert alone == texts(engine.submit(prompt(1, 20), ANSWER).result())


def test_layers_of_cancelled_prompts_are_not_computed(watched: Watched) -> None:
    others = watched.decoding()
    (gone,) = watched.arriving(lambda streams: streams[0].cancel(), prompt(3, 30))
    assert gone.result().outputs[0].finish_reason == "abort"
    for stream in others:
        stream.result()
    assert len(watched.spans) < DEPTH


def test_short_prompt_does_not_wait_for_a_divided_one(watched: Watched) -> None:
    engine, answers = watched.engine, []
    others = watched.decoding()
    (long,) = watched.arriving(lambda _: answers.append(engine.submit([5, 6, 7], ANSWER)), prompt(4, 40))
    late = long.result().metrics.first_token_time
    assert answers[0].result().metrics.first_token_time < late
    for stream in others:
        stream.result()


def test_short_prompt_is_not_divided_with_a_long_one(watched: Watched) -> None:
    engine = watched.engine
    others = watched.decoding()
    requests: list[RequestStream] = []
    engine.between_steps(
        lambda core: requests.extend(engine.submit(prompt(6, n), ANSWER) for n in (40, 3))
    ).result()
    long, short = (stream.result().metrics.first_token_time for stream in requests)
    assert short < long
    assert {tokens for tokens, _, _ in watched.spans} == {40}
    for stream in others:
        stream.result()


def test_another_clients_prompt_does_not_wait_for_all_layers(watched: Watched) -> None:
    engine, answers = watched.engine, []
    others = [engine.submit([7, 9, 11], DECODING, client="decoding")]
    next(iter(others[0]))
    flood = watched.arriving(
        lambda _: answers.append(engine.submit(prompt(9, 12), ANSWER, client="new")),
        *(prompt(i, 40) for i in range(3)),
        client="flood",
    )
    last = max(stream.result().metrics.first_token_time for stream in flood)
    assert answers[0].result().metrics.first_token_time < last
    for stream in others:
        stream.result()


def test_rest_of_the_layers_follows_at_once_where_nothing_decodes(watched: Watched) -> None:
    others = watched.decoding(1)
    (long,) = watched.arriving(lambda _: others[0].cancel(), prompt(5, 40))
    long.result()
    assert [(first, last) for _, first, last in watched.spans] == [(0, 1), (1, DEPTH)]
