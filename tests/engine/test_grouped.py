"""Grouped-query attention in the engine and on every backend: a small GLM-4.5 with its MTP layer, on the CPU
kernels unless said otherwise."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("farthing._native")

from farthing import LLM
from farthing.checkpoint.shards import CheckpointError
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.load import load, random_model
from farthing.model.parameters import random_parameters
from farthing.ops.api import CacheDtype
from farthing.ops.cpu.backend import CpuOps
from farthing.ops.hybrid import HybridOps
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from tests.isas import ISAS
from tests.served import served_model
from tests.tiny import GLM4

from .conftest import EOS, GREEDY, VOCAB, Always, Greedy, MakeEngine, greedy_of, tokens_of
from .test_engine import (  # noqa: F401  (collected here again, with this file's model)
    PROMPTS,
    test_second_turn_reuses_the_cache,
)

CONFIG = ModelConfig.from_json(GLM4 | dict(vocab_size=VOCAB, eos_token_id=EOS))


def built(backend: str = "cpu", **options: Any) -> DecoderModel:
    threads = None if backend == "reference" else options.pop("threads", 1)
    return random_model(CONFIG, select(backend, torch.float32, threads, **options), seed=7)


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    torch.set_num_threads(1)
    return served_model(CONFIG, dtype="float32")


@pytest.fixture(scope="module")
def greedy() -> Greedy:
    """Greedy tokens of a second model, because the kernels run one call at a time."""
    return greedy_of(served_model(CONFIG, dtype="float32"))


@pytest.mark.parametrize(
    "config",
    [
        {"max_num_batched_tokens": 8, "max_num_seqs": 8},
        {"num_blocks": 16, "max_num_seqs": 4},
        {"speculate": "mtp:2"},
    ],
    ids=["chunks", "preempts", "drafts"],
)
def test_tokens_are_those_of_one_sequence(
    make_engine: MakeEngine, greedy: Greedy, config: dict[str, Any]
) -> None:
    engine = make_engine(**config)
    if "speculate" in config:
        engine._core._speculator.gates = (Always(),)  # type: ignore[union-attr]
    streams = [engine.submit(p, GREEDY, kind="final") for p in PROMPTS]
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        assert tokens_of(stream.result()) == greedy(prompt, 12)


def hidden(model: DecoderModel, dtype: CacheDtype = "float32", length: int = 40) -> torch.Tensor:
    """A prompt in two chunks, a step of two sequences, and a step of one, over scattered blocks."""
    ids = torch.arange(length) % VOCAB
    cache, block = model.new_cache(40 + length // 8, 8, dtype), length // 8 + 2
    first = list(reversed(range(block)))
    second = list(range(block, block + 4))
    parts = [
        (ids[: length - 6], make_batch([length - 6], [0], [first], 8)),
        (ids[:9], make_batch([4, 5], [length - 6, 0], [first, second], 8)),
        (ids[:3], make_batch([1, 2], [length - 2, 5], [first, second], 8)),
        (ids[:1], make_batch([1], [length - 1], [first], 8)),
    ]
    with torch.inference_mode():
        return torch.cat([model.logits(model.forward(part, batch, cache)).float() for part, batch in parts])


@pytest.fixture(scope="module")
def expected() -> dict[CacheDtype, torch.Tensor]:
    reference = built("reference")
    kinds: tuple[CacheDtype, ...] = ("float32", "bfloat16", "fp8", "int8")
    return {dtype: hidden(reference, dtype) for dtype in kinds}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8", "int8"])
def test_kernels_agree_with_the_reference(
    dtype: CacheDtype, isa: str, expected: dict[CacheDtype, torch.Tensor]
) -> None:
    found = hidden(random_model(CONFIG, CpuOps(2, isa=isa), seed=7), dtype)
    assert distance(found, expected[dtype]) < (1e-5 if dtype == "float32" else 0.02)


@pytest.mark.parametrize("dtype", ["float32", "fp8", "int8"])
def test_torch_agrees_with_the_reference(dtype: CacheDtype, expected: dict[CacheDtype, torch.Tensor]) -> None:
    assert distance(hidden(built("torch"), dtype), expected[dtype]) < (1e-5 if dtype == "float32" else 0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_prompts_take_expanded_attention_with_the_same_result(dtype: CacheDtype) -> None:
    both = (CpuOps(2, invariant=each) for each in (False, True))
    logits = [hidden(random_model(CONFIG, ops, seed=7), dtype, 1400) for ops in both]
    assert not torch.equal(*logits)
    assert distance(*logits) < (1e-5 if dtype == "float32" else 0.01)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_packed_file_gives_the_same_logits(quantization: str | None, tmp_path: Path) -> None:
    path = str(tmp_path / "packed.bin")
    model = built(quantization=quantization)
    model.ops.save_packed(path)
    mapped = built(packed=path)
    assert mapped.ops.packed_from is not None
    assert torch.equal(hidden(model), hidden(mapped))
    assert distance(hidden(model), hidden(built())) < {None: 1e-6, "int8": 0.1, "int4": 0.6}[quantization]


def test_experts_on_the_host_give_the_same_logits(expected: dict[CacheDtype, torch.Tensor]) -> None:
    ops = HybridOps(select("torch", torch.float32), select("cpu", threads=1), 2)
    assert distance(hidden(random_model(CONFIG, ops, seed=7)), expected["float32"]) < 1e-5


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_layers_can_be_divided(backend: str) -> None:
    model = built(backend)
    ids, batch = torch.arange(20), make_batch([20], [0], [[2, 0, 1]], 8)
    whole = model.forward(ids, batch, model.new_cache(3, 8))
    h, cache = model.embed(ids), model.new_cache(3, 8)
    for layer in range(CONFIG.num_hidden_layers):
        h = model.run_layers(h, batch, cache, span=slice(layer, layer + 1))
    assert torch.equal(h, whole)


def test_layers_run_in_one_call() -> None:
    model = built()
    assert model.stack is not None
    model.unstack()
    apart = hidden(model)
    model.restack()
    assert torch.equal(apart, hidden(model))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_prefill_process_disk_cache_and_ranks_give_the_same_tokens(dtype: CacheDtype, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GLM4 | dict(vocab_size=VOCAB, eos_token_id=EOS)))
    save_file(random_parameters(CONFIG, seed=7), tmp_path / "model.safetensors")
    found = []
    ways: list[dict[str, Any]] = [
        {},
        {"disaggregate": True},
        {"prefix_cache_dir": tmp_path / "cache"},
        {"prefix_cache_dir": tmp_path / "cache"},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 4},  # ranks share key-value heads
    ]
    for way in ways:
        with LLM(
            str(tmp_path), backend="cpu", skip_tokenizer_init=True, block_size=4, num_blocks=64, threads=1,
            kv_cache_dtype=dtype, **way,
        ) as llm:  # fmt: skip
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        found.append([o.outputs[0].token_ids for o in outputs])
    assert all(tokens == found[0] for tokens in found)


def test_calibrated_scales_of_the_cache_are_applied(
    tmp_path: Path, expected: dict[CacheDtype, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """k_scale and v_scale of llm-compressor, and ModelOpt's names in the last layer, with an FP8 cache."""
    (tmp_path / "config.json").write_text(json.dumps(GLM4 | dict(vocab_size=VOCAB, eos_token_id=EOS)))
    tensors, last = random_parameters(CONFIG, seed=7), CONFIG.num_hidden_layers
    for layer in range(last + 1):
        for name in ("k", "v"):
            own = f"{name}_proj.{name}_scale" if layer == last else f"{name}_scale"
            tensors[f"model.layers.{layer}.self_attn.{own}"] = torch.tensor([0.002])
    save_file(tensors, tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO):
        loaded = {name: load(tmp_path, select(name, torch.float32, None)) for name in ("reference", "cpu")}
    assert "8 scales of keys and values (k_scale, v_scale) are applied to an FP8 cache" in caplog.text
    reference = hidden(loaded["reference"], "fp8")
    assert distance(hidden(loaded["cpu"], "fp8"), reference) < 0.02 < distance(reference, expected["fp8"])
    assert distance(hidden(loaded["cpu"], "float32"), expected["float32"]) < 1e-5
    del tensors["model.layers.0.self_attn.k_scale"]
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([float("nan")])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_scale: got nan"):
        load(tmp_path, select("reference", torch.float32, None))
