"""Mixtures of experts under the names that tools give them: as loaded as the values that they stand for.

llm-compressor 0.14 and GPTQModel 7.7 split stacks of experts and name each matrix gate_proj, up_proj or
down_proj: the former in the module that the model has (`block_sparse_moe` of Mixtral and MiniMax-M2), the
latter always in `mlp`. Files written by these tools had the tensors that are written here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from farthing.checkpoint import compressed_tensors as ct
from farthing.checkpoint.reader import Checkpoint
from farthing.model.load import config_of, load, parameter_shapes, source_of
from farthing.ops.select import select
from farthing.ops.weights import Weight, quantize_int4
from tests.checkpoint.test_words import in_words

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
