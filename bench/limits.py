"""The machine's limits: its units' peaks, and operations and bytes per step, computed from the model's shape.

T = tokens of a prompt, B = sequences that decode together, C = cached tokens of each.

    prefill   2 (T·N + head) operations at the INT8 peak (half of it for bfloat16 weights) and
              2 H (n + r + v) T (T + 1) / 2 of attention at the bfloat16 peak, which is half of it, or one
              read of every weight touched, whichever takes longer
    decode    the weights that B tokens touch under random routing, B·C cached latents or keys and values
              (at most those of a window; of a compressed past a window, the entries that are selected, and
              the index keys of all), and recurrent states twice, as they are written too, at the
              bandwidth of memory, or their operations at these peaks, whichever takes longer

N = matrix elements multiplied per token, without the output head, which only a prompt's last token needs.
Attention of a prompt is counted with expanded keys and values (n + r + v multiplications per head, query and
key), the cheaper of the two forms. An engine that beats this count is measured wrongly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from farthing import _native
from farthing.model.config import ModelConfig
from farthing.model.forms import Mixer
from farthing.ops.cpu.formats import PLANES_FROM
from random_model import EMBEDDING, TABLES, active_parameters, config, head_parameters, tensors


class Bytes(NamedTuple):
    """Bytes per weight of a format, by the kind of matrix."""

    feed_forward: float
    attention: float
    head: float
    keys: float | None = None  # the projection to latents and W_UK, where they differ from other attention
    router: float = 2.0


# 4-bit groups of 64 share a 16-bit scale; attention and head keep 8 bits, the router its 16 (`packing.plan`).
BYTES_PER_WEIGHT = {
    "bf16": Bytes(2.0, 2.0, 2.0),
    "int8": Bytes(1.0, 1.0, 1.0),
    "int4": Bytes(0.5 + 2 / 64, 1.0, 1.0),
}
# Greedy decoding reads the high nibbles of a large 8-bit head, and all of a few panels (not counted).
_HIGH_NIBBLES = 0.5
# Blocks of 32 share a 16-bit scale; llama-quantize gives a Q4_0 model a Q6_K head, and in ik_llama.cpp a
# projection to latents and a W_UK in Q8_0. Their files keep the router in float32.
PEER_BYTES = {
    "BF16": Bytes(2.0, 2.0, 2.0, router=4.0),
    "Q8_0": Bytes(34 / 32, 34 / 32, 34 / 32, router=4.0),
    # Feed-forwards in Q4_0 or MXFP4 (17 bytes a block), and 8 bits elsewhere, as in our int4.
    "Q4_0+Q8_0": Bytes(18 / 32, 34 / 32, 34 / 32, router=4.0),
    "MXFP4": Bytes(17 / 32, 34 / 32, 34 / 32, router=4.0),
    "Q4_0": Bytes(18 / 32, 18 / 32, 210 / 256, keys=34 / 32, router=4.0),
}
BYTES_PER_CACHED = 2
# The unit of each instruction set's vectors (`_native.peak_ops`); sets that are not named have AVX-512's.
VECTORS = {"avx2": "avx2_int8", "avx_vnni": "avx_vnni_int8"}
AVX512 = "vnni_int8"


def vector_peak(threads: int, isa: str = "auto") -> float:
    """INT8 GOP/s of the vectors of an instruction set, or of the best one of this processor."""
    units = [AVX512, *VECTORS.values()] if isa == "auto" else [VECTORS.get(isa, AVX512)]
    return max(_native.peak_ops(unit, threads) for unit in units)


@dataclass(frozen=True, order=True)
class Point:
    """One row of the table: a prompt of `context` tokens, or `batch` sequences with `context` cached."""

    kind: Literal["prefill", "decode"]
    batch: int
    context: int

    @property
    def tokens(self) -> int:
        """Tokens computed in one step."""
        return self.context if self.kind == "prefill" else self.batch


def experts_touched(c: ModelConfig, tokens: int) -> float:
    """Expected number of experts per layer selected by at least one of `tokens` under random routing."""
    experts, k = c.n_routed_experts or 0, c.num_experts_per_tok
    return float(experts * (1 - (1 - k / max(experts, 1)) ** tokens))


def mixers(c: ModelConfig) -> list[Mixer]:
    """The first half of every hidden layer."""
    return list(c.mixers[: c.num_hidden_layers])


class Work(NamedTuple):
    """Multiplications and additions of one step, by the unit that computes them."""

    weights: float  # products with matrices, in their format
    halves: float  # attention and index scores, in bfloat16
    floats: float  # recurrent states: four of each per value and token

    def seconds(self, int8: float, weights: str) -> float:
        """At an INT8 peak: a vector or a tile holds half as many bfloat16 and a quarter as many floats."""
        return (self.weights * (2 if weights == "bf16" else 1) + 2 * self.halves + 4 * self.floats) / int8


def operations(raw: dict[str, Any], point: Point) -> float:
    """Multiplications and additions of one step."""
    return sum(work(raw, point))


def work(raw: dict[str, Any], point: Point) -> Work:
    """The same by unit."""
    c = ModelConfig.from_json(raw)
    body = active_parameters(raw, c.num_experts_per_tok) - head_parameters(raw)
    state = sum(math.prod(mixer.states[0]) for mixer in mixers(c) if mixer.states)
    if point.kind == "prefill":
        attention = sum(m.query_heads * m.expanded_width * _pairs(m, point.context) for m in mixers(c))
        tokens = point.context
        return Work(2 * (tokens * body + head_parameters(raw)), 2 * attention, 2 * tokens * 4 * state)
    # Decoding does not expand keys.
    attention = sum(m.query_heads * m.dot_width * m.keys_read(point.context + 1) for m in mixers(c))
    attention += sum(m.index.heads * m.index.width * scored(m, point.context) for m in mixers(c) if m.index)
    return Work(*(2 * point.batch * each for each in (body + head_parameters(raw), attention, 4 * state)))


def scored(mixer: Mixer, tokens: int) -> int:
    """Index keys of entries that a token behind so many is scored against."""
    return tokens // mixer.entry_tokens if mixer.index is not None and mixer.entry_tokens > 1 else 0


def _pairs(mixer: Mixer, tokens: int) -> float:
    """Queries of a prompt times the keys that they see in one layer."""
    if mixer.entry_tokens > 1:
        return float(sum(mixer.keys_read(at) for at in range(1, tokens + 1)))
    most = mixer.keys_read(tokens)
    return most * (most + 1) / 2 + (tokens - most) * most


def _bytes_of(c: ModelConfig, each: Bytes, name: str) -> float:
    if name.startswith("lm_head"):
        return each.head
    if ".mlp.gate." in name or "shared_expert_gate" in name:
        return each.router
    if "_hc." in name or "hc_head" in name:
        return 4.0  # in every format
    return each.feed_forward if ".mlp." in name else _attention_bytes(c, each, name)


def _attention_bytes(c: ModelConfig, each: Bytes, name: str) -> float:
    if each.keys is None or "kv_" not in name:
        return each.attention
    keys, values = c.latent.qk_nope_head_dim, 0 if "kv_a" in name else c.latent.v_head_dim
    return float((keys * each.keys + values * each.attention) / (keys + values))


def weight_bytes(raw: dict[str, Any], each: Bytes, routed: float) -> float:
    """Bytes of the matrices of a step that touches `routed` experts per layer, without the embedding."""
    c = ModelConfig.from_json(raw)
    total = head_parameters(raw) * each.head if c.head.tie_word_embeddings else 0.0
    for name, shape in tensors(raw):
        if name == EMBEDDING or len(shape) != 2 or name.endswith(TABLES):
            continue
        share = routed / (c.n_routed_experts or 1) if ".experts." in name else 1
        total += math.prod(shape) * _bytes_of(c, each, name) * share
    return total


def bytes_read(raw: dict[str, Any], weights: str, point: Point) -> float:
    """Bytes that one step must read, in one of our formats or a peer's: weights, caches, and recurrent
    states, which it also writes."""
    c = ModelConfig.from_json(raw)
    each = (BYTES_PER_WEIGHT | PEER_BYTES)[weights]
    if raw.get("quantization_config") and weights in BYTES_PER_WEIGHT:  # experts stay in MXFP4
        each = each._replace(feed_forward=PEER_BYTES["MXFP4"].feed_forward)
    if weights in ("int8", "int4") and head_parameters(raw) >= PLANES_FROM:
        each = each._replace(head=each.head * _HIGH_NIBBLES)
    touched = weight_bytes(raw, each, experts_touched(c, point.tokens))
    if point.kind == "prefill":
        return touched
    values = (m.cache_rows * m.cache_width * m.keys_read(point.context) for m in mixers(c))
    indexed = sum(m.index.width * scored(m, point.context) for m in mixers(c) if m.index)
    state = sum(2 * m.state_bytes for m in mixers(c))
    return touched + point.batch * (BYTES_PER_CACHED * (sum(values) + indexed) + state)


def limit(size: str, weights: str, point: Point, machine: dict[str, float]) -> float:
    """Upper bound on tokens/s of the machine."""
    c = config(size)
    peak = max(machine["int8_gop_s"], machine["amx_int8_gop_s"]) * 1e9
    computing = work(c, point).seconds(peak, weights)
    reading = bytes_read(c, weights, point) / (machine["read_gb_s"] * 1e9)
    return point.tokens / max(computing, reading)
