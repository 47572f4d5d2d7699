"""Calibration of adaptive experts: the knapsack against brute force, the bound on a model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.checkpoint.reader import Checkpoint
from farthing.compress import api
from farthing.compress.adaptive import Option, calibrate_adaptive, fewest_experts, write_adaptive
from farthing.compress.api import Options, compress
from farthing.compress.evaluate import Corpus, Window, halves
from farthing.compress.recipe import RECIPES
from farthing.model.config import ModelConfig
from farthing.model.load import AdaptiveExperts, random_model
from farthing.ops.select import select
from tests.tiny import SMALL_V3

layer = st.lists(
    st.tuples(st.floats(0, 0.02), st.floats(1, 8)).map(lambda t: Option(0.5, *t)), min_size=1, max_size=3
).map(lambda row: [*row, Option(1.0, 0.0, 8.0)])


@given(options=st.lists(layer, min_size=1, max_size=4), budget=st.floats(0.001, 0.05))
@settings(max_examples=60)
def test_knapsack_meets_the_budget_and_is_nearly_optimal(options: list[list[Option]], budget: float) -> None:
    picks = fewest_experts(options, budget)
    chosen = [row[i] for row, i in zip(options, picks, strict=True)]
    assert sum(o.loss for o in chosen) <= budget * (1 + 1e-9)
    # Losses are rounded up to 1/400 of the budget, so the optimum of a slightly smaller budget is reached.
    tight = budget * (1 - len(options) / 400)
    best = min(
        sum(o.experts for o in pick)
        for pick in itertools.product(*options)
        if sum(o.loss for o in pick) <= tight
    )
    assert sum(o.experts for o in chosen) <= best + 1e-9


def test_calibrated_rule_stays_within_its_bound(tmp_path: Path) -> None:
    config = ModelConfig.from_json(SMALL_V3 | dict(num_experts_per_tok=4, topk_group=2))
    model = random_model(config, select("reference"), seed=2)
    ids = torch.randint(0, 40, (40, 33), generator=torch.Generator().manual_seed(0))
    corpus = Corpus([Window(row, i) for i, row in enumerate(ids)], 0)
    calls: list[int] = []
    plan = calibrate_adaptive(model, corpus, 0.05, on_trial=lambda done, total: calls.append(total - done))
    assert calls[-1] == 0
    assert plan.drop < plan.most_drop <= 0.05 + 1e-6
    assert 0 < plan.flops_saved < 1
    assert len(plan.rule.mass) == 4
    with pytest.raises(ValueError, match="no MoE layer"):
        dense = ModelConfig.from_json(SMALL_V3 | dict(first_k_dense_replace=9))
        calibrate_adaptive(random_model(dense, select("reference")), corpus, 0.01)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(SMALL_V3))
    (source / "tokenizer.json").write_text("{}")
    write_adaptive(source, tmp_path / "out", plan, model)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert AdaptiveExperts.from_json(written) == plan.rule
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_halves_share_no_document() -> None:
    ids = torch.arange(9)
    corpus = Corpus([Window(ids[: n + 1], d) for d, n in ((0, 8), (0, 3), (1, 4), (2, 4), (3, 2))], 9)
    one, other = halves(corpus)
    assert {w.document for w in one.windows} == {0} and {w.document for w in other.windows} == {1, 2, 3}
    assert one.tokens + other.tokens == corpus.tokens
    with pytest.raises(ValueError, match="one document; expected at least two"):
        halves(Corpus(corpus.windows[:2], 0))


def test_recipe_chooses_and_evaluates_on_different_text(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Corpus] = []

    def spy(name: str, position: int) -> None:
        real = getattr(api, name)

        def call(*args: Any) -> Any:
            seen.append(args[position])
            return real(*args)

        monkeypatch.setattr(api, name, call)

    spy("_adapt", 3)
    spy("_measure", 3)
    options = Options(data=data, window=64, backend="reference")
    compress(model_dir, tmp_path / "out", RECIPES["adaptive-experts"], options)
    chosen, judged = ({w.document for w in corpus.windows} for corpus in seen)
    assert chosen and judged and not chosen & judged


def test_recipe_writes_a_rule_and_keeps_the_weights(model_dir: Path, data: Path, tmp_path: Path) -> None:
    options = Options(calibration=data, data=data, backend="reference", window=64)
    outcome = compress(model_dir, tmp_path / "out", RECIPES["adaptive-experts"], options)
    document = outcome.to_json()
    assert document["size_after"] == document["size_before"]
    assert document["drop"] < 0.05
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    rule = AdaptiveExperts.from_json(written)
    assert rule is not None
    report = json.loads(Path(document["report"]).read_text())
    assert report["recipe"]["calibrated"]["rule"]["mass"] == list(rule.mass)
    checkpoint = Checkpoint.open(model_dir)
    routed = sum(checkpoint.nbytes(n) for n in checkpoint.names() if ".experts." in n and "layers.3" not in n)
    before, after = (report["sizes"][when]["token"] for when in ("before", "after"))
    share = report["recipe"]["calibrated"]["flops_saved"]  # 2 of 8 experts per token, minus the saved ones
    assert before - after == pytest.approx(share * routed * 2 / 8, abs=2)
