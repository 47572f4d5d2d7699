"""Recipes of the command line and of files: overrides, units and errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from farthing.checkpoint.reader import Checkpoint
from farthing.cli.compress import app
from farthing.compress.api import Options, compress
from farthing.compress.recipe import known_recipes, load_recipe

RECIPES = known_recipes()


def test_the_command_and_its_gate(model_dir: Path, data: Path, tmp_path: Path) -> None:
    files = ["--calibration", str(data), "--data", str(data), "--no-timing", "--json"]
    args = [str(model_dir), "--recipe", "int8", "-o", str(tmp_path / "a"), *files, "--max-drop", "50%"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert {"size_before", "size_after", "drop", "drop_interval", "seconds", "peak_memory", "report"} <= set(
        document
    )
    assert document["verdict"] == "pass"
    assert document["bytes_per_token_after"] < document["bytes_per_token_before"]
    budget = [str(model_dir), "--recipe", "auto", "--budget", "1kB", "--measure", "token", "--no-gate"]
    (tmp_path / "auto.yaml").write_text("base: auto\ncalibration_tokens: 600\n")
    budget[2] = str(tmp_path / "auto.yaml")
    result = CliRunner().invoke(app, [*budget, "-o", str(tmp_path / "c"), "--calibration", str(data)])
    assert result.exit_code == 2 and "budget_bytes: got 1,000 (weights read per decoded" in result.output
    result = CliRunner().invoke(app, [*args[:2], "int8", "--budget", "1kB", "-o", str(tmp_path / "d")])
    assert (
        result.exit_code == 2
        and "--budget: got '1kB' with recipe 'int8'; expected --recipe auto" in result.output
    )
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("base: int4-rtn\ngroup_size: 32\nignore: ['*.o_proj']\n")
    result = CliRunner().invoke(
        app, [str(model_dir), "--recipe", str(yaml), "-o", str(tmp_path / "b"), *files, "--max-drop", "0%"]
    )
    assert result.exit_code in (1, 3), result.output
    checkpoint = Checkpoint.open(tmp_path / "b")
    assert checkpoint.weight("model.layers.0.self_attn.o_proj").format == "dense"
    assert checkpoint.weight("model.layers.0.mlp.up_proj").group_size == 32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scheme: int7", "scheme: got 'int7'; expected one of"),
        ("grup_size: 3", "grup_size: unknown field; expected one of name, scheme"),
        ("prune: {sparsity: 2}", r"prune\.sparsity: got 2\.0; expected a share"),
        ("prune: {shares: {'*': 2}}", r"prune\.shares\['\*'\]: got 2\.0; expected a share"),
        ("prune: {shares: {'*': many}}", r"prune\.shares\['\*'\]: got 'many'; expected a number"),
        ("prune: {heal_steps: few}", "prune.heal_steps: got 'few'; expected a whole number"),
        ("prune: {scope: global}", "prune.score: got 'obs' with prune.scope 'global'; expected one of"),
        ("experts: 1.5", "experts: got 1.5; expected a share"),
        ("ignore: '*.o_proj'", r"ignore: got '\*\.o_proj'; expected a list"),
        ("calibration_tokens: many", "calibration_tokens: got 'many'; expected a whole number"),
        ("act_order: 1", "act_order: got 1; expected true or false"),
        ("max_drop: 1%", "max_drop: got '1%'; expected a number"),
        ("base: auto\nmax_drop: -1", r"max_drop: got -1\.0; expected a share"),
        ("base: auto\nbudget_bytes: 5 bits", "budget_bytes: got '5 bits'; expected bytes such as"),
        ("base: auto\nmeasure: disk", "measure: got 'disk'; expected one of"),
        ("budget_bytes: 5MB", "budget_bytes: got 5000000, but scheme is 'int8'; expected scheme 'auto'"),
        ("base: nothing", "base: got 'nothing'; expected one of"),
        ("- a", "expected a mapping"),
    ],
)
def test_bad_recipes(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    ("text", "size"), [(1500, 1500), ("1500", 1500), ("1.5kB", 1500), ("2 MiB", 2**21), ("1e3B", 1000)]
)
def test_a_budget_in_units(text: str | int, size: int, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"base: auto\nbudget_bytes: {text}\nmeasure: token\n")
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert (recipe.budget_bytes, recipe.measure, recipe.allowed_drop) == (size, "token", None)
    assert replace(recipe, budget_bytes=None).allowed_drop == 0.01


def test_predictable_failures_happen_before_the_work(model_dir: Path, data: Path, tmp_path: Path) -> None:
    for recipe, options, words in (
        (
            "auto",
            Options(data, data, export="deepseek-fp8"),
            "scheme of recipe auto is 'auto'; expected 'fp8'",
        ),
        ("auto", Options(data, data, export="gguf"), "format: got 'gguf'; expected one of auto, "),
        ("int8", Options(data, data, backend="tpu"), "backend: got 'tpu'; expected 'auto' or one of"),
        ("int8", Options(data, tmp_path / "none"), "data: got .*none', which does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            compress(model_dir, tmp_path / "out", RECIPES[recipe], options)
        assert not (tmp_path / "out").exists()


def test_error_for_unknown_recipe_lists_known_ones() -> None:
    with pytest.raises(ValueError, match="int8-kl"):
        load_recipe("int7")
