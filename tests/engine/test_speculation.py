"""Drafts never change a token, are counted, and are disabled where they do not pay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.config import EngineConfig, parse_speculate
from farthing.engine.drafters import MtpDrafter, SuffixAutomaton, TextDrafter, continuation
from farthing.engine.engine import Engine
from farthing.engine.generation import Drafting
from farthing.engine.request import SamplingParams
from farthing.engine.runner import Step
from farthing.engine.sequence import Scheduled, Sequence
from farthing.engine.speculation import Gate, Speculator, worthwhile
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from tests.served import next_logits, served_model

from .conftest import CONFIG, RAW, Always, MakeEngine, tokens_of

pytestmark = pytest.mark.usefixtures("exact_on_amx")


class Oracle:
    """Drafts the true continuation, with errors at given positions."""

    num_lookahead, costly = 0, False

    def __init__(self, tokens: list[int], num_drafts: int, spoil: Callable[[int], bool]) -> None:
        self.tokens, self.num_drafts, self.spoil = tokens, num_drafts, spoil

    def observe(self, plan: list[Scheduled], step: Step, hidden: object, wanted: bool) -> None:
        return None

    def ready(self, seq: Sequence) -> bool:
        return True

    def draft(self, seqs: list[Sequence], most: list[int], price: float) -> list[list[int]]:
        result = []
        for seq in seqs:
            at = len(seq.tokens)
            true = self.tokens[at : at + self.num_drafts]
            result.append([t + 1 if self.spoil(at + j) else t for j, t in enumerate(true)])
        return result


def use(engine: Engine, drafter: Any) -> None:
    engine._core._speculator = Speculator([drafter], Always)


PARAMS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0, "seed": 5},
    "filtered": {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 6},
    "penalized": {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.7, "min_tokens": 10},
}


@pytest.mark.parametrize("name", PARAMS)
def test_correct_drafts_are_accepted_and_wrong_ones_change_nothing(
    make_engine: MakeEngine, name: str
) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=1, **PARAMS[name])
    plain = make_engine(enable_prefix_caching=False).submit([5, 6, 7], params).result()
    tokens = [5, 6, 7, *plain.outputs[0].token_ids]
    for spoil, least in ((lambda at: False, 21), (lambda at: at % 5 == 0, 12), (lambda at: True, 0)):
        engine = make_engine(enable_prefix_caching=False)
        use(engine, Oracle(tokens, 3, spoil))
        output = engine.submit([5, 6, 7], params).result()
        assert output.outputs[0].token_ids == plain.outputs[0].token_ids
        assert output.outputs[0].cumulative_logprob == pytest.approx(
            plain.outputs[0].cumulative_logprob, abs=1e-3
        )
        stats = engine.stats.snapshot()
        assert stats.accepted_tokens >= least and stats.draft_tokens >= 21
        assert stats.steps <= 30 - stats.accepted_tokens
        assert (output.metrics.draft_tokens, output.metrics.accepted_tokens) == (
            stats.draft_tokens,
            stats.accepted_tokens,
        )
        assert stats.generation_tokens == 30


def test_stop_within_drafts_ends_the_output_there(make_engine: MakeEngine) -> None:
    plain = (
        make_engine()
        .submit([5, 6, 7], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        .result()
    )
    tokens = plain.outputs[0].token_ids
    stop = tokens[9]
    end = tokens.index(stop) + 1
    engine = make_engine()
    use(engine, Oracle([5, 6, 7, *tokens], 4, lambda at: False))
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[stop])
    output = engine.submit([5, 6, 7], params).result()
    assert output.outputs[0].token_ids == tokens[:end] and output.outputs[0].stop_reason == stop


class Likeliest:
    """Drafts the likelier of two tokens, given the previous one."""

    num_drafts, num_lookahead, costly = 1, 0, False

    def __init__(self, best: dict[int, int]) -> None:
        self.best = best

    def observe(self, plan: list[Scheduled], step: Step, hidden: object, wanted: bool) -> None:
        return None

    def ready(self, seq: Sequence) -> bool:
        return True

    def draft(self, seqs: list[Sequence], most: list[int], price: float) -> list[list[int]]:
        return [[self.best.get(seq.tokens[-1], 3)] for seq in seqs]


def test_rejected_drafts_preserve_the_models_distribution(
    make_engine: MakeEngine, model: DecoderModel
) -> None:
    """Leviathan et al. 2023: the replacement of a rejected draft follows p without the draft."""
    prompt, count, heat = [5, 6, 7], 2000, 1.5

    def two(tokens: list[int]) -> dict[int, float]:
        values, ids = (next_logits(model, tokens) / heat).topk(2)
        return dict(zip(ids.tolist(), values.softmax(-1).tolist(), strict=True))

    first = two(prompt)
    second = {t: two([*prompt, t]) for t in first}
    expected = {(a, b): p * q for a, p in first.items() for b, q in second[a].items()}
    engine = make_engine(max_num_seqs=32, num_blocks=256, max_num_batched_tokens=128, max_queue=None)
    use(engine, Likeliest({a: max(q, key=q.__getitem__) for a, q in second.items()}))
    streams = [
        engine.submit(
            prompt,
            SamplingParams(temperature=heat, top_k=2, seed=i, max_tokens=3, ignore_eos=True),
            kind="final",
        )
        for i in range(count)
    ]
    seen = Counter(tuple(stream.result().outputs[0].token_ids[:2]) for stream in streams)
    assert set(seen) == set(expected)
    chi2 = sum((seen[pair] - p * count) ** 2 / (p * count) for pair, p in expected.items())
    assert chi2 < 3 + 5 * (2 * 3) ** 0.5
    accepted = sum(p * max(second[a].values()) for a, p in first.items())
    rate = engine.stats.accepted_tokens / engine.stats.draft_tokens
    assert engine.stats.draft_tokens == count
    assert rate == pytest.approx(accepted, abs=5 * (accepted * (1 - accepted) / count) ** 0.5)


def test_mtp_drafts_equal_those_of_the_layer(make_engine: MakeEngine) -> None:
    """The first draft, recomputed from scratch over the whole sequence."""
    model = served_model(CONFIG, arrays=False)
    import torch

    from farthing.ops.torch_util import make_batch

    engine = make_engine(speculate="mtp:2", max_num_batched_tokens=8)
    engine._core._speculator.gates = (Always(),)  # type: ignore[union-attr]
    drafts: list[tuple[list[int], list[int]]] = []
    after = engine._core._speculator.after  # type: ignore[union-attr]

    def spy(plan: list[Scheduled], step: Step, hidden: torch.Tensor, seconds: float) -> None:
        after(plan, step, hidden, seconds)
        drafts.extend((list(item.seq.tokens), list(item.seq.drafts)) for item in plan if item.seq.drafts)

    engine._core._speculator.after = spy  # type: ignore[union-attr, method-assign, assignment]
    engine.submit(list(range(40, 60)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)).result()
    # Near the end a sequence has no slot for the second draft.
    assert sum(len(proposed) == 2 for _, proposed in drafts) >= 5
    for tokens, proposed in drafts:
        cache = model.new_cache(8, 16, model.ops.cache_dtype)
        count = len(tokens) - 1
        batch = make_batch([count], [0], [list(range(4))], 16)
        with torch.inference_mode():
            hidden = model.forward(torch.tensor(tokens[:-1]), batch, cache)
            mtp = model.draft(torch.tensor(tokens[1:]), hidden, batch, cache)
            first = int(model.draft_logits(mtp[-1:])[0].argmax())
            more = make_batch([1], [count], [list(range(4))], 16)
            again = model.draft(torch.tensor([first]), mtp[-1:], more, cache, step=1)
            second = int(model.draft_logits(again, step=1)[0].argmax())
        assert proposed == [first, second][: len(proposed)]


def longest_repeat(tokens: list[int]) -> int:
    """Length of the longest ending that also occurs earlier, by definition."""
    n = len(tokens)
    return max(k for k in range(n) if any(tokens[i : i + k] == tokens[n - k :] for i in range(n - k)))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.data())
def test_suffix_automaton_finds_the_longest_repeated_ending(tokens: list[int], data: st.DataObject) -> None:
    automaton = SuffixAutomaton()
    while automaton.size < len(tokens):  # extended in pieces
        count = data.draw(st.integers(1, len(tokens) - automaton.size))
        automaton.extend(tokens[automaton.size : automaton.size + count])
        text, k, end = tokens[: automaton.size], automaton.matched, automaton.earlier
        assert k == longest_repeat(text)
        if k:
            assert end < automaton.size - 1 and text[end + 1 - k : end + 1] == text[automaton.size - k :]


def test_suffix_automaton_prefers_a_recent_occurrence() -> None:
    automaton = SuffixAutomaton()
    automaton.extend([1, 2, 9, 1, 2, 8, 1, 2])
    assert (automaton.matched, automaton.earlier) == (2, 4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 12), st.data())
def test_continuation_repeats_the_last_period(tokens: list[int], count: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(tokens) - 1))
    period = len(tokens) - start
    expected = [tokens[start + i % period] for i in range(count)]
    assert continuation(tokens, start, count) == expected


def test_text_drafter_drops_finished_sequences(make_engine: MakeEngine) -> None:
    engine = make_engine(speculate="ngram:2")
    drafter = engine._core._speculator.drafters[0]  # type: ignore[union-attr]
    assert isinstance(drafter, TextDrafter)
    for i in range(200):
        engine.submit([i % 9 + 2] * 6, SamplingParams(max_tokens=2, ignore_eos=True)).result()
    assert len(drafter._automata) <= 80


def feed(
    gate: Gate, batch: int, plain: float, drafted: float, gained: float, steps: int = 1000
) -> tuple[int, float]:
    """Follow the gate with sequences that draft whenever they may, 2 drafts each, of which `gained` are
    accepted. Returns the drafted steps and the time taken relative to plain decoding of the same tokens."""
    count, seconds, tokens = 0, 0.0, 0.0
    for _ in range(steps):
        order = gate.order(batch)
        wish = gate.price(batch) < 1 if order is None else order
        count += wish
        taken = drafted if wish else plain
        seconds, tokens = seconds + taken, tokens + (1 + gained if wish else 1)
        gate.observe(batch, taken, 2 * batch if wish else None, round(gained * batch))
    return count, seconds / (tokens * plain)


def test_gate_drafts_where_it_pays_and_measures_the_price_per_batch_size() -> None:
    gate = Gate()
    count, time = feed(gate, 10, plain=1.0, drafted=1.3, gained=1.2)
    assert count > 900 and time < 0.65
    count, time = feed(gate, 100, plain=1.0, drafted=1.9, gained=1.2)
    assert count > 900 and time < 0.9
    assert gate.price(10) == pytest.approx(1.1 * 0.15)
    assert gate.price(100) == pytest.approx(1.1 * 0.45)


@given(
    drafted=st.floats(0.5, 12.0),
    gained=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    batch=st.sampled_from([2, 16]),
)
def test_useless_drafts_cost_a_few_steps_and_one_percent(drafted: float, gained: float, batch: int) -> None:
    _, time = feed(Gate(), batch, 1.0, drafted, gained, steps=4000)
    assert time <= 1.005 + (8 + 4 * drafted) / 4000


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_gate_survives_a_change_of_the_machines_speed(factor: float) -> None:
    gate = Gate()
    feed(gate, 1, plain=1.0, drafted=1.3, gained=1.0)
    count, _ = feed(gate, 1, plain=factor, drafted=1.3 * factor, gained=1.0)
    assert count > 700
    # Nor does it keep drafting when drafts stop paying.
    count, _ = feed(gate, 1, plain=factor, drafted=1.3 * factor, gained=0.0)
    assert count < 200


def test_single_slow_step_changes_little() -> None:
    gate = Gate()
    feed(gate, 1, plain=1.0, drafted=1.2, gained=1.0, steps=50)
    gate.observe(1, 1000.0, 2, 2)
    assert gate.price(1) < 0.5
    count, _ = feed(gate, 1, plain=1.0, drafted=1.2, gained=1.0, steps=50)
    assert count > 40 and gate.price(1) < 0.16


@pytest.mark.parametrize("drafts", [2, None])
def test_decisions_do_not_depend_on_the_unit_of_time(drafts: int | None) -> None:
    """Not even after a step that is much slower than the others."""
    found = []
    for unit in (1.0, 2.0**-10):  # so that both round alike
        gate = Gate()
        feed(gate, 1, plain=unit, drafted=1.25 * unit, gained=1.0, steps=50)
        gate.observe(1, 1000.0 * unit, drafts, 2)
        found.append((feed(gate, 1, plain=unit, drafted=1.5 * unit, gained=0.0, steps=200), gate.price(1)))
    assert found[0] == found[1]


def test_layer_is_not_kept_up_where_drafts_do_not_pay(make_engine: MakeEngine) -> None:
    class Never(Gate):
        def order(self, batch: int) -> bool | None:
            return False

        def may_pay(self, batch: int) -> bool:
            return False

    engine = make_engine(speculate="mtp:1", num_blocks=64, enable_prefix_caching=False)
    speculator = engine._core._speculator
    assert speculator is not None and isinstance(speculator.drafters[0], MtpDrafter)
    speculator.gates = (Always(),)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    plain = engine.submit([2, 3, 4] * 50, params).result()
    assert engine.stats.drafts
    before = engine.stats.drafts
    speculator.gates = (Never(),)
    speculator._upkeep = [1e9]
    assert tokens_of(engine.submit([2, 3, 4] * 50, params).result()) == tokens_of(plain)
    assert engine.stats.drafts == before
    assert not speculator.drafters[0]._behind


@pytest.mark.parametrize(
    ("hits", "price", "count"), [(0.9, 0.5, 6), (0.8, 0.5, 3), (0.5, 0.5, 1), (1.0, 0.9, 9)]
)
def test_number_of_drafts_is_the_profitable_one(hits: float, price: float, count: int) -> None:
    assert worthwhile(Drafting(hits), price, 9) == count


def test_unprofitable_drafter_is_retried_after_a_pause() -> None:
    record = Drafting(0.4)
    assert [worthwhile(record, 0.5, 4) for _ in range(150)].count(1) == 2  # after 48 steps, then 96 more
    record.hits = 0.9
    while record.pause:
        worthwhile(record, 0.5, 4)
    assert worthwhile(record, 0.5, 4) == 4


def test_draft_as_dear_as_a_step_is_never_worthwhile() -> None:
    assert [worthwhile(Drafting(1.0), 1.0, 4) for _ in range(100)] == [0] * 100


def test_request_with_failing_drafts_stops_drafting(make_engine: MakeEngine) -> None:
    class Costly(Gate):
        def order(self, batch: int) -> bool | None:
            return None

        def price(self, batch: int) -> float:
            return 0.5

    engine = make_engine()
    drafter = Oracle(list(range(2, 300)), 2, lambda at: True)
    engine._core._speculator = Speculator([drafter], Costly)
    engine.submit([2, 3], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)).result()
    assert 0 < engine.stats.drafts < 20


@pytest.mark.parametrize("value", ["mtp:0", "mtp:x", "mtp:", "eagle", "ngram:99", "mtp+mtp", "mtp+", ""])
def test_bad_speculate(value: str) -> None:
    if value == "mtp:":
        assert parse_speculate(value) == (("mtp",), 4)
        return
    with pytest.raises(ValueError, match="speculate: got"):
        EngineConfig(speculate=value)


def test_mtp_without_the_layer_is_rejected() -> None:
    bare = served_model(ModelConfig.from_json(RAW | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ValueError, match="the model has no MTP layer; expected 'ngram' or None"):
        Engine(bare, EngineConfig(speculate="mtp"))
