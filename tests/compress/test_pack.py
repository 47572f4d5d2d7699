"""`--pack`: the CPU kernels' packed file serves the compressed model without zero blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from farthing.cli.compress import app
from farthing.compress.evaluate import paged_batch
from farthing.compress.size import zero_block_bytes
from farthing.model.load import load
from farthing.ops.select import select
from farthing.ops.weights import NEVER

pytest.importorskip("farthing._native")

RECIPE = """
base: int4-block16-40
prune: {pattern: 16x16, sparsity: 0.5, scope: matrix}
"""


def logits(path: Path, packed: Path | None) -> tuple[torch.Tensor, dict[str, object]]:
    model = load(path, select("cpu", packed=None if packed is None else str(packed)))
    ids = torch.arange(2, 50)
    batch, blocks = paged_batch([len(ids)])
    cache = model.new_cache(blocks, 16, "bfloat16")
    return model.logits(model.forward(ids, batch, cache)).clone(), model.ops._blobs  # type: ignore[attr-defined]


@pytest.mark.usefixtures("sparse_on_amx", "exact_on_amx")
def test_block_sparse_weights_survive_packing_and_are_served(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    files = ["--calibration", str(data), "--data", str(data), "--no-timing", "--json", "--pack"]
    result = CliRunner().invoke(
        app, [str(model_dir), "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(out), *files]
    )
    assert result.exit_code == 0, result.output
    assert all(0.45 < m["sparsity"] < 0.6 for m in json.loads((out / "report.json").read_text())["modules"]
               if ".experts." in m["module"])  # fmt: skip
    expected, built = logits(out, None)
    actual, mapped = logits(out, out / "packed.bin")
    assert torch.equal(actual, expected)
    experts = [n for n in built if ".experts." in n]
    assert experts and set(built) == set(mapped)
    for name in experts:
        assert built[name].sparse and mapped[name].sparse  # type: ignore[attr-defined]
    assert not mapped["model.layers.0.self_attn.o_proj"].sparse  # type: ignore[attr-defined]
    monkeypatch.setattr("farthing.ops.cpu.formats.costs_of", lambda kind, isa: NEVER)
    dense, packed = logits(out, None)
    assert not any(packed[n].sparse for n in experts)  # type: ignore[attr-defined]
    assert float((actual - dense).norm() / dense.norm()) < 1e-4


@pytest.mark.usefixtures("sparse_on_amx")
def test_packed_size_decreases_with_the_blocks() -> None:
    from farthing.ops.cpu.formats import PackedFormat, Plan, pack
    from farthing.ops.weights import Weight, quantize_int4

    native = select("cpu")._native  # type: ignore[attr-defined]
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    keep = (torch.rand(16, 32, generator=torch.Generator().manual_seed(1)) > 0.4).float()
    sparse = w * keep.repeat_interleave(16, 0).repeat_interleave(16, 1)
    dense_bytes, sparse_bytes = (
        pack(native, [quantize_int4(x)], Plan(PackedFormat.Q4, 64)).serialized_bytes for x in (w, sparse)
    )
    counted = zero_block_bytes(quantize_int4(sparse), sparse != 0)
    assert dense_bytes - sparse_bytes == pytest.approx(counted, rel=0.1)
    few = keep.clone().fill_(1.0)
    few[0, :8] = 0  # two of 128 cells: the kernels keep them
    mask = few.repeat_interleave(16, 0).repeat_interleave(16, 1) != 0
    assert zero_block_bytes(quantize_int4(w * mask), mask) == 0
    assert zero_block_bytes(Weight("dense", sparse), sparse != 0) == 0
