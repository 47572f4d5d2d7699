"""Calibrated input ranges: the kernels follow the file and agree with transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.shards import CheckpointError
from farthing.compress.api import load_for
from farthing.compress.evaluate import PAGE, paged_batch
from farthing.compress.stream import Compression, run
from farthing.model.load import load
from farthing.ops.select import select
from farthing_lab.compress.recipe import RECIPES, Study
from tests.compress.conftest import corpus_of, write_model

IDS = torch.randint(2, 258, (40,), generator=torch.Generator().manual_seed(3))


def log_probs(path: Path, backend: str) -> torch.Tensor:
    model = load_for(path, backend)
    batch, blocks = paged_batch([len(IDS)])
    logits = model.logits(model.forward(IDS, batch, model.new_cache(blocks, PAGE, "float32")))
    return logits.float().log_softmax(-1)


def scaled(source: Path, out: Path, factor: float) -> Path:
    """The same model with every input scale multiplied."""
    out.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            save_file({n: t * factor if n.endswith("input_scale") else t for n, t in tensors.items()},
                      out / file.name, metadata={"format": "pt"})  # fmt: skip
        elif file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.fixture(scope="module")
def static(model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("static") / "out"
    recipe = Study("static", "int8", activations="tensor", observer="kl")
    run(Compression(model_dir, out, recipe, corpus_of(data, model_dir, 64, 600)))
    return out


def test_served_result_depends_on_the_ranges(static: Path, tmp_path: Path) -> None:
    """With scales x 100 nearly everything rounds to zero, unlike with dynamic rounding."""
    served = log_probs(static, "cpu")
    wide = log_probs(scaled(static, tmp_path / "wide", 100.0), "cpu")
    assert float((served - wide).abs().max()) > 0.1


def test_every_backend_matches_the_simulation(static: Path) -> None:
    """Except for the products of kv_b, whose inputs only the kernels round, and for a token in twenty that
    this sends to another expert."""
    served, simulated = log_probs(static, "cpu"), log_probs(static, "simulate")
    apart = ((served - simulated).norm(dim=1) / simulated.norm(dim=1)).sort().values
    assert float(apart[: len(IDS) * 19 // 20].max()) < 0.025 and float(apart.median()) < 0.015
    assert float((log_probs(static, "reference") - simulated).norm() / simulated.norm()) < 1e-5


def test_experts_of_a_layer_share_one_input_range(static: Path) -> None:
    checkpoint = Checkpoint.open(static)
    names = [n for n in checkpoint.names() if ".mlp.experts." in n and n.endswith("input_scale")]
    shared = {(n.split(".")[2], float(checkpoint.tensor(n))) for n in names if "down" not in n}
    assert len(shared) == len({layer for layer, _ in shared}) == 3  # two layers and the MTP layer's
    assert len({float(checkpoint.tensor(n)) for n in names if "down" in n}) > 3
    for module in ("experts.0.gate_proj", "experts.5.up_proj"):
        weight = checkpoint.weight(f"model.layers.1.mlp.{module}")
        assert weight.inputs is not None and ("1", weight.inputs.scale) in shared


def w8a8_static(source: Path, out: Path) -> Path:
    """llm-compressor's W8A8 files with static activations, written by compressed-tensors."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.lifecycle import forward  # noqa: F401 - registers the wrapped forward
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    args = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = args | {"strategy": "channel", "dynamic": False, "observer": "minmax"}
    inputs = args | {"strategy": "tensor", "dynamic": False, "observer": "static_minmax"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    ignore = ["lm_head", "re:.*kv_b_proj"]  # kv_b is absorbed, so its input is never a separate tensor
    config = QuantizationConfig(
        config_groups={"group_0": group}, ignore=ignore, quantization_status="initialized"
    )
    apply_quantization_config(model, config)
    absmax: dict[str, float] = {}
    hooks = []
    for name, module in model.named_modules():
        if not hasattr(module, "input_scale"):
            continue

        def see(_: Any, args: Any, name: str = name) -> None:
            absmax[name] = max(absmax.get(name, 0.0), float(args[0].abs().max()))

        module.quantization_enabled = False
        hooks.append(module.register_forward_pre_hook(see))
        module.weight_scale.data = (module.weight.detach().abs().amax(1, keepdim=True) / 127.5).clamp_min(
            1e-9
        )
    with torch.no_grad():
        model(IDS[None])
    for hook in hooks:
        hook.remove()
    for name, module in model.named_modules():
        if hasattr(module, "input_scale"):
            module.quantization_enabled = True
            module.input_scale.data.fill_(0.8 * absmax[name] / 127.5)  # clips some values, like calibration
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    return out


def test_static_llm_compressor_files_agree_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = write_model(tmp_path / "source", num_nextn_predict_layers=0, first_k_dense_replace=3)
    out = w8a8_static(source, tmp_path / "out")
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    assert written["config_groups"]["group_0"]["input_activations"]["dynamic"] is False
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0].log_softmax(-1)

    def distance(actual: torch.Tensor) -> float:
        return float((actual - expected).norm() / expected.norm())

    assert distance(log_probs(out, "simulate")) < 1e-5
    assert distance(log_probs(out, "cpu")) < 5e-3
    assert distance(log_probs(scaled(out, tmp_path / "wide", 3.0), "cpu")) > 0.02


def test_error_for_a_missing_or_impossible_range_names_the_module(static: Path, tmp_path: Path) -> None:
    for factor in (0.0, math.nan, -1.0):
        broken = Checkpoint.open(scaled(static, tmp_path / str(factor), factor))
        with pytest.raises(CheckpointError, match=r"model\.layers\.0\.\S+input_scale: found"):
            broken.weight("model.layers.0.self_attn.o_proj")


def test_int8_kl_is_static_and_loads(model_dir: Path, data: Path, tmp_path: Path) -> None:
    run(Compression(model_dir, tmp_path / "out", RECIPES["int8-kl"], corpus_of(data, model_dir, 64, 600)))
    weight = Checkpoint.open(tmp_path / "out").weight("model.layers.0.self_attn.o_proj")
    assert weight.inputs is not None and weight.inputs.scale is not None
    load(tmp_path / "out", select("cpu"))
