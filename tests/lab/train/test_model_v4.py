"""DeepSeek-V4 for training, against the engine's reference; its indexer; its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from farthing.model.config import ConfigError, ModelConfig
from farthing.model.load import load, model_of
from farthing.model.source import MemorySource
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing_lab.cli.train import app
from farthing_lab.train import export
from farthing_lab.train.mite import MITE_V4, Recipe, apply_settings
from farthing_lab.train.model_v4 import DeepSeekV4LM, Index, RootRouter

CHANGES = (
    *(
        "num_hidden_layers=3",
        "vocab_size=400",
        "hidden_size=64",
        "moe_intermediate_size=32",
        "num_attention_heads=4",
    ),
    *(
        "num_attention_heads=4",
        "head_dim=32",
        "qk_rope_head_dim=16",
        "q_lora_rank=32",
        "o_lora_rank=24",
        "n_routed_experts=8",
    ),
    *("num_experts_per_tok=3", "index_head_dim=16", "index_n_heads=2", "max_position_embeddings=512"),
    *("compress_ratios=[0,4,128]", "hc_mult=2", "hc_sinkhorn_iters=3"),
)
TINY = apply_settings(Recipe(MITE_V4), list(CHANGES)).model


def randomized(cfg: ModelConfig = TINY) -> DeepSeekV4LM:
    """A model of which every tensor matters."""
    torch.manual_seed(3)
    model = export.model_of(cfg)
    assert isinstance(model, DeepSeekV4LM)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        for module in model.modules():
            if isinstance(module, RootRouter):
                module.e_score_correction_bias.normal_(std=0.1)
    return model.eval()


def served(cfg: ModelConfig, tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The engine's logits of a sequence."""
    model = model_of(cfg, select("reference", torch.float32), MemorySource(tensors))
    blocks = len(ids) // 128 + 1
    cache = model.new_cache(blocks, 128, "float32")
    batch = make_batch([len(ids)], [0], [list(range(blocks))], 128)
    with torch.inference_mode():
        return model.logits(model.forward(ids, batch, cache))


def test_fields_describe_the_architecture() -> None:
    assert ModelConfig.from_json(export.to_json(TINY)) == TINY
    with pytest.raises(ConfigError, match="sliding_window, compress_ratios: got 64"):
        export.model_of(apply_settings(Recipe(TINY), ["sliding_window=64"]).model)


@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 300])
def test_logits_equal_the_engines(length: int) -> None:
    model, ids = randomized(), torch.arange(length) * 7 % TINY.vocab_size
    with torch.no_grad():
        mine = model.logits(model(ids[None]))[0]
    theirs = served(TINY, dict(export._views(model)), ids)
    assert (mine - theirs).norm() < 1e-5 * theirs.norm()


def test_selection_drops_the_entry_with_the_lowest_score() -> None:
    """As the engine's does, where one of 65 entries has to go."""
    cfg = TINY.selecting(64)
    model, ids = randomized(cfg), torch.arange(262) * 11 % cfg.vocab_size
    with torch.no_grad():
        mine, dense = model.logits(model(ids[None]))[0], randomized().logits(randomized()(ids[None]))[0]
    theirs = served(cfg, dict(export._views(model)), ids)
    assert (mine - theirs).norm() < 1e-5 * theirs.norm()
    assert not torch.allclose(mine[-1], dense[-1]) and torch.equal(mine[:200], dense[:200])


def test_only_the_indexer_learns_from_its_divergence() -> None:
    model = randomized().train()
    losses = model.loss(torch.randint(0, TINY.vocab_size, (2, 130)))
    assert losses["index"] > 0 and losses["loss"] == losses["main"] + losses["index"]
    index = next(m for m in model.modules() if isinstance(m, Index))
    assert index.divergence is not None
    index.divergence.backward()
    own = {id(p) for p in index.parameters()}
    assert all(p.grad is not None for p in index.parameters())
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


def test_checkpoint_has_the_published_layout(tmp_path: Path, sources: Path) -> None:
    from farthing_lab.train.data import find_sources, train_tokenizer

    model = randomized()
    tokenizer = train_tokenizer((d.text for d in find_sources(sources)), TINY.vocab_size)
    export.save_checkpoint(model, tokenizer, tmp_path)
    stored = export.load_checkpoint(tmp_path)
    ids = torch.arange(140) % TINY.vocab_size
    with torch.no_grad():
        expected = stored.logits(stored(ids[None]))[0]
    engine = load(tmp_path, select("reference", torch.float32))
    cache, batch = engine.new_cache(2, 128, "float32"), make_batch([140], [0], [[0, 1]], 128)
    with torch.inference_mode():
        found = engine.logits(engine.forward(ids, batch, cache))
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_command_trains_it(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = ["--set", "heldout_every=12", "--set", "micro_tokens=512", "--set", "batch_stages=[[0,512]]"]
    run += ["--set", "window_stages=[[0,128]]", *(word for change in CHANGES for word in ("--set", change))]
    base = ["mite", "--arch", "v4", "--out", str(out), "--data", str(sources), "--device", "cpu", "--json"]
    found = []
    for length in (["--tokens", "1024"], ["--tokens", "4096", "--resume"]):
        result = CliRunner().invoke(app, [*base, *run, *length])
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout)["heldout"]["bits_per_byte"])
    assert found[1] < found[0]
