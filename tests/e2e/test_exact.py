"""`compute="exact"` from end to end: the log-probabilities of a model in 8 bits are the reference ops'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("farthing._native")

from farthing import LLM, SamplingParams
from farthing.model.config import ModelConfig
from farthing.model.load import random_parameters
from farthing.model.pack import pack_checkpoint

RAW = dict(
    model_type="llama", vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=256,
    bos_token_id=0, eos_token_id=1,
)  # fmt: skip
PROMPTS = [[5, 17, 250, 33, 8], list(range(20, 90)), [7]]
NEAR = 1e-3  # nats
Likeliest = list[list[dict[int, float]]]  # per prompt and token: log-probabilities


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    tensors = {name: t.bfloat16() for name, t in random_parameters(ModelConfig.from_json(RAW), 3).items()}
    tensors["lm_head.weight"] *= 2  # so that some tokens are likelier than others
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def likeliest(model: Path, **options: Any) -> Likeliest:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=5)
    with LLM(
        model, dtype="float32", quantization="int8", skip_tokenizer_init=True, num_blocks=32, max_num_seqs=4,
        **options,
    ) as llm:  # fmt: skip
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    found = [output.outputs[0].logprobs for output in outputs]
    return [[{t: e.logprob for t, e in position.items()} for position in p] for p in found if p is not None]


def largest_change(found: Likeliest, expected: Likeliest) -> float:
    """Of tokens that both have, up to the first position whose likeliest token differs."""
    most = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            most = max(most, *(abs(a[t] - b[t]) for t in a.keys() & b.keys()))
            if max(a, key=a.__getitem__) != max(b, key=b.__getitem__):
                break
    return most


def test_log_probabilities_are_those_of_the_reference(model: Path) -> None:
    torch.set_num_threads(1)
    expected = likeliest(model, backend="reference")
    assert largest_change(likeliest(model, backend="cpu"), expected) < NEAR  # as dtype is float32
    assert largest_change(likeliest(model, backend="cpu", compute="int8"), expected) > 10 * NEAR


def test_packed_file_serves_both(model: Path, tmp_path: Path) -> None:
    """How inputs are rounded is chosen when a file is served, not when it is written."""
    packed = tmp_path / "packed"
    pack_checkpoint(model, packed, "int8", 1)
    for compute in ("int8", "exact"):
        assert likeliest(model, backend="cpu", packed=packed, compute=compute) == likeliest(
            model, backend="cpu", compute=compute
        )
