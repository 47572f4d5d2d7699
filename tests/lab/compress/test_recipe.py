"""Recipes of the laboratory on whole models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.writer import CheckpointWriter
from farthing.compress.api import Options, compress
from farthing.compress.evaluate import Corpus, paged_batch
from farthing.compress.recipe import load_recipe
from farthing.compress.stream import Compression, run
from farthing.model.load import load
from farthing.ops.api import Place
from farthing.ops.select import select
from farthing_lab.compress.recipe import RECIPES, Study
from farthing_lab.compress.settings import Prune
from tests.compress.conftest import corpus_of, write_model
from tests.compress.test_stream import SMALL, UNEQUAL, reference_logits


def test_rotation_and_scaling_preserve_the_function(model_dir: Path, corpus: Corpus, tmp_path: Path) -> None:
    ids = torch.arange(2, 60)
    expected = reference_logits(model_dir, ids)
    for i, scaling in enumerate(("awq", "smoothquant")):
        recipe = Study("exact", "keep", scaling=scaling, rotate=True)  # type: ignore[arg-type]
        run(Compression(model_dir, tmp_path / str(i), recipe, corpus))
        actual = reference_logits(tmp_path / str(i), ids)
        assert float((actual - expected).norm() / expected.norm()) < 1e-3
        before, after = (Checkpoint.open(p) for p in (model_dir, tmp_path / str(i)))
        name = "model.layers.0.self_attn.kv_b_proj.weight"
        assert not torch.allclose(before.tensor(name), after.tensor(name), atol=1e-3)


def test_dropping_experts_keeps_the_most_salient_of_each_group(data: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", n_group=2, topk_group=1, num_nextn_predict_layers=0)
    corpus = corpus_of(data, source, 64, SMALL)
    run(Compression(source, tmp_path / "out", Study("x", "keep", experts=0.5, neurons=0.5), corpus))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_routed_experts"], config["moe_intermediate_size"]) == (4, 32)
    model = load(source, select("reference"))
    ids = torch.cat([w.ids[:-1] for w in corpus.windows])
    batch, blocks = paged_batch([w.tokens for w in corpus.windows])
    cache = model.new_cache(blocks, 16, "float32")
    model.rotations.reach(batch)
    h = model.ops.embed(ids, model.embedding)
    (attention, mlp), (attention1, moe) = model.layers[:2]
    h, _ = attention(h, Place(cache, 0, batch))
    h, _ = attention1(mlp(h), Place(cache, 1, batch))
    n = model.ops.rms_norm(h, moe.norm)
    chosen, gates = model.ops.route(n, moe.packed)
    saliency = []
    for e, (gate, up, down) in enumerate(moe.packed.experts):
        token, slot = torch.where(chosen == e)
        out = (torch.nn.functional.silu(n[token] @ gate.T) * (n[token] @ up.T)) @ down.T
        saliency.append(float((out.norm(dim=-1) * gates[token, slot]).mean()) if len(token) else 0.0)
    best = [sorted(range(g, g + 4), key=lambda e: -saliency[e])[:2] for g in (0, 4)]
    kept = sorted(best[0]) + sorted(best[1])
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    router = "model.layers.1.mlp.gate.weight"
    assert torch.equal(before.tensor(router)[kept], after.tensor(router))


@pytest.mark.parametrize("name", ["prune30-block16", "int4-block16-40"])
def test_whole_blocks_are_zero_in_the_files(
    name: str, model_dir: Path, corpus: Corpus, tmp_path: Path
) -> None:
    prune = RECIPES[name].prune
    assert prune is not None
    run(Compression(model_dir, tmp_path, replace(RECIPES[name], prune=replace(prune, heal_steps=2)), corpus))
    checkpoint = Checkpoint.open(tmp_path)
    for part in ("gate", "up", "down"):
        blocks = [
            checkpoint.weight(f"model.layers.1.mlp.experts.{e}.{part}_proj").dequantize() for e in range(8)
        ]
        zero = torch.stack(blocks).view(8, 4, 16, 4, 16).eq(0).all(4).all(2)
        # a block with little energy may also round to zero, hence at least
        assert float(zero.double().mean()) == pytest.approx(prune.sparsity, abs=0.02)
    assert checkpoint.weight("model.layers.1.self_attn.o_proj").dequantize().ne(0).double().mean() > 0.8


@pytest.mark.parametrize("pattern", ["unstructured", "16x16"])
def test_one_threshold_over_all_layers(pattern: Any, model_dir: Path, tmp_path: Path) -> None:
    """Against sorting every weight (or block) of the model."""
    prune = Prune(pattern, 0.3, "magnitude", "global", "none", "all")
    source, writer = Checkpoint.open(model_dir), CheckpointWriter(tmp_path / "source")
    step = 1 if pattern == "unstructured" else 0.05  # sums over a block differ less
    for i, name in enumerate(source.names()):  # matrices of different magnitudes
        writer.add(name, source.tensor(name) * (1 + step * (i % 5) if "_proj" in name else 1))
    writer.close(source.config, copy_from=model_dir)
    run(Compression(tmp_path / "source", tmp_path / "out", Study("x", "keep", prune=prune), None))
    before, after = Checkpoint.open(tmp_path / "source"), Checkpoint.open(tmp_path / "out")
    names = [n for n in before.names() if n.endswith("_proj.weight") or "kv_a_proj_with_mqa" in n]
    scores, kept = [], []
    for name in names:
        score, keep = before.tensor(name).abs(), after.tensor(name) != 0
        if pattern == "16x16":
            score, keep = (t.float().unfold(0, 16, 16).unfold(1, 16, 16).sum((2, 3)) for t in (score, keep))
        scores.append(score.flatten())
        kept.append(keep.flatten() != 0)
    threshold = torch.cat(scores).sort().values[round(0.3 * sum(map(len, scores)))]
    agree = (torch.cat(scores) >= threshold) == torch.cat(kept)
    assert float(agree.float().mean()) > 0.99  # the histogram's bins are 1/512 wide
    assert float((~torch.cat(kept)).float().mean()) == pytest.approx(
        0.3, abs=0.01
    )  # no matrix loses more than 90 %
    shares = [float((~k).float().mean()) for k in kept]
    assert max(shares) > 2 * min(shares)


def test_healing_reduces_the_error_and_keeps_zeros(model_dir: Path, corpus: Corpus, tmp_path: Path) -> None:
    prune = Prune("16x16", 0.5, heal_steps=60)
    state = run(Compression(model_dir, tmp_path / "healed", Study("x", "keep", prune=prune), corpus))
    assert [h["layer"] for h in state.healed] == [0, 1, 2]
    assert all(h["after"] < h["before"] for h in state.healed)
    unhealed = Study("x", "keep", prune=replace(prune, heal_steps=0))
    run(Compression(model_dir, tmp_path / "not", unhealed, corpus))
    healed, plain = (Checkpoint.open(tmp_path / p) for p in ("healed", "not"))
    name = "model.layers.0.mlp.up_proj.weight"  # the first layer's mask cannot depend on healing
    a, b = healed.tensor(name), plain.tensor(name)
    assert torch.equal(a == 0, b == 0) and not torch.equal(a, b)


def test_experts_of_layers_with_different_sizes_are_not_dropped(data: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", layer_sizes=UNEQUAL)
    with pytest.raises(ValueError, match=r"experts: got 0\.25, but the layers of this model already differ"):
        compress(source, tmp_path / "out", RECIPES["experts-reap"], Options(data, data, window=64))
    odd = write_model(tmp_path / "odd", layer_sizes=[{"intermediate_size": 40}, {}, {}, {}])
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.gate_proj is 40x64, which blocks of 16x16 do not tile"
    ):
        compress(odd, tmp_path / "out", RECIPES["prune30-block16"], Options(data, data, window=64))


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("scheme: int8\nactivations: best\n", "activations", "best"),  # a value that only this package has
        ("prune:\n  pattern: 2:4\n", "prune", Prune("2:4")),  # not a number in base 60
        ("base: int8\nscaling: awq\n", "scaling", "awq"),
        (
            "base: prune-2of4\nprune: {heal_steps: 5}\n",
            "prune",
            Prune("2:4", 0.5, scope="matrix", heal_steps=5),
        ),
    ],
)
def test_recipe_files_have_the_fields_and_values_of_this_package(
    tmp_path: Path, text: str, field: str, value: object
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert isinstance(recipe, Study) and getattr(recipe, field) == value


def test_unknown_field_is_named_beside_fields_of_this_package(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("scaling: awq\nschme: int8\n")
    with pytest.raises(ValueError, match=r"schme: unknown field; expected one of name, .*scaling"):
        load_recipe(str(tmp_path / "r.yaml"))
