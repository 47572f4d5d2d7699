"""The torch backend, eager and compiled, against the reference with odd shapes, and whole models."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farthing.config import EngineConfig
from farthing.model.load import load
from farthing.ops.api import CacheDtype, Norm, Place
from farthing.ops.reference import ReferenceOps
from farthing.ops.select import select
from farthing.ops.specs import AttentionSpec
from farthing.ops.torch_backend import TorchOps, create
from farthing.ops.torch_util import make_batch
from tests.ops.models import logits_of, tiny_checkpoint
from tests.ops.parts import EPS, ROUTERS, SPECS, batch_of, distance, experts, norm, weight

pytestmark = pytest.mark.pairs

CPU = torch.device("cpu")


@pytest.fixture
def ops() -> TorchOps:
    torch.manual_seed(0)
    return TorchOps(CPU, torch.float32)


@pytest.fixture
def ref() -> ReferenceOps:
    return ReferenceOps(torch.float32)


@pytest.mark.parametrize("name", ["f32", "int4", "fp8"])
def test_linear_and_mlp(ops: TorchOps, ref: ReferenceOps, name: str) -> None:
    x, scale = torch.randn(5, 64), norm(64)
    w = weight(name, 48, 64)
    y = ops.linear(x, ops.pack_linear("w", lambda: [w]), Norm(scale, EPS))
    assert distance(y, ref.linear(x, ref.pack_linear("w", lambda: [w]), Norm(scale, EPS))) < 1e-10
    parts = weight(name, 96, 64), weight(name, 96, 64), weight(name, 64, 96)
    y = ops.mlp(x, ops.pack_mlp("m", lambda: parts), Norm(scale, EPS))
    assert distance(y, ref.mlp(x, ref.pack_mlp("m", lambda: parts), Norm(scale, EPS))) < 1e-10


@pytest.mark.parametrize("name", ["f32", "bf16", "int8", "int4", "fp8"])
def test_rows_of_a_table_are_those_of_its_weight(ops: TorchOps, ref: ReferenceOps, name: str) -> None:
    table, ids = weight(name, 48, 64), torch.tensor([0, 47, 7, 7])
    for each in (ops, ref, select("cpu", torch.float32, 1)):
        found = each.embed(ids, each.pack_table("t", lambda: table))
        # Kernels have scales of 4 bits in half precision.
        torch.testing.assert_close(found.float(), table.dequantize()[ids].float(), rtol=2**-10, atol=0.0)


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize("tokens", [1, 2, 16, 70])
def test_moe(ops: TorchOps, ref: ReferenceOps, router: str, tokens: int) -> None:
    spec = ROUTERS[router]
    w = experts(spec, "f32", 64, 48, shared=32)
    x, scale = torch.randn(tokens, 64), norm(64)
    counts, expected = (torch.zeros(spec.num_experts, dtype=torch.int64) for _ in range(2))
    y = ops.moe(x, ops.pack_moe("m", spec, lambda: w), Norm(scale, EPS), counts)
    z = ref.moe(x, ref.pack_moe("m", spec, lambda: w), Norm(scale, EPS), expected)
    assert distance(y, z) < 1e-10
    assert torch.equal(counts, expected)


def attention(
    ops: ReferenceOps, spec: AttentionSpec, dtype: CacheDtype, lengths: list[tuple[int, int]], chosen: bool
) -> Tensor:
    """Fill a cache with each sequence's past, then compute the new tokens."""
    torch.manual_seed(2)
    w = weight("f32", spec.num_heads * (spec.nope_dim + spec.value_dim), spec.latent_dim)
    angles = torch.rand(200, spec.rope_dim // 2)
    rope = torch.stack((angles.cos(), angles.sin()))
    handle = ops.pack_attention("a", spec, lambda: (w, norm(spec.latent_dim)), rope)
    width = spec.latent_dim + spec.rope_dim
    batch = batch_of(lengths, 8, 200)
    cache = ops.new_cache(2, int(batch.block_table.max()) + 1, 8, width, dtype)
    values = torch.randn(*cache.data.shape)
    cache.data.copy_((values * 20).to(cache.data.dtype) if cache.scale is not None else values)
    tokens = batch.positions.shape[0]
    q = torch.randn(tokens, spec.num_heads * (spec.nope_dim + spec.rope_dim))
    picked = None
    if chosen:
        picked = torch.full((tokens, 4), -1, dtype=torch.int32)
        for t, position in enumerate(batch.positions.tolist()):
            some = torch.randperm(position + 1)[: 1 + t % 4].sort().values.int()
            picked[t, : len(some)] = some
    return ops.mla(q, torch.randn(tokens, width), handle, Place(cache, 1, batch), picked)


@pytest.mark.parametrize("spec", list(SPECS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8", "int8"])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [
        [(0, 1)],
        [(5, 1), (30, 1), (0, 1)],
        [(3, 7), (9, 1), (17, 1), (0, 12), (40, 1)],
        [(0, 180), (12, 175)],
    ],
)
def test_mla(
    ops: TorchOps,
    ref: ReferenceOps,
    spec: str,
    dtype: CacheDtype,
    chosen: bool,
    lengths: list[tuple[int, int]],
) -> None:
    y, z = (attention(o, SPECS[spec], dtype, lengths, chosen) for o in (ops, ref))
    assert distance(y, z) < 1e-9


def test_model_equals_the_reference(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    expected = logits_of(path, select("reference"))
    assert distance(logits_of(path, select("torch/cpu")), expected) < 1e-10


class Decoding:
    """One sequence, decoded token by token from given ids."""

    def __init__(self, path: Path, ops: ReferenceOps, dtype: CacheDtype = "float32") -> None:
        self.model = load(path, ops)
        self.cache = self.model.new_cache(8, 16, dtype)
        self.counts = torch.zeros(self.model.cache_layers, 8, dtype=torch.int64)
        self.length = 0

    def __call__(self, token: int) -> Tensor:
        batch = make_batch([1], [self.length], [list(range(8))], 16)
        self.length += 1
        with torch.inference_mode():
            hidden = self.model.forward(torch.tensor([token]), batch, self.cache, self.counts)
            return self.model.logits(hidden)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_compiled_steps_equal_the_reference_without_recompiling(
    tmp_path: Path, ops: TorchOps, caplog: pytest.LogCaptureFixture, dtype: CacheDtype
) -> None:
    path = tiny_checkpoint(tmp_path)
    ops.compile_after = 3
    ours, theirs = Decoding(path, ops, dtype), Decoding(path, ReferenceOps(torch.float32), dtype)
    tokens = torch.randint(0, 96, (60,), generator=torch.Generator().manual_seed(4)).tolist()
    with caplog.at_level(logging.INFO):
        for token in tokens[:5]:
            assert distance(ours(token), theirs(token)) < 1e-9
        assert ops.compiling is not None
        ops.compiling.join()
    if "torch.compile does not work" in caplog.text:
        pytest.skip(caplog.text)
    assert ours.model.stack.compiled is not None
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for token in tokens[5:]:
        assert distance(ours(token), theirs(token)) < 1e-9
    assert graphs > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert torch.equal(ours.counts, theirs.counts)


def test_steps_stay_eager_where_torch_compile_fails(
    tmp_path: Path, ops: TorchOps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    path = tiny_checkpoint(tmp_path)
    ops.compile_after = 1
    ours, theirs = Decoding(path, ops), Decoding(path, ReferenceOps(torch.float32))
    with caplog.at_level(logging.WARNING):
        for token in range(4):
            assert distance(ours(token), theirs(token)) < 1e-10
            if ops.compiling is not None:
                ops.compiling.join()
    assert "torch.compile does not work on cpu: no C++ compiler" in caplog.messages


def test_compilation_can_be_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TorchOps(CPU, torch.float32).compile_after is not None
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert TorchOps(CPU, torch.float32).compile_after is None


def test_device_that_torch_cannot_use_is_named() -> None:
    for device in ("nonsense", "meta"):
        with pytest.raises(ValueError, match=rf"^device: got '{device}'; expected cpu"):
            select(f"torch/{device}")


def test_packed_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^packed: got 'model.packed' with backend 'torch'; expected None"):
        create(None, None, None, "model.packed")


def test_threads_are_those_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", said.append)
    for threads in (3, None):
        create(None, threads, None, None, "cpu")
    assert said == [3]


def test_device_needs_the_torch_backend() -> None:
    assert EngineConfig(backend="torch", device="xpu").ops == "torch/xpu"
    assert EngineConfig(backend="torch").ops == "torch"
    assert EngineConfig(backend="torch", tensor_parallel_size=2).ops == "torch/cpu"
    assert EngineConfig(backend="cpu/avx2").ops == "cpu/avx2"
    with pytest.raises(ValueError, match=r"^device: got 'xpu' with backend 'auto'; expected None"):
        EngineConfig(device="xpu")
    with pytest.raises(ValueError, match=r"^device: got 'xpu' with 2 ranks; expected 'cpu'"):
        EngineConfig(backend="torch", device="xpu", tensor_parallel_size=2)


def test_auto_selects_torch_where_no_kernels_are_built(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = sys.modules["farthing.ops.select"]
    monkeypatch.setattr(module, "_native", lambda: False)
    monkeypatch.setattr(module, "_device", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert select("auto").name == "torch/cpu float32"
    assert "serving with the slower torch ops" in caplog.text
