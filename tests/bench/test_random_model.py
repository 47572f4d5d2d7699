"""Random slices of published models: their checkpoints load, and their bytes are those counted by hand."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("farthing._native")

from farthing import LLM, SamplingParams
from tests.bench.test_page import BENCH

NARROW = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "num_global_key_value_heads": 1, "global_head_dim": 64,
}  # fmt: skip


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return import_module("random_model")


@pytest.mark.parametrize(
    "size", ["qwen3.6-35b-a3b", "qwen3-30b-a3b", "gpt-oss-20b", "glm-4.5-air", "gemma-4-26b-a4b"]
)
def test_a_slice_is_served(
    models: ModuleType, size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published = models.config(size)
    experts = next(
        name for name in published if name.endswith(("num_experts", "local_experts", "routed_experts"))
    )
    narrow = published | {name: n for name, n in NARROW.items() if name in published} | {experts: 8}
    monkeypatch.setattr(models, "config", lambda _: narrow)
    monkeypatch.setattr(models, "write_tokenizer", lambda *_: None)
    llm = LLM(
        models.make_model(size, tmp_path), backend="cpu", threads=1, quantization="int4",
        skip_tokenizer_init=True, max_model_len=64, max_num_seqs=2, num_blocks=16,
    )  # fmt: skip
    (answer,) = llm.generate([[3, 4, 5]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert len(answer.outputs[0].token_ids) == 4


def test_slices_keep_the_share_of_the_head(models: ModuleType) -> None:
    c = models.config("qwen3.6-35b-a3b")
    assert (c["num_hidden_layers"], c["vocab_size"]) == (4, 248320 // 10 // 64 * 64)
    assert models.config("gpt-oss-20b")["vocab_size"] == 201088 * 4 // 24 // 64 * 64


def test_bytes_of_a_recurrent_model(models: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of Gated DeltaNet and one of attention, each with 8 of 256 experts and a shared one."""
    limits = import_module("limits")
    c = models.config("qwen3.6-35b-a3b")
    delta = 2048 * (8192 + 4096 + 32 + 32) + 4096 * 2048
    attention = 2048 * (2 * 16 * 256 + 2 * 2 * 256) + 16 * 256 * 2048
    expert, router = 3 * 2048 * 512, 2048 * 257
    state = 32 * 128 * 128 * 4 + 8192 * 3 * 4
    read = 4 * 9 * expert * (0.5 + 2 / 64) + 3 * delta + attention + 4 * 2 * router + c["vocab_size"] * 2048
    assert limits.bytes_read(c, "int4", limits.Point("decode", 1, 1000)) == pytest.approx(
        read + 3 * 2 * state + 1000 * 2 * 2 * 256 * 2, rel=1e-9
    )


def test_windows_bound_the_cache_that_is_read(models: ModuleType) -> None:
    limits = import_module("limits")
    c = models.config("gpt-oss-20b")
    near, far = (limits.bytes_read(c, "int4", limits.Point("decode", 2, n)) for n in (1000, 3000))
    assert far - near == pytest.approx(2 * 2 * 2000 * 8 * 128 * 2), "two of four layers see 128 tokens"
