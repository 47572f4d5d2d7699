"""Fairness between clients: no starvation, shares close to equal, and no delay of new clients by a crowd."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.config import EngineConfig, check
from farthing.engine.pace import SCORING, SMALLEST_CHUNK, SMALLEST_SCORED, Interference, Pace
from farthing.engine.request import EngineError, SamplingParams, StructuredOutputsParams
from farthing.engine.scheduler import Scheduler
from farthing.engine.sequence import Scheduled, Sequence, Status
from tests.engine.conftest import EOS, GREEDY, VOCAB, Greedy, MakeEngine, tokens_of

NUMBERS = itertools.count()


def sequence(client: str, prompt: int, output: int, priority: int = 0) -> Sequence:
    number = next(NUMBERS)
    tokens = [number % 7919 + 1] * prompt  # no prefix shared between sequences
    return Sequence(number, tokens, prompt, prompt + output, number + 10.0 * priority, client=client)


def step(scheduler: Scheduler, served: Counter[str] | None = None) -> list[Scheduled]:
    """Compute one step and remove finished sequences."""
    plan = scheduler.schedule()
    for item in plan:
        scheduler.commit(item, [9] if item.sample else [])
        if served is not None:
            served[item.seq.client] += item.num_tokens
    for item in plan:
        if len(item.seq.tokens) >= item.seq.max_len:
            scheduler.finish(item.seq)
    scheduler.check()
    return plan


def scheduler(rows: int = 8, blocks: int = 256, budget: int = 32) -> Scheduler:
    return Scheduler(blocks, 4, rows, budget, enable_prefix_caching=False)


LENGTHS = st.tuples(st.integers(1, 60), st.integers(1, 30))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.tuples(st.integers(1, 12), LENGTHS), min_size=2))
def test_clients_with_work_get_equal_shares(loads: dict[str, tuple[int, tuple[int, int]]]) -> None:
    """Regardless of the number and sizes of their requests."""
    engine, served = scheduler(), Counter[str]()
    for _ in range(150):
        for client, (depth, (prompt, output)) in loads.items():
            mine = sum(seq.client == client for seq in engine.running + engine.waiting)
            # More than a step can finish: a client without sequences counts as gone and returns level.
            for _ in range((depth + 1) * 8 - mine):
                engine.add(sequence(client, prompt, output))
        step(engine, served)
    longest = max(prompt + output for _, (prompt, output) in loads.values())
    assert max(served.values()) - min(served.values()) <= 2 * engine.max_tokens + longest


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(100, 400))
def test_crowd_does_not_delay_a_new_client(lengths: tuple[int, int], crowd: int) -> None:
    engine = scheduler(rows=8, blocks=128, budget=32)
    for _ in range(crowd):
        engine.add(sequence("crowd", *lengths))
    for _ in range(20):
        step(engine)
    newcomer = sequence("newcomer", 20, 5)
    engine.add(newcomer)
    steps = 0
    while newcomer.status is not Status.FINISHED and steps < 50:
        steps += 1
        step(engine)
    assert newcomer.status is Status.FINISHED
    assert steps <= 1 + 5 + 5  # its prompt, its output, and steps shared with the crowd
    while not engine.idle:
        step(engine)


def test_successive_new_clients_are_served() -> None:
    engine = scheduler()
    for _ in range(200):
        engine.add(sequence("crowd", 50, 100))
    for _ in range(10):
        step(engine)
    for _ in range(20):
        newcomer = sequence("newcomer", 10, 3)
        engine.add(newcomer)
        for _ in range(12):
            step(engine)
        assert newcomer.status is Status.FINISHED
    assert any(seq.client == "crowd" for seq in engine.running)


def test_preempted_crowd_still_finishes() -> None:
    engine = scheduler(rows=4, blocks=64)
    crowd = [sequence("crowd", 30, 20) for _ in range(20)]
    for seq in crowd:
        engine.add(seq)
    for round_ in itertools.count():
        if round_ % 3 == 0:
            engine.add(sequence("steady", 5, 2))
        step(engine)
        if all(seq.status is Status.FINISHED for seq in crowd):
            break
        assert round_ < 3000
    assert any(seq.preemptions for seq in crowd)


def test_large_requests_of_two_clients_do_not_preempt_each_other() -> None:
    engine = scheduler(rows=4, blocks=32)  # 128 tokens; each wants 100
    both = [sequence(client, 60, 40) for client in "ab"]
    for seq in both:
        engine.add(seq)
    for _ in range(400):
        step(engine)
    assert all(seq.status is Status.FINISHED for seq in both)
    assert sum(seq.preemptions for seq in both) <= 2


@pytest.mark.parametrize(("prompt", "preempted"), [(24, 2), (25, 0)])
def test_nothing_is_preempted_for_more_blocks_than_a_clients_share(prompt: int, preempted: int) -> None:
    """Of 13 blocks, two clients may each claim six; the crowd holds twelve."""
    engine = scheduler(blocks=13, budget=64)
    for _ in range(3):
        engine.add(sequence("crowd", 14, 2))
    step(engine)
    engine.add(sequence("newcomer", prompt, 1))
    engine.schedule()
    assert engine.num_preemptions == preempted


def test_a_clients_only_sequence_is_not_preempted_for_another_client() -> None:
    """Although it holds 8 of 13 blocks, twice a third, and the newcomer lacks two of its share."""
    engine = scheduler(blocks=13, budget=64)
    for seq in (sequence("first", 6, 2), sequence("large", 30, 2)):
        engine.add(seq)
    step(engine)
    engine.add(sequence("newcomer", 16, 1))
    engine.schedule()
    assert engine.num_preemptions == 0


def test_priority_applies_within_a_client() -> None:
    engine = scheduler(rows=1)
    late, urgent = sequence("a", 4, 1), sequence("a", 4, 1, priority=-5)
    engine.add(late)
    engine.add(urgent)
    assert [item.seq for item in step(engine)] == [urgent]


def test_single_client_is_served_by_urgency() -> None:
    engine = scheduler(rows=4)
    many = [sequence("", 8, 4) for _ in range(8)]
    for seq in many:
        engine.add(seq)
    assert [item.seq for item in step(engine)] == many[:4]


LIMIT, DECODE, COST = 0.15, 0.01, 1e-3  # seconds: of a step, of a decode-only step, per prompt token


def interference_sequence(client: str, prompt: int, output: int) -> Sequence:
    number = next(NUMBERS)
    return Sequence(number, [number % 7919 + 1] * prompt, prompt, prompt + output, number, client=client)


def decode(client: str) -> Scheduled[Sequence]:
    return Scheduled(interference_sequence(client, 4, 4), 4, 1, (), True, True, False)


def prompt(client: str, tokens: int) -> Scheduled[Sequence]:
    return Scheduled(interference_sequence(client, tokens, 4), 0, tokens, (), True, False, True)


def test_client_pauses_for_as_long_as_it_has_delayed_another() -> None:
    owed = Interference()
    owed.observe([decode("a"), prompt("b", 100)], 0.1, 0.04)
    assert owed.paused({"a"}) == {"b"}
    owed.observe([decode("a")], 0.04, 0.04)
    assert owed.paused({"a"}) == {"b"}
    owed.observe([decode("a")], 0.04, 0.04)
    assert owed.paused({"a"}) == set()


def test_client_does_not_pause_for_itself_or_without_others() -> None:
    owed = Interference()
    owed.observe([decode("a"), prompt("a", 100)], 0.1, 0.04)
    owed.observe([prompt("b", 100)], 0.1, 0.04)
    assert owed.paused({"a", "b"}) == set()
    owed.observe([decode("a"), prompt("b", 100)], 0.1, 0.04)
    assert owed.paused({"b"}) == owed.paused(set()) == set()


def test_debt_is_forgotten_once_no_other_client_decodes() -> None:
    owed = Interference()
    owed.observe([decode("a"), prompt("b", 100)], 0.1, 0.04)
    owed.observe([decode("b")], 0.01, 0.01)
    assert owed.paused({"a"}) == set()


def test_time_spent_on_a_third_client_repays_nothing() -> None:
    """Or two clients could take turns at delaying another."""
    owed = Interference()
    owed.observe([decode("a"), prompt("b", 100)], 0.10, 0.02)
    owed.observe([decode("a"), prompt("c", 100)], 0.10, 0.02)
    assert owed.paused({"a"}) == {"b", "c"}


@pytest.mark.parametrize("attackers", [1, 3])
@pytest.mark.parametrize("length", [8, 300, 4000])
def test_flood_of_prompts_delays_an_answer_by_a_bounded_time(attackers: int, length: int) -> None:
    """A simulated machine; prompts of each attacker wait at all times."""
    pace = Pace(LIMIT)
    scheduler = Scheduler(4096, 16, 64, 512, False, limits=pace)
    clock, spent = 0.0, Counter[str]()

    def step() -> None:
        nonlocal clock
        for i in range(attackers):
            while sum(seq.client == f"bad{i}" for seq in [*scheduler.running, *scheduler.waiting]) < 4:
                scheduler.add(interference_sequence(f"bad{i}", length, 2))
        plan = scheduler.schedule()
        decodes = sum(item.decode for item in plan)
        tokens = sum(item.count for item in plan if not item.decode)
        seconds = DECODE * (decodes > 0) + COST * tokens
        scheduler.interference.observe(plan, seconds, pace.decode_seconds(decodes))
        pace.observe(decodes, tokens, seconds)
        clock += seconds
        spent["prompts"] += int(1e6 * COST * tokens)
        for item in plan:
            scheduler.commit(item, [9] if item.sample else [])
        for item in plan:
            if len(item.seq.tokens) >= item.seq.max_len:
                scheduler.finish(item.seq)
        scheduler.check()

    for _ in range(50):
        step()
    firsts, delays = [], []
    for _ in range(20):
        good = interference_sequence("good", 4, 8)
        scheduler.add(good)
        began = clock
        while good.num_output < 1:
            step()
        firsts.append(clock - began)
        began = clock
        while len(good.tokens) < good.max_len:
            step()
        delays.append(clock - began - 7 * DECODE)
    assert max(firsts) <= LIMIT
    assert max(delays) <= attackers * LIMIT
    assert spent["prompts"] >= 0.4e6 * clock  # and the flood is served


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


def test_prompt_logprobs_per_step_are_limited(make_engine: MakeEngine) -> None:
    """For any prompt, so that steps stay short; and kept as arrays, without an object per token."""
    engine = make_engine(max_num_batched_tokens=256, num_blocks=256)
    rows: list[int] = []
    logits = engine._core.runner.model.logits
    engine._core.scheduler.limits.scored_tokens = lambda shared: 8  # type: ignore[method-assign]

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
def test_limits_that_exclude_every_token_are_rejected(make_engine: MakeEngine, name: str) -> None:
    fields, named = IMPOSSIBLE[name]
    with pytest.raises(ValueError, match=named):
        make_engine().submit("x", SamplingParams(max_tokens=4, **fields))


@pytest.mark.parametrize("speculate", [None, "ngram:3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_limits_that_exclude_every_token_later_are_an_error(
    make_engine: MakeEngine, speculate: str | None, temperature: float
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


@pytest.mark.parametrize("limit", [math.inf, 1e308, math.nan, -1.0])
def test_limit_is_finite(limit: float) -> None:
    with pytest.raises(ValueError, match=r"max_step_ms: got .*; expected a number >= 0 and <= "):
        check(EngineConfig(max_step_ms=limit))


def test_no_bound_without_a_limit_or_without_decoding() -> None:
    assert Pace(0).prompt_tokens(8) is None
    assert Pace(0.15).prompt_tokens(0) is None


@given(
    limit=st.floats(0.05, 1.0),
    decode=st.floats(1e-4, 0.04),
    cost=st.floats(1e-6, 2e-3),
    drift=st.floats(1.0, 1.02),
    decodes=st.integers(1, 64),
    decode_measured=st.booleans(),
)
def test_mixed_steps_converge_to_the_limit(
    limit: float, decode: float, cost: float, drift: float, decodes: int, decode_measured: bool
) -> None:
    """decode: seconds of a decode step; cost: seconds per prompt token, growing by `drift` per step.

    Without a measured decode step (cold), the first chunk sizes are found by trial: six steps suffice.
    """
    pace = Pace(limit)
    if decode_measured:
        pace.observe(0, 512, 512 * cost * 0.7)  # a large prompt step is cheaper per token
        for _ in range(5):
            pace.observe(decodes, 0, decode)
    durations = []
    for _ in range(60):
        chunk = pace.prompt_tokens(decodes)
        assert chunk is not None and chunk >= SMALLEST_CHUNK
        tokens = min(chunk, 8192)
        seconds = decode + cost * tokens
        cost *= drift
        pace.observe(decodes, tokens, seconds)
        durations.append((seconds, tokens))
    floor = decode + cost * SMALLEST_CHUNK  # the smallest chunk may exceed the limit
    assert all(seconds <= max(1.3 * limit, floor) for seconds, _ in durations[6:])
    seconds, tokens = durations[-1]
    assert tokens in (SMALLEST_CHUNK, 8192) or seconds >= 0.6 * limit  # and the step is well used


def test_single_slow_step_does_not_starve_prompts() -> None:
    pace = Pace(0.15)
    for _ in range(20):
        pace.observe(4, pace.prompt_tokens(4) or 0, 0.02 + 1e-3 * (pace.prompt_tokens(4) or 0))
    before = pace.prompt_tokens(4)
    pace.observe(4, before or 0, 10.0)
    after = pace.prompt_tokens(4)
    assert before is not None and after is not None and after > before / 2


@given(cost=st.floats(1e-7, 1e-1))
def test_scored_prompt_tokens_take_their_share_of_a_step(cost: float) -> None:
    pace = Pace(0)
    for _ in range(6):
        tokens = pace.scored_tokens()
        pace.observe_scores(tokens, tokens * cost)
    assert pace.scored_tokens() * cost <= max(1.01 * SCORING, SMALLEST_SCORED * cost)
    assert pace.scored_tokens() >= min(SCORING / cost - 1, SMALLEST_SCORED)
    assert pace.scored_tokens(shared=True) == max(SMALLEST_SCORED, int(SCORING * 0.5 / pace._score))
