"""Tensors as numpy arrays: the same results as torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from farthing.checkpoint.floats import fp8_scales
from farthing.checkpoint.shards import ArrayFile, CheckpointError
from farthing.ops import Weight, arrays, sampling
from farthing.ops.cpu import backend
from farthing.ops.sampling import Filters

ARRAY: Any = np.random.default_rng(3).normal(size=(4, 1000)).astype(np.float32)
TENSOR = torch.from_numpy(ARRAY)


def test_functions_of_rows() -> None:
    for function in (arrays.log_softmax, arrays.logsumexp, arrays.as_float32, arrays.contiguous):
        np.testing.assert_allclose(function(ARRAY), function(TENSOR).numpy(), atol=1e-5)
    index: Any = np.array([[1, 5], [0, 0], [2, 999], [7, 3]])
    gathered = arrays.gather(TENSOR, torch.from_numpy(index)).numpy()
    assert np.array_equal(arrays.gather(ARRAY, index), gathered)
    assert arrays.all_finite(ARRAY) and not arrays.all_finite(ARRAY * np.float32("inf"))


@given(n=st.integers(0, 4), vocabulary=st.integers(1, 40), k=st.integers(0, 45), seed=st.integers(0, 99))
def test_largest_is_that_of_torch(n: int, vocabulary: int, k: int, seed: int) -> None:
    rows: Any = np.random.default_rng(seed).permuted(np.arange(n * vocabulary)).reshape(n, vocabulary)
    rows = rows.astype(np.float32)
    ours, theirs = arrays.largest(rows, k), arrays.largest(torch.from_numpy(rows), k)
    for array, tensor in zip(ours, theirs, strict=True):
        assert array.shape == (n, min(k, vocabulary))
        assert np.array_equal(array, tensor.numpy()) and arrays.dtype_name(array.dtype) in str(tensor.dtype)


@given(dim=st.integers(0, 1), start=st.integers(0, 4), size=st.integers(0, 4))
def test_narrow_is_that_of_torch_and_copies_nothing(dim: int, start: int, size: int) -> None:
    x = np.arange(8 * 9, dtype=np.float32).reshape(8, 9)
    expected = torch.from_numpy(x).narrow(dim, start, size)
    for each in (x, torch.from_numpy(x)):
        found = arrays.narrow(each, dim, start, size)  # type: ignore[arg-type]
        assert np.array_equal(arrays.host(found), expected.numpy())
        assert not size or np.shares_memory(arrays.host(found), x)


def test_bfloat16_is_widened_exactly() -> None:
    value = torch.from_numpy(ARRAY).bfloat16()
    bits: Any = value.view(torch.int16).numpy().view(arrays.numpy_dtype("bfloat16"))
    assert arrays.dtype_name(bits.dtype) == arrays.dtype_name(value.dtype) == "bfloat16"
    assert np.array_equal(arrays.as_float32(bits), value.float().numpy())


@pytest.mark.parametrize("vocabulary", [50, 1000, 32000])
@pytest.mark.parametrize("limits", [None, (0, 0.9, 0.0), (40, 1.0, 0.0), (0, 1.0, 0.02), (300, 0.95, 0.001)])
def test_draws_are_those_of_torch(vocabulary: int, limits: tuple[int, float, float] | None) -> None:
    random = np.random.default_rng(vocabulary)
    logits = (2 * random.normal(size=(64, vocabulary))).astype(np.float32)
    uniform = random.uniform(size=64)
    filters, same = None, None
    if limits is not None:
        k, p, least = limits
        parts: list[NDArray[Any]] = [np.full(64, k or vocabulary), np.full(64, p, np.float32)]
        parts.append(np.full(64, least, np.float32))
        same = Filters(*map(torch.from_numpy, parts))  # type: ignore[misc]
        filters = Filters(*parts)  # type: ignore[arg-type, misc]
    expected = sampling.sample(torch.from_numpy(logits), torch.from_numpy(uniform), same).numpy()
    # A random number on the border of two tokens may fall to either.
    assert (backend.sample(logits, uniform, filters) == expected).mean() > 0.98


def test_arrays_of_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    stored = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randn(200, 200),
        "c": torch.arange(7),
        "d": torch.arange(3, dtype=torch.int32),
        "e": torch.zeros(3, dtype=torch.int16),
    }
    save_file(stored, tmp_path / "m.safetensors")
    file = ArrayFile(tmp_path / "m.safetensors")
    assert file.names() == set(stored)
    assert np.array_equal(arrays.as_float32(file.read("a")), stored["a"].float().numpy())  # type: ignore[arg-type]
    assert np.array_equal(file.read("b"), stored["b"].numpy())
    assert np.array_equal(file.read("c"), stored["c"].numpy())
    assert np.array_equal(file.read("d"), stored["d"].numpy())
    with pytest.raises(CheckpointError, match="e: found I16"):
        file.read("e")
    (tmp_path / "m.safetensors").write_bytes(bytes(4))
    with pytest.raises(CheckpointError, match="truncated"):
        ArrayFile(tmp_path / "m.safetensors")


def test_fp8_has_the_values_of_torch_in_blocks_rows_and_alone() -> None:
    bits = np.arange(256, dtype=np.uint8).reshape(2, 128)
    ours = bits.view(arrays.numpy_dtype("float8_e4m3fn"))
    theirs = torch.from_numpy(bits.copy()).view(torch.float8_e4m3fn)
    assert np.array_equal(arrays.as_float32(ours), theirs.float().numpy(), equal_nan=True)
    assert torch.equal(arrays.as_float32(theirs).isnan(), theirs.float().isnan())
    for shape in ((1, 1), (2, 1)):
        scale = np.linspace(0.5, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)
        as_arrays = fp8_scales("scale", scale, (2, 128))  # type: ignore[arg-type]
        as_tensors = fp8_scales("scale", torch.from_numpy(scale), (2, 128))
        assert np.array_equal(as_arrays, as_tensors.numpy())
        values = Weight("fp8", ours, as_arrays).dequantize()
        assert np.array_equal(values, Weight("fp8", theirs, as_tensors).dequantize().numpy(), equal_nan=True)


@pytest.mark.parametrize("values", [[1.0, -0.0], [1.0, 1.0 + 2**-20], [float("nan")], [float("inf")]])
def test_whether_bfloat16_holds_every_value(values: list[float]) -> None:
    x = np.array(values, np.float32)
    assert arrays.is_bfloat16(x) == arrays.is_bfloat16(torch.from_numpy(x))  # type: ignore[arg-type]
