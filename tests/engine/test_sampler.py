"""Distributions, penalties, and independence of draws from the batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farthing.engine import sampler
from farthing.engine.request import RANGES, SMALLEST_TOP_P, SamplingParams, positions
from farthing.engine.sampler import (
    PromptTokens,
    Row,
    SamplingState,
    edit,
    report,
    sample,
    sample_logits,
    stream_seed,
    uniform,
)
from farthing.ops.arrays import largest, logsumexp
from farthing.ops.cpu import CpuOps
from farthing.ops.sampling import invert

V = 50


def row(seed: int = 0, index: int = 0, drafts: tuple[int, ...] = (), ahead: int = 0, **params: Any) -> Row:
    state = SamplingState(SamplingParams(**params), seed)
    state.num_output = index
    return Row(state, drafts, ahead)


def kept_by_hand(logits: Tensor, params: SamplingParams) -> Tensor:
    """The filtered distribution, implemented from the definitions."""
    z = logits.double() / params.temperature
    p = z.softmax(-1)
    keep = p >= params.min_p * p.max()
    if params.top_k > 0:
        keep &= p >= p.sort(descending=True).values[min(params.top_k, V) - 1]
    q = (p * keep) / (p * keep).sum()
    order = q.argsort(descending=True)
    before = q[order].cumsum(0) - q[order]
    allowed = torch.zeros_like(keep)
    allowed[order[before < params.top_p]] = True
    q = q * allowed
    return q / q.sum()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 10, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
        {"top_p": 0.999, "temperature": 3.0},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(params: dict[str, Any]) -> None:
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1)) * 2
    count = 10_000
    rows = [row(seed=5, index=i, **params) for i in range(count)]
    tokens = sample_logits(logits.expand(count, V), rows)
    expected = kept_by_hand(logits, rows[0].state.params)
    seen = torch.from_numpy(np.bincount(tokens, minlength=V)).double()
    assert not seen[expected == 0].any(), "a token outside the filter was drawn"
    # Pearson's chi-squared over the sufficiently likely tokens: 5 sigma of its distribution.
    likely = expected * count > 5
    chi2 = float(((seen - expected * count) ** 2 / (expected * count))[likely].sum())
    degrees = int(likely.sum()) - 1
    assert chi2 < degrees + 5 * (2 * max(1, degrees)) ** 0.5 + 5


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**6))
def test_uniform_is_in_the_open_interval(seed: int, index: int) -> None:
    assert 0.0 < uniform(seed, index) < 1.0
    assert uniform(seed, index) == uniform(seed, index)


def test_uniforms_are_uniform_along_a_request_and_across_streams() -> None:
    for values in (
        [uniform(7, i) for i in range(20_000)],
        [uniform(stream_seed(7, i), 0) for i in range(20_000)],
        [uniform(i, 0) for i in range(20_000)],
    ):
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 19 + 5 * (2 * 19) ** 0.5
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 5]),
        "top_p": st.sampled_from([0.1, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
    },
)


@given(
    st.lists(st.tuples(PARAMS, st.integers(0, 99), st.integers(0, 9)), min_size=1, max_size=8), st.randoms()
)
@settings(max_examples=60, deadline=None)
def test_draw_does_not_depend_on_the_batch(specs: list[tuple[dict[str, Any], int, int]], random: Any) -> None:
    generator = torch.Generator().manual_seed(random.randrange(1000))
    logits = torch.randn(len(specs), V, generator=generator)
    rows = [row(seed, index, **params) for params, seed, index in specs]
    for r in rows:
        r.state.counts.update({3: 2, 4: 1})
        r.state.num_output = max(r.state.num_output, 3)
    together = sample_logits(edit(logits.clone(), rows), rows)
    alone = [sample_logits(edit(logits[i : i + 1].clone(), [r]), [r])[0] for i, r in enumerate(rows)]
    assert together == alone


def test_penalties_match_manual_calculation() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0, 0.5, 3.0]])
    state = SamplingState(
        SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25),
        seed=0,
        prompt=PromptTokens([0, 1]),
    )
    for token in (1, 2, 2):
        state.push(token)
    edit(logits, [Row(state)])
    assert logits[0].tolist() == pytest.approx(
        [1.0 / 2, -1.0 * 2 - 0.25 - 0.5, 2.0 / 2 - 0.5 - 0.5, 0.5, 3.0]
    )


def test_prompt_of_a_penalty_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of completions and steps, since a prompt may have 100,000 distinct tokens."""
    read: list[int] = []
    index = sampler._index
    monkeypatch.setattr(
        sampler, "_index", lambda tokens, like: read.append(len(list(tokens))) or index(tokens, like)
    )
    prompt = PromptTokens(range(1000))
    states = [SamplingState(SamplingParams(repetition_penalty=2.0), 0, prompt) for _ in range(8)]
    for _ in range(5):
        logits = edit(torch.ones(8, 2000), [Row(state) for state in states])
        assert logits[0, :1000].eq(0.5).all()
        for state in states:
            state.push(1500)
    assert sum(read) < 1000 + 8 * 5 * 2


def test_rows_after_drafts_include_them_in_penalties() -> None:
    state = SamplingState(SamplingParams(frequency_penalty=1.0), seed=0)
    state.push(2)
    logits = torch.zeros(3, 5)
    edit(logits, [Row(state, (2, 4), ahead) for ahead in range(3)])
    assert logits.tolist() == [[0, 0, -1, 0, 0], [0, 0, -2, 0, 0], [0, 0, -2, 0, -1]]
    assert [Row(state, (2, 4), ahead).index for ahead in range(3)] == [1, 2, 3]
    assert state.counts == Counter({2: 1})


def test_bias_and_min_tokens() -> None:
    state = SamplingState(SamplingParams(logit_bias={1: 5.0}, min_tokens=2), seed=0, end_ids=(0, 3))
    logits = torch.zeros(3, 4)
    edit(logits, [Row(state, (2, 2), ahead) for ahead in range(3)])
    inf = float("-inf")
    assert logits.tolist() == [[inf, 5, 0, inf], [inf, 5, 0, inf], [0, 5, 0, 0]]


def test_end_is_possible_in_the_rows_from_min_tokens_on() -> None:
    """A grammar that only allows the end there does not leave the row without a token."""

    class Grammar:
        def masks(self, drafts: tuple[int, ...], vocab: int) -> Any:
            return np.eye(vocab, dtype=bool)[[2, 0]]  # the token 2, then the end

    dead = {}
    for least in (0, 1, 2):
        params = SamplingParams(min_tokens=least)
        state = SamplingState(params, seed=0, end_ids=(0,), matcher=Grammar())  # type: ignore[arg-type]
        edit(torch.zeros(2, 4), [Row(state, (2,), ahead) for ahead in range(2)])
        dead[least] = state.dead_end
    assert dead == {0: None, 1: None, 2: 1}


class Head:
    """Returns its input as logits; counts which path was used."""

    def __init__(self, logits: Tensor) -> None:
        self.values, self.fast = logits, 0

    def logits(self, hidden: Tensor) -> Tensor:
        return self.values.clone()

    def top_logits(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        self.fast += 1
        values, ids = self.values.topk(k)
        return values, ids, self.values.logsumexp(-1)

    def greedy(self, hidden: Tensor) -> list[int]:
        self.fast += 1
        return self.values.argmax(-1).tolist()


def test_plain_greedy_rows_never_materialize_logits() -> None:
    head = Head(torch.randn(2, V))
    tokens, logprobs = sample(head, torch.empty(2, 1), [row(temperature=0), row(temperature=0)])
    assert tokens == head.values.argmax(-1).tolist() and logprobs is None and head.fast == 1
    mixed, _ = sample(head, torch.empty(2, 1), [row(temperature=0), row(temperature=0, logit_bias={7: 100})])
    assert mixed == [tokens[0], 7] and head.fast == 1
    biased, _ = sample(head, torch.empty(2, 1), [row(temperature=0, min_tokens=1), row(temperature=0)])
    assert biased == tokens and head.fast == 1


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 0, "logit_bias": {9: 0.0}}])
def test_both_paths_report_the_same_logprobs(params: dict[str, Any]) -> None:
    head = Head(torch.randn(3, V, generator=torch.Generator().manual_seed(3)))
    rows = [row(logprobs=k, **params) for k in (0, 1, 4)]
    tokens, table = sample(head, torch.empty(3, 1), rows)
    assert table is not None
    expected = head.values.log_softmax(-1)
    for i, entry in enumerate(positions(table, [0, 1, 4])):
        best = expected[i].topk(max(1, (0, 1, 4)[i])).indices.tolist()
        assert list(entry) == best and tokens[i] == best[0]
        assert [e.logprob for e in entry.values()] == pytest.approx(expected[i, best].tolist(), abs=1e-5)
        assert [e.rank for e in entry.values()] == list(range(1, len(best) + 1))


def test_report_ranks_a_token_outside_the_top_k() -> None:
    raw = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).log_softmax(-1)
    (entry,) = positions(report(raw, [0], 2), [2])
    assert [(t, e.rank) for t, e in entry.items()] == [(0, 4), (1, 1), (2, 2)]


@given(st.integers(1, 700), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_grouped_inversion_equals_plain_inversion(width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(6, width, generator=generator) * (torch.rand(6, width, generator=generator) < 0.3)
    weights[:, seed % width] += 0.1
    u = torch.tensor([0.0, 1e-12, 0.3, 0.7, 1 - 1e-12, 1 - 2.0**-53], dtype=torch.float64)
    picked = invert(weights, u)
    cdf = weights.double().cumsum(-1)
    for i, token in enumerate(picked.tolist()):
        assert weights[i, token] > 0
        share = cdf[i] / cdf[i, -1]
        assert share[token] >= u[i] - 1e-6 and share[token] - weights[i, token] / cdf[i, -1] <= u[i] + 1e-6


def test_wide_filters_use_the_whole_vocabulary() -> None:
    """More than the first candidates survive: the narrow search must detect it."""
    wide = 1000
    logits = torch.zeros(1, wide)
    seen = sample_logits(logits.expand(3000, wide), [row(seed=1, index=i, top_p=0.99) for i in range(3000)])
    assert len(set(seen)) > 900


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("n", 0),
        ("n", True),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3),
        ("logprobs", -1),
        ("seed", "x"),
        ("stop", [""]),
        ("logit_bias", {1: 1000.0}),
        ("logit_bias", {"a": 1.0}),
    ],
)
def test_bad_parameters_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_contradictions_are_named() -> None:
    with pytest.raises(ValueError, match="min_tokens: got 9; expected at most max_tokens = 3"):
        SamplingParams(min_tokens=9, max_tokens=3)
    with pytest.raises(ValueError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


class Logits:
    """A head whose hidden states are the logits, on one kind of tensor."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.ops = CpuOps(1, arrays=isinstance(raw, np.ndarray))

    def logits(self, hidden: Any) -> Any:
        return hidden.copy() if isinstance(hidden, np.ndarray) else hidden.clone()

    def top_logits(self, hidden: Any, k: int) -> Any:
        return (*largest(hidden, k), logsumexp(hidden)[:, 0])

    def greedy(self, hidden: Any) -> list[int]:
        return hidden.argmax(-1).tolist()  # type: ignore[no-any-return]


def edges(low: float, high: float, kind: type) -> st.SearchStrategy[Any]:
    """The bounds of a field, and 0 and 1 where it accepts them."""
    return st.sampled_from([kind(v) for v in (low, 0, 1, high) if low <= v <= high])


FIELDS = {
    name: edges(max(low, SMALLEST_TOP_P) if name == "top_p" else low, high, kind)
    for name, low, high, kind in RANGES
    if name not in ("n", "max_tokens", "min_tokens", "prompt_logprobs", "seed")
}


@given(
    st.integers(1, 3),
    st.integers(2, 70),
    st.fixed_dictionaries({}, optional=FIELDS | {"logit_bias": st.just({0: -100.0, 1: 100.0})}),
    st.integers(0, 99),
)
@settings(max_examples=200)
def test_arrays_and_tensors_give_the_same_tokens(
    n: int, vocabulary: int, fields: dict[str, Any], seed: int
) -> None:
    """At every bound of every numeric field, in any combination."""
    raw: Any = np.random.default_rng(seed).normal(size=(n, vocabulary)).astype(np.float32) * 3
    params, results = SamplingParams(**fields), []
    for hidden in (raw, torch.from_numpy(raw)):
        head = Logits(hidden)
        states = [SamplingState(params, seed + i, PromptTokens([0]), (1,)) for i in range(n)]
        results.append(sample(head, hidden, [Row(state) for state in states], head.ops.sample))  # type: ignore[arg-type]
    (tokens, table), (expected, same) = results
    # A random number on the border of two tokens may fall to either.
    assert tokens == expected or not params.greedy
    assert all(0 <= token < vocabulary for token in tokens)
    assert (table is None) == (same is None) == (params.logprobs is None)
    if table is not None and same is not None:
        least = 1 + min(params.logprobs or 0, vocabulary)
        assert table.ids.shape == table.values.shape == same.ids.shape and table.ids.shape[1] >= least
        np.testing.assert_allclose(table.values[:, 1:], same.values[:, 1:], atol=1e-4)
        assert np.isfinite(table.values).all() and (table.ranks >= 1).all()
