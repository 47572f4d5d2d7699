"""The packed file: what comes back is what was packed, without the checkpoint; damage is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("farthing._native")

from farthing.ops.api import RouterSpec
from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.packed_file import write_packed
from farthing.ops.weights import Weight
from tests.ops.parts import weight
from tests.ops.test_cpu import SPECS, experts, zero_blocks
from tests.ops.test_cpu_threads import results


def never() -> None:
    raise AssertionError("the checkpoint was read although the packed file has it")


def test_a_backend_from_a_file_computes_the_same(tmp_path: Path) -> None:
    packed = CpuOps(2)
    expected = results(packed)
    packed.save_packed(str(tmp_path / "model.packed"))
    for topology in ("", "0;1"):
        mapped = CpuOps(2, packed=str(tmp_path / "model.packed"), topology=topology)
        for a, b in zip(expected, results(mapped), strict=True):
            assert torch.equal(a, b)


def test_what_could_not_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "model.packed").write_bytes(b"an older one")
    with pytest.raises(AttributeError):
        write_packed(tmp_path / "model.packed", None, [("a", torch.ones(3)), ("b", object())])
    assert [f.name for f in tmp_path.iterdir()] == ["model.packed"]
    assert (tmp_path / "model.packed").read_bytes() == b"an older one"


def test_experts_that_a_rank_did_not_hold(tmp_path: Path) -> None:
    """They are absent again; of a whole model's file they would be missing."""
    spec = RouterSpec(8, 3)
    w = experts(spec, "int8", 64, 96, None)
    part = replace(w, experts=[load if e in (1, 4, 7) else None for e, load in enumerate(w.experts)])
    x, norm, packed = torch.randn(5, 64), torch.ones(64), CpuOps(2)
    expected = packed.moe(x.clone(), packed.pack_moe("m", spec, lambda: part), norm, 1e-6)
    packed.save_packed(str(tmp_path / "rank.packed"))
    mapped = CpuOps(2, packed=str(tmp_path / "rank.packed"))
    assert torch.equal(mapped.moe(x.clone(), mapped.pack_moe("m", spec, never), norm, 1e-6), expected)
    del packed._blobs["m.held"]
    packed.save_packed(str(tmp_path / "lacking.packed"))
    with pytest.raises(ValueError, match="the packed file lacks a part of this layer"):
        CpuOps(2, packed=str(tmp_path / "lacking.packed")).pack_moe("m", spec, never)


def test_the_checkpoint_is_not_read(tmp_path: Path) -> None:
    path, spec, layout = str(tmp_path / "m"), RouterSpec(8, 2), SPECS["small"]
    rope = torch.ones(2, 8, layout.rope_dim // 2)
    rows = layout.num_heads * (layout.nope_dim + layout.value_dim)
    ops = CpuOps(1, "int4")
    ops.pack_linear("l", lambda: [weight("f32", 32, 64)])
    ops.pack_mlp("mlp", lambda: (weight("f32", 64, 32), weight("f32", 64, 32), weight("f32", 32, 64)))
    ops.pack_moe("moe", spec, lambda: experts(spec, "f32", 64, 64, 64))
    ops.pack_attention("a", layout, lambda: (weight("bf16", rows, layout.latent_dim), torch.ones(32)), rope)
    ops.save_packed(path)
    mapped = CpuOps(1, packed=path)
    assert mapped.pack_linear("l", never).n == 32  # type: ignore[arg-type]
    mapped.pack_mlp("mlp", never)  # type: ignore[arg-type]
    mapped.pack_moe("moe", spec, never)  # type: ignore[arg-type]
    mapped.pack_attention("a", layout, never, rope)  # type: ignore[arg-type]


def test_sparse_matrices_survive(tmp_path: Path) -> None:
    w: Weight = zero_blocks(weight("int4", 64, 256, 64), 0.7)
    ops, x = CpuOps(1), torch.randn(3, 256)
    y = ops.linear(x, ops.pack_linear("w", lambda: [w]))
    ops.save_packed(str(tmp_path / "m"))
    mapped = CpuOps(1, packed=str(tmp_path / "m"))
    handle = mapped.pack_linear("w", never)  # type: ignore[arg-type]
    assert handle.packed.sparse
    assert torch.equal(mapped.linear(x, handle), y)


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with pytest.raises(ValueError, match="does not exist"):
        CpuOps(1, packed=str(path))
    ops = CpuOps(1, "int8")
    ops.pack_linear("w", lambda: [weight("f32", 32, 64)])
    ops.save_packed(str(path))
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="quantization 'int4' is not what"):
        CpuOps(1, "int4", packed=str(path))
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="cut off"):
        CpuOps(1, packed=str(path))
    path.write_bytes(b"GGUF" + whole[4:])
    with pytest.raises(ValueError, match="not a packed file"):
        CpuOps(1, packed=str(path))
    path.write_bytes(whole[:4096] + b"\0" * 4 + whole[4100:])
    with pytest.raises(ValueError, match="damaged or of another version"):
        CpuOps(1, packed=str(path)).pack_linear("w", never)  # type: ignore[arg-type]
