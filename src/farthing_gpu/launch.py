"""How kernels are launched: tuned configurations, device properties, CUDA graphs, interpreter differences."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from farthing.ops.api import Batch

# Arithmetic that Triton's interpreter does differently from the hardware; all special cases are here.
#
# The interpreter (TRITON_INTERPRET=1, NumPy on a CPU) multiplies bfloat16 as integers, interprets an
# integer's bits as bfloat16, and truncates where the hardware rounds. When interpreting, products
# therefore use float32, which represents every product of two bfloat16 or FP8 numbers exactly, and
# rounding uses bit arithmetic. On a GPU each helper is one instruction.

# Since 3.10 Triton fuses multiply-adds only on request; scaled sums need them.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

INTERPRETED: bool = knobs.runtime.interpret
_INTERPRET = tl.constexpr(INTERPRETED)
LEAST_CAPABILITY = (8, 0)  # Ampere: bfloat16 on tensor cores, asynchronous copies
FP8_MAX = tl.constexpr(448.0)
LEAST_AMAX = tl.constexpr(1e-4)  # minimum amax of an activation group (as in DeepSeek-V3's quantizer)


@triton.jit
def dot(a, b, acc):
    """acc [M, N] float32 + a [M, K] b [K, N]; float32 operands are not rounded to TF32."""
    if _INTERPRET:
        result = acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        result = tl.dot(a, b, acc, input_precision="ieee")
    return result


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x as `dtype` (float32, bfloat16 or float8e4nv), rounded to nearest even; |x| <= 448 for FP8."""
    if _INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        if dtype == tl.bfloat16:
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
            result = rounded.to(tl.bfloat16, bitcast=True)
        elif dtype == tl.float8e4nv:
            size = bits & 0x7FFFFFFF
            normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # exponent bias 127 to 7
            # Below 2^-6 the step is 2^-9; adding 2^23 leaves no fractional bits.
            small = ((tl.abs(x) * 512.0 + 8388608.0) - 8388608.0).to(tl.uint32)
            code = tl.where(tl.abs(x) < 0.015625, small, normal) | ((bits >> 31) << 7)
            result = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        else:
            result = x.to(dtype)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def widen(x, dtype: tl.constexpr):
    """x (8-bit integers, FP8, or a float no wider than it) as `dtype`, exactly."""
    if _INTERPRET:
        result = narrow(x.to(tl.float32), dtype)
    elif x.dtype == tl.float8e4nv:
        # FP8 converts to float16; float16 to bfloat16 runs at an eighth of the rate.
        result = x.to(tl.float32).to(dtype)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def round_half_even(x):
    """float32 |x| < 2^22 rounded to the nearest integer, as float32."""
    return (x + 12582912.0) - 12582912.0  # 1.5 x 2^23 leaves no room for fractional bits


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gated(gate, up, ALPHA: tl.constexpr, CUBIC: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """`farthing.ops.api.Gate`; LIMIT 0: none."""
    if LIMIT != 0.0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.clamp(up, -LIMIT, LIMIT)
    wide = gate * ALPHA
    if CUBIC != 0.0:
        wide = wide * (1.0 + CUBIC * gate * gate)
    return gate / (1.0 + tl.exp(-wide)) * (up + SHIFT)


# (hidden [T, D], batch, live [1] int32: how many of its rows are real) -> hidden [T, D]
Layers = Callable[[Tensor, Batch, Tensor], Tensor]
MOST_ROWS = 512
_WARM_UP = 2  # runs before capture, to compile kernels and create cuBLAS handles


def bucket(rows: int) -> int | None:
    """Rows of the graph for a batch: 1, 2, 4, 8, steps of 8 to 64, steps of 32 to 512; None above."""
    if rows > MOST_ROWS:
        return None
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step


def width_bucket(blocks: int) -> int:
    """Columns of the graph's block table: a power of two."""
    return 1 << max(0, blocks - 1).bit_length()


def is_decode(batch: Batch) -> bool:
    """Whether every sequence has one token."""
    return batch.positions.shape[0] == batch.context_lens.shape[0]


@dataclass(slots=True)
class _Inputs:
    """Input tensors of a graph; each step is copied into them."""

    hidden: Tensor
    batch: Batch
    live: Tensor

    @classmethod
    def of(cls, rows: int, width: int, hidden: Tensor) -> _Inputs:
        device = hidden.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        batch = Batch(
            positions=zeros(rows),
            slots=zeros(rows).long(),
            query_start=torch.arange(rows + 1, dtype=torch.int32, device=device),
            context_lens=zeros(rows) + 1,
            block_table=zeros(rows, width),
        )
        return cls(hidden.new_zeros(rows, hidden.shape[1]), batch, zeros(1))

    def fill(self, hidden: Tensor, batch: Batch) -> None:
        rows, width = batch.block_table.shape
        own = self.batch
        pairs = (
            (self.hidden, hidden),
            (own.positions, batch.positions),
            (own.slots, batch.slots),
            (own.context_lens, batch.context_lens),
            (own.block_table[:, :width], batch.block_table),
        )
        for to, source in pairs:
            to[:rows].copy_(source)
            if rows < len(to):
                to[rows:].copy_(source[:1].expand_as(to[rows:]))
        self.live.fill_(rows)


@dataclass(slots=True)
class _Captured:
    inputs: _Inputs
    graph: torch.cuda.CUDAGraph | None
    output: Tensor | None


class DecodeGraphs:
    """One graph per bucket, block table width, and set of layers.

    A step of B sequences with one token each runs in the graph of the next larger bucket. Its inputs are
    copied into the graph's own tensors. Rows beyond B repeat the first row, so that they write the same
    values to the cache, and select no expert. A graph is captured on the first use of its bucket.

    Without CUDA nothing is captured: the same buckets and copies are used, then the layers run directly.
    """

    def __init__(self) -> None:
        self._captured: dict[tuple[int, int, Hashable], _Captured] = {}
        self._pool: Any = None  # memory shared by all graphs, as only one runs at a time

    def run(self, key: Hashable, layers: Layers, hidden: Tensor, batch: Batch) -> Tensor:
        """Run `layers` on a decode step. key identifies their other inputs: cache, counts, layers."""
        rows, width = batch.block_table.shape
        size = bucket(rows)
        if size is None:
            return layers(hidden, batch, torch.full((1,), rows, dtype=torch.int32, device=hidden.device))
        at = size, width_bucket(width), key
        captured = self._captured.get(at)
        if captured is None:
            captured = self._captured[at] = _Captured(_Inputs.of(size, at[1], hidden), None, None)
            captured.inputs.fill(hidden, batch)
            if hidden.is_cuda:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                _capture(captured, layers, self._pool)
        else:
            captured.inputs.fill(hidden, batch)
        if captured.graph is None:
            out = layers(captured.inputs.hidden, captured.inputs.batch, captured.inputs.live)
        else:
            captured.graph.replay()
            assert captured.output is not None
            out = captured.output
        return out[:rows].clone()

    def __len__(self) -> int:
        return len(self._captured)


def _capture(captured: _Captured, layers: Layers, pool: Any) -> None:
    """Warm-up runs read and write the step's own cache rows, as the step itself does afterwards."""
    inputs = captured.inputs
    live = inputs.live.clone()
    inputs.live.zero_()  # no token selects an expert, so warm-up adds no counts
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            layers(inputs.hidden, inputs.batch, inputs.live)
    torch.cuda.current_stream().wait_stream(stream)
    captured.graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured.graph, pool=pool):
        captured.output = layers(inputs.hidden, inputs.batch, inputs.live)
    inputs.live.copy_(live)


FOLDER = Path(__file__).parent / "configs"
_INTERPRETED_PROGRAMS = 3  # few and odd, so that persistent loops iterate in tests
_SMALLER = re.compile(r"shared-(\d+)k\.json")  # for GPUs with at most this much shared memory, in KiB
_TILE = {"bm", "bn", "bk"}


@dataclass(frozen=True, slots=True)
class Config:
    """Tile sizes and resources of one launch. Fields that a kernel does not use keep their default."""

    bm: int = 64
    bn: int = 64
    bk: int = 64
    num_warps: int = 4
    num_stages: int = 3
    per_processor: int = 1  # concurrent programs per multiprocessor: persistent kernels and decode

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            power = isinstance(value, int) and value > 0 and value & (value - 1) == 0
            if field.name == "num_stages":
                power = isinstance(value, int) and 1 <= value <= 8
            if not power or (field.name in _TILE and value < 16):
                raise ValueError(
                    f"{field.name}: got {value!r}; expected "
                    f"{'1 to 8' if field.name == 'num_stages' else 'a power of two'}"
                    f"{', at least 16' if field.name in _TILE else ''}"
                )

    @property
    def resources(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def file_name(device: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'nvidia-h100-80gb-hbm3.json'."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def read_configs(path: Path) -> dict[str, list[tuple[int, Config]]]:
    """kernel -> (maximum rows, configuration), ascending.

    File format: {kernel: [{"rows": 16, "bm": 16, …}, …]}; a kernel's last entry covers all larger sizes.
    Raises ValueError naming file, kernel and field.
    """
    names = {f.name for f in fields(Config)}
    table: dict[str, list[tuple[int, Config]]] = {}
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    for kernel, entries in raw.items():
        rows = []
        for entry in entries:
            unknown = entry.keys() - names - {"rows"}
            if unknown or "rows" not in entry:
                raise ValueError(
                    f"{path.name}: {kernel} has {sorted(entry)}; expected 'rows' and some of {sorted(names)}"
                )
            try:
                rows.append((int(entry["rows"]), Config(**{k: v for k, v in entry.items() if k != "rows"})))
            except ValueError as error:
                raise ValueError(f"{path.name}: {kernel}: {error}") from error
        if not rows or [r for r, _ in rows] != sorted({r for r, _ in rows}):
            raise ValueError(
                f"{path.name}: {kernel} has rows {[r for r, _ in rows]}; expected some, ascending"
            )
        table[kernel] = rows
    return table


@dataclass(frozen=True, slots=True)
class Card:
    """The GPU properties that determine launches."""

    name: str
    processors: int
    shared: int  # maximum shared memory per program in bytes
    generation: int  # major compute capability


# Target of interpreted kernels, and of compilation without a GPU: an H100.
_NONE = Card("", _INTERPRETED_PROGRAMS if INTERPRETED else 132, 227 << 10, 9)


@cache
def table(card: Card) -> dict[str, list[tuple[int, Config]]]:
    """default.json, overridden by shared-memory and generation files, then by the GPU's measured file."""
    configs = read_configs(FOLDER / "default.json")
    smaller = {int(m[1]): m[0] for path in FOLDER.iterdir() if (m := _SMALLER.fullmatch(path.name))}
    for most in sorted(smaller, reverse=True):
        if card.shared <= most << 10:
            configs |= read_configs(FOLDER / smaller[most])
    for name in (f"generation-{card.generation}.json", file_name(card.name)):
        if (FOLDER / name).exists():
            configs |= read_configs(FOLDER / name)
    return configs


@cache
def _card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Card(properties.name, properties.multi_processor_count, shared, properties.major)


def card(device: torch.device) -> Card:
    """Properties of the GPU; without one, of the target for interpretation and compilation."""
    return _card(device.index or 0) if device.type == "cuda" else _NONE


def config(kernel: str, rows: int, device: torch.device) -> Config:
    """The configuration of `kernel` for this number of rows on this device."""
    entries = table(card(device))[kernel]
    return next((c for most, c in entries if rows <= most), entries[-1][1])


def product_config(kind: str, weight: str, inputs: torch.dtype, rows: int, device: torch.device) -> Config:
    """Configuration of product `kind` by weight format. float32 inputs use no tensor cores: small tiles."""
    measured = {"mxfp4": "int4", "q4_1": "int4", "int8_groups": "int8"}.get(weight, weight)
    return config(f"{kind}_{'float32' if inputs is torch.float32 else measured}", rows, device)


def processors(device: torch.device) -> int:
    """Number of multiprocessors of the device."""
    return card(device).processors


def rows(x: Tensor) -> Tensor:
    """Rows with unit column stride."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
