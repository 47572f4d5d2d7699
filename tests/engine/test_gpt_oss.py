"""gpt-oss in the engine and on every backend: windows, sinks, biases and a clamped gate; on the CPU kernels
unless said otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("farthing._native")

from farthing import LLM, SamplingParams, _native
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
from farthing.ops.weights import Weight
from tests.isas import ISAS
from tests.served import served_model
from tests.tiny import GPT_OSS

from .conftest import EOS, GREEDY, VOCAB, Greedy, MakeEngine, greedy_of, tokens_of
from .test_engine import (  # noqa: F401  (collected here again, with this file's model)
    PROMPTS,
    test_second_turn_reuses_the_cache,
)
from .test_grouped import distance, hidden

RAW = GPT_OSS | dict(vocab_size=VOCAB, eos_token_id=EOS)
CONFIG = ModelConfig.from_json(RAW)
LONG = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)


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
        {"num_blocks": 40, "max_num_seqs": 4},
    ],
    ids=["chunks", "preempts"],
)
def test_tokens_are_those_of_one_sequence(
    make_engine: MakeEngine, greedy: Greedy, config: dict[str, Any]
) -> None:
    """Of 64 tokens; asked again, the prompts are found in the prefix cache."""
    engine = make_engine(**config)
    for _ in range(2):
        streams = [engine.submit(p, LONG, kind="final") for p in PROMPTS]
        for prompt, stream in zip(PROMPTS, streams, strict=True):
            assert tokens_of(stream.result()) == greedy(prompt, 64)


@pytest.fixture(scope="module")
def expected() -> dict[CacheDtype, torch.Tensor]:
    reference = built("reference")
    kinds: tuple[CacheDtype, ...] = ("float32", "bfloat16", "fp8", "int8")
    return {dtype: hidden(reference, dtype) for dtype in kinds}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8", "int8"])
def test_kernels_agree_with_the_reference(
    dtype: CacheDtype, isa: str, expected: dict[CacheDtype, torch.Tensor]
) -> None:
    found = hidden(random_model(CONFIG, CpuOps(2, isa=isa), seed=7), dtype)
    if dtype == "float32":
        assert distance(found, expected[dtype]) < 1e-5
    else:  # the median token: where rounding changes the choice of an expert, an error is of another size
        error = (found - expected[dtype]).norm(dim=1) / expected[dtype].norm(dim=1)
        assert error.median() < 0.02


@pytest.mark.parametrize("dtype", ["float32", "fp8", "int8"])
def test_torch_agrees_with_the_reference(dtype: CacheDtype, expected: dict[CacheDtype, torch.Tensor]) -> None:
    assert distance(hidden(built("torch"), dtype), expected[dtype]) < (1e-5 if dtype == "float32" else 0.02)


@pytest.mark.slow  # interpreted
def test_triton_agrees_with_the_reference(expected: dict[CacheDtype, torch.Tensor]) -> None:
    pytest.importorskip("triton")
    from farthing_gpu import GpuOps
    from farthing_gpu.launch import INTERPRETED

    if not INTERPRETED:
        pytest.skip("interpreted where there is no GPU")
    ops = GpuOps(torch.float32, torch.device("cpu"))
    assert distance(hidden(random_model(CONFIG, ops, seed=7)), expected["float32"]) < 1e-5


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
    """With and without copies on the device."""
    for hot in (0, 2):
        ops = HybridOps(select("torch", torch.float32), select("cpu", threads=1), hot)
        model = random_model(CONFIG, ops, seed=7)
        for _ in range(3):
            assert distance(hidden(model), expected["float32"]) < 1e-5
            ops.settle()


def test_layers_of_several_windows_can_be_divided() -> None:
    model = built()
    ids, batch = torch.arange(20), make_batch([20], [0], [[2, 0, 1]], 8)
    h, cache = model.embed(ids), model.new_cache(3, 8)
    for layer in range(CONFIG.num_hidden_layers):
        h = model.run_layers(h, batch, cache, span=slice(layer, layer + 1))
    assert torch.equal(h, model.forward(ids, batch, model.new_cache(3, 8)))


def test_layers_run_in_one_call() -> None:
    model = built()
    assert model.stack is not None
    model.unstack()
    apart = hidden(model)
    model.restack()
    assert torch.equal(apart, hidden(model))


def decoded(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return Weight("mxfp4", blocks.flatten(1), torch.exp2(scales.float() - 128)).dequantize(torch.bfloat16)


def published(path: Path, mxfp4: bool, width: int = 64) -> dict[str, torch.Tensor]:
    """A random checkpoint with the names of published ones: matrices of experts in MXFP4, or as transformers
    saves the same values."""
    generator = torch.Generator().manual_seed(3)
    d, i, e = CONFIG.hidden_size, width, CONFIG.n_routed_experts
    config = ModelConfig.from_json(RAW | dict(intermediate_size=i))
    tensors: dict[str, torch.Tensor] = {}
    for name, value in random_parameters(config, seed=7).items():
        if ".experts." not in name:
            tensors[name.replace("mlp.gate.", "mlp.router.")] = value
    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}.mlp.experts."
        for part, rows, columns in (("gate_up_proj", 2 * i, d), ("down_proj", d, i)):
            blocks = torch.randint(256, (e, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 125, (e, rows, columns // 32), generator=generator, dtype=torch.uint8)
            tensors[f"{p}{part}_bias"] = torch.randn(e, rows, generator=generator).bfloat16()
            if mxfp4:
                tensors |= {f"{p}{part}_blocks": blocks, f"{p}{part}_scales": scales}
            else:
                whole = torch.stack([decoded(b, s) for b, s in zip(blocks, scales, strict=True)])
                tensors[p + part] = whole.transpose(1, 2).contiguous()
    path.mkdir()
    more = {"quantization_config": {"quant_method": "mxfp4"}} if mxfp4 else {}
    (path / "config.json").write_text(json.dumps(RAW | dict(intermediate_size=i) | more))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return tensors


def test_mxfp4_files_have_the_values_of_transformers(tmp_path: Path) -> None:
    """Its decoder, on every byte; and a checkpoint gives the logits of the same values in bfloat16."""
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = published(tmp_path / "mxfp4", True)
    published(tmp_path / "plain", False)
    name = "model.layers.0.mlp.experts.down_proj"
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    theirs = integration.convert_moe_packed_tensors(blocks, scales)  # transposed
    ours = torch.stack([decoded(b, s) for b, s in zip(blocks, scales, strict=True)])
    assert torch.equal(ours, theirs.transpose(1, 2))
    for backend, bound in (("reference", 1e-5), ("torch", 1e-5), ("cpu", 0.05)):  # the CPU rounds inputs
        found = [hidden(load(tmp_path / way, select(backend, torch.float32))) for way in ("mxfp4", "plain")]
        error = (found[0] - found[1]).norm(dim=1) / found[1].norm(dim=1)
        assert error.median() < bound and torch.isfinite(found[0]).all()
    ops = CpuOps(1)
    load(tmp_path / "mxfp4", ops)
    packed = dict(ops.packed_weights())
    kinds = {packed[f"model.layers.0.mlp.experts.0.{part}"].format for part in ("gate_up", "down")}
    assert kinds == {_native.Format.MXFP4}


def test_scales_of_mxfp4_that_are_nan_are_refused(tmp_path: Path) -> None:
    tensors = published(tmp_path / "model", True)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    tensors[name][1, 0, 0] = 255
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}: expected finite scales, found NaN"):
        load(tmp_path / "model", select("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_prefill_process_disk_cache_and_ranks_give_the_same_tokens(dtype: CacheDtype, tmp_path: Path) -> None:
    # With 8 bits, sums over more ranks may round a key differently, and then a later token differs.
    params = LONG if dtype == "float32" else GREEDY
    published(tmp_path / "model", True, width=512)  # ranks divide it at groups of columns
    found = []
    ways: list[dict[str, Any]] = [
        {},
        {"disaggregate": True},
        {"prefix_cache_dir": tmp_path / "cache"},
        {"prefix_cache_dir": tmp_path / "cache"},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 4},  # ranks share key-value heads
        {"pipeline_parallel_size": 2},
        {"expert_parallel_size": 2},
    ]
    for way in ways:
        with LLM(
            str(tmp_path / "model"), backend="cpu", skip_tokenizer_init=True, block_size=4, num_blocks=128,
            threads=1, kv_cache_dtype=dtype, **way,
        ) as llm:  # fmt: skip
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        found.append([o.outputs[0].token_ids for o in outputs])
    assert [way for way, tokens in zip(ways, found, strict=True) if tokens != found[0]] == []
