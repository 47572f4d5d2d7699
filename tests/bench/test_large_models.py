"""A model packed by bench/large_models.py is served."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("farthing._native")

from farthing import LLM, SamplingParams
from tests.bench.test_page import BENCH

TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 64, "intermediate_size": 128, "q_lora_rank": 32,
    "kv_lora_rank": 32, "num_attention_heads": 2, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "vocab_size": 512,
}  # fmt: skip


def test_packed_without_a_bfloat16_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    large = import_module("large_models")
    monkeypatch.setitem(large.SIZES, "tiny", TINY)
    source, out = large.RandomSource("tiny"), tmp_path / "tiny"
    large.write_checkpoint("tiny", out, source)
    large.write_packed(out, source, "int4", 1)
    decode = import_module("decode")
    monkeypatch.setattr(decode, "pack_checkpoint", None)
    os.utime(out.with_name("tiny-int4.packed"), (0, 0))  # older than the build, whose layout is the same
    assert decode.packed(out, "int4", 1) == out.with_name("tiny-int4.packed")
    llm = LLM(
        out, backend="cpu", threads=1, packed=tmp_path / "tiny-int4.packed", skip_tokenizer_init=True,
        max_model_len=64, max_num_seqs=2, num_blocks=16,
    )  # fmt: skip
    (answer,) = llm.generate([[3, 4, 5]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert len(answer.outputs[0].token_ids) == 4
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(BENCH))
    out.with_name("tiny-int4.packed.layout").write_text("another")
    with pytest.raises(SystemExit, match=r"is missing.*; write .* with bench/large_models.py tiny"):
        decode.packed(out, "int4", 1)
