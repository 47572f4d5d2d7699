"""GPTQ, AWQ and AutoRound: files written here by the rules of their packing, and by the tools themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.shards import CheckpointError
from farthing.planner.footprint import stored_by_config
from tests.checkpoint.sizes import QWEN3_MOE

MODULE = "model.layers.0.mlp.down_proj"
N, K = 32, 128


def in_words(values: NDArray[np.int64], bits: int, axis: int) -> Tensor:
    """Integers along an axis as a stream of bits in 32-bit words, lowest first; those below 0 borrow."""
    rows = []
    for row in np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis]):
        whole = sum(int(v) << bits * i for i, v in enumerate(row)) % (1 << bits * len(row))
        rows.append([whole >> 32 * i & 0xFFFFFFFF for i in range(bits * len(row) // 32)])
    words = torch.tensor(np.array(rows, np.uint32).view(np.int32))
    return words.t().contiguous() if axis == 0 else words


def integers(bits: int, group: int, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """u [N, K], scales [N, G] float16 and zero points [N, G]."""
    g = torch.Generator().manual_seed(bits)
    u = torch.randint(0, 1 << bits, (N, K), generator=g)
    scale = (torch.rand(N, -(-K // group), generator=g) - 0.3).half()
    zero = torch.randint(0, 1 << bits, scale.shape, generator=g)
    return u, scale, torch.full_like(zero, 1 << bits - 1) if symmetric else zero


def opened(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Checkpoint:
    save_file({f"{MODULE}.{k}": v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    raw = QWEN3_MOE | {"quantization_config": config}
    (path / "config.json").write_text(json.dumps(raw))
    return Checkpoint.open(path)


def values(u: Tensor, scale: Tensor, zero: Tensor, order: Tensor) -> Tensor:
    return (u.float() - zero.float()[:, order]) * scale.float()[:, order]


def gptq_files(
    bits: int, group: int, symmetric: bool, less: int, order: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    u, scale, zero = integers(bits, group, symmetric)
    order = torch.arange(K) // group if order is None else order
    tensors = {
        "qweight": in_words(u.numpy().T, bits, 0),
        "qzeros": in_words(zero.numpy().T - less, bits, 1),
        "scales": scale.t(),
        "g_idx": order.int(),
    }
    return tensors, values(u, scale, zero, order)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group", [32, 128])
def test_gptq(tmp_path: Path, bits: int, symmetric: bool, version: str, group: int) -> None:
    tensors, expected = gptq_files(bits, group, symmetric, version == "gptq")
    if bits == 3 and version == "gptq":  # each number by itself: words of 3 bits are no unit of subtraction
        zero = integers(bits, group, symmetric)[2].numpy().T - 1 & 7
        tensors["qzeros"] = in_words(zero, bits, 1)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": False}
    checkpoint = opened(tmp_path, tensors, config | {"checkpoint_format": version})
    weight = checkpoint.weight(MODULE, (N, K))
    assert weight.format == ("int8_groups" if bits == 8 else "int4")
    assert torch.equal(weight.dequantize(), expected)
    assert (weight.zero_point is None) == symmetric
    assert checkpoint.stored_as(MODULE) == (weight.format, (N, K))
    checkpoint.finish()
    planned = stored_by_config(checkpoint.config)("model.layers.2.mlp.experts.0.up_proj.weight")
    assert (planned.kind, planned.group, planned.zero) == (weight.format, group, not symmetric)


def test_a_scale_for_a_whole_row(tmp_path: Path) -> None:
    tensors, expected = gptq_files(4, K, True, 1)
    config = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True}
    assert torch.equal(opened(tmp_path, tensors, config).weight(MODULE).dequantize(), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 48])
def test_groups_of_columns_that_are_not_adjacent(
    tmp_path: Path, bits: int, symmetric: bool, group: int
) -> None:
    """Act-order: the stored columns are sorted by group; the last group may have fewer."""
    order = (torch.arange(K) // group)[torch.randperm(K, generator=torch.Generator().manual_seed(0))]
    tensors, expected = gptq_files(bits, group, symmetric, 0, order)
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": True,
        "checkpoint_format": "gptq_v2",
    }  # fmt: skip
    checkpoint = opened(tmp_path, tensors, config)
    weight = checkpoint.weight(MODULE)
    assert torch.equal(weight.dequantize(), expected)
    assert weight.format == checkpoint.stored_as(MODULE)[0] == ("int8_groups" if bits == 8 else "int4")
    assert weight.order is not None and bool((order[weight.order].diff() >= 0).all())


@pytest.mark.parametrize(
    ("column", "found"), [(4, "a group outside 0 to 3"), (1, r"groups of \[31, 33, 32, 32\] columns")]
)
def test_groups_that_no_tool_writes(tmp_path: Path, column: int, found: str) -> None:
    order = torch.arange(K) // 32
    order[0] = column
    tensors, _ = gptq_files(4, 32, True, 1, order.clamp_max(3))
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}
    with pytest.raises(CheckpointError, match=f"g_idx: found {found}"):
        opened(tmp_path, tensors | {"g_idx": order.int()}, config).weight(MODULE)


def test_gptq_with_fields_of_modules(tmp_path: Path) -> None:
    tensors, expected = gptq_files(8, 64, True, 1)
    config = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True,
        "dynamic": {r"-:.*q_proj": {}, r"+:.*down_proj": {"bits": 8, "group_size": 64}},
    }  # fmt: skip
    checkpoint = opened(tmp_path, tensors | {"bias": torch.zeros(N)}, config)
    assert torch.equal(checkpoint.weight(MODULE).dequantize(), expected)
    checkpoint.finish()
    planned = stored_by_config(checkpoint.config)
    kinds = [planned(f"model.layers.0.{m}.weight").kind for m in ("self_attn.q_proj", "mlp.up_proj")]
    assert kinds == ["bfloat16", "int4"]


AWQ = [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("order", ["gemm", "gemv"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq(tmp_path: Path, order: str, group: int) -> None:
    u, scale, zero = integers(4, group, False)
    if order == "gemm":
        mixed = [8 * w + i for w in range(N // 8) for i in AWQ]
        tensors = {
            "qweight": in_words(u.numpy().T[:, mixed], 4, 1),
            "qzeros": in_words(zero.numpy().T[:, mixed], 4, 1),
            "scales": scale.t(),
        }
    else:
        more = torch.nn.functional.pad(zero, (0, 8 - zero.shape[1]))
        tensors = {
            "qweight": in_words(u.numpy(), 4, 1),
            "qzeros": in_words(more.numpy(), 4, 1),
            "scales": torch.nn.functional.pad(scale, (0, 8 - scale.shape[1])),
        }
    config = {
        "quant_method": "awq", "bits": 4, "group_size": group, "version": order, "zero_point": True,
        "modules_to_not_convert": ["mlp.gate"],
    }  # fmt: skip
    checkpoint = opened(tmp_path, tensors, config)
    weight = checkpoint.weight(MODULE, (N, K))
    assert weight.format == "int4"
    assert torch.equal(weight.dequantize(), values(u, scale, zero, torch.arange(K) // group))
    checkpoint.finish()


@pytest.mark.parametrize(
    ("packing", "less"), [("auto_round:auto_gptq", 1), ("auto_round", 0), ("auto_round:gptqmodel", 0)]
)
def test_auto_round(tmp_path: Path, packing: str, less: int) -> None:
    tensors, expected = gptq_files(2, 32, False, less)
    config = {
        "quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 64, "sym": True,
        "data_type": "int", "extra_config": {
            MODULE: {"bits": 2, "group_size": 32, "sym": False},
            r".*\.layers\.1\..*": {"bits": 16, "data_type": "float"},
        },
    }  # fmt: skip
    checkpoint = opened(tmp_path, tensors, config)
    assert torch.equal(checkpoint.weight(MODULE).dequantize(), expected)
    planned = stored_by_config(checkpoint.config)
    assert planned("model.layers.1.mlp.up_proj.weight").kind == "bfloat16"
    assert planned("model.layers.0.mlp.up_proj.weight").kind == "int4"


def test_fp8_blocks_of_auto_round(tmp_path: Path) -> None:
    """Its FP8_BLOCK: a list as the size of groups, and scales in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn((256, 128), generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand((2, 1), generator=generator).bfloat16()
    config = {
        "quant_method": "auto-round", "bits": 8, "data_type": "fp", "fmt": "e4m3", "group_size": [128, 128],
        "packing_format": "auto_round:fp8", "weight_block_size": [128, 128], "act_bits": 8,
    }  # fmt: skip
    weight = opened(tmp_path, {"weight": data, "weight_scale_inv": scale}, config).weight(MODULE)
    assert torch.equal(weight.dequantize(), data.float() * scale.float().repeat_interleave(128, 0))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "bits: got 5; expected 2, 3, 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size: got 0; expected -1 or 1 to"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
            "checkpoint_format: got 'marlin'; expected gptq or gptq_v2",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:(": {}}},
            "not a valid pattern",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv_fast"},
            "version: got 'gemv_fast'; expected gemm or gemv",
        ),
        (
            {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_int"},
            "got data_type 'mx_int' with 4 bits in groups of 32; expected int",
        ),
        (
            {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "marlin"},
            "packing_format: got 'marlin'; expected auto",
        ),
        (
            {"quant_method": "auto-round", "bits": 4, "group_size": 32, "rotation_config": {"a": 1}},
            "rotates activations",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path, {"weight": torch.ones(2, 2)}, config)
    assert words in str(error.value)


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    tensors, _ = gptq_files(4, 32, True, 1)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
    with pytest.raises(CheckpointError, match=r"down_proj.scales: expected shape \[32, 2\], found \[32, 4\]"):
        opened(tmp_path, tensors, config).weight(MODULE)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_files_of_gptqmodel(tmp_path: Path, bits: int, symmetric: bool) -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    _, scale, zero = integers(bits, 32, symmetric)
    linear = torch.nn.Linear(K, N, bias=False).half()
    own = TorchLinear(
        bits=bits, group_size=32, sym=symmetric, desc_act=False, in_features=K, out_features=N, bias=False,
        pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    own.pack_block(linear, scale.abs().float(), zero.float(), g_idx=(torch.arange(K) // 32).int())
    own.post_init()
    theirs = own.dequantize_weight().t()
    tensors = {k: v for k, v in own.state_dict().items() if k in ("qweight", "qzeros", "scales", "g_idx")}
    config = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": bits, "group_size": 32}
    weight = opened(tmp_path, tensors, config | {"sym": symmetric}).weight(MODULE)
    assert torch.equal(weight.dequantize().half(), theirs.half())


@pytest.mark.slow
@pytest.mark.parametrize("order", ["gemm", "gemv"])
def test_files_of_autoawq(tmp_path: Path, order: str) -> None:
    pytest.importorskip("awq")
    from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV
    from awq.utils.packing_utils import dequantize_gemm

    u, scale, zero = integers(4, 32, False)
    scale = scale.abs() + 0.01
    expected = values(u, scale, zero, torch.arange(K) // 32).half()
    linear = torch.nn.Linear(K, N, bias=False).half()
    linear.weight.data = expected
    if order == "gemm":
        own = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scale.t(), zeros=zero.t())
        theirs = dequantize_gemm(own.qweight, own.qzeros, own.scales, 4, 32).t()
        assert torch.equal(theirs, expected)
    else:
        own = WQLinear_GEMV.from_linear(linear, 4, 32, scales=scale, zeros=zero)
    tensors = {k: getattr(own, k) for k in ("qweight", "qzeros", "scales")}
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": order, "zero_point": True}
    weight = opened(tmp_path, tensors, config).weight(MODULE)
    assert torch.equal(weight.dequantize().half(), expected)
