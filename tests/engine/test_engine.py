"""The engine against the model run from scratch: tokens, logprobs, caches and statistics."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from farthing.engine.request import (
    RequestOutput,
    SamplingParams,
)
from farthing.model.decoder import DecoderModel
from tests.served import next_logits, served_model

from .conftest import CONFIG, GREEDY, Always, Greedy, MakeEngine, tokens_of

PROMPTS = [
    [5, 6, 7],
    list(range(20, 60)),
    [9] * 17,
    list(range(20, 44)),
    [11, 12],
    list(range(100, 133)),
]


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


def test_logprobs_equal_those_of_the_model(make_engine: MakeEngine) -> None:
    model = served_model(CONFIG)  # the kernels run one call at a time
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


def test_greedy_logprobs_use_the_fast_path(make_engine: MakeEngine, model: DecoderModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=2)
    output = make_engine().submit([4, 5], params).result().outputs[0]
    assert output.logprobs is not None
    expected = next_logits(model, [4, 5]).log_softmax(-1)
    values, ids = expected.topk(2)
    assert list(output.logprobs[0]) == ids.tolist()
    assert [x.logprob for x in output.logprobs[0].values()] == pytest.approx(values.tolist(), abs=1e-4)


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


def test_metrics_and_statistics(make_engine: MakeEngine, model: DecoderModel) -> None:
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
