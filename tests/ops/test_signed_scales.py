"""INT4 weights with negative group scales, as AutoRound's symmetric format has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing.checkpoint.compressed_tensors import encode
from farthing.ops.api import Norm
from farthing.ops.cpu import CpuOps
from farthing.ops.reference import ReferenceOps
from farthing.ops.specs import MoEWeights, RouterSpec
from farthing.ops.weights import Weight, pack_int4
from tests.isas import ISAS
from tests.ops.models import logits_of, tiny_checkpoint
from tests.ops.parts import BOUNDS, EPS, distance, norm, weight, zero_blocks

pytestmark = [pytest.mark.pairs, pytest.mark.usefixtures("exact_on_amx")]


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(2, isa=request.param)


@pytest.fixture
def ref() -> ReferenceOps:
    return ReferenceOps(torch.float32)


def auto_round(w: Tensor, group: int = 32) -> Weight:
    """W4A16 like AutoRound 0.16 without tuning: the group's value of largest magnitude becomes -8."""
    n, k = w.shape
    groups = w.float().view(n, -1, group)
    low, high = -groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    top = torch.where(high < low, low, -high)
    scale = (top / 8).to(torch.float16).float()
    scale = torch.where(scale < 0, scale.clamp(max=-1e-5), scale.clamp(min=1e-5))
    q = (groups / scale.unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8)
    return Weight("int4", pack_int4(q.view(n, k)), scale)


def signed(w: Weight, signs: Tensor) -> Weight:
    """The same weight with its scales multiplied by signs [N, G]."""
    assert w.scale is not None
    return Weight("int4", w.data, w.scale * signs, w.zero_point)


def random_signs(w: Weight) -> Tensor:
    assert w.scale is not None
    return torch.randint(0, 2, w.scale.shape).float() * 2 - 1


@pytest.mark.parametrize("tokens", [1, 5, 20, 40])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("name", ["int4", "int4_zero"])
@pytest.mark.parametrize("signs", ["negative", "mixed"])
def test_projection(ops: CpuOps, ref: ReferenceOps, tokens: int, group: int, name: str, signs: str) -> None:
    w = weight(name, 50, 384, group)
    assert w.scale is not None
    w = signed(w, -torch.ones_like(w.scale) if signs == "negative" else random_signs(w))
    x = torch.randn(tokens, 384)
    y = ops.linear(x, ops.pack_linear("w", lambda: [w]))
    assert distance(y, ref.linear(x, ref.pack_linear("w", lambda: [w]))) < BOUNDS["int4"]


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_same_bits_as_positive_scales(ops: CpuOps, tokens: int) -> None:
    """(-s) * (-q) and s * q are equal; q = -8 has no counterpart and is excluded."""
    q = torch.randint(-7, 8, (48, 256), dtype=torch.int8)
    scale = torch.rand(48, 4) + 0.01
    signs = torch.randint(0, 2, (48, 4)).float() * 2 - 1
    flipped = (q.view(48, 4, 64) * signs.to(torch.int8).unsqueeze(-1)).view(48, 256)
    x = torch.randn(tokens, 256)
    plain = ops.linear(x, ops.pack_linear("a", lambda: [Weight("int4", pack_int4(q), scale)]))
    same = ops.linear(x, ops.pack_linear("b", lambda: [Weight("int4", pack_int4(flipped), scale * signs)]))
    assert torch.equal(plain, same)


@pytest.mark.usefixtures("sparse_on_amx")
@pytest.mark.parametrize("tokens", [1, 20])
def test_block_sparse(ops: CpuOps, ref: ReferenceOps, tokens: int) -> None:
    w = zero_blocks(weight("int4", 64, 256, 64), 0.7)
    w = signed(w, random_signs(w))
    handle, x = ops.pack_linear("w", lambda: [w]), torch.randn(tokens, 256)
    assert handle.packed.sparse
    assert distance(ops.linear(x, handle), ref.linear(x, ref.pack_linear("w", lambda: [w]))) < BOUNDS["int4"]


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_scales_of_zero_and_of_very_different_sizes(ops: CpuOps, ref: ReferenceOps, tokens: int) -> None:
    w = weight("int4", 48, 256, 32)
    assert w.scale is not None
    factor = torch.tensor([1.0, -1e-3, 0.0, -1.0, 1e-5, -1e2, 0.5, -1e-38])
    w = Weight("int4", w.data, w.scale * factor)
    x = torch.randn(tokens, 256)
    y = ops.linear(x, ops.pack_linear("w", lambda: [w]))
    assert distance(y, ref.linear(x, ref.pack_linear("w", lambda: [w]))) < BOUNDS["int4"]


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_signed_scales_of_other_formats(ops: CpuOps, ref: ReferenceOps, name: str, tokens: int) -> None:
    w = weight(name, 300, 320)
    assert w.scale is not None
    w = Weight(w.format, w.data, w.scale * (torch.randint(0, 2, w.scale.shape) * 2 - 1))
    x = torch.randn(tokens, 320)
    y = ops.linear(x, ops.pack_linear("w", lambda: [w]))
    assert distance(y, ref.linear(x, ref.pack_linear("w", lambda: [w]))) < BOUNDS[name]


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_mixture_of_experts(ops: CpuOps, ref: ReferenceOps, tokens: int) -> None:
    spec = RouterSpec(8, 3, num_groups=4, top_k_groups=2)

    def mlp() -> tuple[Weight, Weight, Weight]:
        return tuple(auto_round(torch.randn(n, k) / k**0.5) for n, k in ((96, 64), (96, 64), (64, 96)))  # type: ignore[return-value]

    parts = [mlp() for _ in range(9)]
    assert all(bool((w.scale < 0).any()) for p in parts for w in p if w.scale is not None)
    w = MoEWeights(
        torch.randn(8, 64) / 8,
        None,
        [lambda p=p: p for p in parts[:8]],
        lambda: parts[8],  # type: ignore[misc]
    )
    x, scale = torch.randn(tokens, 64), norm(64)
    y = ops.moe(x.clone(), ops.pack_moe("m", spec, lambda: w), Norm(scale, EPS))
    z = ref.moe(x, ref.pack_moe("m", spec, lambda: w), Norm(scale, EPS))
    assert distance(y - x, z - x) < 3 * BOUNDS["int4"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_non_finite_scales_are_rejected(name: str, bad: float) -> None:
    w = weight(name, 32, 128)
    assert w.scale is not None
    w.scale.view(-1)[-1] = bad
    with pytest.raises(ValueError, match=r"scale \d+ of \d+ is -?(nan|inf); expected finite scales"):
        CpuOps(1).pack_linear("w", lambda: [w])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "part"), [("q4_1", "minimum"), ("q4_k", "unit"), ("q4_k", "minimum unit"), ("q6_k", "unit")]
)
def test_non_finite_minimums_and_units_are_rejected(name: str, part: str, bad: float) -> None:
    w = weight(name, 32, 512)
    found = w.minimum if part == "minimum" else (w.units or ())[part == "minimum unit"]
    assert found is not None
    found.view(-1)[-1] = bad
    with pytest.raises(ValueError, match=rf"w: {part.split()[-1]} \d+ of \d+ is (nan|inf); expected finite"):
        CpuOps(1).pack_linear("w", lambda: [w])


def same_logits(path: Path) -> None:
    """Check that the CPU backend and the reference compute the same logits of a checkpoint."""

    expected, found = logits_of(path, ReferenceOps(torch.float32)), logits_of(path, CpuOps(2))
    assert bool(found.isfinite().all())
    # int8 activations alone change some expert selections: 0.008 for positive scales.
    assert distance(found, expected) < 0.02


def test_checkpoint_with_experts_in_auto_round_format(tmp_path: Path) -> None:

    path = tiny_checkpoint(tmp_path)

    tensors, out = load_file(path / "model.safetensors"), dict[str, Tensor]()
    for name, t in tensors.items():
        module = name.removesuffix(".weight")
        if t.ndim != 2 or any(s in name for s in ("embed", "lm_head", "mlp.gate.", "kv_a_proj")):
            out[name] = t
            continue
        w = auto_round(t)
        assert w.scale is not None
        encoded = encode(module, Weight("int4", w.data, w.scale.abs()))
        out |= encoded | {f"{module}.weight_scale": w.scale.half()}
    save_file(out, path / "model.safetensors")
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "group_size": 32,
        "strategy": "group",
        "dynamic": False,
    }
    config["quantization_config"] = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}},
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["re:.*kv_a_proj_with_mqa", "model.layers.1.mlp.gate", "lm_head"],
    }
    (path / "config.json").write_text(json.dumps(config))
    same_logits(path)


@pytest.mark.slow
def test_checkpoint_written_by_auto_round(tmp_path: Path) -> None:
    module = pytest.importorskip("auto_round")

    path = tiny_checkpoint(tmp_path / "tiny", tokenizer=True)
    rounded = module.AutoRound(
        str(path), scheme="W4A16", group_size=32, sym=True, iters=0, disable_opt_rtn=True, device_map="cpu"
    )
    rounded.quantize_and_save(str(tmp_path / "out"), format="llm_compressor")
    (written,) = (f.parent for f in (tmp_path / "out").rglob("model.safetensors"))
    same_logits(written)
