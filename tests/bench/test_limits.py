"""bench/limits.py against counts by hand."""

from __future__ import annotations

import math
from importlib import import_module
from types import ModuleType

import pytest

from tests.bench.test_page import BENCH

MACHINE = {"threads": 2, "read_gb_s": 33.0, "int8_gop_s": 900.0, "amx_int8_gop_s": 0.0}


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return import_module("limits")


def test_v3_counts_match_manual_counts(limits: ModuleType) -> None:
    """DeepSeek-V3's matrices, one dense and one expert layer."""
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    dense, expert, router = 3 * 7168 * 18432, 3 * 7168 * 2048, 256 * 7168
    body = 2 * attention + dense + 9 * expert + router  # no norms, no bias: they are vectors
    head = 129280 * 7168
    c = limits.config("V3S")
    assert limits.active_parameters(c, 8) == body + head
    prompt = limits.Point("prefill", 1, 512)
    pairs = 512 * 513 // 2
    assert limits.operations(c, prompt) == 2 * (512 * body + head) + 2 * 2 * 128 * 320 * pairs
    step = limits.Point("decode", 1, 128)
    four_bits = dense + 9 * expert
    others = 2 * attention + 2 * router  # in 8 and 16 bits
    latents = 128 * 576 * 2 * 2
    assert limits.bytes_read(c, "int4", step) == pytest.approx(
        four_bits * (0.5 + 2 / 64) + others + head / 2 + latents, rel=1e-9
    )
    assert limits.bytes_read(c, "int8", step) == pytest.approx(
        four_bits + others + head / 2 + latents, rel=1e-9
    )
    assert limits.bytes_read(c, "bf16", step) == pytest.approx(2 * (body + head) + latents, rel=1e-9)
    eight_bits = 2 * (7168 * 576 + 512 * 128 * 128)  # W_KV_A and W_UK in Q8_0
    assert limits.bytes_read(c, "Q4_0", step) == pytest.approx(
        (body - router) * 18 / 32 + 4 * router + eight_bits * 16 / 32 + head * 210 / 256 + latents, rel=1e-9
    )
    assert limits.bytes_read(c, "BF16", step) == pytest.approx(2 * (body + router + head) + latents, rel=1e-9)


def test_head_counts_once_per_prompt(limits: ModuleType) -> None:
    c = limits.config("V3S")
    short, long = (limits.operations(c, limits.Point("prefill", 1, n)) for n in (1, 2))
    body = limits.active_parameters(c, 8) - limits.head_parameters(c)
    assert long - short == 2 * body + 2 * 2 * 128 * 320 * 2


def test_long_context_adds_its_latents(limits: ModuleType) -> None:
    c = limits.config("L576")
    empty, behind = (limits.bytes_read(c, "int4", limits.Point("decode", 4, n)) for n in (0, 4096))
    assert behind - empty == pytest.approx(4 * 4096 * 576 * 2 * 16)


def test_decode_is_bound_by_bytes(limits: ModuleType) -> None:
    point = limits.Point("decode", 1, 0)
    for weights in ("int8", "bf16", "Q4_0"):
        read = limits.bytes_read(limits.config("S"), weights, point)
        assert limits.limit("S", weights, point, MACHINE) == pytest.approx(MACHINE["read_gb_s"] * 1e9 / read)


def test_attention_counts_at_the_bfloat16_peak(limits: ModuleType) -> None:
    """And recurrent states, which are float32, at a quarter of the INT8 peak."""
    c, point = limits.config("L576"), limits.Point("prefill", 1, 16384)
    work = limits.work(c, point)
    assert sum(work) == limits.operations(c, point)
    heads, layers = c["num_attention_heads"], c["num_hidden_layers"]
    width = c["qk_nope_head_dim"] + c["qk_rope_head_dim"] + c["v_head_dim"]
    assert work.halves == 2 * heads * width * layers * 16384 * 16385 // 2
    assert work.seconds(1.0, "int8") == work.weights + 2 * work.halves
    assert work.seconds(1.0, "bf16") == 2 * (work.weights + work.halves)
    recurrent = limits.work(limits.config("qwen3.6-35b-a3b"), limits.Point("decode", 2, 0))
    assert (
        recurrent.seconds(1.0, "int8") - recurrent.weights - 2 * recurrent.halves == 4 * recurrent.floats > 0
    )


@pytest.mark.parametrize(("size", "total"), [("V2L", 15.7e9), ("V3S", 13.9e9), ("L576", 3.2e9)])
def test_sizes(limits: ModuleType, size: str, total: float) -> None:
    model = import_module("random_model")
    count = sum(math.prod(shape) for _, shape in model.tensors(limits.config(size)))
    assert count == pytest.approx(total, rel=0.02)


def test_peak_of_each_set_of_vectors(limits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own unit; the best one where none is named."""
    peaks = {"avx2_int8": 2.0, "avx_vnni_int8": 3.0, "vnni_int8": 0.0}
    monkeypatch.setattr(limits._native, "peak_ops", lambda unit, threads: threads * peaks[unit])
    assert [limits.vector_peak(2, isa) for isa in ("avx2", "avx_vnni", "avx512_bf16")] == [4, 6, 0]
    assert limits.vector_peak(2) == 6


def test_peak_of_an_unknown_unit(limits: ModuleType) -> None:
    with pytest.raises(ValueError, match="peak 'mmx' is unknown; expected 'avx2_int8', 'avx_vnni_int8'"):
        limits._native.peak_ops("mmx", 1)
