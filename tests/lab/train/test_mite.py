"""The recipe end to end on small files; evaluation; the written checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner

from farthing.model.config import ModelConfig
from farthing_lab.cli.train import app
from farthing_lab.train.evaluate import evaluate, windows
from farthing_lab.train.export import is_quantized, load_checkpoint, save_checkpoint
from farthing_lab.train.mite import Recipe, apply_settings
from farthing_lab.train.model import DeepSeekLM
from tests.lab.train.test_model import randomized

TINY_RUN = [
    *("--set", "vocab_size=400", "--set", "hidden_size=64", "--set", "intermediate_size=64"),
    *("--set", "num_hidden_layers=2", "--set", "n_routed_experts=32", "--set", "moe_intermediate_size=64"),
    *("--set", "heldout_every=12", "--set", "micro_tokens=512", "--set", "batch_stages=[[0,512]]"),
    *("--set", "window_stages=[[0,64]]", "--set", "max_position_embeddings=128"),
]


def test_command_trains_resumes_and_exports(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    base = ["mite", "--out", str(out), "--data", str(sources), "--device", "cpu", "--json", *TINY_RUN]
    result = CliRunner().invoke(app, [*base, "--tokens", "2048"])
    assert result.exit_code == 0, result.output
    refused = CliRunner().invoke(app, [*base, "--tokens", "2048"])
    assert refused.exit_code == 2
    other = CliRunner().invoke(app, [*base, "--tokens", "4096", "--resume", "--seed", "1"])
    assert other.exit_code == 2 and "seed: got 1; expected 0" in other.stderr
    resumed = CliRunner().invoke(app, [*base, "--tokens", "4096", "--resume"])
    assert resumed.exit_code == 0, resumed.output
    summary = json.loads(resumed.stdout)
    assert [b["tokens"] for b in summary["budgets"]] == [2048, 4096]
    assert summary["tokens"] == 4096
    assert summary["heldout"]["bits_per_byte"] < json.loads(result.stdout)["heldout"]["bits_per_byte"]
    assert {p.name for p in (out / "checkpoint").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "heldout.jsonl", "training.json", "loss.png"),
    }
    rows = [json.loads(line) for line in (out / "checkpoint/heldout.jsonl").read_text().splitlines()]
    assert rows
    assert all((sources / row["path"]).read_text() == row["text"] for row in rows)


def test_errors_name_unknown_settings() -> None:
    assert apply_settings(Recipe(), ["muon_lr=0.5", "vocab_size=512", "decay=0.1"]).model.vocab_size == 512
    with pytest.raises(ValueError, match="unknown field"):
        apply_settings(Recipe(), ["nonsense=1"])
    with pytest.raises(ValueError, match="expected a JSON value"):
        apply_settings(Recipe(), ["muon_lr=fast"])


def test_checkpoint_is_fp8_and_loads_back(tiny: ModelConfig, tmp_path: Path, sources: Path) -> None:
    from farthing_lab.train.data import find_sources, train_tokenizer

    model = randomized(tiny)
    tokenizer = train_tokenizer((d.text for d in find_sources(sources)), tiny.vocab_size)
    size = save_checkpoint(model, tokenizer, tmp_path)
    assert size == (tmp_path / "model.safetensors").stat().st_size
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        for name in names:
            dtype = file.get_tensor(name).dtype
            if is_quantized(name):
                assert dtype == torch.float8_e4m3fn
                assert f"{name}_scale_inv" in names
            elif name.endswith("_scale_inv") or ".mlp.gate." in name:
                assert dtype == torch.float32
            else:
                assert dtype == torch.bfloat16
    assert "lm_head.weight" not in names
    assert not any("shared_head.head" in n or "layers.3.embed_tokens" in n for n in names)
    tokens = torch.randint(0, tiny.vocab_size, (1, 40))
    with torch.no_grad():
        a, b = model.logits(model(tokens)), load_checkpoint(tmp_path).eval().logits(model(tokens))
    assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.999


def test_chat_template_renders(tiny: ModelConfig, tmp_path: Path, sources: Path) -> None:
    import jinja2

    from farthing_lab.train.export import CHAT_TEMPLATE

    messages = [
        {"role": "system", "content": "S1"},
        {"role": "system", "content": "S2"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>no</think>yes"},
        {"role": "user", "content": "again"},
    ]
    text = jinja2.Template(CHAT_TEMPLATE).render(
        messages=messages, bos_token="[B]", eos_token="[E]", add_generation_prompt=True
    )
    assert text == "[B]S1\n\nS2<｜User｜>hi<｜Assistant｜>yes[E]<｜User｜>again<｜Assistant｜>"


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 80), length=st.integers(2, 20), data=st.data())
def test_windows_score_every_target_once(n: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    ids = np.arange(n).astype(np.uint16)
    scored: list[int] = []
    for window, skip in windows(ids, length, stride):
        assert 2 <= len(window) <= length + 1
        fresh = window[1 + skip :].tolist()
        if scored:
            assert fresh[0] - int(window[0]) > length - stride  # context before the first new target
        scored += fresh
    assert scored == list(range(1, n))


def test_bits_per_byte_of_a_uniform_model(tiny: ModelConfig) -> None:
    """An untrained model needs log2(vocabulary) bits per token."""
    model = DeepSeekLM(tiny).eval()
    with torch.no_grad():
        model.embed_tokens.zero_()
    ids = np.array([0, 5, 6, 7, 1], dtype=np.uint16)
    result = evaluate(model, [ids], ["abcdef"], length=16)
    assert result["bits_per_byte"] == pytest.approx(3 * np.log2(tiny.vocab_size) / 6, rel=1e-5)
    assert (result["eval_tokens"], result["eval_bytes"]) == (3, 6)
    assert result["mtp_acceptance"] == 1.0  # every argmax is token 0


def test_evaluation_does_not_depend_on_windows_when_one_suffices(tiny: ModelConfig) -> None:
    model = randomized(tiny)
    ids = np.array([0, *np.random.default_rng(0).integers(3, 300, 40), 1], dtype=np.uint16)
    whole = evaluate(model, [ids], ["x" * 40], length=64)
    tokens = torch.from_numpy(ids[:-1].astype(np.int64))[None]
    with torch.no_grad():
        logits = model.logits(model(tokens[:, :-1]))[0]
    assert whole["eval_loss"] == pytest.approx(F.cross_entropy(logits, tokens[0, 1:]).item(), rel=1e-5)


def test_greedy_mtp_loss_only_teaches_the_mtp_layer(tiny: ModelConfig) -> None:
    tokens = torch.randint(0, tiny.vocab_size, (2, 20))
    gradients = []
    for weight in (0.0, 0.5):
        model = randomized(tiny).train()
        model.loss(tokens, weight, mtp_greedy=True)["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    without, with_mtp = gradients
    for name, grad in with_mtp.items():
        if name.startswith("mtp."):
            assert grad is not None, name
        else:
            torch.testing.assert_close(grad, without[name], msg=name)
