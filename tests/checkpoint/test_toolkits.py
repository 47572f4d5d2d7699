"""bitsandbytes and ModelOpt: files written here by the rules of their packing, and by the tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from farthing.checkpoint import toolkits
from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.shards import CheckpointError
from farthing.planner.footprint import stored_by_config
from tests.checkpoint.sizes import QWEN3_MOE

MODULE = "model.layers.0.mlp.down_proj"
N, K = 32, 256
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def opened(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Checkpoint:
    save_file({f"{MODULE}.{k}": v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    raw = QWEN3_MOE | {"quantization_config": config}
    (path / "config.json").write_text(json.dumps(raw))
    return Checkpoint.open(path)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nibbles(*shape: int) -> Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def four_bits(kind: str, nested: bool, dtype: str) -> tuple[dict[str, Tensor], Tensor]:
    """A matrix as bitsandbytes stores it, and its value."""
    u, code, size = nibbles(N * K), numbers(16, seed=2), numbers(N * K // 64).abs()
    state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": dtype, "shape": [N, K]}
    tensors = {"weight": (u[::2] << 4 | u[1::2]).unsqueeze(1), "weight.quant_map": code}
    if nested:
        state |= {"nested_blocksize": 48, "nested_dtype": "float32", "nested_offset": 0.25}
        index, map_, outer = nibbles(len(size)), numbers(256, seed=3), numbers(3, seed=4).abs()
        tensors |= {"weight.absmax": index, "weight.nested_quant_map": map_, "weight.nested_absmax": outer}
        size = map_[index.long()] * outer.repeat_interleave(48)[: len(size)] + 0.25
    else:
        tensors |= {"weight.absmax": size}
    raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = raw
    value = (code[u.long()].view(-1, 64) * size.unsqueeze(1)).view(N, K)
    return tensors, value.to(getattr(torch, dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_4_bits_of_bitsandbytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, nested: bool, dtype: str
) -> None:
    tensors, value = four_bits(kind, nested, dtype)
    checkpoint = opened(tmp_path, tensors, BNB)
    toolkits._say_dense.cache_clear()
    weight = checkpoint.weight(MODULE, (N, K))
    assert weight.format == "dense" and torch.equal(weight.data, value)
    assert checkpoint.stored_as(MODULE) == ("dense", (N, K))
    checkpoint.finish()
    assert f"4 bits of bitsandbytes ({kind}): held in 16 bits" in caplog.text
    assert stored_by_config(checkpoint.config)(f"{MODULE}.weight").kind == "bfloat16"


def test_llm_int8(tmp_path: Path) -> None:
    data = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    size = numbers(N).abs()
    tensors = {"weight": data, "SCB": size, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["q_proj"]}
    checkpoint = opened(tmp_path, tensors, config)
    weight = checkpoint.weight(MODULE, (N, K))
    assert weight.format == "int8" == checkpoint.stored_as(MODULE)[0]
    torch.testing.assert_close(weight.dequantize(), data * size.unsqueeze(1) / 127, rtol=1e-6, atol=0)
    checkpoint.finish()
    planned = stored_by_config(checkpoint.config)
    names = ("self_attn.q_proj", "mlp.up_proj")
    assert [planned(f"model.layers.0.{n}.weight").kind for n in names] == ["bfloat16", "int8"]
    turing = tensors | {"weight_format": torch.tensor(1, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"weight_format: got tiles of a GPU; expected rows \(0\)"):
        opened(tmp_path, turing, config).weight(MODULE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [N]}, "expected quant_type, dtype, blocksize and a shape of two sizes"),
        ({"blocksize": 0}, "expected quant_type, dtype, blocksize"),
        ({"dtype": "__class__"}, "expected quant_type, dtype, blocksize"),
        ({"nested_offset": 0.5}, "nested_blocksize beside nested_offset"),
        ({"shape": [N, 2 * K]}, r"weight: expected shape \[8192\], found \[4096\]"),
        ({"blocksize": 128}, r"weight.absmax: expected shape \[64\], found \[128\]"),
    ],
)
def test_states_that_do_not_fit(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    tensors, _ = four_bits("nf4", False, "bfloat16")
    suffix = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[suffix].tolist())) | change
    tensors[suffix] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=words):
        opened(tmp_path, tensors, BNB).weight(MODULE)


def test_a_state_that_is_no_json(tmp_path: Path) -> None:
    tensors, _ = four_bits("nf4", False, "bfloat16")
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.zeros(5, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"quant_state\.bitsandbytes__nf4: expected JSON, found"):
        opened(tmp_path, tensors, BNB).weight(MODULE)


# ModelOpt.


def stored(algorithm: str) -> tuple[dict[str, Tensor], Tensor, str]:
    """A matrix as ModelOpt stores it, its value, and the format it is held in."""
    w8 = numbers(N, K).to(torch.float8_e4m3fn)
    u, q8 = nibbles(N, K), torch.randint(-128, 128, (N, K), dtype=torch.int8)
    exponents = torch.randint(120, 130, (N, K // 32), dtype=torch.uint8)
    powers = torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    pairs, one = u[:, ::2] | u[:, 1::2] << 4, torch.tensor(0.25)
    if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        scale = one if algorithm == "FP8" else numbers(N).abs()
        return {"weight": w8, "weight_scale": scale}, w8.float() * scale.view(-1, 1), "fp8"
    if algorithm == "fp8_pb_wo":
        scale = numbers(1, 1, K // 128, 1).abs()
        value = w8.float() * scale.view(1, -1).repeat_interleave(128, 1)
        return {"weight": w8, "weight_scale": scale}, value, "fp8"
    if algorithm == "MXFP8":
        return {"weight": w8, "weight_scale": exponents}, w8.float() * powers, "fp8"
    if algorithm == "mxfp4":
        return {"weight": pairs, "weight_scale": exponents}, E2M1[u.long()] * powers, "mxfp4"
    if algorithm == "NVFP4":
        scale = numbers(N, K // 16).abs().to(torch.float8_e4m3fn)
        value = E2M1[u.long()] * (scale.float() * one).repeat_interleave(16, 1)
        return {"weight": pairs, "weight_scale": scale, "weight_scale_2": one}, value, "mxfp4"
    if algorithm in ("W8A16", "W8A8_SQ_PER_CHANNEL"):
        scale = numbers(N).abs()
        return {"weight": q8, "weight_scale": scale}, q8 * scale.unsqueeze(1), "int8"
    scale = numbers(N, K // 128).abs()
    value = ((u ^ 8).float() - 8) * scale.repeat_interleave(128, 1)
    tensors = {"weight": u[::2] | u[1::2] << 4, "weight_scale": scale}
    return tensors | ({"weight_scale_2": one} if algorithm == "W4A8_AWQ" else {}), value, "int4"


ALGORITHMS = [
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo", "MXFP8", "mxfp4", "NVFP4", "W8A16",
    "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ",
]  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_modelopt(tmp_path: Path, algorithm: str) -> None:
    tensors, value, held = stored(algorithm)
    config = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head", "*.self_attn*"]}
    checkpoint = opened(tmp_path, tensors | {"input_scale": torch.tensor(0.5)}, config)
    weight = checkpoint.weight(MODULE, (N, K))
    assert weight.format == held
    torch.testing.assert_close(weight.dequantize(), value, rtol=1e-6, atol=0)
    assert checkpoint.stored_as(MODULE) == (held, (N, K))
    assert (weight.inputs is not None) == (algorithm == "W8A8_SQ_PER_CHANNEL")
    checkpoint.finish()
    planned = stored_by_config(checkpoint.config)
    assert planned("model.layers.0.self_attn.q_proj.weight").kind == "bfloat16"
    assert planned("model.layers.0.mlp.up_proj.weight").kind == held


def test_modelopt_by_a_file_of_its_own(tmp_path: Path) -> None:
    """Older exports leave config.json as it was."""
    tensors, value, _ = stored("NVFP4")
    section = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    opened(tmp_path, tensors, {})
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": section})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    torch.testing.assert_close(
        Checkpoint.open(tmp_path).weight(MODULE).dequantize(), value, rtol=1e-6, atol=0
    )


def test_modelopt_with_an_algorithm_for_each_layer(tmp_path: Path) -> None:
    tensors, value, _ = stored("NVFP4")
    layers = {
        MODULE: {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.0.mlp.up_proj": {"quant_algo": "FP8"},
    }
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    checkpoint = opened(tmp_path, tensors, config)
    torch.testing.assert_close(checkpoint.weight(MODULE).dequantize(), value, rtol=1e-6, atol=0)
    planned = stored_by_config(checkpoint.config)
    kinds = [planned(f"model.layers.0.mlp.{n}_proj.weight").kind for n in ("down", "up", "gate")]
    assert kinds == ["mxfp4", "fp8", "bfloat16"]


def with_factors(path: Path, **config: Any) -> tuple[Checkpoint, dict[str, Tensor], Tensor]:
    """An MLP of ModelOpt's AWQ whose down projection has factors, its values, and the factors."""
    down, value, _ = stored("W4A16_AWQ")
    scale, u = numbers(K, 1, seed=5).abs(), nibbles(K, 128)
    factor = numbers(K, seed=7).abs().bfloat16()
    tensors = {f"{MODULE}.{k}": v for k, v in (down | {"pre_quant_scale": factor}).items()}
    up = {"weight": u[::2] | u[1::2] << 4, "weight_scale": scale}
    tensors |= {f"model.layers.0.mlp.up_proj.{k}": v for k, v in up.items()}
    quantization = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}
    opened(path, {}, quantization)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    raw = {"model_type": "qwen3", "quantization_config": quantization} | config
    (path / "config.json").write_text(json.dumps(raw))
    return Checkpoint.open(path), {"up": ((u ^ 8).float() - 8) * scale, "down": value}, factor.float()


def test_factors_of_a_down_projection_go_before_it(tmp_path: Path) -> None:
    """ModelOpt's AWQ leaves `pre_quant_scale` there; both matrices keep their 4 bits."""
    checkpoint, values, factor = with_factors(tmp_path)
    up, down = (checkpoint.weight(f"model.layers.0.mlp.{name}_proj") for name in ("up", "down"))
    assert (up.format, down.format) == ("int4", "int4")
    assert torch.equal(down.dequantize(), values["down"])
    torch.testing.assert_close(up.dequantize(), values["up"] * factor.unsqueeze(1), rtol=1e-6, atol=0)
    checkpoint.finish()


def test_factors_stay_where_the_neurons_are_clamped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toolkits._say_dense.cache_clear()
    checkpoint, values, factor = with_factors(tmp_path, swiglu_limit=7.0)
    up, down = (checkpoint.weight(f"model.layers.0.mlp.{name}_proj") for name in ("up", "down"))
    torch.testing.assert_close(up.dequantize(), values["up"], rtol=1e-6, atol=0)
    assert torch.equal(down.data, (values["down"] * factor).bfloat16())
    assert "down_proj and its pre_quant_scale (of ModelOpt): held in 16 bits" in caplog.text
    checkpoint.finish()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_algo": "NVFP4_SVD"}, "quant_algo: got 'NVFP4_SVD'; expected MIXED_PRECISION or one of FP8"),
        ({"quant_algo": "NVFP4", "group_size": 32}, "group_size: got 32; expected 16"),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "x"}}},
            "quantization_config.a.quant_algo: got 'x'",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path, {"weight": torch.ones(2, 2)}, {"quant_method": "modelopt"} | config)
    assert words in str(error.value)


# Files of the tools.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_files_of_bitsandbytes(tmp_path: Path, kind: str, nested: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    w = numbers(N, K).bfloat16()
    packed, state = bnb.functional.quantize_4bit(w, quant_type=kind, compress_statistics=nested)
    tensors = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    found = opened(tmp_path, tensors, BNB).weight(MODULE)
    assert torch.equal(found.data, bnb.functional.dequantize_4bit(packed, state))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fp8", "fp8_pc_pt", "int8_sq", "int4_awq", "mxfp4", "mxfp8", "nvfp4"])
def test_files_of_modelopt(tmp_path: Path, algorithm: str) -> None:
    pytest.importorskip("modelopt")
    tensors, value, name = written_by_modelopt(algorithm, numbers(N, K))
    tensors["input_scale"] = torch.tensor(0.5)
    weight = opened(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": name}).weight(MODULE)
    torch.testing.assert_close(weight.dequantize(), value, rtol=1e-6, atol=0)


def written_by_modelopt(algorithm: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor, str]:
    """Tensors by its export, their value by its own dequantization, and quant_algo."""
    from modelopt.torch.export.quant_utils import process_layer_quant_config, to_quantized_weight
    from modelopt.torch.quantization import qtensor

    name = process_layer_quant_config({"a.quantization": algorithm, "a.awq_block_size": 128})["quant_algo"]
    group = {"int4_awq": 128, "nvfp4": 16, "mxfp8": 32, "mxfp4": 32}.get(algorithm, 0)
    second, blocks, size = None, {"block_sizes": {-1: group}}, w.abs().amax(1)
    if algorithm == "fp8":
        scale = w.abs().amax() / 448
    elif algorithm in ("fp8_pc_pt", "int8_sq"):
        scale = size / (448 if algorithm == "fp8_pc_pt" else 127)
    elif algorithm == "int4_awq":
        scale = w.unflatten(1, (-1, group)).abs().amax(-1) / 7
    elif algorithm == "mxfp4":
        scale = qtensor.MXFP4QTensor.quantize(w, block_size=group)[1].reshape(N, -1)
    elif algorithm == "mxfp8":
        _, scale = qtensor.MXFP8QTensor.quantize(w)
    else:
        second = qtensor.NVFP4QTensor.get_weights_scaling_factor_2(w)
        scale = qtensor.NVFP4QTensor.get_weights_scaling_factor(w, group, second)[0]
    data = to_quantized_weight(w, scale, algorithm, second, group or None)
    tensors = {"weight": data, "weight_scale": scale}
    own = {"fp8": "FP8", "fp8_pc_pt": "FP8", "int8_sq": "INT8", "mxfp8": "MXFP8", "mxfp4": "MXFP4"}
    if algorithm == "int4_awq":  # has no class of its own: the rule by which it rounds
        q = (w / scale.repeat_interleave(group, 1)).round().clamp(-8, 7)
        return tensors, q * scale.repeat_interleave(group, 1), name
    cls = getattr(qtensor, f"{own.get(algorithm, 'NVFP4')}QTensor")
    if second is not None:
        tensors["weight_scale_2"] = second
        value = cls(w.shape, torch.float32, data).dequantize(
            scale=scale, double_scale=second, block_sizes={-1: group}
        )
    else:
        more = blocks if group else {}
        each = scale.unsqueeze(1) if algorithm in ("fp8_pc_pt", "int8_sq") else scale
        value = cls(w.shape, torch.float32, data).dequantize(torch.float32, scale=each, **more)
    return tensors, value, name
