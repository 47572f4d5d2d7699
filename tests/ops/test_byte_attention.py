"""Attention over caches of 8 bits that are read as cached, against float64 over what the cache holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing.ops.api import CacheDtype, LatentCache, Place
from farthing.ops.cpu import CpuOps
from farthing.ops.specs import GroupedParts, GroupedSpec
from farthing.ops.torch_util import make_batch
from tests.isas import ISAS

pytestmark = pytest.mark.pairs

# Relative error of the arithmetic alone. Where keys become bfloat16 first it is about 4e-3.
AS_CACHED = {("avx512_vnni", "int8"): 3e-4, ("avx512_bf16", "int8"): 3e-4}
BOUND = 1.5e-2
TYPES: dict[CacheDtype, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# Heads, key-value heads, head size. Queries are multiplied 8 at a time, keys 256 columns at a time.
SHAPES = [(8, 2, 64), (12, 1, 128), (2, 2, 256), (40, 2, 64), (7, 1, 64), (18, 2, 192), (3, 1, 320)]


def attended(
    isa: str, shape: tuple[int, int, int], cache_dtype: CacheDtype, x: Tensor
) -> tuple[Tensor, Tensor]:
    """What the last token of x attends to, and the same in float64."""
    heads, groups, size = shape
    n, scale = len(x), size**-0.5
    ops = CpuOps(1, isa=isa)
    rope = torch.stack((torch.ones(n, size // 2), torch.zeros(n, size // 2)))
    handle = ops.pack_grouped(GroupedSpec(heads, groups, size, size, scale), GroupedParts(), rope)
    cache = ops.new_cache(groups, -(-n // 16), 16, 2 * size, cache_dtype)
    blocks = torch.randperm(-(-n // 16), generator=torch.Generator().manual_seed(0)).tolist()
    place = [Place(cache, 0, make_batch([n - 1], [0], [blocks], 16))]
    place.append(Place(cache, 0, make_batch([1], [n - 1], [blocks], 16)))
    ops.gqa(x[:-1].clone(), handle, place[0])
    found = ops.gqa(x[-1:].clone(), handle, place[1])
    values, keys = cached(cache, cache_dtype, blocks, n)
    q = x[-1, : heads * size].double().view(groups, heads // groups, size)
    weights = (torch.einsum("ghd,gnd->ghn", q, keys) * scale).softmax(-1)
    return found.double().view(-1), torch.einsum("ghn,gnd->ghd", weights, values).reshape(-1)


def cached(cache: LatentCache, cache_dtype: CacheDtype, blocks: list[int], n: int) -> tuple[Tensor, Tensor]:
    assert cache.scale is not None
    rows = torch.tensor([blocks[i // 16] * 16 + i % 16 for i in range(n)])
    data = cache.data.flatten(1, 2)[:, rows].view(TYPES[cache_dtype]).double()
    scale = cache.scale.flatten(1, 2)[:, rows].double()
    half = data.shape[-1] // 2
    return data[..., :half] * scale[..., :1], data[..., half:] * scale[..., 1:]


def error(pair: tuple[Tensor, Tensor]) -> float:
    return float((pair[0] - pair[1]).norm() / pair[1].norm())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_dtype", list(TYPES))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outliers", [1.0, 30.0])
def test_arithmetic(isa: str, cache_dtype: CacheDtype, shape: tuple[int, int, int], outliers: float) -> None:
    """A few columns of queries, keys and values may be much larger than the rest."""
    torch.manual_seed(1)
    heads, groups, size = shape
    x = torch.randn(333, heads + 2 * groups, size)
    x[..., :2] *= outliers
    x[:, : heads + groups] /= outliers
    bound = AS_CACHED.get((isa, cache_dtype), BOUND)
    assert error(attended(isa, shape, cache_dtype, x.flatten(1))) < bound


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_dtype", list(TYPES))
@pytest.mark.parametrize(
    "case", ["zero keys", "zero values", "zero query", "huge", "tiny", "uneven", "few large"]
)
def test_extremes(isa: str, cache_dtype: CacheDtype, case: str) -> None:
    torch.manual_seed(2)
    heads, groups, size = shape = 8, 2, 64
    x = torch.randn(70, heads + 2 * groups, size)
    q, k, v = x.split([heads, groups, groups], 1)
    if case == "zero keys":
        k[::3] = 0
    if case == "zero values":
        v[::3] = 0
    if case == "zero query":
        q[-1] = 0
    if case == "huge":
        v *= 1e30
    if case == "tiny":  # scores of 0 in effect; values whose scale is close to the least normal number
        k *= 1e-12
        v *= 1e-12
    if case == "uneven":  # ordinary scores of very large keys and very small queries
        k *= 1e32
        q *= 1e-32
    if case == "few large":  # the rest of a row is subnormal in FP8, of both signs and 0
        for y in (k, v):
            y[..., 1:] *= 2e-5
            y[..., 5] = -0.0
    found, exact = attended(isa, shape, cache_dtype, x.flatten(1))
    assert torch.isfinite(found).all()
    assert error((found, exact)) < BOUND


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_dtype", list(TYPES))
def test_largest_sums(isa: str, cache_dtype: CacheDtype) -> None:
    """Every column of queries and keys has the largest number: sums of integers almost fill 32 bits."""
    heads, groups, size = shape = 2, 1, 1024
    x = torch.ones(70, heads + 2 * groups, size)
    x[::3, heads:] = -1
    x[:, :heads] = 2 * size**-0.5
    found, exact = attended(isa, shape, cache_dtype, x.flatten(1))
    assert exact.abs().min() > 0.5
    assert error((found, exact)) < BOUND


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_dtype", list(TYPES))
def test_what_is_not_finite_shows(isa: str, cache_dtype: CacheDtype) -> None:
    torch.manual_seed(3)
    x = torch.randn(40, 12 * 64)
    x[-1, 5] = float("nan")
    found, _ = attended(isa, (8, 2, 64), cache_dtype, x)
    assert found[:64].isnan().all()
    assert torch.isfinite(found[64:]).all()
