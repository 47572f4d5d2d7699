"""What ends a generation, and the requests that are rejected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from farthing.engine.request import (
    EngineError,
    SamplingParams,
    StructuredOutputsParams,
)

from .conftest import EOS, GREEDY, VOCAB, Greedy, MakeEngine, tokens_of


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
