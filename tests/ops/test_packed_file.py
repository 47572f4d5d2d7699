"""The packed file: restores packed weights without the checkpoint; damage is reported."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

pytest.importorskip("farthing._native")

from farthing.ops.api import Norm, NotFinite
from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.formats import F32, plan
from farthing.ops.cpu.packed import HEADER, MAGIC, DamagedFile, write_packed
from farthing.ops.specs import AttentionSpec, RouterSpec
from farthing.ops.weights import Weight
from tests.ops.parts import SPECS, experts, weight, zero_blocks
from tests.ops.test_cpu_threads import results


def never() -> None:
    raise AssertionError("the checkpoint was read although the packed file has it")


def test_backend_from_a_file_computes_the_same(tmp_path: Path) -> None:
    packed = CpuOps(2)
    expected = results(packed)
    packed.save_packed(str(tmp_path / "model.packed"))
    for topology in ("", "0;1"):
        mapped = CpuOps(2, packed=str(tmp_path / "model.packed"), topology=topology)
        for a, b in zip(expected, results(mapped), strict=True):
            assert torch.equal(a, b)


def test_failed_write_leaves_no_files(tmp_path: Path) -> None:
    (tmp_path / "model.packed").write_bytes(b"an older one")
    with pytest.raises(AttributeError):
        write_packed(tmp_path / "model.packed", None, [("a", torch.ones(3)), ("b", object())])
    assert [f.name for f in tmp_path.iterdir()] == ["model.packed"]
    assert (tmp_path / "model.packed").read_bytes() == b"an older one"


def test_experts_absent_from_a_rank(tmp_path: Path) -> None:
    """They stay absent; in a whole model's file they would be an error."""
    spec = RouterSpec(8, 3)
    w = experts(spec, "int8", 64, 96, None)
    part = replace(w, experts=[load if e in (1, 4, 7) else None for e, load in enumerate(w.experts)])
    x, norm, packed = torch.randn(5, 64), torch.ones(64), CpuOps(2)
    expected = packed.moe(x.clone(), packed.pack_moe("m", spec, lambda: part), Norm(norm, 1e-6))
    packed.save_packed(str(tmp_path / "rank.packed"))
    mapped = CpuOps(2, packed=str(tmp_path / "rank.packed"))
    assert torch.equal(mapped.moe(x.clone(), mapped.pack_moe("m", spec, never), Norm(norm, 1e-6)), expected)
    del packed._blobs["m.held"]
    packed.save_packed(str(tmp_path / "lacking.packed"))
    with pytest.raises(ValueError, match="the packed file lacks a part of this layer"):
        CpuOps(2, packed=str(tmp_path / "lacking.packed")).pack_moe("m", spec, never)


def test_a_plain_array_is_no_matrix(tmp_path: Path) -> None:
    ops = CpuOps(1)
    ops._keep("norm", torch.ones(64))
    ops.save_packed(str(tmp_path / "m"))
    with pytest.raises(ValueError, match="'norm' is a plain array; expected a matrix"):
        CpuOps(1, packed=str(tmp_path / "m")).pack_linear("norm", never)  # type: ignore[arg-type]


def test_checkpoint_is_not_read(tmp_path: Path) -> None:
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


def test_heads_in_a_format_without_plain_columns_are_rejected(tmp_path: Path) -> None:
    """Attention with expanded keys reads columns of W_UK and W_UV, which 4 bits and their groups have not."""
    path, layout, ops = str(tmp_path / "m"), AttentionSpec(1, 64, 8, 64, 64, 0.2), CpuOps(1)
    rope = torch.ones(2, 8, layout.rope_dim // 2)
    ops._keep("a.norm", torch.ones(64))
    for part in ("uk", "uv"):
        ops._pack(f"a.{part}.0", [weight("int4", 64, 64, 64)])
    ops.save_packed(path)
    with pytest.raises(ValueError, match="W_UK of a head is stored in Q4; expected floats"):
        CpuOps(1, packed=path).pack_attention("a", layout, never, rope)  # type: ignore[arg-type]


@pytest.mark.usefixtures("sparse_on_amx")
def test_sparse_matrices_round_trip(tmp_path: Path) -> None:
    w: Weight = zero_blocks(weight("int4", 64, 256, 64), 0.7)
    ops, x = CpuOps(1), torch.randn(3, 256)
    y = ops.linear(x, ops.pack_linear("w", lambda: [w]))
    ops.save_packed(str(tmp_path / "m"))
    mapped = CpuOps(1, packed=str(tmp_path / "m"))
    handle = mapped.pack_linear("w", never)  # type: ignore[arg-type]
    assert handle.packed.sparse
    assert torch.equal(mapped.linear(x, handle), y)


@pytest.mark.usefixtures("sparse_on_amx")
def test_choice_for_another_instruction_set_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m"
    two_matrices(path)
    CpuOps(1, packed=str(path))
    assert not caplog.records
    CpuOps(1, packed=str(path), isa="portable")
    assert "was chosen for" in caplog.text and "not for portable; for full speed pack" in caplog.text
    caplog.clear()
    ops = CpuOps(1)
    ops.pack_linear("dense", lambda: [weight("int8", 64, 64)])
    ops.save_packed(str(path))
    CpuOps(1, packed=str(path), isa="portable")  # without block-sparse matrices there was no choice
    assert not caplog.records


def test_damage_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with pytest.raises(ValueError, match="does not exist"):
        CpuOps(1, packed=str(path))
    ops = CpuOps(1, "int8")
    ops.pack_linear("w", lambda: [weight("f32", 32, 64)])
    ops.save_packed(str(path))
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="quantization: got 'int4'; expected the packed file's"):
        CpuOps(1, "int4", packed=str(path))
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="cut off"):
        CpuOps(1, packed=str(path))
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match=r"has bytes after its end: \d+ bytes, expected"):
        CpuOps(1, packed=str(path))
    path.write_bytes(b"GGUF" + whole[4:])
    with pytest.raises(ValueError, match="not a packed file"):
        CpuOps(1, packed=str(path))
    path.write_bytes(whole[:4096] + b"\0" * 4 + whole[4100:])
    with pytest.raises(ValueError, match="'w': packed matrix is damaged: it has no header"):
        CpuOps(1, packed=str(path)).pack_linear("w", never)  # type: ignore[arg-type]


def two_matrices(path: Path) -> bytes:
    ops = CpuOps(1)
    w = weight("int8", 64, 64)
    sparse = zero_blocks(weight("int4", 64, 256, 64), 0.7)
    ops.pack_linear("a", lambda: [w])
    ops.pack_linear("b", lambda: [weight("int8", 64, 64)])
    ops.pack_linear("sparse", lambda: [sparse])
    ops.save_packed(str(path))
    return path.read_bytes()


def rewrite_index(path: Path, whole: bytes, change: Callable[[dict[str, Any]], None]) -> None:
    """The same file with another index with a valid checksum."""
    _, offset, length, _ = HEADER.unpack(whole[: HEADER.size])
    index = json.loads(whole[offset : offset + length])
    change(index)
    text = json.dumps(index).encode()
    head = HEADER.pack(MAGIC, offset, len(text), xxhash.xxh3_64_intdigest(text))
    path.write_bytes(head + whole[HEADER.size : offset] + text)


def test_swapped_matrices_are_rejected(tmp_path: Path) -> None:
    def swap(index: dict[str, Any]) -> None:
        e = index["entries"]
        e["a"], e["b"] = e["b"], e["a"]

    path = tmp_path / "m"
    rewrite_index(path, two_matrices(path), swap)
    with pytest.raises(ValueError, match="'a': packed matrix is damaged: it belongs to another name"):
        CpuOps(1, packed=str(path)).pack_linear("a", never)  # type: ignore[arg-type]


def test_changed_index_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "m"
    whole = two_matrices(path)
    path.write_bytes(whole.replace(b'"offset": 4096', b'"offset": 8192'))
    with pytest.raises(ValueError, match="index is damaged"):
        CpuOps(1, packed=str(path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("offset", 2**40), ("offset", -4096), ("offset", 4097), ("bytes", 2**40), ("bytes", -1), ("bytes", 0),
     ("offset", 1.5), ("offset", None), ("checksum", "x"), ("inputs", [0, 1.0]), ("inputs", [4, -1.0]),
     ("inputs", 3), ("dtype", "float99"), ("dtype", "float32")],
)  # fmt: skip
def test_index_entries_out_of_range_are_rejected(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "m"
    rewrite_index(path, two_matrices(path), lambda index: index["entries"]["a"].update({field: value}))
    with pytest.raises(ValueError, match="its index is damaged"):
        CpuOps(1, packed=str(path))


def test_flipped_bits_are_detected(tmp_path: Path) -> None:
    path = tmp_path / "m"
    whole = bytearray(two_matrices(path))
    whole[4096 + 64 + 70] ^= 1  # a weight of the first matrix
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="the checksum of 'a' does not match"):
        CpuOps(1, packed=str(path)).verify_packed()
    ops = CpuOps(1, packed=str(path))  # without --verify: a background thread detects it
    assert ops._file is not None
    for _ in range(200):
        if ops._file.damage:
            break
        time.sleep(0.05)
    with pytest.raises(DamagedFile, match="the checksum of 'a' does not match"):
        ops._file.raise_damage()


def test_damage_stops_models_that_run_op_by_op(tmp_path: Path) -> None:
    ops = CpuOps(1)
    ops.pack_mlp("m", lambda: (weight("f32", 64, 32), weight("f32", 64, 32), weight("f32", 32, 64)))
    ops.save_packed(str(tmp_path / "m"))
    mapped = CpuOps(1, packed=str(tmp_path / "m"))
    assert mapped._file is not None
    handle, x = mapped.pack_mlp("m", never), torch.randn(2, 32)  # type: ignore[arg-type]
    mapped.mlp(x, handle, Norm(torch.ones(32), 1e-6))
    mapped._file.damage = "a checksum does not match"
    with pytest.raises(DamagedFile, match="a checksum does not match"):
        mapped.mlp(x, handle, Norm(torch.ones(32), 1e-6))


def test_damaged_sections_never_crash(tmp_path: Path) -> None:
    """Random bytes in headers, panel tables and masks: an error, or a matrix of the same layout."""
    path, rng = tmp_path / "m", random.Random(7)
    whole = two_matrices(path)
    _, offset, length, _ = HEADER.unpack(whole[: HEADER.size])
    entries = json.loads(whole[offset : offset + length])["entries"]
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        name = rng.choice(["a", "sparse"])
        for _ in range(rng.randint(1, 3)):
            data[entries[name]["offset"] + rng.randrange(192)] = rng.choice([0, 1, 255, rng.randrange(256)])
        path.write_bytes(data)
        ops = CpuOps(1, packed=str(path))
        try:
            handle = ops.pack_linear(name, never)  # type: ignore[arg-type]
        except ValueError:
            refused += 1
            continue
        finally:
            assert ops._file is not None
            ops._file.close()
        ops.linear(torch.randn(3, handle.k), handle)
    assert refused > 100


def test_logits_that_are_not_finite_are_an_error() -> None:
    ops = CpuOps(2)
    w = torch.randn(1100, 64)
    w[700, 3] = float("nan")
    head = ops.pack_linear("h", lambda: [Weight("dense", w)])
    for k in (1, 5):
        with pytest.raises(NotFinite, match="weights are broken"):
            ops.top_logits(torch.randn(3, 64), head, Norm(torch.ones(64), 1e-6), k)
    with pytest.raises(NotFinite, match="weights are broken"):
        ops.greedy(torch.full((2, 64), float("nan")), head, Norm(torch.ones(64), 1e-6))


@pytest.mark.parametrize("exact", [0, 1])
def test_stacked_matrices_are_float32_unless_all_are_bfloat16(exact: int) -> None:
    weights = [Weight("dense", torch.full((16, 32), 1 + (i != exact) * 2**-12)) for i in range(2)]
    assert [plan([w], None).format.name for w in weights] == ["BF16", "F32"][:: 1 - 2 * exact]
    assert plan(weights, None) == F32


@pytest.mark.parametrize(("heads", "divided"), [(3, False), (4, True)])
def test_output_projection_is_summed_in_halves_of_whole_heads(heads: int, divided: bool) -> None:
    ops = CpuOps(1, parts=2)
    packed = ops.pack_linear("o", lambda: [weight("f32", 32, heads * 32)], heads)
    assert (packed.rest is not None) == divided
    assert set(dict(ops.packed_weights())) == ({"o.part0", "o.part1"} if divided else {"o"})


@pytest.mark.parametrize("rounded", [False, True])
def test_heads_of_a_rounded_projection_are_8_bit(rounded: bool) -> None:
    """A slice of a quantized projection that splits its scales is dense, but no less rounded."""
    spec, ops = SPECS["small"], CpuOps(1)
    kv_b = replace(
        weight("f32", spec.num_heads * (spec.nope_dim + spec.value_dim), spec.latent_dim), rounded=rounded
    )
    ops.pack_attention(
        "a", spec, lambda: (kv_b, torch.ones(spec.latent_dim)), torch.zeros(2, 8, spec.rope_dim // 2)
    )
    formats = {w.format.name for name, w in ops.packed_weights() if ".u" in name}
    assert formats == {"Q8" if rounded else "F32"}
