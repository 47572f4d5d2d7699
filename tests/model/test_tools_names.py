"""Models as quantization tools write them, with their own names of experts and packed small matrices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")

from farthing.checkpoint.shards import CheckpointError
from farthing.compress.source import PlainCheckpoint
from farthing.model.load import load
from farthing.ops.select import select
from tests.parity.families import build
from tests.parity.paged import run

PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None], **config: Any) -> None:
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | config))


def logits(path: Path) -> Tensor:
    return run(load(path, select("reference", dtype=torch.float32)), torch.arange(2, 22), [20])


@pytest.mark.parametrize("family", ["mixtral", "minimax_m2"])
@pytest.mark.parametrize("tool", ["llm-compressor", "GPTQModel"])
def test_single_experts_have_the_names_of_modules(family: str, tool: str, tmp_path: Path) -> None:
    build(family, 0, tmp_path)
    expected = logits(tmp_path)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            new = re.sub(r"(experts\.\d+)\.(w\d)", lambda m: f"{m[1]}.{PARTS[m[2]]}", name)
            new = new.replace("block_sparse_moe", "mlp") if tool == "GPTQModel" else new
            tensors[new] = tensors.pop(name)

    rewrite(tmp_path, rename)
    assert torch.equal(logits(tmp_path), expected)


def test_a_stack_that_was_quantized_whole_is_refused_by_name(tmp_path: Path) -> None:
    build("gpt_oss", 0, tmp_path)

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            tensors[f"{name}_weight_scale"] = torch.ones(())

    rewrite(tmp_path, quantize)
    with pytest.raises(
        CheckpointError, match=r"experts\.gate_up_proj is one quantized tensor of all experts"
    ):
        load(tmp_path, select("reference"))


def test_the_gate_of_a_shared_expert_may_be_quantized(tmp_path: Path) -> None:
    """bitsandbytes quantizes every Linear module."""
    build("qwen3_next", 0, tmp_path)
    code = torch.linspace(-1, 1, 16)

    def quantize(packed: bool) -> Callable[[dict[str, Tensor]], None]:
        def change(tensors: dict[str, Tensor]) -> None:
            for name in [n for n in tensors if n.endswith("shared_expert_gate.weight")]:
                k = tensors[name].shape[1]
                u = torch.arange(k, dtype=torch.uint8) % 16
                tensors[name] = code[u.long()].bfloat16().float().unsqueeze(0)
                if packed:
                    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [1, k]}
                    raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
                    tensors[name] = (u[::2] << 4 | u[1::2]).unsqueeze(1)
                    tensors[f"{name}.absmax"], tensors[f"{name}.quant_map"] = torch.ones(1), code.clone()
                    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = raw

        return change

    rewrite(tmp_path, quantize(packed=False))
    expected = logits(tmp_path)
    rewrite(
        tmp_path,
        quantize(packed=True),
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )
    assert torch.equal(logits(tmp_path), expected)


def test_a_stored_head_is_the_models_own_whatever_its_configuration_says(tmp_path: Path) -> None:
    """As transformers reads it; a compressed file would not say which is meant."""
    build("mixtral", 0, tmp_path)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])

    rewrite(tmp_path, add, tie_word_embeddings=False)
    own = logits(tmp_path)
    rewrite(tmp_path, lambda tensors: None, tie_word_embeddings=True)
    assert torch.equal(logits(tmp_path), own)
    with pytest.raises(CheckpointError, match="tie_word_embeddings: true; expected false"):
        PlainCheckpoint.open(tmp_path)
