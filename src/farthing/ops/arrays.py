"""Functions of tensors that are torch's, or numpy arrays where a model is served without torch.

A backend's tensors are all of one kind. numpy lacks two of the dtypes; their values are stored as bits.

Legend: n rows; V vocabulary; k columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from farthing.lazy import np, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

BITS = {"bfloat16": "<u2", "float8_e4m3fn": "u1"}  # dtypes that numpy lacks


def numpy_dtype(name: str) -> Any:
    """The inverse of `dtype_name` for arrays."""
    return np.dtype([(name, BITS[name])] if name in BITS else name)


@cache
def dtype_name(dtype: Any) -> str:
    """The name of a dtype as torch spells it, without the module: 'bfloat16'."""
    return dtype.names[0] if getattr(dtype, "names", None) else str(dtype).removeprefix("torch.")


def address(x: Any) -> int:
    """Address of the first element."""
    return x.__array_interface__["data"][0] if isinstance(x, np.ndarray) else x.data_ptr()  # type: ignore[no-any-return]


def row_stride(x: Any) -> int:
    """Elements from one slice of the first dimension to the next."""
    return x.strides[0] // x.itemsize if isinstance(x, np.ndarray) else x.stride(0)  # type: ignore[no-any-return]


def as_float32(x: Tensor) -> Tensor:
    """The values as float32, without a copy if they are."""
    x_: Any = x
    if not isinstance(x_, np.ndarray):
        return x.float()
    kind = dtype_name(x_.dtype)
    if kind == "bfloat16":
        return (np.ascontiguousarray(x_).view("<u2").astype(np.uint32) << 16).view(np.float32)  # type: ignore[return-value]
    if kind == "float8_e4m3fn":
        return _e4m3()[np.ascontiguousarray(x_).view("u1")]  # type: ignore[no-any-return]
    return x_.astype(np.float32, copy=False)  # type: ignore[return-value]


def cast(x: Tensor, kind: str) -> Tensor:
    """The values in a dtype by its name; to bfloat16, of finite numbers, to the nearest, half to even."""
    if not isinstance(x, np.ndarray):
        return x.to(getattr(torch, kind))
    if kind != "bfloat16":
        return as_float32(x).astype(kind, copy=False)
    bits = np.ascontiguousarray(as_float32(x)).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return rounded.astype("<u2").view(numpy_dtype(kind))  # type: ignore[no-any-return]


def as_int64(x: Tensor) -> Tensor:
    """Integers as int64, without a copy if they are."""
    return x.astype(np.int64, copy=False) if isinstance(x, np.ndarray) else x.long()


@cache
def _e4m3() -> Any:
    """The values of all bytes as E4M3 without infinities."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    value = np.where(exponent, np.ldexp(1 + fraction / 8, exponent - 7), np.ldexp(fraction / 8, -6))
    value[byte & 127 == 127] = np.nan
    return np.where(byte & 128, -value, value).astype(np.float32)


def raw(x: Tensor) -> Tensor:
    """The bytes of one-byte values."""
    return x.view("u1") if isinstance(x, np.ndarray) else x.view(torch.uint8)  # type: ignore[call-overload, no-any-return]


def is_bfloat16(x: Tensor) -> bool:
    """Whether bfloat16 holds every value."""
    if dtype_name(x.dtype) == "bfloat16":
        return True
    if not isinstance(x, np.ndarray):
        return bool((x.bfloat16().to(x.dtype) == x).all())
    values: Any = as_float32(x)
    return not (np.ascontiguousarray(values).view("<u4") & 0xFFFF).any() and not np.isnan(values).any()


def repeated(x: Tensor, *shape: int) -> Tensor:
    """x with its single rows or columns repeated to a shape."""
    return contiguous(np.broadcast_to(x, shape) if isinstance(x, np.ndarray) else x.expand(shape))  # type: ignore[arg-type]


def empty(x: Tensor, *shape: int, dtype: str = "float32") -> Tensor:
    """An uninitialized tensor of x's kind, in host memory."""
    if isinstance(x, np.ndarray):
        return np.empty(shape, dtype)  # type: ignore[return-value]
    return torch.empty(shape, dtype=getattr(torch, dtype))


def contiguous(x: Tensor) -> Tensor:
    """x, or a copy with its elements in order."""
    return np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x.contiguous()


def narrow(x: Tensor, dim: int, start: int, size: int) -> Tensor:
    """Rows (dim 0) or columns (dim 1) [start, start + size), without a copy."""
    part = slice(start, start + size)
    return x[part] if dim == 0 else x[:, part]


def beside(parts: Sequence[Tensor]) -> Tensor:
    """Matrices with the same rows, next to each other."""
    return np.concatenate(parts, 1) if isinstance(parts[0], np.ndarray) else torch.cat(list(parts), 1)


def like(values: NDArray[Any], x: Tensor) -> Tensor:
    """The values as a tensor of x's kind, on its device."""
    if isinstance(x, np.ndarray):
        return values  # type: ignore[return-value]
    return torch.from_numpy(values).to(x.device)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same shape and values, or neither exists."""
    if a is None or b is None or a is b:
        return a is b
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else torch.equal(a, b)


def host(x: Tensor) -> NDArray[Any]:
    """The values as a numpy array."""
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()


def copy_slots(x: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy x[:, source] to x[:, target] for every pair; no slot is source and target."""
    if not isinstance(x, np.ndarray) and x.device.type != "cpu":
        source, target = torch.tensor(pairs, device=x.device).T
        x[:, target] = x[:, source]
        return
    for layer in host(x):  # one slot at a time: a selection of several would be copied twice
        for from_slot, to_slot in pairs:
            layer[to_slot] = layer[from_slot]


def on_torch(x: Tensor | None) -> Tensor | None:
    """A numpy array as torch's tensor of the same memory."""
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def alternating(a: Tensor, b: Tensor) -> Tensor:
    """Matrices [n, k] whose columns take turns, as [n, 2 k]."""
    if isinstance(a, np.ndarray):
        return np.stack((a, b), -1).reshape(len(a), -1)  # type: ignore[return-value]
    return torch.stack((a, b), -1).flatten(1)


def repeat_columns(x: Tensor, times: int) -> Tensor:
    """Every column so many times: [n, k] -> [n, times k]."""
    return x.repeat(times, 1) if isinstance(x, np.ndarray) else x.repeat_interleave(times, 1)


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    x_: Any = x
    return bool(np.isfinite(x_).all()) if isinstance(x_, np.ndarray) else bool(x.isfinite().all())


def logsumexp(x: Tensor) -> Tensor:
    """Of every row [n, V], as [n, 1]."""
    x_: Any = x
    if not isinstance(x_, np.ndarray):
        return x.logsumexp(-1, keepdim=True)
    top = x_.max(-1, keepdims=True)
    return top + np.log(np.exp(x_ - top).sum(-1, keepdims=True))  # type: ignore[no-any-return]


def log_softmax(x: Tensor) -> Tensor:
    """Of every row [n, V]."""
    return x - logsumexp(x) if isinstance(x, np.ndarray) else x.log_softmax(-1)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x [n, V] at index [n, k] of its row."""
    x_: Any = x
    at: Any = index
    return np.take_along_axis(x_, at, 1) if isinstance(x_, np.ndarray) else x.gather(1, index)  # type: ignore[return-value]


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where the condition holds, else b."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, a, b)  # type: ignore[return-value]
    return torch.where(condition, a, b)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row [n, V], in order: (values, ids int64), each [n, min(k, V)]."""
    x_: Any = x
    k = min(k, x_.shape[1])
    if not isinstance(x_, np.ndarray):
        values, ids = x.topk(k, dim=-1)
        return values, ids
    if k == 0:  # there is no element to partition at
        part: Any = np.empty((len(x_), 0), np.int64)
    else:
        part = np.argpartition(x_, x_.shape[1] - k, axis=1)[:, x_.shape[1] - k :]
    inner = np.take_along_axis(x_, part, 1)
    order = np.argsort(-inner, axis=1, kind="stable")
    return np.take_along_axis(inner, order, 1), np.take_along_axis(part, order, 1)  # type: ignore[return-value]
