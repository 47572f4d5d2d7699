"""Gemma 3 and 4 on every backend: two widths of heads, norms after attention and feed-forwards, an MLP next
to the experts. The engine's tests are those of models whose layers forget (`test_forgetting.py`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("farthing._native")

from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel, routers_of
from farthing.model.deepseek import moe_weights
from farthing.model.load import random_model
from farthing.model.parameters import parameter_shapes, random_parameters
from farthing.model.source import MemorySource
from farthing.ops.api import CacheDtype, Ops
from farthing.ops.cpu.backend import CpuOps
from farthing.ops.hybrid import HybridOps
from farthing.ops.select import select
from tests.isas import ISAS

from .conftest import EOS, VOCAB
from .test_grouped import distance, hidden

COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    sliding_window=9,
    layer_types=["sliding_attention", "full_attention", "full_attention"],
    bos_token_id=0,
    eos_token_id=EOS,
)
RAW: dict[str, dict[str, Any]] = {
    "gemma3": COMMON | dict(model_type="gemma3_text", query_pre_attn_scalar=24),
    "gemma4": COMMON
    | dict(
        model_type="gemma4_text",
        global_head_dim=32,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        hidden_size_per_layer_input=0,
        final_logit_softcapping=10.0,
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=2,
        moe_intermediate_size=32,
    ),
}
CONFIGS = {name: ModelConfig.from_json(raw) for name, raw in RAW.items()}
DTYPES: tuple[CacheDtype, ...] = ("float32", "bfloat16", "fp8", "int8")


def built(name: str, ops: Ops | None = None) -> DecoderModel:
    return random_model(CONFIGS[name], ops or select("reference", torch.float32), seed=7)


@pytest.fixture(scope="module", params=list(RAW))
def name(request: pytest.FixtureRequest) -> str:
    torch.set_num_threads(1)
    return str(request.param)


@pytest.fixture(scope="module")
def expected(name: str) -> dict[CacheDtype, torch.Tensor]:
    reference = built(name)
    return {dtype: hidden(reference, dtype) for dtype in DTYPES}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_agree_with_the_reference(
    name: str, dtype: CacheDtype, isa: str, expected: dict[CacheDtype, torch.Tensor]
) -> None:
    found = hidden(built(name, CpuOps(2, isa=isa)), dtype)
    if dtype == "float32":
        assert distance(found, expected[dtype]) < 1e-5
    else:  # the median token: where rounding changes the choice of an expert, an error is of another size
        error = (found - expected[dtype]).norm(dim=1) / expected[dtype].norm(dim=1)
        assert error.median() < 0.02


def test_torch_agrees_with_the_reference(name: str, expected: dict[CacheDtype, torch.Tensor]) -> None:
    assert distance(hidden(built(name, select("torch", torch.float32))), expected["float32"]) < 1e-5


@pytest.mark.slow  # interpreted
def test_triton_agrees_with_the_reference(name: str, expected: dict[CacheDtype, torch.Tensor]) -> None:
    pytest.importorskip("triton")
    from farthing_gpu import GpuOps
    from farthing_gpu.launch import INTERPRETED

    if not INTERPRETED:
        pytest.skip("interpreted where there is no GPU")
    ops = GpuOps(torch.float32, torch.device("cpu"))
    assert distance(hidden(built(name, ops)), expected["float32"]) < 1e-5


def test_experts_on_the_host_give_the_same_logits(
    name: str, expected: dict[CacheDtype, torch.Tensor]
) -> None:
    for hot in (0, 2):
        ops = HybridOps(select("torch", torch.float32), select("cpu", threads=1), hot)
        model = built(name, ops)
        for _ in range(3):
            assert distance(hidden(model), expected["float32"]) < 1e-5
            ops.settle()


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_packed_file_gives_the_same_logits(name: str, quantization: str | None, tmp_path: Path) -> None:
    path = str(tmp_path / "packed.bin")
    model = built(name, select("cpu", threads=1, quantization=quantization))
    model.ops.save_packed(path)
    mapped = built(name, select("cpu", threads=1, packed=path))
    assert torch.equal(hidden(model), hidden(mapped))
    exact = hidden(built(name))
    assert distance(hidden(model), exact) < {None: 1e-5, "int8": 0.1, "int4": 0.6}[quantization]


def test_layers_run_in_one_call(name: str) -> None:
    model = built(name, select("cpu", threads=2))
    assert model.stack is not None
    whole = hidden(model)
    model.unstack()
    assert distance(hidden(model), whole) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_top_logits_are_capped(backend: str) -> None:
    """So are those that their logarithm of the sum of exponentials counts."""
    model = built("gemma4", select(backend, torch.float32))
    x = torch.randn(5, CONFIGS["gemma4"].hidden_size)
    logits = model.logits(x)
    open_ended = model.ops.logits(x, model.head, replace(model.norm, cap=0.0))
    assert torch.allclose(logits, 10 * torch.tanh(open_ended / 10), atol=1e-5)
    assert logits.abs().max() < 10 < open_ended.abs().max()
    values, ids, total = model.top_logits(x, 4)
    assert torch.allclose(values, logits.gather(1, ids), atol=1e-5)
    assert torch.allclose(total, logits.logsumexp(-1), atol=1e-5)
    assert model.greedy(x) == ids[:, 0].tolist()


def test_a_new_routing_rule_keeps_the_scales_of_experts() -> None:
    config = CONFIGS["gemma4"]
    for backend in ("reference", "cpu"):
        model = built("gemma4", select(backend, torch.float32))
        before = hidden(model)
        model.reroute(routers_of(config))
        assert torch.equal(hidden(model), before)


def test_router_reads_its_input_without_the_norm_of_the_experts() -> None:
    """Also where a weight of that norm is 0."""
    config, p = CONFIGS["gemma4"], "model.layers.0.mlp"
    parameters = random_parameters(config, 3)
    parameters[f"{p}.expert_norm.weight"][:5] = 0
    parameters[f"{p}.gate.input_scale"][:] = torch.rand(config.hidden_size) + 0.5
    experts = config.experts
    assert experts is not None
    source = MemorySource(parameters)
    x = torch.randn(7, config.hidden_size)
    plain = x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
    scaled = plain * parameters[f"{p}.gate.input_scale"] * config.hidden_size**-0.5
    wanted = (scaled @ parameters[f"{p}.gate.weight"].t()).softmax(-1).topk(2).indices.sort(-1).values
    for backend in ("reference", "cpu"):
        model = DecoderModel(config, select(backend, torch.float32), source)
        _, feed = model.layers[0]
        packed = model.ops.pack_moe("again", experts.router, lambda: moe_weights(config, source, p, experts))
        ids, _ = model.ops.route(model.ops.rms_norm(x, feed.norm), packed)
        assert torch.equal(ids.sort(-1).values, wanted)


def test_cache_has_the_width_of_each_kind() -> None:
    model = built("gemma4")
    cache = model.new_cache(5, 4, windows={9: 3})
    assert cache.data.shape == (2 * 1, 5, 4, 32 + 8) and cache.windows[9].data.shape == (1 * 2, 3, 4, 32)
    names = {name for name, _ in parameter_shapes(CONFIGS["gemma4"])}
    assert "model.layers.0.self_attn.v_proj.weight" in names  # of sliding layers only: others have K = V
    assert "model.layers.1.self_attn.v_proj.weight" not in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_size_per_layer_input": 256},
            "hidden_size_per_layer_input: got 256; expected 0: embeddings",
        ),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers: got 2; expected 0: layers that share keys"),
        ({"hidden_activation": "silu"}, "hidden_activation: got 'silu'; expected 'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention: got 'all'; expected false"),
        ({"attention_bias": True}, "attention_bias: got True; expected false"),
        ({"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config: got .*the same in all of them"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json(RAW["gemma4"] | change)
