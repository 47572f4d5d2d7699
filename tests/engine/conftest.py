"""A tiny random model and a byte-level tokenizer, shared by the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from farthing.config import EngineConfig
from farthing.engine.engine import Engine
from farthing.engine.request import RequestOutput, SamplingParams
from farthing.engine.sequence import Sequence
from farthing.engine.speculation import Gate
from farthing.engine.tokenizer import Tokenizer
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from tests.served import form_for, next_logits, served_model
from tests.tiny import tiny

VOCAB = 320
EOS = 1
RAW = tiny(vocab_size=VOCAB, max_position_embeddings=256, num_nextn_predict_layers=1, eos_token_id=EOS)
CONFIG = ModelConfig.from_json(RAW)
MakeEngine = Callable[..., Engine]
Greedy = Callable[[list[int], int], list[int]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def tokens_of(output: RequestOutput, index: int = 0) -> list[int]:
    return output.outputs[index].token_ids


class Always(Gate):
    """A gate that always drafts."""

    def order(self, batch: int) -> bool | None:
        return True

    def price(self, batch: int) -> float:
        return 0.0

    def may_pay(self, batch: int) -> bool:
        return True


class Guesses:
    """Drafts what follows in one of the texts, every second time with a wrong token among it."""

    num_drafts, num_lookahead, costly = 4, 0, False

    def __init__(self, *texts: list[int]) -> None:
        self.texts, self.wrong = texts, 0

    def observe(self, *arguments: Any) -> None: ...

    def ready(self, seq: Sequence) -> bool:
        return True

    def draft(self, seqs: list[Sequence], most: list[int], price: float) -> list[list[int]]:
        found = []
        for seq in seqs:
            length = len(seq.tokens)
            text = next((text for text in self.texts if text[:length] == seq.tokens), [])
            drafts = text[length:][: self.num_drafts]
            if length % 2 and drafts:
                at = length % len(drafts)
                drafts[at] = abs(drafts[at] - 1)
                self.wrong += 1
            found.append(drafts)
        return found


@pytest.fixture(scope="session")
def model() -> DecoderModel:
    """One dense layer, one MoE layer and an MTP layer."""
    torch.set_num_threads(1)
    return served_model(CONFIG)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE with a few merges and DeepSeek's special tokens."""
    backend = HfTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
        show_progress=False,
    )
    text = ["def function(self): return self.value", "import typing, json", "for item in items: yield item"]
    backend.train_from_iterator(text * 4, trainer)
    config = {
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": {"content": "<｜end▁of▁sentence｜>"},
        "add_bos_token": True,
    }
    return Tokenizer(backend, config)


@pytest.fixture
def make_engine(model: DecoderModel, tokenizer: Tokenizer) -> Iterator[MakeEngine]:
    """Engines of the tiny model; at the end of the test they are shut down and their invariants checked."""
    engines: list[Engine] = []

    def make(with_tokenizer: bool = True, **config: Any) -> Engine:
        defaults = {"max_num_seqs": 8, "num_blocks": 64, "block_size": 4, "max_num_batched_tokens": 32}
        options = EngineConfig(**(defaults | config))
        engine = Engine(form_for(model, options), options, tokenizer if with_tokenizer else None)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.shutdown()
        engine._core.scheduler.check()
        engine.health()
        assert engine.num_live == 0
        assert engine._core.scheduler.pool.num_free == engine.config.num_blocks
        assert engine.stats.integrity_failures == 0


@pytest.fixture(scope="module")
def greedy() -> Greedy:
    """The next `count` greedy tokens, each recomputed from scratch by a second model, because the kernels run
    one call at a time."""
    return greedy_of(served_model(CONFIG))


def greedy_of(model: DecoderModel) -> Greedy:
    """`greedy` for a model without a running engine."""

    @cache
    def computed(prompt: tuple[int, ...], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(next_logits(model, tokens).argmax()))
        return tokens[len(prompt) :]

    return lambda prompt, count: computed(tuple(prompt), count)
