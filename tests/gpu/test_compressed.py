"""A window and a compressed past: what is cached and what attention returns, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from farthing.model.deepseek_v4 import new_past
from farthing.ops.api import CacheDtype, IndexCache, LatentCache, OpenCache, Ops, Place
from farthing.ops.reference import ReferenceOps
from farthing.ops.selection import sequences_of
from farthing.ops.specs import CompressedParts, CompressedSpec, IndexerSpec, PoolParts
from farthing.ops.torch_util import make_batch
from farthing_gpu import GpuOps, attention
from farthing_gpu.compressed import write
from farthing_gpu.launch import Config
from tests.gpu.parts import DEVICE, norm
from tests.gpu.test_attention import CACHES, moved
from tests.ops.parts import distance

Steps = list[list[tuple[int, int]]]  # per step: (sequence, tokens)
TABLES = [[5, 0, 9, 2, 11, 7], [1, 8, 3, 10, 6, 4]]
SLOTS = [2, 0]


@dataclass(frozen=True)
class Case:
    """A layer, and the inputs of two sequences."""

    spec: CompressedSpec
    block: int  # tokens in a block
    parts: CompressedParts
    rope: Tensor
    inputs: list[tuple[Tensor, Tensor, Tensor | None]]  # q, x and index_q of a sequence

    @classmethod
    def random(cls, spec: CompressedSpec, block: int, lengths: list[int], seed: int = 0) -> Case:
        torch.manual_seed(seed)
        h, d, index = spec.num_heads, spec.head_dim, spec.index
        dims = (d,) if index is None else (d, index.head_dim)
        pools = tuple(
            PoolParts(torch.randn(spec.rate, width), norm(dim))
            for width, dim in zip(spec.pooled, dims, strict=False)
        )
        angles = torch.rand(2 * max(lengths), spec.rope_dim // 2) * 6
        columns = d + 2 * sum(spec.pooled) + (0 if index is None else index.num_heads)
        return cls(
            spec,
            block,
            CompressedParts(norm(d), torch.randn(h), pools),
            torch.stack((angles.cos(), angles.sin())),
            [
                (
                    torch.randn(n, h * d),
                    torch.randn(n, columns + 3)[:, 3:],
                    None if index is None else torch.randn(n, index.num_heads * index.head_dim),
                )
                for n in lengths
            ],
        )

    def cache(self, ops: Ops, dtype: CacheDtype) -> LatentCache:
        """Of two layers, with slots that held another sequence."""
        s, blocks = self.spec, len(TABLES[0]) * len(TABLES)
        cache = ops.new_cache(0, blocks, self.block, s.head_dim, dtype)
        own = cache.windows[s.window] = ops.new_cache(0, blocks, self.block, s.head_dim, dtype)
        shape = (blocks, self.block // s.rate) if s.rate else (0, 0)
        past, own.entries[s.rate] = new_past(ops, 2, shape, (blocks, self.block), s.head_dim, dtype)
        if s.rate:
            cache.entries[s.rate] = past
            cache.open = OpenCache({s.rate: ops.zeros("float32", 2, 3, s.open_tokens, 2 * sum(s.pooled))})
            cache.open.rows[s.rate] += torch.nan
        if s.index is not None:
            cache.index = IndexCache.new(ops, past, 2, s.index.head_dim)
        return cache

    def run(
        self, ops: Any, steps: Steps, dtype: CacheDtype, attends: bool = True
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Output per sequence, and what the layer has cached at the end."""
        heads = ops.pack_compressed("", self.spec, lambda: self.parts, self.rope)
        cache, at = self.cache(ops, dtype), [0, 0]
        found: list[list[Tensor]] = [[], []]
        for step in steps:
            which, new = [b for b, _ in step], [n for _, n in step]
            batch = make_batch(
                new, [at[b] for b in which], [TABLES[b] for b in which], self.block, [SLOTS[b] for b in which]
            )
            batch = moved(batch) if ops.device.type == "cuda" else batch
            q, x, index_q = (
                None
                if each[0] is None
                else torch.cat([e[at[b] : at[b] + n] for e, (b, n) in zip(each, step, strict=True)])
                for each in zip(*(self.inputs[b] for b in which), strict=True)
            )
            here = [None if e is None else e.to(ops.device, ops.dtype) for e in (q, x, index_q)]
            place = Place(cache, 1, batch)
            if attends:
                y = ops.compressed(*here, heads, place).cpu()
                for b, part in zip(which, y.split(new), strict=True):
                    found[b].append(part)
            else:
                write(here[1], heads, place, sequences_of(batch).to(torch.int32))
            for b, n in step:
                at[b] += n
        return [torch.cat(f) for f in found if f], dict(self.kept(cache, at))

    def kept(self, cache: LatentCache, lengths: list[int]) -> Iterator[tuple[str, Tensor]]:
        """Keys and entries with their scales multiplied, and the open windows; other layers have nothing."""
        s = self.spec
        stores = {"keys": (cache.of(s.window).entries[s.rate], 1)}
        if s.rate:
            stores["entries"] = cache.entries[s.rate], s.rate
        if cache.index is not None:
            stores["index"] = cache.index, s.rate
        for name, (store, rate) in stores.items():
            assert not store.data[0].float().any()
            data = store.data[1].float()
            if store.scale is not None:
                data = data * store.scale[1].view(*data.shape[:2], -1)[..., :1]
            for b, length in enumerate(lengths):
                yield f"{name} {b}", data[TABLES[b]].flatten(0, 1)[: length // rate].cpu()
        if cache.open is not None:
            rows = cache.open.rows[s.rate]
            assert rows[0].isnan().all()
            for b, length in enumerate(lengths):
                yield (
                    f"open {b}",
                    rows[
                        1, SLOTS[b], torch.arange(max(0, length - s.open_tokens), length) % s.open_tokens
                    ].cpu(),
                )


INDEX = IndexerSpec(12, 16, 8, 3, interleaved=True)
SPECS = {
    "window": (CompressedSpec(3, 24, 8, 10), 8),
    "pooled": (CompressedSpec(4, 24, 8, 7, 8), 8),
    "selected": (CompressedSpec(5, 32, 8, 6, 2, INDEX), 4),
    "long": (CompressedSpec(2, 16, 16, 5, 16), 16),
}
# Chunks that end inside of windows, at their edges and after; a prompt next to single tokens.
STEPS: Steps = [[(0, 13), (1, 1)], [(1, 6), (0, 3)], [(0, 1), (1, 1)], [(1, 5)], [(0, 1), (1, 3)]]
BOUNDS = CACHES | {"float32": 1e-10}


def total(steps: Steps) -> list[int]:
    return [sum(n for step in steps for c, n in step if c == b) for b in (0, 1)]


def agree(case: Case, steps: Steps, dtype: CacheDtype, activations: torch.dtype = torch.float32) -> None:
    """The kernels' output and what they cache are the reference's."""
    bound = BOUNDS[dtype] if activations is torch.float32 else 1e-3
    (found, mine), (expected, theirs) = (
        case.run(ops, steps, dtype) for ops in (GpuOps(activations, DEVICE), ReferenceOps(torch.float32))
    )
    for name, value in theirs.items():
        assert distance(mine[name], value) < bound, name
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < bound


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "config", lambda *_: Config(bm=16, bk=16))


@pytest.mark.parametrize(
    ("name", "dtype", "activations"),
    [
        *((name, "float32", torch.float32) for name in SPECS),
        *(("selected", dtype, torch.float32) for dtype in ("bfloat16", "fp8", "int8")),
        ("pooled", "bfloat16", torch.bfloat16),
    ],
)
def test_reference(name: str, dtype: CacheDtype, activations: torch.dtype) -> None:
    spec, block = SPECS[name]
    agree(Case.random(spec, block, total(STEPS)), STEPS, dtype, activations)


def test_splits_of_window_and_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some have rows of both, some of one, some none."""
    monkeypatch.setattr(attention, "splits_for", lambda *_: 5)
    spec = CompressedSpec(2, 16, 8, 20, 2)
    steps: Steps = [[(0, 21), (1, 3)], [(0, 1), (1, 1)]]
    agree(Case.random(spec, 8, total(steps)), steps, "float32")


@pytest.mark.parametrize(
    ("rate", "index", "chunks"),
    [(4, IndexerSpec(2, 8, 4, 3, interleaved=True), [3, 1, 1, 10, 1, 1, 2]), (128, None, [127, 1, 1, 2])],
)
def test_entries_do_not_depend_on_chunks(rate: int, index: IndexerSpec | None, chunks: list[int]) -> None:
    """Of V4's rates, bit by bit, over chunks that end before, at and after the edges of windows."""
    length = sum(chunks)
    case = Case.random(CompressedSpec(1, 8, 4, 8, rate, index), 128, [length, 1])
    ops = GpuOps(torch.float32, DEVICE)
    _, expected = case.run(ReferenceOps(torch.float32), [[(0, length)]], "float32")
    _, whole = case.run(ops, [[(0, length)]], "float32", attends=False)
    _, parts = case.run(ops, [[(0, n)] for n in chunks], "float32", attends=False)
    for name, value in expected.items():
        assert distance(whole[name], value) < 1e-10, name
        assert torch.equal(whole[name], parts[name]), name
