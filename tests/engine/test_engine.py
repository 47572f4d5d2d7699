"""The engine against the model run from scratch, and every event in a request's life."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from farthing.config import EngineConfig
from farthing.engine.engine import Engine
from farthing.engine.request import (
    EngineError,
    EngineFailed,
    EngineStopped,
    QueueFull,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from farthing.model import DeepseekModel, ModelConfig, random_model
from farthing.ops import select

from .conftest import EOS, RAW, VOCAB, Always, next_logits

MakeEngine = Callable[..., Engine]
Greedy = Callable[[list[int], int], list[int]]

PROMPTS = [
    [5, 6, 7],
    list(range(20, 60)),
    [9] * 17,
    list(range(20, 44)),
    [11, 12],
    list(range(100, 133)),
]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def tokens_of(output: RequestOutput, index: int = 0) -> list[int]:
    return output.outputs[index].token_ids


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"enable_prefix_caching": False, "block_size": 16},
        {"max_num_batched_tokens": 8, "max_num_seqs": 8},
        {"num_blocks": 16, "max_num_seqs": 4},  # preempts
        {"max_num_seqs": 1, "block_size": 1, "num_blocks": 64},
        {"speculate": "mtp:1"},
        {"speculate": "mtp:3", "num_blocks": 18},
        {"speculate": "ngram:4"},
    ],
    ids=str,
)
def test_tokens_equal_those_of_the_model(
    make_engine: MakeEngine, greedy: Greedy, config: dict[str, Any]
) -> None:
    engine = make_engine(**config)
    if (speculator := engine._core._speculator) is not None:
        speculator.gates = (Always(),)  # random weights make drafts too uncertain to pay
    streams = [engine.submit(p, GREEDY, kind="final") for p in PROMPTS]
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        output = stream.result()
        assert tokens_of(output) == greedy(prompt, 12)
        assert output.outputs[0].finish_reason == "length"
        assert output.prompt_token_ids == prompt
    snapshot = engine.stats.snapshot()
    assert snapshot.generation_tokens == 12 * len(PROMPTS)
    assert (snapshot.preemptions > 0) == (config.get("num_blocks", 64) < 64 and "block_size" not in config)
    assert snapshot.num_requests_running == snapshot.num_requests_waiting == 0
    if "speculate" in config:
        assert snapshot.draft_tokens > 0


def test_deltas_add_up_to_the_final_output(make_engine: MakeEngine) -> None:
    engine = make_engine(enable_prefix_caching=False)  # a cached prefix differs in the last bits
    params = SamplingParams(temperature=1, seed=3, max_tokens=30, n=2, logprobs=2, ignore_eos=True)
    whole = engine.submit("def f(", params, kind="final").result()
    parts = list(engine.submit("def f(", params))
    for index in range(2):
        mine = [c for part in parts for c in part.outputs if c.index == index]
        assert [t for c in mine for t in c.token_ids] == tokens_of(whole, index)
        assert "".join(c.text for c in mine) == whole.outputs[index].text
        assert [x for c in mine for x in c.logprobs or []] == whole.outputs[index].logprobs
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["length"]
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    assert engine.submit("def f(", params).result().outputs == whole.outputs


def test_seed_gives_the_same_tokens_in_any_batch(make_engine: MakeEngine) -> None:
    params = SamplingParams(temperature=1.2, top_p=0.9, seed=11, max_tokens=16, ignore_eos=True)
    alone = tokens_of(make_engine().submit([7, 8, 9], params).result())
    busy = make_engine(num_blocks=24, max_num_batched_tokens=9, max_num_seqs=9, speculate="ngram:2")
    others = [busy.submit(p, SamplingParams(max_tokens=25, ignore_eos=True), priority=-1) for p in PROMPTS]
    assert tokens_of(busy.submit([7, 8, 9], params).result()) == alone
    assert [len(tokens_of(o.result())) for o in others] == [25] * len(others)
    other_seed = SamplingParams(temperature=1.2, top_p=0.9, seed=12, max_tokens=16, ignore_eos=True)
    assert tokens_of(busy.submit([7, 8, 9], other_seed).result()) != alone


def test_engine_seed_is_used_without_a_request_seed(make_engine: MakeEngine) -> None:
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    first, again, other = (
        [tokens_of(engine.submit([7], params).result()) for _ in range(2)]
        for engine in (make_engine(seed=1), make_engine(seed=1), make_engine(seed=2))
    )
    assert first == again and first != other
    assert first[0] != first[1], "requests differ from each other"


def test_second_turn_reuses_the_cache(make_engine: MakeEngine, greedy: Greedy) -> None:
    engine = make_engine()
    prompt = list(range(30, 50))
    first = engine.submit(prompt, GREEDY).result()
    turn = [*prompt, *tokens_of(first), 3, 4]
    second = engine.submit(turn, GREEDY).result()
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 31  # all that were computed: seven full blocks and a part of one
    assert second.metrics.prefill_tokens == len(turn) - 31
    assert tokens_of(second) == greedy(turn, 12)
    assert engine.submit(turn, GREEDY, cache_salt="other").result().num_cached_tokens == 0
    assert engine.stats.snapshot().prefix_cache_hits == 31


def test_completions_of_one_prompt_share_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    output = engine.submit(list(range(40)), SamplingParams(n=3, max_tokens=4, ignore_eos=True)).result()
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3
    assert output.metrics.prefill_tokens == 40 + 2 * 4  # the others compute only the last block


def test_logprobs_equal_those_of_the_model(make_engine: MakeEngine, model: DeepseekModel) -> None:
    engine = make_engine()
    params = SamplingParams(
        temperature=0.7, seed=1, max_tokens=4, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )
    prompt = list(range(60, 100))
    output = engine.submit(prompt, params).result()
    completion = output.outputs[0]
    assert completion.logprobs is not None and output.prompt_logprobs is not None
    tokens = list(prompt)
    total = 0.0
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        expected = next_logits(model, tokens).log_softmax(-1)
        top = expected.topk(3).indices.tolist()
        assert set(entry) == {token, *top}
        for t, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(expected[t]), abs=1e-4)
            assert logprob.rank == int((expected > expected[t]).sum()) + 1
        total += entry[token].logprob
        tokens.append(token)
    assert completion.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    for i, entry in enumerate(output.prompt_logprobs[1:], 1):
        expected = next_logits(model, prompt[:i]).log_softmax(-1)
        assert entry is not None
        assert entry[prompt[i]].logprob == pytest.approx(float(expected[prompt[i]]), abs=1e-4)


def test_greedy_logprobs_use_the_fast_path(make_engine: MakeEngine, model: DeepseekModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=2)
    output = make_engine().submit([4, 5], params).result().outputs[0]
    assert output.logprobs is not None
    expected = next_logits(model, [4, 5]).log_softmax(-1)
    values, ids = expected.topk(2)
    assert list(output.logprobs[0]) == ids.tolist()
    assert [x.logprob for x in output.logprobs[0].values()] == pytest.approx(values.tolist(), abs=1e-4)


def test_stop_token_eos_and_min_tokens(make_engine: MakeEngine, greedy: Greedy) -> None:
    engine = make_engine()
    plain = greedy([5, 6, 7], 12)
    stop = plain[5]
    at = plain.index(stop)
    stopped = engine.submit(
        [5, 6, 7], SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop])
    ).result()
    assert tokens_of(stopped) == plain[: at + 1]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    later = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop], min_tokens=at + 2)
    assert stop not in tokens_of(engine.submit([5, 6, 7], later).result())[: at + 2]
    eos = SamplingParams(temperature=0, max_tokens=5, logit_bias={EOS: 100})
    ended = engine.submit([5], eos).result().outputs[0]
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([EOS], "", "stop", None)
    ignored = SamplingParams(temperature=0, max_tokens=5, logit_bias={EOS: 100}, ignore_eos=True)
    assert tokens_of(engine.submit([5], ignored).result()) == [EOS] * 5
    kept = SamplingParams(temperature=0, max_tokens=5, logit_bias={EOS: 100}, min_tokens=3)
    assert tokens_of(engine.submit([5], kept).result()).index(EOS) == 3


def test_stop_strings_never_leak_into_the_stream(make_engine: MakeEngine) -> None:
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    text = engine.submit("for item in", params).result().outputs[0].text
    stop = text[9:13]
    assert stop in text
    for include in (False, True):
        stopping = SamplingParams(
            temperature=0,
            max_tokens=40,
            ignore_eos=True,
            stop=["never", stop],
            include_stop_str_in_output=include,
        )
        parts = list(engine.submit("for item in", stopping))
        shown = "".join(c.text for part in parts for c in part.outputs)
        end = text.index(stop)
        assert shown == (text[: end + len(stop)] if include else text[:end])
        assert parts[-1].outputs[0].stop_reason == stop


def test_lengths_are_limited(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=20)
    output = engine.submit([3] * 15, SamplingParams(max_tokens=None, ignore_eos=True)).result()
    assert len(tokens_of(output)) == 5 and output.outputs[0].finish_reason == "length"
    with pytest.raises(ValueError, match="prompt has 20 tokens; expected at most 19"):
        engine.submit([3] * 20)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([VOCAB], {}, rf"prompt has {VOCAB}"),
        ([-1], {}, r"prompt has -1"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias has"),
        ([1], {"stop_token_ids": [-5]}, "stop_token_ids has -5"),
        ([1], {"structured_outputs": StructuredOutputsParams(regex="(")}, "structured_outputs.regex"),
        ([1], {"structured_outputs": StructuredOutputsParams(json="{")}, "structured_outputs.json"),
    ],
)
def test_errors_of_bad_requests_name_the_field(
    make_engine: MakeEngine, prompt: list[int], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine().submit(prompt, SamplingParams(**params))


def test_text_is_rejected_without_a_tokenizer(make_engine: MakeEngine) -> None:
    engine = make_engine(with_tokenizer=False)
    assert len(tokens_of(engine.submit([1, 2], GREEDY).result())) == 12
    for prompt, params in (("text", {}), ([1], {"stop": "x"})):
        with pytest.raises(ValueError, match="skip_tokenizer_init"):
            engine.submit(prompt, SamplingParams(**params))


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


def test_failing_model_fails_every_stream_and_health(model: DeepseekModel) -> None:
    engine = Engine(model)
    engine._core.runner.forward = broken  # type: ignore[method-assign, assignment]
    streams = [engine.submit([4]) for _ in range(2)]
    for stream in streams:
        with pytest.raises(EngineError, match="out of memory"):
            stream.result()
    engine._thread.join(10)
    with pytest.raises(EngineError, match="out of memory"):
        engine.health()
    with pytest.raises(EngineError):
        engine.submit([4])
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
        raise ValueError(f"token {token} refused")


def test_async_iteration_from_many_tasks(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def client(i: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        return [t async for out in engine.submit([i + 2], params) for t in out.outputs[0].token_ids]

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(client(i % 5) for i in range(40)))

    results = asyncio.run(main())
    assert all(len(tokens) == 6 for tokens in results)
    assert all(results[i] == results[i % 5] for i in range(40))

    async def one() -> RequestOutput:
        return await engine.submit([2], GREEDY).aresult()

    assert tokens_of(asyncio.run(one()))[:6] == results[0]


def test_submitting_from_many_threads(make_engine: MakeEngine) -> None:
    engine = make_engine()
    results: dict[int, list[int]] = {}

    def work(i: int) -> None:
        results[i] = tokens_of(engine.submit([i % 3 + 2], GREEDY).result())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 24 and all(results[i] == results[i % 3] for i in results)


def test_metrics_and_statistics(make_engine: MakeEngine, model: DeepseekModel) -> None:
    engine = make_engine()
    output = engine.submit(list(range(2, 12)), GREEDY).result()
    m = output.metrics
    assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.finished_time
    assert (m.prefill_tokens, m.cached_tokens, m.decode_tokens) == (10, 0, 12)
    assert m.prefill_seconds > 0 and m.decode_seconds > 0
    s = engine.stats.snapshot()
    assert s.busy_seconds == pytest.approx(m.prefill_seconds + m.decode_seconds, rel=0.5)
    assert (s.prompt_tokens, s.generation_tokens, s.steps) == (10, 12, 12)
    assert s.time_to_first_token.count == s.e2e_request_latency.count == s.request_queue_time.count == 1
    assert s.inter_token_latency.count == 11
    assert s.requests_finished == {"stop": 0, "length": 1, "abort": 0, "error": 0}
    # 21 tokens are computed (the last is not), each by two experts of layer 1.
    assert sum(s.expert_tokens[1]) == 2 * 21 and 0 not in s.expert_tokens


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


def test_leak_is_counted_and_repaired(model: DeepseekModel) -> None:
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


def test_prompt_logprobs_per_step_are_limited(make_engine: MakeEngine) -> None:
    """For any prompt, so that steps stay short; and kept as arrays, without an object per token."""
    engine = make_engine(max_num_batched_tokens=256, num_blocks=256)
    rows: list[int] = []
    logits = engine._core.runner.model.logits
    engine._core.scheduler.scored_limit = lambda: 8

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            rows.append(len(hidden))
            return logits(hidden)

    model = engine._core.runner.model
    engine._core.runner.model = Counting()  # type: ignore[assignment]
    params = SamplingParams(max_tokens=1, prompt_logprobs=3, temperature=0)
    streams = [engine.submit([i, *range(40, 90)], params) for i in range(3)]
    outputs = [stream.result() for stream in streams]
    assert max(rows) <= 8 and sum(rows) >= 3 * 50
    for output in outputs:
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 51


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "min_tokens": ({"allowed_token_ids": [1], "min_tokens": 3}, "allowed_token_ids and min_tokens"),
    "stop_token_ids": (
        {"allowed_token_ids": [9, 10], "stop_token_ids": [9, 10], "min_tokens": 1},
        "allowed_token_ids and min_tokens",
    ),
    "structured_outputs": (
        {"allowed_token_ids": [2], "structured_outputs": StructuredOutputsParams(regex="[0-9]+")},
        "structured_outputs and allowed_token_ids",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_limits_that_exclude_every_token_are_rejected(make_engine: Callable[..., Engine], name: str) -> None:
    fields, named = IMPOSSIBLE[name]
    with pytest.raises(ValueError, match=named):
        make_engine().submit("x", SamplingParams(max_tokens=4, **fields))


@pytest.mark.parametrize("speculate", [None, "ngram:3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_limits_that_exclude_every_token_later_are_an_error(
    make_engine: Callable[..., Engine], speculate: str | None, temperature: float
) -> None:
    engine = make_engine(speculate=speculate)
    assert engine.tokenizer is not None
    (x,) = engine.tokenizer.encode("x", add_special_tokens=False)
    params = SamplingParams(
        max_tokens=8,
        temperature=temperature,
        allowed_token_ids=[x],
        structured_outputs=StructuredOutputsParams(regex="xxx[0-9]"),
    )
    tokens: list[int] = []
    with pytest.raises(EngineError, match="structured_outputs and allowed_token_ids exclude every token"):
        for output in engine.submit("x", params):
            tokens += output.outputs[0].token_ids
    assert set(tokens) == {x}


@pytest.mark.parametrize(
    ("params", "where"),
    [
        (SamplingParams(temperature=0, max_tokens=4), "layer 1's experts (model.layers.1.mlp)"),
        (SamplingParams(temperature=1, max_tokens=4), "layer 0's attention (model.layers.0.self_attn)"),
        (SamplingParams(max_tokens=1, prompt_logprobs=1), "layer 1's attention (model.layers.1.self_attn)"),
    ],
)
def test_logits_that_are_not_finite_name_the_layer(params: SamplingParams, where: str) -> None:
    broken = random_model(ModelConfig.from_json(RAW), select("reference"), seed=3)
    layer, part = int(where[6]), int("mlp" in where)
    broken.layers[layer][part].norm[3] = float("nan")
    expected = pytest.raises(EngineFailed, match=re.escape(f"output that is not finite is that of {where}"))
    with Engine(broken, EngineConfig(max_num_seqs=4, num_blocks=64, block_size=4)) as engine, expected:
        engine.submit(list(range(20, 40)), params).result()
