"""A model with identity experts and experts added a layer later (LongCat-Flash), on the CPU kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("farthing._native")

from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.load import random_model
from farthing.model.parameters import random_parameters
from farthing.model.source import MemorySource
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from tests.tiny import LONGCAT

from .conftest import EOS, GREEDY, VOCAB, Greedy, MakeEngine, greedy_of, tokens_of
from .test_engine import (  # noqa: F401  (collected here again, with this file's model)
    PROMPTS,
    test_second_turn_reuses_the_cache,
)


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    torch.set_num_threads(1)
    return random_model(
        ModelConfig.from_json(LONGCAT | dict(vocab_size=VOCAB, eos_token_id=EOS)),
        select("cpu", torch.float32, 1),
        seed=7,
    )


@pytest.fixture(scope="module")
def greedy(model: DecoderModel) -> Greedy:
    """Greedy tokens of a second model, because the kernels run one call at a time."""
    return greedy_of(random_model(model.config, select("cpu", torch.float32, 1), seed=7))


@pytest.mark.parametrize(
    "config",
    [{"max_num_batched_tokens": 8, "max_num_seqs": 8}, {"num_blocks": 16, "max_num_seqs": 4}],
    ids=["chunks", "preempts"],
)
def test_tokens_and_counts(make_engine: MakeEngine, greedy: Greedy, config: dict[str, Any]) -> None:
    engine = make_engine(**config)
    streams = [engine.submit(p, GREEDY, kind="final") for p in PROMPTS]
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        assert tokens_of(stream.result()) == greedy(prompt, 12)
    counts = engine.stats.snapshot().expert_tokens
    assert set(counts) == {0, 2}, "every second layer has experts"
    assert all(len(row) == 6 + 3 and sum(row[6:]) > 0 for row in counts.values())


def test_packed_file_gives_the_same_logits(model: DecoderModel, tmp_path: Path) -> None:
    path = str(tmp_path / "packed.bin")
    model.ops.save_packed(path)
    mapped = random_model(model.config, select("cpu", torch.float32, 1, packed=path), seed=7)
    assert mapped.ops.packed_from is not None
    ids, batch = torch.arange(20), make_batch([20], [0], [list(range(5))], 4)
    found = [m.forward(ids, batch, m.new_cache(5, 4)) for m in (model, mapped)]
    assert torch.equal(*found)


def test_a_layer_that_is_not_finite_is_named(model: DecoderModel) -> None:
    parameters = random_parameters(model.config, seed=7)
    ids, batch = torch.arange(20), make_batch([20], [0], [list(range(5))], 4)

    def named() -> str | None:
        broken = DecoderModel(model.config, select("reference"), MemorySource(parameters))
        return broken.first_not_finite(ids, batch, broken.new_cache(5, 4))

    assert named() is None
    for e in range(6):
        parameters[f"model.layers.2.mlp.experts.{e}.down_proj.weight"] *= float("nan")
    assert named() == "layer 2's experts (model.layers.2.mlp)"
