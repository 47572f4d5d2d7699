"""Slow grammars fail before they delay other clients."""

from __future__ import annotations

import numpy as np
import pytest

from farthing.engine import structured
from farthing.engine.mask_time import MaskTime, MaskTimes
from farthing.engine.request import StructuredOutputsParams
from farthing.engine.structured import GrammarCompiler, translate
from farthing.engine.tokenizer import Tokenizer

pytest.importorskip("llguidance")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_credit_is_spent_and_refilled() -> None:
    clock = Clock()
    credit = MaskTime(clock)
    assert not credit.spent
    credit.charge(0.2)
    assert credit.spent
    clock.now = 10.0
    assert not credit.spent


def test_used_credit_is_kept() -> None:
    times = MaskTimes()
    credit = times.of("a")
    credit.charge(5.0)
    assert times.of("b") is not credit
    assert times.of("a") is credit


def test_slow_grammars_of_a_client_without_credit_fail(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, credit = Clock(), MaskTime(lambda: 0.0)
    monkeypatch.setattr(structured.time, "thread_time", clock)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    grammar = translate(StructuredOutputsParams(regex="[a-z]*"))
    slow, quick = (compiler.build(grammar, "regex", credit=credit) for _ in range(2))
    twin = slow.copy()
    token = tokenizer.encode("a", add_special_tokens=False)[0]

    class Late:
        """A grammar whose masks take 40 ms."""

        def __getattr__(self, name: str) -> object:
            clock.now += 0.04 if name == "unsafe_compute_mask_ptr" else 0.0
            return getattr(inner, name)

    inner = slow._matcher
    slow._matcher = twin._matcher = Late()  # type: ignore[assignment]
    for _ in range(3):
        assert not slow.masks([], tokenizer.vocab_size).all()
        slow.consume(token)
    for refused in (slow, twin):
        before = clock.now
        assert np.all(refused.masks([], tokenizer.vocab_size))
        assert clock.now == before  # nothing is computed
        with pytest.raises(ValueError, match="grammars of this key"):
            refused.consume(token)
    assert not quick.masks([], tokenizer.vocab_size).all()
    quick.consume(token)  # a fast grammar continues
