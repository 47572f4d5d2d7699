"""Errors of broken checkpoints name the file, the tensor, the expected and the found value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from farthing.checkpoint import compressed_tensors as ctw
from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.shards import CheckpointError
from farthing.checkpoint.writer import CheckpointWriter
from farthing.ops.weights import quantize_int4, quantize_int8


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    writer = CheckpointWriter(tmp_path, max_shard_bytes=1000)
    writer.add("a.weight", torch.randn(8, 16))
    writer.add("b.weight", torch.randn(8, 16))
    writer.close({})
    return tmp_path


def fails(*parts: str) -> Any:
    return pytest.raises(CheckpointError, match="(?s)" + ".*".join(parts))


def test_unused(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    checkpoint.weight("a")
    with fails("model-00002-of-00002.safetensors", "b.weight", r"\[8, 16\]", "not used"):
        checkpoint.finish()
    checkpoint.finish(ignore=["b.*"])


def test_missing(directory: Path) -> None:
    with fails("a.bias is missing", "a.weight"):
        Checkpoint.open(directory).tensor("a.bias")
    with fails("c.weight is missing"):
        Checkpoint.open(directory).weight("c")


def test_wrong_shape(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    with fails("model-00001", "a.weight", r"expected shape \[16, 8\]", r"found \[8, 16\]"):
        checkpoint.weight("a", (16, 8))
    with fails(r"expected shape \[9\]", r"found \[8, 16\]"):
        checkpoint.tensor("b.weight", (9,))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shard(directory: Path, keep: int) -> None:
    file = directory / "model-00002-of-00002.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    checkpoint = Checkpoint.open(directory)
    checkpoint.weight("a")
    with fails("model-00002-of-00002.safetensors", "truncated", "expected", "found"):
        checkpoint.weight("b")


def test_shard_of_the_index_is_missing_or_lacks_the_tensor(directory: Path) -> None:
    (directory / "model-00002-of-00002.safetensors").unlink()
    with fails("model-00002-of-00002.safetensors", "missing"):
        Checkpoint.open(directory).weight("b")
    save_file({"x": torch.ones(1)}, directory / "model-00002-of-00002.safetensors")
    with fails("b.weight is missing", "index"):
        Checkpoint.open(directory).weight("b")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (
            {"quant_method": "hqq"},
            (
                "quant_method: got 'hqq'",
                "expected one of fp8.*llm-compressor, GPTQModel, AutoRound and ModelOpt write these",
            ),
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [64, 48]},
            (r"weight_block_size: got \[64, 48\]", "a multiple of 32", "null"),
        ),
        ({"quant_method": "compressed-tensors"}, ("config_groups",)),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {
                    "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}
                },
            },
            ("group_0", "unknown quantization nvfp4", "expected"),
        ),
    ],
)
def test_unknown_quantization(directory: Path, quantization: dict[str, Any], words: tuple[str, ...]) -> None:
    (directory / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with fails("config.json", *words):
        Checkpoint.open(directory)


def test_quantized_tensors_without_a_config_group(directory: Path, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "q")
    for name, tensor in ctw.encode("a", quantize_int8(torch.randn(4, 8))).items():
        writer.add(name, tensor)
    writer.close({})
    with fails("a is stored quantized", "does not target"):
        Checkpoint.open(tmp_path / "q").weight("a")


def test_missing_scale_and_wrong_scale_shape(tmp_path: Path) -> None:
    encoded = ctw.encode("a", quantize_int4(torch.randn(4, 64), 32))
    config = ctw.quantization_config({"a": ctw.GroupKey("int4", 32, True)})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file(encoded | {"a.weight_scale": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    with fails("model.safetensors", "a.weight_scale", r"expected shape \[4, 2\]", r"found \[4, 3\]"):
        Checkpoint.open(tmp_path).weight("a")
    save_file({k: v for k, v in encoded.items() if "scale" not in k}, tmp_path / "model.safetensors")
    with fails("a.weight_scale is missing", "a.weight_packed"):
        Checkpoint.open(tmp_path).weight("a")
    save_file(encoded | {"a.weight_scale": torch.full((4, 2), torch.nan)}, tmp_path / "model.safetensors")
    with fails("expected finite scales"):
        Checkpoint.open(tmp_path).weight("a")


def test_not_a_model_directory(tmp_path: Path) -> None:
    with fails("not a directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with fails("config.json", "missing"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with fails("config.json", "not valid JSON"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with fails("neither model.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0abcde")
    with fails("model.safetensors", "not valid JSON"):
        Checkpoint.open(tmp_path)


def test_zero_and_infinite_scales_are_rejected() -> None:
    weight = quantize_int8(torch.randn(4, 8))
    assert weight.scale is not None
    for bad in (0.0, torch.inf, torch.nan):
        weight.scale[1] = bad
        with pytest.raises(ValueError, match="a scale is zero, negative or not finite"):
            ctw.encode("a", weight)


def test_killed_writer_resumes_after_its_last_shard(tmp_path: Path) -> None:
    first = CheckpointWriter(tmp_path)
    first.add("a", torch.arange(4))
    first.flush()
    first.add("b", torch.arange(4))  # never flushed: lost
    again = CheckpointWriter(tmp_path, resume=True)
    assert again.has("a") and not again.has("b")
    with pytest.raises(ValueError, match="written before"):
        again.add("a", torch.arange(4))
    again.add("b", torch.arange(5))
    again.close({"model_type": "deepseek_v3"})
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.tensor("b"), torch.arange(5))
    assert not list(tmp_path.glob("part-*"))
    assert not CheckpointWriter(tmp_path).has("a")


def test_memory_is_released(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    before = checkpoint.weight("a").data
    checkpoint.release()
    assert torch.equal(before, checkpoint.weight("a").data)


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    writer, w = CheckpointWriter(tmp_path), torch.randn(3)
    writer.add("a", w)
    writer.add("b", w)
    writer.close({})
    assert torch.equal(Checkpoint.open(tmp_path).tensor("b"), w)
