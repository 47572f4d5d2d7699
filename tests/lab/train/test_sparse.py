"""Sparse attention in training: selection, the indexer's loss, and the exported checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from farthing.cli.app import app
from farthing.model.config import ModelConfig
from farthing.model.load import load
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing_lab.train.export import load_checkpoint, save_checkpoint
from farthing_lab.train.model import (
    DeepSeekLM,
    Indexer,
    attend,
    divergence,
    index_scores,
    largest,
    random_keys,
    recent,
)
from farthing_lab.train.sparse_run import SparseConfig, configured, stage_loss, train_sparse, with_indexer
from tests.lab.train.conftest import random_checkpoint, settings_of

SPARSE = SparseConfig(index_topk=8, index_n_heads=4, index_head_dim=16, warmup_tokens=320)


def test_every_selection_reads_k_earlier_keys() -> None:
    torch.manual_seed(0)
    scores = index_scores(torch.randn(2, 9, 3, 4), torch.randn(2, 9, 4), torch.rand(2, 9, 3))
    for pick in (largest, recent, random_keys):
        keys = pick(scores, 4)
        assert keys.sum(-1).tolist() == [[1, 2, 3, 4, 4, 4, 4, 4, 4]] * 2
        assert not keys.triu(1).any()
    assert recent(scores, 4)[0, 8].tolist() == [False] * 5 + [True] * 4
    assert random_keys(scores, 4).diagonal(dim1=-2, dim2=-1).all()


def test_divergence_is_zero_if_scores_are_the_logarithm_of_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    keys = torch.ones(6, 6, dtype=torch.bool).tril()[None]
    _, target = attend(q, k, v, 0.3, keys)
    assert divergence(target, target.log(), keys).abs() < 1e-6
    assert divergence(target, torch.zeros_like(target), keys) > 0.01


def test_stages_train_their_parameters(tiny: ModelConfig) -> None:
    torch.manual_seed(0)
    model = with_indexer(DeepSeekLM(tiny), SPARSE, 0).train()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.1
    tokens = torch.randint(0, tiny.vocab_size, (2, 33))
    stage_loss("sparse", model, tokens, SPARSE)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "indexer.wk" in n)
    model.zero_grad()
    (divergence_of,) = (i.divergence for i in [next(m for m in model.modules() if isinstance(m, Indexer))])
    assert divergence_of is not None
    for name, p in model.named_parameters():
        p.requires_grad_(".indexer." in name)
    stage_loss("warmup", model, tokens, SPARSE)["loss"].backward()
    assert {n.partition("indexer")[1] for n, p in model.named_parameters() if p.grad is not None} == {
        "indexer"
    }


def test_engine_computes_the_trained_model(tiny: ModelConfig, tmp_path: Path, sources: Path) -> None:
    """The exported checkpoint of type deepseek_v32 with the paged cache."""
    dense = load_checkpoint(random_checkpoint(tiny, tmp_path / "dense", sources))
    model = with_indexer(dense, dataclasses.replace(SPARSE, index_n_heads=24), 0).eval()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "dense" / "tokenizer.json"))
    save_checkpoint(model, tokenizer, tmp_path / "sparse")
    stored = load_checkpoint(tmp_path / "sparse").eval()
    ids = torch.randint(0, tiny.vocab_size, (40,), generator=torch.manual_seed(0))
    ours = load(tmp_path / "sparse", select("reference", dtype=torch.float32))
    with torch.no_grad():
        expected = stored.logits(stored(ids[None]))[0]
        batch = make_batch([40], [0], [list(range(3))], 16)
        found = ours.logits(ours.forward(ids, batch, ours.new_cache(3, 16, "float32")))
        without = dense.eval().logits(dense(ids[None]))[0]
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (without - expected).abs().max() > 1e-2 * expected.abs().max()


def test_run_resumes_and_reports(checkpoint: Path, tmp_path: Path, sources: Path) -> None:
    settings = settings_of(checkpoint, tmp_path / "run", sources)
    summary = train_sparse(settings, SPARSE)
    assert summary is not None
    rises = summary["rise_over_dense"]
    assert set(rises) >= {"sparse", "dense", "untrained indexer", "random keys", "most recent keys"}
    assert rises["dense"]["all"] == [0.0, 0.0, 0.0]
    assert load(tmp_path / "run" / "checkpoint", select("reference")).config.index_topk == 8
    with pytest.raises(ValueError, match="already has a run"):
        train_sparse(settings, SPARSE)
    again = train_sparse(settings, SPARSE, resume=True)
    assert again is not None and again["perplexity"] == summary["perplexity"]


def test_settings_by_name() -> None:
    config, changed = configured(["index_topk=64", "window=256"])
    assert config.index_topk == 64 and changed == {"window": 256}
    with pytest.raises(ValueError, match="unknown field"):
        configured(["nonsense=1"])


def test_precision_is_rejected() -> None:
    run = CliRunner().invoke(app, ["train", "mite", "--sparse-attention", "--precision", "fp8"])
    assert run.exit_code == 2
    assert "--precision: got 'fp8'; expected 'bf16' with --sparse-attention" in run.output
