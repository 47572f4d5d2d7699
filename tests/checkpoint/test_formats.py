"""Every format is read from files of its reference writer: compressed-tensors, or by hand for DeepSeek."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from farthing.checkpoint import compressed_tensors as ct
from farthing.checkpoint import compressed_tensors as ctw
from farthing.checkpoint.layout import Parts
from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.shards import CheckpointError
from farthing.checkpoint.writer import CheckpointWriter
from farthing.ops.weights import Weight, pack_int4, quantize_int4, quantize_int8


def save(path: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None = None) -> Checkpoint:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    config = {"model_type": "deepseek_v3"} | ({"quantization_config": quantization} if quantization else {})
    (path / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(path)


def groups(
    args: dict[str, Any], storage: str, ignore: list[str] | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": storage,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args, **more}},
        "ignore": ignore or [],
    }


def compress(w: Tensor, args: dict[str, Any], storage: str) -> tuple[dict[str, Tensor], Tensor]:
    """Quantize with the compressed-tensors package; returns (tensors by suffix, dequantized value)."""
    weights = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    n, k = w.shape
    state: dict[str, Tensor] = {"weight": w}
    if "group" in args["strategy"]:
        blocks = w.view(n, -1, args["group_size"])
        low, high = blocks.amin(-1), blocks.amax(-1)
    elif args["strategy"] == "block":
        padded = torch.nn.functional.pad(w, (0, -k % 128, 0, -n % 128))
        blocks = padded.view(padded.shape[0] // 128, 128, -1, 128)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    if args["strategy"] == "tensor_group":
        state["weight_global_scale"] = generate_gparam(w.amin(), w.amax())
    scale, zero = calculate_qparams(low, high, weights, state.get("weight_global_scale"))
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(storage)
    packed = compressor.compress(state, scheme)
    value = compressor.decompress(dict(packed), scheme)["weight"].float()
    if storage == "nvfp4-pack-quantized":  # which it rounds to bfloat16
        q = unpack_fp4_from_uint8(packed["weight_packed"], n, k, torch.float32)
        each = (packed["weight_scale"].float() / packed["weight_global_scale"]).repeat_interleave(16, 1)
        torch.testing.assert_close(value, q * each, rtol=2**-7, atol=0)
        value = q * each
    return packed, value


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [128, 128]}
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
MX = {"type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
SCHEMES = {
    "int-quantized": INT8,
    "int-quantized 2-bit groups": INT4 | {"num_bits": 2, "group_size": 32},
    "int-quantized 4-bit asymmetric": INT4 | {"symmetric": False, "group_size": 32},
    "int-quantized 5-bit groups": INT4 | {"num_bits": 5, "group_size": 32},
    "int-quantized 6-bit": INT8 | {"num_bits": 6},
    "pack-symmetric": INT4 | {"group_size": 32},
    "pack-asymmetric": INT4 | {"symmetric": False, "group_size": 64},
    "pack-8-bit-groups": INT8 | {"strategy": "group", "group_size": 32},
    "pack-channel": INT4 | {"strategy": "channel"},
    "pack-8": INT8,
    "pack-8-asymmetric": INT8 | {"strategy": "group", "group_size": 64, "symmetric": False},
    "pack-3-bit": INT4 | {"num_bits": 3, "group_size": 32},
    "pack-2-bit-asymmetric": INT4 | {"num_bits": 2, "symmetric": False, "group_size": 16},
    "pack-5-bit": INT4 | {"num_bits": 5, "group_size": 32},
    "pack-5-bit-asymmetric": INT4 | {"num_bits": 5, "symmetric": False, "group_size": 64},
    "pack-6-bit": INT4 | {"num_bits": 6, "strategy": "channel"},
    "float-quantized": FP8,
    "float-quantized channel": FP8 | {"strategy": "channel", "block_structure": None},
    "float-quantized tensor": FP8 | {"strategy": "tensor", "block_structure": None},
    "nvfp4-pack-quantized": FP4 | {"strategy": "tensor_group", "group_size": 16},
    "mxfp4-pack-quantized": MX | {"num_bits": 4},
    "mxfp6-pack-quantized": MX | {"num_bits": 6},
    "mxfp8-quantized": MX | {"num_bits": 8},
}
# What a scheme becomes in memory.
HELD = {"int-quantized": "int8", "pack-8": "int8", "pack-6-bit": "int8", "mxfp8-quantized": "fp8"}
HELD |= {n: "int8_groups" for n in ("pack-8-bit-groups", "pack-8-asymmetric", "pack-5-bit-asymmetric")}
HELD |= {"pack-5-bit": "q5_0", "int-quantized 5-bit groups": "q5_0", "int-quantized 6-bit": "int8"}
HELD |= {"mxfp6-pack-quantized": "int8_groups"}
HELD |= {n: "mxfp4" for n in ("nvfp4-pack-quantized", "mxfp4-pack-quantized")}
HELD |= {n: "fp8" for n in SCHEMES if n.startswith("float")}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(16, 64), (43, 192), (129, 320)])
def test_reads_what_compressed_tensors_writes(tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    args = SCHEMES[name]
    storage = "pack-quantized" if name.startswith("pack") else name.partition(" ")[0]
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed, value = compress(w, args, storage)
    tensors = {f"model.layers.0.mlp.gate_proj.{k}": v for k, v in packed.items()}
    checkpoint = save(tmp_path, tensors, groups(args, storage))
    weight = checkpoint.weight("model.layers.0.mlp.gate_proj", shape)
    assert weight.shape == shape and weight.format == HELD.get(name, "int4")
    assert checkpoint.stored_as("model.layers.0.mlp.gate_proj") == (weight.format, shape)
    torch.testing.assert_close(weight.dequantize(), value, rtol=1e-6, atol=1e-7)
    checkpoint.finish()


def test_4_bit_inputs_of_a_token_stay_in_8(tmp_path: Path) -> None:
    """llm-compressor's W4A4: the weights are what the file says, and inputs more exact than it asks for."""
    w = torch.randn((16, 64), generator=torch.Generator().manual_seed(1))
    packed, value = compress(w, INT4 | {"group_size": 32}, "int-quantized")
    inputs = {"num_bits": 4, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    quantization = groups(INT4 | {"group_size": 32}, "int-quantized", input_activations=inputs)
    tensors = {f"model.layers.0.mlp.gate_proj.{k}": v for k, v in packed.items()}
    weight = save(tmp_path, tensors, quantization).weight("model.layers.0.mlp.gate_proj")
    assert torch.equal(weight.dequantize(), value) and weight.inputs is None


@pytest.mark.parametrize("shape", [(128, 128), (576, 200), (1, 1), (130, 257)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_deepseek_fp8_with_a_ragged_block_and_the_scale_in_another_shard(
    tmp_path: Path, shape: tuple[int, int], power_of_two: bool
) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    n, k = shape
    scale = torch.empty(-(-n // 128), -(-k // 128))
    data = torch.empty(shape, dtype=torch.float8_e4m3fn)
    value = torch.empty(shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            s = w[block].abs().max() / 448
            scale[i, j] = torch.exp2(torch.ceil(torch.log2(s))) if power_of_two else s
            data[block] = (w[block] / scale[i, j]).to(torch.float8_e4m3fn)
            value[block] = data[block].float() * scale[i, j]
    stored = scale.to(torch.float8_e8m0fnu) if power_of_two else scale
    save_file({"a.weight": data}, tmp_path / "one.safetensors")
    save_file({"a.weight_scale_inv": stored, "lm_head.weight": w.bfloat16()}, tmp_path / "two.safetensors")
    weight_map = {"a.weight": "one.safetensors", "a.weight_scale_inv": "two.safetensors"}
    index = {"weight_map": weight_map | {"lm_head.weight": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    checkpoint = Checkpoint.open(tmp_path)
    weight = checkpoint.weight("a", shape)
    assert weight.format == "fp8"
    assert torch.equal(weight.dequantize(), value)
    assert checkpoint.weight("lm_head").format == "dense"
    checkpoint.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_weights_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    w = torch.randn(3, 5).to(dtype)
    checkpoint = save(tmp_path, {"a.weight": w, "a.norm": torch.ones(5)})
    assert torch.equal(checkpoint.weight("a", (3, 5)).data, w)
    assert checkpoint.has("a.norm") and not checkpoint.has("a.bias")
    assert checkpoint.tensor("a.norm", (5,)).dtype == torch.float32


def test_scales_of_the_cache_are_not_weights(tmp_path: Path) -> None:
    """llm-compressor's kv_cache_scheme: one k_scale and v_scale per layer."""
    packed, _ = compress(torch.randn(16, 64), INT8, "int-quantized")
    tensors = {f"model.layers.0.mlp.up_proj.{k}": v for k, v in packed.items()}
    tensors |= {f"model.layers.0.self_attn.{k}_scale": torch.ones(1) for k in "kv"}
    cache = {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
    checkpoint = save(tmp_path, tensors, groups(INT8, "int-quantized") | cache)
    checkpoint.weight("model.layers.0.mlp.up_proj")
    checkpoint.finish()


def test_several_groups_and_the_ignore_list(tmp_path: Path) -> None:
    w = torch.randn(16, 64)
    eight, four = SCHEMES["int-quantized"], SCHEMES["pack-symmetric"]
    a, _ = compress(w, eight, "int-quantized")
    b, _ = compress(w, four, "pack-quantized")
    tensors = {f"model.a.{k}": v for k, v in a.items()} | {f"model.experts.3.up.{k}": v for k, v in b.items()}
    tensors |= {"lm_head.weight": w, "model.left.weight": w.clone()}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": eight, "format": "int-quantized"},
            "group_1": {"targets": [r"re:.*experts\.\d+\..*"], "weights": four, "format": "pack-quantized"},
        },
        "ignore": ["lm_head", "re:.*left"],
    }
    checkpoint = save(tmp_path, tensors, quantization)
    formats = [
        checkpoint.weight(m).format for m in ("model.a", "model.experts.3.up", "lm_head", "model.left")
    ]
    assert formats == ["int8", "int4", "dense", "dense"]
    checkpoint.finish()


WEIGHTS = {
    "int8": lambda w: quantize_int8(w),
    "int4": lambda w: quantize_int4(w, 32),
    "int5": lambda w: Weight(
        "q5_0", (w * 6).round().clamp(-16, 15).to(torch.int8), torch.rand(w.shape[0], w.shape[1] // 32) + 0.1
    ),
    "int4-asymmetric": lambda w: Weight(
        "int4", quantize_int4(w, 32).data, quantize_int4(w, 32).scale,
        torch.randint(-8, 8, (w.shape[0], w.shape[1] // 32), dtype=torch.int8),
    ),
    "fp8": lambda w: Weight(
        "fp8", w.to(torch.float8_e4m3fn), torch.rand(-(-w.shape[0] // 128), -(-w.shape[1] // 128)) + 0.1
    ),
    "dense": lambda w: Weight("dense", w.bfloat16()),
}  # fmt: skip


def test_shard_permissions_follow_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        writer = CheckpointWriter(tmp_path)
        writer.add("w", torch.zeros(2))
        writer.close({})
    finally:
        os.umask(umask)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", WEIGHTS)
def test_writer_output_is_read_by_compressed_tensors_and_the_reader(tmp_path: Path, name: str) -> None:
    w = torch.randn(37, 160, generator=torch.Generator().manual_seed(3))
    weight = WEIGHTS[name](w)
    writer = CheckpointWriter(tmp_path)
    for tensor, value in ctw.encode("model.a", weight).items():
        writer.add(tensor, value)
    config = ctw.quantization_config({"model.a": ctw.key_of(weight)})
    writer.close({"quantization_config": config} if config else {})
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.weight("model.a", (37, 160)).dequantize(), weight.dequantize())
    checkpoint.finish()
    if config is None:
        return
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    stored = {n.rpartition(".")[2]: checkpoint.tensor(n) for n in checkpoint.names()}
    theirs = BaseCompressor.get_value_from_registry(config["format"]).decompress(stored, scheme)["weight"]
    torch.testing.assert_close(theirs.float(), weight.dequantize(), rtol=1e-6, atol=1e-7)


def write_fitted(path: Path, weight: Weight, section: Any) -> Checkpoint:
    writer = CheckpointWriter(path)
    for tensor, value in ctw.encode("model.a", weight).items():
        writer.add(tensor, value)
    config = ctw.quantization_config({"model.a": ctw.key_of(weight)})
    writer.close({"quantization_config": config, ctw.MARK: section})
    return Checkpoint.open(path)


def test_fitted_values_are_kept_and_others_read_even_steps(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    data = torch.randint(0, 256, (37, 80), generator=generator, dtype=torch.uint8)
    scale = ctw.stored_scale(torch.randn(37, 5, generator=generator) / 1000)
    weight = Weight("nl4", data, scale)
    exact = write_fitted(tmp_path / "a", weight, ctw.VALUES).weight("model.a")
    assert exact.format == "nl4"
    assert torch.equal(exact.data, data) and torch.equal(exact.dequantize(), weight.dequantize())
    even = write_fitted(tmp_path / "b", weight, None).weight("model.a")
    assert even.format == "int4" and even.nbytes == exact.nbytes
    far = (even.dequantize() - weight.dequantize()).norm() / weight.dequantize().norm()
    assert 0.05 < float(far) < 0.2
    with pytest.raises(CheckpointError, match=r"config.json: farthing: got .*int4_step.*; expected"):
        write_fitted(tmp_path / "c", weight, ctw.VALUES | {"int4_step": -8}).weight("model.a")


@settings(max_examples=200, deadline=None)
@given(st.floats(-4000, 4000, width=32))
def test_scales_of_fitted_values_survive_the_file(value: float) -> None:
    once = ctw.stored_scale(torch.tensor([value]))
    assert torch.equal(ctw.stored_scale(once), once) and bool(once != 0)
    if abs(value) > 2.0**-18:
        assert float(abs(once / value - 1)) <= 2.0**-8


@pytest.mark.parametrize("columns", [32, 160, 224])
def test_packing_of_5_bits_agrees_with_the_package(columns: int) -> None:
    q = torch.randint(-16, 16, (7, columns), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    encoded = ctw.encode("m", Weight("q5_0", q, torch.full((7, columns // 32), -0.5)))
    assert torch.equal(encoded["m.weight_packed"], pack_to_int32(q, 5))
    assert encoded["m.weight_scale"].dtype == torch.float16


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 24), st.integers(0, 2**31))
def test_packing_agrees_with_the_package(tmp_path: Path, n: int, half: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (n, 2 * half), generator=generator, dtype=torch.int8)
    zero = torch.randint(-8, 8, (n, 1), generator=generator, dtype=torch.int8)
    weight = Weight("int4", pack_int4(q), torch.ones(n, 1), zero)
    assert torch.equal(weight.quantized(), q)
    encoded = ctw.encode("m", weight)
    assert torch.equal(encoded["m.weight_packed"], pack_to_int32(q, 4))
    assert torch.equal(encoded["m.weight_zero_point"], pack_to_int32(zero, 4, packed_dim=0))
    assert torch.equal(unpack_from_int32(encoded["m.weight_packed"], 4, q.shape), q)
    scheme = ct.Scheme("pack-quantized", 4, False, "group", 2 * half)
    back = scheme.read(Parts(save(tmp_path, encoded), "m"))
    assert torch.equal(back.data, weight.data) and torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize("online", [False, True])
def test_transforms_as_the_package_writes_them(tmp_path: Path, online: bool) -> None:
    """Rotations merged into weights are read as stored; those of activations are refused by name."""
    from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme

    merged = [TransformArgs(targets=["re:.*gate_proj"], location="weight_input")]
    running = [TransformArgs(targets=["re:.*down_proj"], location="input")]
    schemes = {"R1": TransformScheme(type="hadamard", apply=merged)}
    schemes |= {"R4": TransformScheme(type="hadamard", apply=running)} if online else {}
    section = json.loads(TransformConfig(config_groups=schemes).model_dump_json())
    packed, value = compress(torch.randn(16, 64), INT4 | {"group_size": 32}, "pack-quantized")
    tensors = {f"model.a.{k}": v for k, v in packed.items()}
    config = groups(INT4 | {"group_size": 32}, "pack-quantized") | {"transform_config": section}
    if not online:
        found = save(tmp_path, tensors, config).weight("model.a").dequantize()
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-7)
        return
    words = r"config_groups\.R4: rotates activations while the model runs \(location 'input'\)"
    with pytest.raises(CheckpointError, match=words):
        save(tmp_path, tensors, config)
