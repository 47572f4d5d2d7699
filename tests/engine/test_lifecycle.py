"""The events in a request's life: queueing, cancellation, shutdown and failures."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from farthing.config import EngineConfig
from farthing.engine.constraints import Refused
from farthing.engine.core import MOST_FAILURES, MOST_REPEATED
from farthing.engine.engine import Engine
from farthing.engine.request import (
    INTERNAL,
    EngineError,
    EngineFailed,
    EngineStopped,
    QueueFull,
    SamplingParams,
    StructuredOutputsParams,
)
from farthing.engine.runner import Step
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.load import random_model
from farthing.ops.select import select

from .conftest import GREEDY, RAW, MakeEngine, tokens_of


def hold(engine: Engine) -> threading.Event:
    """Pause the engine before its next step until the event is set."""
    go, step = threading.Event(), engine._core.step

    def held() -> bool:
        go.wait(30)
        return step()

    engine._core.step = held  # type: ignore[method-assign]
    return go


def test_queue_is_bounded(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2, max_queue=3)
    go = hold(engine)
    streams = [engine.submit([4], GREEDY) for _ in range(5)]
    with pytest.raises(QueueFull, match="5 sequences in flight and 1 requested"):
        engine.submit([4], GREEDY)
    go.set()
    assert [len(tokens_of(s.result())) for s in streams] == [12] * 5
    assert len(tokens_of(engine.submit([4], GREEDY).result())) == 12


def test_cancel_frees_blocks_within_a_step(make_engine: MakeEngine) -> None:
    engine = make_engine()
    stream = engine.submit([4] * 9, SamplingParams(max_tokens=200, ignore_eos=True))
    other = engine.submit([5], GREEDY)
    next(stream)
    stream.cancel()
    rest = list(stream)
    assert rest[-1].finished and rest[-1].outputs[0].finish_reason == "abort"
    assert len(tokens_of(other.result())) == 12
    stream.cancel()  # cancelling again does nothing
    assert engine.submit([5], GREEDY).result().finished
    assert engine.stats.snapshot().requests_finished["abort"] == 1


def test_urgent_requests_overtake_waiting_ones(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    go = hold(engine)
    engine.submit([4], GREEDY)
    patient, urgent = engine.submit([4], GREEDY, priority=2), engine.submit([4], GREEDY, priority=-1)
    go.set()
    assert urgent.result().metrics.finished_time < patient.result().metrics.first_scheduled_time
    assert engine.drain(30)


def test_drain_finishes_running_requests(make_engine: MakeEngine) -> None:
    engine = make_engine()
    streams = [engine.submit([4], GREEDY) for _ in range(3)]
    assert engine.drain(30) is True
    assert [len(tokens_of(s.result())) for s in streams] == [12] * 3
    with pytest.raises(EngineStopped):
        engine.submit([4], GREEDY)


def test_drain_aborts_requests_after_its_timeout(make_engine: MakeEngine) -> None:
    engine = make_engine()
    go = hold(engine)
    stream = engine.submit([4], GREEDY)
    threading.Timer(0.2, go.set).start()
    assert engine.drain(0.05) is False
    assert stream.result().outputs[0].finish_reason == "abort"


def test_shutdown_aborts_and_is_idempotent(make_engine: MakeEngine) -> None:
    engine = make_engine()
    streams = [engine.submit([4], SamplingParams(max_tokens=200, ignore_eos=True)) for _ in range(12)]
    engine.shutdown()
    assert {s.result().outputs[0].finish_reason for s in streams} == {"abort"}
    engine.shutdown()
    with pytest.raises(EngineStopped):
        engine.submit([4])


def test_model_that_always_fails_ends_the_engine(model: DecoderModel) -> None:
    engine = Engine(model)
    engine._core.runner.forward = broken  # type: ignore[method-assign, assignment]
    for prompt in range(4, 4 + MOST_FAILURES - 1):
        with pytest.raises(EngineError, match=f"^{re.escape(INTERNAL)}$"):
            engine.submit([prompt]).result()
        engine.health()
    with pytest.raises(EngineFailed, match="3 steps in a row could not be computed"):
        engine.submit([40]).result()
    engine._thread.join(10)
    assert engine.ended
    with pytest.raises(EngineFailed, match="3 steps in a row"):
        engine.health()
    with pytest.raises(EngineError):
        engine.submit([4])
    engine.shutdown()


def test_a_request_that_is_sent_again_does_not_end_the_engine(model: DecoderModel) -> None:
    """Clients repeat a request that failed; only that one fails, unless nothing else is computed for long."""
    engine = Engine(model)
    forward = engine._core.runner.forward

    def picky(step: Step) -> torch.Tensor:
        if 7 in step.ids.tolist():
            raise RuntimeError("a bad request")
        return forward(step)

    engine._core.runner.forward = picky  # type: ignore[method-assign, assignment]
    one = SamplingParams(max_tokens=1, temperature=0)
    for _ in range(3):
        for _ in range(MOST_REPEATED):
            with pytest.raises(EngineError, match=f"^{re.escape(INTERNAL)}$"):
                engine.submit([7, 5], one).result()
        assert len(engine.submit([4, 5], one).result().outputs[0].token_ids) == 1
    with pytest.raises(EngineFailed, match=f"{MOST_REPEATED + 1} steps in a row"):
        for _ in range(MOST_REPEATED + 1):
            with pytest.raises(EngineError):
                engine.submit([7, 5], one).result()
            engine.health()
    engine.shutdown()


def broken(step: object) -> torch.Tensor:
    raise RuntimeError("out of memory")


def test_a_grammar_error_fails_only_its_request(make_engine: MakeEngine) -> None:
    engine = make_engine()
    go = hold(engine)
    params = SamplingParams(max_tokens=8, structured_outputs=StructuredOutputsParams(regex="[ab]{20}"))
    stream, other = engine.submit([4], params), engine.submit([5], GREEDY)
    while not engine._core.live():
        time.sleep(0.01)
    engine._core.live()[0].generations[0].sampling.matcher = Refusing()
    go.set()
    with pytest.raises(EngineError, match="refused"):
        stream.result()
    assert len(tokens_of(other.result())) == 12
    engine.health()


class Refusing:
    """A grammar that contradicts its own mask."""

    def masks(self, drafts: object, vocab: int) -> np.ndarray[Any, Any]:
        return np.ones((1, vocab), dtype=bool)

    def consume(self, token: int) -> None:
        raise Refused(f"token {token} refused")


def test_invariants_are_checked_when_idle(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.submit([4], GREEDY).result()
    calls: list[float] = []
    check = engine._core.check
    engine._core.check = lambda: (calls.append(time.time()), check())[1]  # type: ignore[method-assign]
    engine.submit([4], GREEDY).result()
    deadline = time.time() + 10
    while not calls and time.time() < deadline:
        time.sleep(0.02)
    assert calls and engine.stats.integrity_failures == 0


def test_leak_is_counted_and_repaired(model: DecoderModel) -> None:
    with Engine(model) as engine:
        engine.submit([4], GREEDY).result()
        engine._core.scheduler.pool.allocate(1)
        engine._core.check()
        assert engine.stats.integrity_failures == 1
        assert len(tokens_of(engine.submit([4], GREEDY).result())) == 12
        engine._core.scheduler.check()


def test_step_beyond_its_timeout_is_unhealthy(make_engine: MakeEngine) -> None:
    engine = make_engine(step_timeout=0.2)
    engine.health()
    go, step = threading.Event(), engine._core.step
    engine._core.step = lambda: go.wait(30) and step()  # type: ignore[method-assign]
    stream = engine.submit([4], GREEDY)
    deadline = time.monotonic() + 20
    with pytest.raises(EngineFailed, match="no step was completed"):
        while time.monotonic() < deadline:
            engine.health()
            time.sleep(0.02)
    go.set()
    stream.result()
    engine.health()


@pytest.mark.parametrize(
    ("params", "where"),
    [
        (SamplingParams(temperature=0, max_tokens=4), "layer 1's experts (model.layers.1.mlp)"),
        (SamplingParams(temperature=1, max_tokens=4), "layer 0's attention (model.layers.0.self_attn)"),
        (SamplingParams(max_tokens=1, prompt_logprobs=1), "layer 1's attention (model.layers.1.self_attn)"),
    ],
)
def test_logits_that_are_not_finite_name_the_layer(
    params: SamplingParams, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log. A client reads nothing of it, and the engine ends if no step succeeds in between."""
    broken = random_model(ModelConfig.from_json(RAW), select("reference"), seed=3)
    layer, part = int(where[6]), int("mlp" in where)
    broken.layers[layer][part].norm.weight[3] = float("nan")
    with Engine(broken, EngineConfig(max_num_seqs=4, num_blocks=64, block_size=4)) as engine:
        for more in range(MOST_FAILURES - 1):
            with pytest.raises(EngineError, match=f"^{re.escape(INTERNAL)}$"):
                engine.submit(list(range(20, 40 + more)), params).result()
        with pytest.raises(EngineFailed):
            engine.submit(list(range(20, 60)), params).result()
    assert f"the first output that is not finite is that of {where}" in caplog.text


def test_engine_survives_callers_that_no_longer_wait(make_engine: MakeEngine) -> None:
    engine = make_engine()
    entered, leave = threading.Event(), threading.Event()
    engine.between_steps(lambda core: (entered.set(), leave.wait()))
    entered.wait()
    given_up = engine.between_steps(lambda core: None)
    assert given_up.cancel()
    leave.set()
    assert engine.between_steps(lambda core: 1).result() == 1
