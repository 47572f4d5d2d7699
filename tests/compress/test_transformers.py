"""transformers 5.24 on every recipe's files, for models with experts: it loads them and agrees, or the report
lists why it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.compress.api import Options, compress
from farthing.compress.evaluate import PAGE, paged_batch
from farthing.compress.recipe import Recipe, known_recipes
from farthing.hub import resolve_model
from farthing.model.load import load
from farthing.ops.select import select
from farthing_lab.compress.recipe import Study
from tests.compress.conftest import widen_scales, write_model

RECIPES = known_recipes()

# Experts and matrices of several FP8 blocks, so that a scale per matrix differs from a scale per block.
WIDE = {
    "hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256, "q_lora_rank": 128,
    "kv_lora_rank": 64, "v_head_dim": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64,
    "num_hidden_layers": 2,
}  # fmt: skip
FAST = ("int8", "int4-rtn", "fp8-block")
ALL = [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in RECIPES]


def ours(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Our logits in float32, rounding only weights."""
    model = load(path, select("reference"))
    batch, blocks = paged_batch([len(ids)])
    return model.logits(model.forward(ids, batch, model.new_cache(blocks, PAGE, "float32")))


def theirs(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of transformers without input rounding; it must find every tensor."""
    import transformers

    config = json.loads((path / "config.json").read_text())
    for group in config.get("quantization_config", {}).get("config_groups", {}).values():
        group["input_activations"] = None
    (path / "config.json").write_text(json.dumps(config))
    widen_scales(path)
    kind = getattr(transformers, config["architectures"][0])
    model, info = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        logits: torch.Tensor = model(ids[None]).logits[0]
    return logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def quick(recipe: Recipe) -> Recipe:
    if isinstance(recipe, Study) and recipe.prune is not None and recipe.prune.heal_steps:
        recipe = replace(recipe, prune=replace(recipe.prune, heal_steps=4))
    return recipe


def check(source: Path, out: Path, recipe: Recipe, ids: torch.Tensor, **options: Any) -> list[str]:
    """Compress, check the reported limits against transformers, and return them."""
    outcome = compress(source, out, quick(recipe), Options(gate=False, **options))
    limits = outcome.report.transformers_limits
    assert outcome.to_json()["transformers_limits"] == limits
    if limits:
        try:
            actual = theirs(out, ids)
        except Exception:
            return limits
        assert distance(actual, ours(out, ids)) > 1e-2, "it was said not to agree, and does"
    else:
        assert distance(theirs(out, ids), ours(out, ids)) < 1e-4
    return limits


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_loads_or_reports_why_not(name: str, data: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", **WIDE)
    ids = torch.randint(2, 258, (40,), generator=torch.Generator().manual_seed(3))
    limits = check(source, tmp_path / "out", RECIPES[name], ids, calibration=data)
    if name not in ("auto", "adaptive-experts", "int4"):
        assert not limits


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_on_the_embedded_model(name: str, tmp_path: Path) -> None:
    ids = torch.randint(16, 8192, (48,), generator=torch.Generator().manual_seed(3))
    recipe = replace(RECIPES[name], calibration_tokens=2048, window=256)
    limits = check(resolve_model("mite"), tmp_path / "out", recipe, ids)
    if name == "adaptive-experts":
        assert limits == ["it computes all experts of every token, which the adaptive rule does not"]
    elif name not in ("auto", "int4"):
        assert not limits


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        (RECIPES["int8"], {"export": "llm-compressor"}, "plain INT8"),
        (RECIPES["fp8-block"], {"export": "compressed-tensors"}, "FP8 blocks"),
        (Recipe("x", "int4", symmetric=False), {}, "zero points"),
        (RECIPES["fp8-block"], {"changes": {"moe_intermediate_size": 160}}, "do not tile model.layers.1"),
        (RECIPES["int4-rtn"], {"changes": {"moe_intermediate_size": 80}}, "int4 in groups of 64 and int8"),
        (Recipe("x", "int8", ignore=("*.experts.1.*",)), {}, "dense and int8"),
    ],
)
def test_transformers_limits_are_logged_before_the_start_and_reported(
    recipe: Recipe, options: Any, words: str, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = options.get("changes", {})
    options = {k: v for k, v in options.items() if k != "changes"}
    source = write_model(tmp_path / "source", **WIDE | changes)
    ids = torch.randint(2, 258, (40,), generator=torch.Generator().manual_seed(3))
    (limit,) = check(source, tmp_path / "out", recipe, ids, calibration=data, **options)
    assert words in limit
    (record,) = [r for r in caplog.records if "transformers 5.24 will not reproduce" in r.message]
    assert words in record.message
    assert words in (tmp_path / "out" / "report.html").read_text()
