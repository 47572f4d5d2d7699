"""Seconds of the parts of a step on one rank: the slower of memory traffic and arithmetic.

Weights, cache and layout are those of the memory plan: each matrix as this rank stores it. FP8 weights are
multiplied at the FP8 ceiling, all others at bf16's, because INT8 and INT4 are unpacked in registers.

Legend: tokens T of a step; E experts on this rank; k experts per token.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

from farthing.model import layer_of
from farthing.model.forms import Mixer
from farthing.model.spec import FEED, Tensor
from farthing.parallel.plan import Place, ShardPlan
from farthing.planner.footprint import Holder, Stored
from farthing.planner.memory import PlannedModel, cache_row_bytes, held_bytes, local_shape


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Ceilings of one GPU; 1 GB = 1e9 bytes."""

    name: str
    memory: float  # GB
    bandwidth: float  # GB/s
    fp8: float  # TFLOP/s
    bf16: float
    nvlink: float  # GB/s per direction
    network: float
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Share of each ceiling that kernels reach."""

    dense: float
    grouped: float
    attention: float
    bandwidth: float
    network: float


def load_devices(path: Path | None = None) -> tuple[dict[str, Ceilings], Efficiency]:
    """The declared ceilings, overridden by the user's measurements. Raises ValueError naming the field."""
    raw = tomllib.loads(Path(__file__).with_name("devices.toml").read_text())
    devices = {name: Ceilings(name, **row) for name, row in raw["device"].items()}
    shares = dict(raw["share"])
    if path is not None:
        own = tomllib.loads(path.read_text())
        for name, row in own.get("device", {}).items():
            base = (
                {f.name: getattr(devices[name], f.name) for f in fields(Ceilings)} if name in devices else {}
            )
            devices[name] = _device(name, base | row)
        shares |= own.get("share", {})
    names = [field.name for field in fields(Efficiency)]
    if set(shares) != set(names) or not all(0 < s <= 1 for s in shares.values()):
        raise ValueError(f"share: got {shares}; expected {names}, each in (0, 1]")
    return devices, Efficiency(**shares)


def _device(name: str, row: Mapping[str, Any]) -> Ceilings:
    names = {f.name for f in fields(Ceilings)}
    missing = names - set(row) - {"name", "measured"}
    if missing or set(row) - names:
        raise ValueError(f"device.{name} has {sorted(row)}; expected {sorted(names - {'name', 'measured'})}")
    for key in sorted(names - {"name", "measured"}):
        value = row[key]
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"device.{name}.{key}: got {value!r}; expected a number > 0")
    return Ceilings(**{**row, "name": name, "measured": True})


NODE = 8  # GPUs connected by NVLink
FP8, BF16 = 1, 2  # bytes
Part = Literal["attention", "dense", "shared", "expert"]
_PARTS: dict[str, Part] = {"mixer": "attention", "router": "shared", "shared": "shared", "expert": "expert"}


@dataclass(frozen=True, slots=True)
class Workload:
    """The users' workload."""

    prompt: int  # prompt tokens
    output: int
    cache_hit: float = 0.0  # share of prompt tokens found in the cache
    step_limit: float = 0.05  # maximum seconds per decode step: 1 / (tokens/s per user)

    @property
    def context(self) -> float:
        """Mean tokens of a sequence while it decodes."""
        return self.prompt + self.output / 2


@dataclass(frozen=True, slots=True)
class Product:
    """Matrices that one kernel reads and multiplies."""

    weights: int
    nbytes: int
    fp8: bool


class RankRoofline:
    """One rank of a pipeline stage. experts: routed experts per layer on the rank."""

    def __init__(
        self,
        model: PlannedModel,
        plan: ShardPlan,
        place: Place,
        holder: Holder,
        device: Ceilings,
        shares: Efficiency,
        cache_dtype: str,
        experts: int,
    ) -> None:
        self.config, self.layout, self.device, self.shares = plan.config, plan.layout, device, shares
        self.layers, self.experts, self.cache_dtype = plan.stages[place.stage], experts, cache_dtype
        self._model, self._plan, self._place, self._holder = model, plan, place, holder

    @cached_property
    def parts(self) -> dict[int, dict[Part, tuple[Product, ...]]]:
        """The matrices of every hidden layer of this rank; "expert" is one expert."""
        products: dict[int, dict[Part, list[Product]]] = {i: {} for i in self.layers}
        for tensor, stored in self._model.parameters:
            layer = layer_of(tensor.name)
            if layer is not None and layer in products and len(tensor.shape) == 2:
                part, product = self._product(tensor, stored)
                if product is not None:
                    products[layer].setdefault(part, []).append(product)
        return {i: {p: _merged(many) for p, many in of.items()} for i, of in products.items()}

    @cached_property
    def head(self) -> tuple[Product, ...]:
        """This rank's slice of the head."""
        head, stored = self._model.parameters[0 if self.config.head.tie_word_embeddings else -1]
        return tuple(p for p in [self._product(head, stored)[1]] if p is not None)

    def _product(self, tensor: Tensor, stored: Stored) -> tuple[Part, Product | None]:
        part = _PARTS.get(tensor.part, "dense")
        whole = part == "expert" and self.layout.ep > 1  # experts are undivided
        cut = None if whole else self._plan.cut(tensor.name, self._place)
        if cut is None and not whole:
            return part, None
        local = tensor.shape if cut is None else local_shape(tensor.shape, cut)
        rounded = self._holder.rounded(stored, local[1], mlp=tensor.part in FEED)
        expanded = tensor.role in ("heads", "router")  # these are not multiplied in FP8
        size = held_bytes(tensor, local, stored, self._plan, self._holder)
        return part, Product(prod(local), size, rounded.kind == "fp8" and not expanded)

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the device's memory."""
        return self.device.bandwidth * 1e9 * self.shares.bandwidth

    @property
    def attention_flops(self) -> float:
        """Operations per second in attention."""
        return self.device.bf16 * 1e12 * self.shares.attention

    def products(self, products: Iterable[Product], tokens: float, share: float | None = None) -> float:
        """Seconds of matrices with `tokens` rows; share: of the ceiling that the kernel reaches."""
        flops = self.shares.dense if share is None else share
        return sum(
            max(
                p.nbytes / self.bandwidth,
                2 * p.weights * tokens / ((self.device.fp8 if p.fp8 else self.device.bf16) * 1e12 * flops),
            )
            for p in products
        )

    def layer(self, layer: int, tokens: float, routed: float, workload: Workload, decode: bool) -> float:
        """Seconds of computation. tokens: of this rank; routed: of all ranks that share the experts."""
        past = workload.prompt * workload.cache_hit
        attention = (
            self.decode_attention(layer, tokens, workload.context)
            if decode
            else self.prefill_attention(layer, tokens, past, workload.prompt - past)
        )
        projections = self.products(self.parts[layer].get("attention", ()), tokens)
        return projections + attention + self.feed_forward(layer, tokens, routed)

    def feed_forward(self, layer: int, tokens: float, routed: float) -> float:
        """Seconds of a layer's MLPs; only experts that a token selects are read."""
        parts, c = self.parts[layer], self.config
        seconds = self.products((*parts.get("dense", ()), *parts.get("shared", ())), tokens)
        if "expert" not in parts:
            return seconds
        chance = c.routed_per_token / (self.experts * self.layout.ep)  # that a token selects a copy
        read = self.experts * (1 - float((1 - chance) ** routed))
        rows = routed * c.routed_per_token / self.layout.ep  # on this rank
        return seconds + read * self.products(parts["expert"], rows / read, self.shares.grouped)

    def decode_attention(self, layer: int, tokens: float, context: float) -> float:
        """The slower of reading the cache, or a state that is also written, and of this rank's arithmetic."""
        c, mixer = self.config, self.config.mixer(layer)
        attended, scanned = mixer.keys_read(int(context)), mixer.keys_scanned(int(context))
        row, index = cache_row_bytes(c, layer, self.cache_dtype, self.layout.tp)
        read = tokens * (attended * row + scanned * index + 2 * mixer.state_bytes)
        flops = tokens * (attended * self._heads * 2 * mixer.dot_width + scanned * _scored(mixer))
        return max(read / self.bandwidth, flops / self.attention_flops)

    def prefill_attention(self, layer: int, tokens: float, past: float, new: float) -> float:
        """Causal: each of `new` prompt tokens attends to `past` and half of the new ones. A state takes four
        multiplications per element."""
        mixer = self.config.mixer(layer)
        each, scanned = mixer.prompt_keys(past, new)
        work = 2 * self._heads * each + scanned * _scored(mixer) + 2 * mixer.state_bytes
        return tokens * work / self.attention_flops

    @property
    def _heads(self) -> int:
        return self.config.num_attention_heads // self.layout.tp

    def link(self, ranks: int) -> float:
        """Bytes per second between GPUs of a group: one network card per GPU, NVLink within a node."""
        gigabytes = self.device.network if ranks > NODE else self.device.nvlink
        return gigabytes * 1e9 * self.shares.network

    def summed(self, tokens: float, ranks: int) -> float:
        """Seconds of a ring all-reduce of bf16 hidden states."""
        moved = 2 * (ranks - 1) / ranks * tokens * self.config.hidden_size * BF16
        return moved / self.link(ranks)


def _scored(mixer: Mixer) -> int:
    """Operations per query and index key; every rank computes all index heads."""
    return 2 * mixer.index.heads * mixer.index.width if mixer.index else 0


def _merged(products: list[Product]) -> tuple[Product, ...]:
    """One product per ceiling."""
    kinds = (True, False)
    return tuple(
        Product(
            sum(p.weights for p in products if p.fp8 is k), sum(p.nbytes for p in products if p.fp8 is k), k
        )
        for k in kinds
        if any(p.fp8 is k for p in products)
    )
