"""Windows and states on several ranks: stages with different kinds of caches, ranks that share the heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from farthing.config import EngineConfig
from farthing.engine.build import build_engine
from farthing.engine.drafters import MtpDrafter
from farthing.engine.request import SamplingParams
from farthing.engine.speculation import Gate
from farthing.model.config import ModelConfig
from farthing.model.parameters import random_parameters
from farthing.model.types import type_named
from tests.engine.conftest import Always
from tests.engine.test_forgetting import MODELS, prompt


def save(path: Path, name: str, **changes: Any) -> Path:
    """A random checkpoint."""
    raw = MODELS[name] | changes
    config = ModelConfig.from_json(raw)
    stored = type_named(config.model_type).names.in_model(config.num_hidden_layers).stored
    (path / "config.json").write_text(json.dumps(raw))
    tensors = {stored(k): v.contiguous() for k, v in random_parameters(config, 5).items()}
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="module", params=["some layers", "states", "compressed"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers with a window (or state), without, and with one: the second of two stages has no other."""
    return save(tmp_path_factory.mktemp("kinds"), request.param)


def answers(checkpoint: Path, **options: Any) -> list[list[int]]:
    """Of two turns, the second of which finds the first in the cache."""
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    config = EngineConfig(
        model=str(checkpoint), skip_tokenizer_init=True, num_blocks=64, block_size=4, max_num_seqs=2,
        max_num_batched_tokens=16, threads=1, dtype="float32", **{"backend": "reference"} | options,
    )  # fmt: skip
    with build_engine(config) as engine:
        first = engine.submit(prompt(75), params).result().outputs[0].token_ids
        second = engine.submit(prompt(75) + list(first) + prompt(5), params).result()
        assert second.metrics.cached_tokens >= 75 + 20 - 1
        return [list(first), list(second.outputs[0].token_ids)]


@pytest.mark.parametrize("layout", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_ranks_generate_the_tokens_of_one(checkpoint: Path, layout: str) -> None:
    assert answers(checkpoint, **{layout: 2}) == answers(checkpoint)


def test_stages_of_a_compressed_past_compute_in_one_call(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, "compressed")
    exact: dict[str, Any] = dict(backend="cpu", kv_cache_dtype="float32")
    assert answers(checkpoint, **exact, pipeline_parallel_size=2) == answers(checkpoint, **exact)


def test_ranks_draft_with_a_layer_that_reads_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call, with the drafts of one rank, and the tokens of a run without drafts."""
    checkpoint = save(tmp_path, "compressed", num_nextn_predict_layers=1)
    exact: dict[str, Any] = dict(backend="cpu", kv_cache_dtype="float32")
    plain, drafted = answers(checkpoint, **exact), []
    original = MtpDrafter.draft

    def draft(self: MtpDrafter, *arguments: Any) -> list[list[int]]:
        drafted.append(original(self, *arguments))
        return drafted[-1]

    monkeypatch.setattr(MtpDrafter, "draft", draft)
    monkeypatch.setattr("farthing.ops.cpu.backend.CpuOps.coarse", lambda ops: ops)  # as on ranks
    for method in ("order", "price", "may_pay"):
        monkeypatch.setattr(Gate, method, getattr(Always, method))
    expected: list[list[list[int]]] = []
    for layout in ({}, *({f"{kind}_parallel_size": 2} for kind in ("tensor", "pipeline", "expert"))):
        drafted.clear()
        assert answers(checkpoint, speculate="mtp:3", **exact, **layout) == plain
        expected = expected or drafted.copy()
        assert len(drafted) > 10 and drafted == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["some layers", "states"])
def test_another_process_computes_prompts(name: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, name)
    assert answers(checkpoint, disaggregate=True) == answers(checkpoint)
