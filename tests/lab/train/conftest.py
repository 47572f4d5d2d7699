"""Small models and texts for the trainer's tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.writer import CheckpointWriter
from farthing.model.config import ModelConfig
from farthing_lab.train import data
from farthing_lab.train.export import load_checkpoint, save_checkpoint, to_json
from farthing_lab.train.finetune import Settings, Text
from farthing_lab.train.model import DeepSeekLM
from tests.tiny import tiny as tiny_config

TINY = ModelConfig.from_json(
    tiny_config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        tie_word_embeddings=True,
    )
)


@pytest.fixture
def tiny() -> ModelConfig:
    """A model of a few ten thousand parameters with every part of the architecture."""
    return TINY


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A directory of 60 small different Python files, one exact copy and one near copy."""
    rng = random.Random(0)
    root = tmp_path / "sources"
    root.mkdir()
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    for i in range(60):
        lines = []
        for _ in range(20):
            a, b = rng.choice(words), rng.choice(words)
            lines.append(
                f"def {a}_{b}_{i}_{rng.randrange(1000)}(x):\n    return x + {rng.randrange(10**6)}\n"
            )
        (root / f"module_{i:02}.py").write_text("\n".join(lines))
    original = (root / "module_00.py").read_text()
    (root / "copy_exact.py").write_text(original)
    (root / "copy_near.py").write_text(original + "# one more line at the end of the file\n")
    return root


def changed(config: ModelConfig, **change: Any) -> ModelConfig:
    """The config with other values of its config.json."""
    return ModelConfig.from_json(to_json(config) | change)


@pytest.fixture
def wide(tiny: ModelConfig) -> ModelConfig:
    """The tiny model, with columns divisible into groups of 32."""
    return changed(tiny, kv_lora_rank=32, v_head_dim=32)


@pytest.fixture
def checkpoint(wide: ModelConfig, tmp_path: Path, sources: Path) -> Path:
    """A random model with its tokenizer."""
    return random_checkpoint(wide, tmp_path / "model", sources)


def random_checkpoint(cfg: ModelConfig, out: Path, sources: Path) -> Path:
    torch.manual_seed(0)
    model = DeepSeekLM(cfg)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.5 if "embed" in name else p.shape[-1] ** -0.5)
    tokenizer = data.train_tokenizer((d.text for d in data.find_sources(sources)), cfg.vocab_size)
    save_checkpoint(model, tokenizer, out, fp8=False)
    return out


def sharded(checkpoint: Path, out: Path) -> Path:
    """A copy of a checkpoint in shards with an index."""
    source, writer = Checkpoint.open(checkpoint), CheckpointWriter(out, max_shard_bytes=100_000)
    for name in source.names():
        writer.add(name, source.tensor(name))
    writer.close(source.config, copy_from=checkpoint)
    return out


def settings_of(checkpoint: Path, out: Path, sources: Path) -> Settings:
    return Settings(
        checkpoint, out, tokens=640, window=32, batch_tokens=64, root=sources, heldout_every=4, eval_tokens=64
    )


def learn(checkpoint: Path, settings: Settings) -> None:
    """Train the checkpoint on its text, so that it predicts better than token frequencies do."""
    model, text = load_checkpoint(checkpoint), Text.load(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(text.batches.next(8, 32))["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    save_checkpoint(model, text.tokenizer, checkpoint, fp8=False)
