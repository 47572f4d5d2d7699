"""Exceptions at every stage of a step: they end the requests concerned, and change nothing for any other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest

from farthing.config import EngineConfig
from farthing.engine import core as core_module
from farthing.engine import generation
from farthing.engine.core import MOST_FAILURES
from farthing.engine.engine import Engine
from farthing.engine.request import (
    INTERNAL,
    EngineError,
    EngineFailed,
    RequestOutput,
    RequestStream,
    SamplingParams,
)
from farthing.engine.speculation import Speculator
from farthing.model.config import ModelConfig
from farthing.ops.api import NotFinite
from tests.served import served_model

from .conftest import Always, Guesses, MakeEngine, tokens_of
from .test_forgetting import MODELS

SECRET = "/secret/path: out of bounds (8192)"
PROMPTS = [[5, 6, 7], list(range(20, 60)), [9] * 17, list(range(20, 44)), [11, 12]]
# Every way in which the sampler works: greedy, drawn, filtered, penalized, scored.
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=1, seed=3, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, seed=4, max_tokens=16, ignore_eos=True, logprobs=0),
    SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1, seed=5, max_tokens=12, n=2, ignore_eos=True, prompt_logprobs=1),
]
VICTIM = 2  # of PROMPTS, where an exception concerns one request


def anything(*args: Any) -> bool:
    return True


class Fault:
    """A function that raises at one of its calls, or at each; `when`: which arguments count as calls."""

    def __init__(
        self,
        function: Callable[..., Any],
        call: int | None = None,
        when: Callable[..., bool] = anything,
        error: type[Exception] = RuntimeError,
    ) -> None:
        self.function, self.call, self.when, self.error = function, call, when, error
        self.seen = self.raised = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.when(*args):
            self.seen += 1
            if self.call in (None, self.seen):
                self.raised += 1
                raise self.error(SECRET)
        return self.function(*args, **options)


def of_victim(gen: generation.Generation, *args: Any) -> bool:
    return gen.parent.request.prompt_token_ids == PROMPTS[VICTIM]


@contextmanager
def together(engine: Engine) -> Iterator[None]:
    """Requests submitted inside are all in the engine's inbox before the next step."""
    entered, leave = threading.Event(), threading.Event()
    engine.between_steps(lambda core: (entered.set(), leave.wait(60)))
    entered.wait()
    try:
        yield
    finally:
        leave.set()


def answered(engine: Engine) -> list[RequestOutput | EngineError]:
    """The outputs or errors of all requests, which run at the same time."""
    with together(engine):
        streams = [engine.submit(p, params) for p, params in zip(PROMPTS, PARAMS, strict=True)]
    return [ending(stream) for stream in streams]


def ending(stream: RequestStream) -> RequestOutput | EngineError:
    try:
        return stream.result()
    except EngineError as error:
        return error


def content(output: RequestOutput) -> Any:
    parts = [(c.index, c.text, c.token_ids, c.logprobs, c.finish_reason) for c in output.outputs]
    return parts, output.prompt_logprobs


def check_others(
    found: list[RequestOutput | EngineError], expected: list[RequestOutput | EngineError], failed: set[int]
) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if number in failed:
            assert isinstance(one, EngineError) and not isinstance(one, EngineFailed)
            assert str(one) == INTERNAL and SECRET not in str(one)
        else:
            assert isinstance(one, RequestOutput) and isinstance(other, RequestOutput)
            assert content(one) == content(other), number


def settled(engine: Engine) -> None:
    """Nothing is held any more, and invariants hold, as `make_engine` checks again."""
    engine.between_steps(lambda core: core.scheduler.check()).result()
    engine.health()
    assert engine.num_live == 0 and engine._backlog.room == engine._backlog._limit


@pytest.mark.parametrize("call", [1, 2, 7])
@pytest.mark.parametrize("stage", ["schedule", "prepare", "forward", "report"])
def test_a_step_that_fails_ends_its_own_requests(make_engine: MakeEngine, stage: str, call: int) -> None:
    """They may be all; whoever did not take part answers as if nothing had happened."""
    expected = answered(make_engine())
    engine = make_engine(max_num_seqs=8, max_num_batched_tokens=16)  # so that some wait
    core = engine._core
    owner: Any = {"schedule": core.scheduler, "report": core}.get(stage, core.runner)
    name = "_report" if stage == "report" else stage
    fault = Fault(getattr(owner, name), call)
    setattr(owner, name, fault)
    taking_part: list[set[int]] = []

    def watch(error: Exception, ended: Any) -> None:
        taking_part.append({PROMPTS.index(s.request.prompt_token_ids) for s in ended})
        recover(error, ended)

    recover, core._recover = core._recover, watch  # type: ignore[method-assign]
    found = answered(engine)
    assert fault.raised == len(taking_part) == 1
    assert bool(taking_part[0]) == (stage != "schedule")  # without a plan no request is to blame
    check_others(found, expected, taking_part[0])
    settled(engine)
    assert engine.stats.snapshot().failed_steps == 1
    check_others(answered(engine), expected, set())  # nothing wrong is left in the prefix cache


STAGES: dict[str, tuple[type, str, Callable[..., bool]]] = {
    "text": (generation.Generation, "push", of_victim),
    "report": (
        generation.RequestState,
        "output",
        lambda state, *_: state.request.prompt_token_ids == PROMPTS[VICTIM],
    ),
    "last report": (
        generation.RequestState,
        "output",
        lambda state, *_: state.request.prompt_token_ids == PROMPTS[VICTIM] and not state.unfinished,
    ),
    "deliver": (
        RequestStream,
        "_put",
        lambda stream, item: (
            stream.request.prompt_token_ids == PROMPTS[VICTIM] and isinstance(item, RequestOutput)
        ),
    ),
}


@pytest.mark.parametrize(
    ("stage", "call"), [*product(["text", "report", "deliver"], [1, 2, 5]), ("last report", 1)]
)
def test_an_exception_in_one_requests_part_ends_that_request(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, stage: str, call: int
) -> None:
    expected = answered(make_engine())
    engine = make_engine()
    owner, name, when = STAGES[stage]
    fault = Fault(getattr(owner, name), call, when)
    monkeypatch.setattr(owner, name, lambda *args: fault(*args))
    found = answered(engine)
    assert fault.raised == 1
    check_others(found, expected, {VICTIM})
    settled(engine)
    assert engine.stats.snapshot().failed_steps == 0
    check_others(answered(engine), expected, set())


def test_a_cancelled_request_without_an_output_ends_with_an_error(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    with together(engine):
        stream = engine.submit(PROMPTS[VICTIM], PARAMS[VICTIM])
        monkeypatch.setattr(generation.RequestState, "output", Fault(generation.RequestState.output, 1))
        stream.cancel()
    error = ending(stream)
    assert isinstance(error, EngineError) and str(error) == INTERNAL
    settled(engine)


@pytest.mark.parametrize("error", [ValueError, IndexError, NotFinite, MemoryError])
def test_a_row_that_cannot_be_sampled_ends_its_request(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """The whole batch fails first; then it is sampled one sequence at a time."""
    expected = answered(make_engine())
    engine = make_engine()

    def hit(head: Any, hidden: Any, rows: Any, *_: Any) -> bool:
        return any(row.state.params is PARAMS[VICTIM] for row in rows)

    fault = Fault(core_module.sample, None, hit, error)
    monkeypatch.setattr(core_module, "sample", fault)
    check_others(answered(engine), expected, {VICTIM})
    settled(engine)
    assert engine.stats.snapshot().failed_steps == 0
    monkeypatch.undo()
    again = answered(engine)
    check_others(again, expected, set())
    assert isinstance(again[VICTIM], RequestOutput)
    assert not again[VICTIM].num_cached_tokens  # type: ignore[union-attr]  # what it had computed is forgotten


def test_a_prompt_that_cannot_be_scored_ends_its_request(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answered(make_engine())
    engine = make_engine()
    monkeypatch.setattr(core_module, "report", Fault(core_module.report, error=ValueError))
    check_others(answered(engine), expected, {4})
    settled(engine)


def test_a_request_that_the_scheduler_refuses_ends_alone(make_engine: MakeEngine) -> None:
    expected = answered(make_engine())
    engine = make_engine()
    for error in (ValueError, KeyError):
        scheduler = engine._core.scheduler
        original = scheduler.add
        fault = Fault(original, 1, of_victim, error)
        scheduler.add = fault  # type: ignore[method-assign]
        check_others(answered(engine), expected, {VICTIM})
        scheduler.add = original  # type: ignore[method-assign]
    settled(engine)


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("stage", ["schedule", "forward"])
def test_windows_and_states_are_consistent_after_a_failed_step(kind: str, stage: str) -> None:
    """Also where the half-computed step had drafts, in another slot for the state."""
    model = served_model(ModelConfig.from_json(MODELS[kind]))
    prompts = [[2 + (i * i + n) % 300 for i in range(n)] for n in (61, 45, 40)]
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    options: dict[str, Any] = dict(max_num_seqs=4, num_blocks=96, block_size=4, max_num_batched_tokens=24)
    found: list[list[list[int]]] = []
    for call in (0, 1, 5, 9):
        engine = Engine(model, EngineConfig(**options))
        if found:
            texts = [[*p, *answer] for p, answer in zip(prompts, found[0], strict=True)]
            engine._core._speculator = Speculator([Guesses(*texts)], Always)
        owner: Any = engine._core.scheduler if stage == "schedule" else engine._core.runner
        fault = Fault(getattr(owner, stage), call)
        setattr(owner, stage, fault)
        results: list[list[int]] = []
        for p in prompts * 2:  # a request of a failed step is sent again
            outcome = ending(engine.submit(p, greedy))
            if isinstance(outcome, EngineError):
                outcome = ending(engine.submit(p, greedy))
            assert isinstance(outcome, RequestOutput)
            results.append(tokens_of(outcome))
        engine.between_steps(lambda core: core.scheduler.check()).result()
        assert fault.raised == bool(call)
        engine.shutdown()
        engine._core.scheduler.check()
        assert engine._core.scheduler.unused
        assert results[:3] == results[3:] and (not found or results[:3] == found[0])
        found.append(results[:3])
    assert len(found) == 4


def test_a_failed_step_of_divided_prompts_ends_them() -> None:
    from .test_core import DECODING, RAW, Watched, prompt, texts

    made = Watched(served_model(ModelConfig.from_json(RAW), seed=3))
    engine = made.engine
    alone = [tokens_of(engine.submit([7 + i, 9, 11], DECODING).result()) for i in range(2)]
    decoding = made.decoding()

    def fail() -> None:
        raise RuntimeError(SECRET)

    (divided,) = made.arriving(lambda _: made.before.extend([lambda: None, fail]), prompt(1, 40))
    with pytest.raises(EngineError, match=INTERNAL):
        divided.result()
    for stream, tokens in zip(decoding, alone, strict=True):
        assert tokens_of(stream.result()) == tokens[1:]
    (again,) = made.arriving(lambda _: None, prompt(1, 40))
    assert len(texts(again.result())[0]) == 6
    engine.shutdown()
    engine._core.scheduler.check()
    assert engine._core.scheduler.unused


@pytest.mark.parametrize("where", ["observe", "draft"])
def test_drafting_that_fails_changes_no_token(
    make_engine: MakeEngine, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answered(make_engine())
    engine = make_engine(speculate="ngram:4")
    speculator = engine._core._speculator
    assert speculator is not None
    speculator.gates = (Always(),)
    drafter = speculator.drafters[0]
    broken = Fault(getattr(drafter, where))
    setattr(drafter, where, broken)
    with caplog.at_level(logging.ERROR):
        check_others(answered(engine), expected, set())
    assert broken.raised == MOST_FAILURES and "speculation is off" in caplog.text
    settled(engine)


def test_failures_with_progress_in_between_do_not_end_the_engine(make_engine: MakeEngine) -> None:
    engine = make_engine()
    forward, count = engine._core.runner.forward, 0

    def sometimes(step: Any) -> Any:
        nonlocal count
        count += 1
        if count % 3:
            raise RuntimeError(SECRET)
        return forward(step)

    engine._core.runner.forward = sometimes  # type: ignore[method-assign]
    one = SamplingParams(max_tokens=1, temperature=0)
    for _ in range(5):
        for _ in range(2):
            with pytest.raises(EngineError, match=INTERNAL):
                engine.submit([4, 5], one).result()
        assert len(tokens_of(engine.submit([4, 5], one).result())) == 1
    engine.health()
    settled(engine)


def test_a_scheduler_that_fails_twice_ends_what_it_has(make_engine: MakeEngine) -> None:
    expected = answered(make_engine())
    engine = make_engine()
    core = engine._core

    kind = type(core.scheduler)  # it is replaced by another one each time
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(kind.schedule, when=lambda scheduler: fault.raised < 2)
        patch.setattr(kind, "schedule", lambda scheduler: fault(scheduler))
        check_others(answered(engine), expected, set(range(len(PROMPTS))))
        assert fault.raised == 2
        check_others(answered(engine), expected, set())
    settled(engine)
