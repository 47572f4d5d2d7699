"""FP8 files of Mistral's models, in their own format and in transformers': a factor per matrix or per block.

Each form is written from random weights and must give the logits of the dequantized weights.
"""

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
from typer.testing import CliRunner

from farthing.checkpoint.floats import quantize_blocks
from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.shards import CheckpointError
from farthing.cli.app import app
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.load import load, source_of
from farthing.model.parameters import parameter_shapes, random_parameters
from farthing.model.source import MemorySource
from farthing.model.types import type_of
from farthing.ops.select import select
from farthing.ops.weights import Weight
from farthing.planner.estimate import published_config
from farthing.planner.footprint import stored_by_checkpoint, stored_by_config
from tests.parity.paged import run

Tensors = dict[str, Tensor]
Scale = Callable[[Tensor], tuple[Tensor, Tensor]]  # to E4M3 and its factors
KEPT = ("norm", "embed_tokens", "lm_head", "mlp.gate.")
SIZES = dict(
    vocab_size=64, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=48
)
HUB = SIZES | dict(
    model_type="mistral4", hidden_size=256, intermediate_size=192, moe_intermediate_size=128,
    num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
    routed_scaling_factor=1.0, norm_topk_prob=True, rms_norm_eps=1e-6, max_position_embeddings=128,
    tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip
OWN = SIZES | dict(
    dim=256, n_layers=2, hidden_dim=192, n_heads=4, norm_eps=1e-6, max_position_embeddings=128,
    moe=dict(
        num_experts=4, num_experts_per_tok=2, num_shared_experts=1, expert_hidden_dim=128,
        first_k_dense_replace=1,
    ),
)  # fmt: skip
STATIC = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
LARGE = (published_config("mistral-large-3") or {})["quantization_config"]


def whole(w: Tensor) -> tuple[Tensor, Tensor]:
    """One factor for the matrix."""
    scale = w.abs().amax() / 448
    return (w / scale).to(torch.float8_e4m3fn), scale


def value(data: Tensor, scale: Tensor) -> Tensor:
    """What E4M3 and its factors stand for."""
    blocks = scale.reshape(-1, scale.shape[-1]) if scale.ndim > 1 else scale.reshape(1, 1)
    n, k = data.shape
    rows, columns = (128, 128) if scale.ndim > 1 else (n, k)
    return data.float() * blocks.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]


class Files:
    """A directory in one form, and its dequantized weights under DeepSeek-V3's names."""

    def __init__(self, path: Path, raw: dict[str, Any], form: Scale, factor: str, inputs: str) -> None:
        self.path = path
        self.config = ModelConfig.from_json(raw)
        self.values: Tensors = {}
        self._raw, self._form, self._factor, self._inputs = raw, form, factor, inputs
        self._kept = KEPT + (("q_a_proj", "kv_a_proj") if raw.get("quantization_config") is LARGE else ())

    def write(self, stacked: bool) -> Files:
        stored = type_of(self._raw).names.stored
        tensors: Tensors = {}
        stacks: dict[str, dict[str, Tensor]] = {}
        for name, w in random_parameters(self.config, 1).items():
            expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
            if any(kept in name for kept in self._kept):
                self.values[name] = w.bfloat16().float()
                tensors[stored(name)] = w.bfloat16()
            elif stacked and expert:
                stacks.setdefault(f"{expert[1]}", {})[f"{expert[2]}.{expert[3]}"] = w
            else:
                data, scale = self._form(w)
                self.values[name] = value(data, scale)
                module = stored(name).removesuffix(".weight")
                tensors |= {f"{module}.weight": data, f"{module}.{self._factor}": scale}
                if self._inputs:
                    tensors[f"{module}.{self._inputs}"] = torch.tensor(0.5)
        for stack, parts in stacks.items():
            tensors |= self._stack(stack, parts)
        self.path.mkdir(exist_ok=True)
        save_file(tensors, self.path / "model.safetensors")
        file = "params.json" if self._raw["model_type"] == "mistral_large_3" else "config.json"
        (self.path / file).write_text(json.dumps(self._raw))
        return self

    def _stack(self, stack: str, parts: Tensors) -> Tensors:
        out: dict[str, list[Tensor]] = {}
        for e in range(len(parts) // 3):
            gate_up = torch.cat((parts[f"{e}.gate"], parts[f"{e}.up"]))
            for part, w in (("gate_up_proj", gate_up), ("down_proj", parts[f"{e}.down"])):
                data, scale = self._form(w)
                out.setdefault(f"{stack}.{part}", []).append(data)
                out.setdefault(f"{stack}.{part}_scale_inv", []).append(
                    scale if scale.ndim else scale.reshape(1, 1)
                )
                out.setdefault(f"{stack}.{part}_activation_scale", []).append(torch.tensor(0.5))
                names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
                for one, half in zip(names, value(data, scale).chunk(len(names)), strict=True):
                    self.values[f"{stack}.{e}.{one}.weight"] = half.contiguous()
        stored = type_of(self._raw).names.stored
        return {stored(name): torch.stack(all_) for name, all_ in out.items()}


def hub(path: Path, form: Scale = whole, stacked: bool = True) -> Files:
    """As transformers saves it."""
    blocks = None if form is whole else [128, 128]
    raw = HUB | dict(quantization_config=STATIC | dict(weight_block_size=blocks))
    return Files(path, raw, form, "weight_scale_inv", "activation_scale").write(stacked)


def wrapped(path: Path) -> Files:
    """As Mistral Small 4 is released: inside `mistral3`, with a vision tower."""
    raw = dict(model_type="mistral3", text_config=HUB, quantization_config=STATIC)
    return Files(path, raw, whole, "weight_scale_inv", "activation_scale").write(True)


def hub_per_expert(path: Path) -> Files:
    """As other tools save it: a module per expert."""
    raw = HUB | dict(quantization_config={"quant_method": "fp8", "activation_scheme": "static"})
    return Files(path, raw, whole, "weight_scale", "input_scale").write(False)


def own(path: Path, scheme: str | None = "TENSOR") -> Files:
    """params.json, as Mistral Small 4 is released."""
    raw = OWN | dict(
        model_type="mistral_large_3", quantization={"qformat_weight": "fp8_e4m3", "qscheme_act": scheme}
    )
    return Files(path, raw, whole, "qscale_weight", "qscale_act" if scheme == "TENSOR" else "").write(False)


def own_blocks(path: Path) -> Files:
    """params.json, as Mistral Large 3 is released."""
    raw = OWN | dict(model_type="mistral_large_3", quantization_config=LARGE)
    return Files(path, raw, quantize_blocks, "weight_scale", "").write(False)


def own_tensors(path: Path) -> Files:
    """params.json with one factor per matrix in compressed-tensors."""
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    groups = {"FP8": {"targets": ["Linear"], "weights": weights}}
    raw = OWN | dict(
        model_type="mistral_large_3",
        quantization=dict(
            quant_method="compressed-tensors", format="float-quantized", config_groups=groups, ignore=["gate"]
        ),
    )
    return Files(path, raw, whole, "qscale_weight", "qscale_act").write(False)


FORMS: dict[str, Callable[[Path], Files]] = {
    "hub": hub,
    "hub blocks": lambda path: hub(path, quantize_blocks),
    "hub, wrapped": wrapped,
    "hub, a module per expert": hub_per_expert,
    "params.json": own,
    "params.json, no input scales": lambda path: own(path, "NO_SCALES"),
    "params.json, blocks": own_blocks,
    "params.json, a factor per matrix": own_tensors,
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_weights(form: str, tmp_path: Path) -> None:
    """The CPU kernels round activations to bfloat16 and kv_b_proj to INT8 where weights are FP8."""
    files = FORMS[form](tmp_path)
    ids = torch.randint(2, 64, (21,), generator=torch.manual_seed(0))
    for backend, most in (("reference", 1e-6), ("cpu", 0.02)):
        threads = None if backend == "reference" else 1
        one, other = (select(backend, dtype=torch.float32, threads=threads) for _ in range(2))
        expected = run(DecoderModel(files.config, one, MemorySource(files.values)), ids, [9, 12])
        found = run(load(tmp_path, other), ids, [9, 12])
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < most, f"{backend}: {error:.1e}"


@pytest.mark.parametrize("form", FORMS)
def test_matrices_stay_fp8(form: str, tmp_path: Path) -> None:
    files = FORMS[form](tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    source = source_of(checkpoint, files.config)
    by_files, by_config = stored_by_checkpoint(tmp_path), stored_by_config(checkpoint.config)
    for name, shape in parameter_shapes(files.config):
        if len(shape) == 1 or name.startswith(("model.embed", "lm_head")):
            continue
        weight = source.weight(name.removesuffix(".weight"), (shape[0], shape[1]))
        assert by_files(name).kind == by_config(name).kind == kind_of(weight), name
        assert torch.equal(weight.dequantize(), files.values[name]), name


def kind_of(weight: Weight) -> str:
    return "bfloat16" if weight.format == "dense" else weight.format


@pytest.mark.parametrize("form", ["hub", "params.json", "params.json, blocks"])
def test_commands_name_the_format(form: str, tmp_path: Path) -> None:
    files = FORMS[form](tmp_path)
    run = CliRunner().invoke
    checked = run(app, ["check", str(tmp_path)])
    assert "in fp8 and bfloat16" in " ".join(checked.stdout.split())
    shown = run(app, ["inspect", str(tmp_path), "--json"])
    stored = sum(t.numel() for t in files.values.values())
    assert stored < json.loads(shown.stdout)["weight_bytes"] < 1.5 * stored
    planned = run(app, ["plan", str(tmp_path), "--backend", "gpu", "--json"])
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["ranks"][0]["weights"] < 1.6 * stored


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"quantization": {"qformat_weight": "nvfp4"}},
            "quantization.qformat_weight: got 'nvfp4'; expected 'fp8_e4m3'",
        ),
        (
            {"quantization": {"bits": 4}},
            "quant_method: got None; expected one of fp8",
        ),
    ],
)
def test_other_formats_are_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    own(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps(OWN | change))
    with pytest.raises(CheckpointError, match=re.escape(words)):
        Checkpoint.open(tmp_path)


def test_factors_of_stacks_are_checked(tmp_path: Path) -> None:
    files = hub(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj_scale_inv"

    def loading(scale: Tensor) -> Weight:
        save_file(tensors | {name: scale}, tmp_path / "model.safetensors")
        source = source_of(Checkpoint.open(tmp_path), files.config)
        return source.weight("model.layers.1.mlp.experts.3.up_proj", (128, 256))

    assert torch.equal(loading(torch.tensor([2.0])).scale, torch.full((1, 2), 2.0))
    for scale, words in (
        (tensors[name][:3], f"{name} has factors of 3 experts; expected more than 3"),
        (torch.ones(4, 255, 1), f"{name}: expected one number, 256 rows or shape [2, 2]"),
        (torch.full((4, 1, 1), float("nan")), f"{name}: expected finite scales"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(words)):
            loading(scale)


@pytest.mark.parametrize("found", [(1,), (1, 1), (256, 1)])
def test_factors_are_of_the_blocks_that_the_config_declares(found: tuple[int, ...], tmp_path: Path) -> None:
    """Fewer are a truncated file's; by default, one number or one per row is a format of its own."""
    data = torch.ones(256, 256).to(torch.float8_e4m3fn)
    save_file({"a.weight": data, "a.scale": torch.ones(found)}, tmp_path / "model.safetensors")

    def opened(blocks: list[int] | None) -> Checkpoint:
        raw = HUB | dict(quantization_config=STATIC | dict(weight_block_size=blocks))
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return Checkpoint.open(tmp_path)

    assert opened(None).weight("a").format == "fp8"
    words = f"a.scale: expected shape [2, 2] (blocks of 128 x 128), found {list(found)}"
    with pytest.raises(CheckpointError, match=re.escape(words)):
        opened([128, 128]).weight("a")


def test_factors_per_row(tmp_path: Path) -> None:
    data, scale = torch.ones(4, 8).to(torch.float8_e4m3fn), torch.arange(1.0, 5.0)[:, None]
    save_file({"a.weight": data, "a.weight_scale": scale}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(HUB | dict(quantization_config=STATIC)))
    weight = Checkpoint.open(tmp_path).weight("a")
    assert weight.format == "fp8" and torch.equal(weight.dequantize(), scale.expand(4, 8))
