"""Mixtures of experts under the names that tools give them: as loaded as the values that they stand for.

llm-compressor 0.14 and GPTQModel 7.7 split stacks of experts and name each matrix gate_proj, up_proj or
down_proj: the former in the module that the model has (`block_sparse_moe` of Mixtral and MiniMax-M2), the
latter always in `mlp`. Files written by these tools had the tensors that are written here.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from farthing.checkpoint import compressed_tensors as ct
from farthing.checkpoint.layout import format_of, integers
from farthing.checkpoint.reader import Checkpoint
from farthing.model.deepseek import gated
from farthing.model.load import config_of, load, source_of
from farthing.model.parameters import parameter_shapes
from farthing.ops.api import Ops
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing.ops.weights import Weight, quantize_int4
from farthing.parallel.cluster import ParallelModel
from farthing.parallel.plan import Layout, ShardPlan
from farthing.parallel.rank import ShardedSource
from farthing.planner.footprint import Holder, Stored, stored_by_checkpoint, stored_by_config
from farthing.planner.memory import PlannedModel, _all_experts, shares_by_format
from tests.checkpoint.test_words import in_words
from tests.ops.parts import distance
from tests.parallel.ranks import rank_options
from tests.parallel.test_types import greedy

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3Moe": ("mlp", {"moe_intermediate_size": 32, "intermediate_size": 64, "num_experts": 4}),
    "Mixtral": ("block_sparse_moe", {"intermediate_size": 32, "num_local_experts": 4}),
    "MiniMaxM2": ("block_sparse_moe", {"intermediate_size": 32, "num_local_experts": 4}),
    "Qwen3_5Moe": (
        "mlp",
        {
            "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4,
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "GptOss": ("mlp", {"intermediate_size": 32, "num_local_experts": 4, "sliding_window": 8}),
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}
PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"], "input_activations": None,
            "weights": {
                "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True,
                "dynamic": False,
            },
        }
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind, (_, more) in KINDS.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        name = kind + ("TextConfig" if kind == "Qwen3_5Moe" else "Config")
        config = getattr(transformers, name)(**SIZES, **more)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(found[kind])
    return found


def in_gptq(weight: Weight) -> dict[str, Tensor]:
    assert weight.scale is not None
    q = weight.quantized().int() + 8
    groups = weight.scale.shape[1]
    return {
        "qweight": in_words(q.numpy().T, 4, 0),
        "qzeros": in_words(torch.full((groups, len(q)), 7).numpy(), 4, 1),
        "scales": weight.scale.half().t().contiguous(),
        "g_idx": (torch.arange(q.shape[1]) // 32).int(),
    }


@pytest.mark.parametrize("tool", ["llm-compressor", "GPTQModel"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_under_the_names_of_tools(
    kind: str, tool: str, models: dict[str, Path], tmp_path: Path
) -> None:
    if tool == "GPTQModel" and kind in ("Qwen3_5Moe", "GptOss"):
        pytest.skip("not written by it")
    source = Checkpoint.open(models[kind])
    plain = source_of(source, config := config_of(source))
    stored = load_file(models[kind] / "model.safetensors")
    tensors = {n: t for n, t in stored.items() if ".experts." not in n}
    expected = {}
    for name, shape in parameter_shapes(config):
        module = name.removesuffix(".weight")
        if ".experts." not in name or module == name:
            continue
        dense = plain.weight(module, shape)
        weight = quantize_int4(dense.dequantize(), 32)
        assert weight.scale is not None
        weight = replace(weight, scale=weight.scale.half().float(), bias=dense.bias)
        expected[module] = weight
        layer, _, rest = module.partition(".mlp.")
        own = f"{layer}.{KINDS[kind][0] if tool == 'llm-compressor' else 'mlp'}.{rest}"
        if tool == "GPTQModel":
            tensors |= {f"{own}.{n}": t for n, t in in_gptq(weight).items()}
        else:
            tensors |= ct.encode(own, weight, packed=True)
        if dense.bias is not None:
            tensors[f"{own}.bias"] = dense.bias
    if tool == "GPTQModel":
        tensors = {n.replace("block_sparse_moe", "mlp"): t for n, t in tensors.items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    raw = json.loads((models[kind] / "config.json").read_text())
    wide = [n.removesuffix(".weight") for n, t in stored.items() if t.ndim == 2 and ".experts." not in n]
    quantization = GPTQ if tool == "GPTQModel" else PACKED | {"ignore": wide}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))
    checkpoint = Checkpoint.open(tmp_path)
    found = source_of(checkpoint, config_of(checkpoint))
    assert expected
    for module, weight in expected.items():
        read = found.weight(module)
        assert read.format == "int4" and torch.equal(read.dequantize(), weight.dequantize())
        assert weight.bias is None or torch.equal(read.bias, weight.bias)
    load(tmp_path, select("reference", dtype=torch.float32))  # finds every tensor, and none is left over


# Of experts, or single matrices of one: bits, columns of a group, symmetry, act-order.
RULES: dict[str, tuple[int, int, bool, bool]] = {
    r"experts\.0\.": (8, 32, True, False),
    r"experts\.1\.(gate|up)_proj": (2, 16, False, True),
    r"experts\.1\.down_proj": (4, 16, True, True),
    r"experts\.2\.gate_proj": (8, 16, False, False),
    r"layers\.1\..*experts\.3\.up_proj": (3, 32, True, False),
    r"experts\.3\.": (4, 32, True, True),
    r"self_attn\.o_proj": (4, 16, False, True),
}
BASE = (4, 32, False, False)


def rounded(w: Tensor, bits: int, group: int, symmetric: bool, ordered: bool, seed: int) -> dict[str, Tensor]:
    """A matrix [N, K] in GPTQ's tensors, and `value`; matrices of one seed share an order."""
    n, k = w.shape
    g = torch.Generator().manual_seed(seed)
    columns = torch.randperm(k, generator=g) if ordered else torch.arange(k)
    indices = torch.empty(k, dtype=torch.int64)
    indices[columns] = torch.arange(k) // group
    groups = w[:, columns].view(n, -1, group)
    top, middle = (1 << bits) - 1, 1 << bits - 1
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    span = 2 * groups.abs().amax(-1) if symmetric else high - low
    scale = (span / top).half().float()
    zero = torch.full_like(scale, middle) if symmetric else (-low / scale).round().clamp(1, top)
    u = (w / scale[:, indices] + zero[:, indices]).round().clamp(0, top)
    return {
        "value": (u - zero[:, indices]) * scale[:, indices],
        "qweight": in_words(u.long().numpy().T, bits, 0),
        "qzeros": in_words(zero.long().numpy().T - 1, bits, 1),
        "scales": scale.half().t().contiguous(),
        "g_idx": indices.int(),
    }


@pytest.fixture(scope="module")
def mixed(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in GPTQModel's layout with `dynamic`, in AutoRound's (without an order), and what each is
    worth."""
    source, found = load_file(models["Qwen3Moe"] / "model.safetensors"), {}
    raw = json.loads((models["Qwen3Moe"] / "config.json").read_text())
    plain = source_of(opened := Checkpoint.open(models["Qwen3Moe"]), config := config_of(opened))
    stored = {
        name.removesuffix(".weight"): plain.weight(name.removesuffix(".weight"), shape).dequantize()
        for name, shape in parameter_shapes(config)
        if name.endswith("_proj.weight")
    }
    for tool in ("gptq", "auto-round"):
        kept = {n: t for n, t in source.items() if "_proj" not in n and ".experts." not in n}
        values, tensors = dict(kept), dict(kept)
        for module, w in stored.items():
            bits, group, symmetric, ordered = next(
                (r for p, r in RULES.items() if re.search(p, module)), BASE
            )
            seed = len(module.rpartition(".")[0]) + 100 * module.endswith("down_proj")
            parts = rounded(w, bits, group, symmetric, ordered and tool == "gptq", seed)
            values[f"{module}.weight"] = parts.pop("value")
            tensors |= {f"{module}.{n}": t for n, t in parts.items() if n != "g_idx" or tool == "gptq"}
        bits, group, symmetric, _ = BASE
        base = {"bits": bits, "group_size": group, "sym": symmetric}
        rules = {
            p: {"bits": b, "group_size": g, "sym": s} for p, (b, g, s, _) in RULES.items()
        }  # both tools' keys are patterns
        section = (
            {"quant_method": "gptq", "checkpoint_format": "gptq", "desc_act": True}
            | {"dynamic": {f".*{p}": r for p, r in rules.items()}}
            if tool == "gptq"
            else {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
            | {"extra_config": {f".*{p}.*": r for p, r in rules.items()}}
        )
        for name, each, more in (
            (tool, tensors, {"quantization_config": base | section}),
            (f"{tool}-value", values, {}),
        ):
            found[name] = tmp_path_factory.mktemp(name)
            save_file({n: t.contiguous() for n, t in each.items()}, found[name] / "model.safetensors")
            (found[name] / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float32"} | more))
    return found


def logits(path: Path, ops: Ops) -> Tensor:
    model, ids = load(path, ops), torch.arange(20)
    with torch.inference_mode():
        hidden = model.forward(ids, make_batch([20], [0], [[1, 0]], 16), model.new_cache(2, 16))
        return model.logits(hidden).float()


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "gpu"])
@pytest.mark.parametrize("tool", ["gptq", "auto-round"])
def test_experts_of_one_layer_in_different_formats(tool: str, backend: str, mixed: dict[str, Path]) -> None:
    """Bits, groups, symmetry and orders by expert and by matrix: logits of the dequantized model."""
    if backend == "gpu":
        pytest.importorskip("triton")
    expected = logits(mixed[f"{tool}-value"], select("reference", dtype=torch.float32))
    found = logits(mixed[tool], select(backend, dtype=None if backend == "cpu" else torch.float32))
    assert distance(found, expected) < (
        1e-3 if backend == "cpu" else 1e-7
    )  # two orders of a gate and up are rounded


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_divide_columns_in_an_order_exactly(ranks: int, mixed: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(mixed["gptq"])
    config = config_of(checkpoint)
    plan = ShardPlan.build(config, Layout(tp=ranks))
    whole = source_of(checkpoint, config)
    x = torch.randn(3, 64)
    parts = [ShardedSource(whole, plan, plan.layout.place(r)) for r in range(ranks)]
    for expert in range(4):
        prefix = f"model.layers.0.mlp.experts.{expert}"
        gate, up, down = (w.dequantize() for w in gated(whole, prefix, 64, 32)())
        total = torch.zeros(3, 64)
        for part in parts:
            mlp = gated(part, prefix, 64, 32 // ranks)()
            assert all(w.format != "dense" for w in mlp)
            g, u, d = (w.dequantize() for w in mlp)
            total += (torch.nn.functional.silu(x @ g.t()) * (x @ u.t())) @ d.t()
        torch.testing.assert_close(total, (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t())
    o = whole.weight("model.layers.0.self_attn.o_proj")
    cut = [part.weight("model.layers.0.self_attn.o_proj") for part in parts]
    assert o.order is not None and all(w.format == "int4" for w in cut)
    assert torch.equal(torch.cat([w.dequantize() for w in cut], 1), o.dequantize())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_two_running_ranks_of_orders_compute_as_one(backend: str, mixed: dict[str, Path]) -> None:
    """The tokens of one process; and its hidden states, where kernels round inputs in groups that ranks
    divide."""
    if backend == "cpu":
        pytest.importorskip("farthing.ops.cpu")
    one = load(mixed["gptq"], select(backend, dtype=torch.float32, threads=1))
    two = ParallelModel(rank_options(mixed["gptq"], Layout(tp=2), backend=backend))
    ids, batch = torch.arange(20), make_batch([20], [0], [[1, 0]], 16)
    try:
        with torch.inference_mode():
            found, expected = (m.forward(ids, batch, m.new_cache(2, 16, "float32")) for m in (two, one))
        assert distance(found, expected) < (1e-3 if backend == "cpu" else 1e-10)
        assert backend == "cpu" or greedy(two) == greedy(one)
    finally:
        two.close()


def test_the_plan_counts_the_bytes_of_each_expert(mixed: dict[str, Path]) -> None:
    cpu = pytest.importorskip("farthing.ops.cpu")
    path, ops = mixed["auto-round"], cpu.CpuOps(1)
    load(path, ops)
    held = sum(blob.nbytes for name, blob in ops.packed_weights() if ".experts." in name)
    plan = ShardPlan.build(config_of(Checkpoint.open(path)), Layout())
    model = PlannedModel.of(plan, stored_by_checkpoint(path))
    config = json.loads((path / "config.json").read_text())
    assert PlannedModel.of(plan, stored_by_config(config)).mixed == model.mixed
    assert _all_experts(model, plan, plan.layout.place(0), Holder("cpu"), 4) == held
    assert sum(shares_by_format(model, Holder("cpu")).values()) == pytest.approx(1)


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize(("k", "group"), [(96, 64), (80, 64), (224, 128), (128, 64)])
def test_a_group_that_is_cut_off_is_counted_as_held(bits: int, k: int, group: int) -> None:
    cpu = pytest.importorskip("farthing.ops.cpu")
    u, scale = torch.randint(0, 1 << bits, (32, k), dtype=torch.uint8), torch.rand(32, -(-k // group)).half()
    w = integers(bits, u[:, ::2] | u[:, 1::2] << 4 if bits == 4 else u, scale, None, group)
    value = (u.float() - (1 << bits - 1)) * scale.float()[:, torch.arange(k) // group]
    assert torch.equal(w.dequantize(), value)
    held = cpu.CpuOps(1).pack_linear("w", lambda: [w]).packed.nbytes
    assert Holder("cpu").matrix(32, k, Stored(format_of(bits, group, True), group)) == held
