"""Whole recipes on a tiny checkpoint: other software loads the result, and killed runs resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from farthing.checkpoint import Checkpoint, CheckpointWriter
from farthing.cli.compress import app
from farthing.compress import stream
from farthing.compress.api import Options, compress
from farthing.compress.corpus import Corpus
from farthing.compress.evaluate import paged_batch
from farthing.compress.gate import load_for
from farthing.compress.recipe import RECIPES, Prune, Recipe, load_recipe
from farthing.compress.stream import Job, run
from farthing.model import load
from farthing.ops import select
from tests.compress.conftest import corpus_of, write_model

SMALL = 600  # calibration tokens


@pytest.fixture(scope="module")
def corpus(model_dir: Path, data: Path) -> Corpus:
    return corpus_of(data, model_dir, 64, SMALL)


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.scheme != "auto" and not r.adaptive])
def test_engine_loads_the_result_of_every_recipe(
    name: str, model_dir: Path, data: Path, tmp_path: Path
) -> None:
    options = Options(calibration=data, data=data, backend="simulate", window=64)
    recipe = RECIPES[name]
    if recipe.prune is not None and recipe.prune.heal_steps:
        recipe = replace(recipe, prune=replace(recipe.prune, heal_steps=8))
    outcome = compress(model_dir, tmp_path / "out", recipe, options)
    document = outcome.to_json()
    assert document["size_after"] > 0 and document["drop_interval"][0] <= document["drop"]
    report = json.loads(Path(document["report"]).read_text())
    assert report["modules"] and all(0 <= m["error"] < 1 for m in report["modules"])
    assert (tmp_path / "out" / "report.html").read_text().count("<svg") >= 3
    assert not (tmp_path / "out" / stream.STATE).exists()
    checkpoint = Checkpoint.open(tmp_path / "out")
    for scale in (n for n in checkpoint.names() if "scale" in n):
        tensor = checkpoint.tensor(scale).float()
        assert bool((tensor > 0).all() and tensor.isfinite().all())
    for layer in ("1", "2", "3"):  # router and norms are unchanged, or exact in float32
        gate = checkpoint.tensor(f"model.layers.{layer}.mlp.gate.weight")
        assert gate.dtype == torch.float32
    assert document["drop"] < 0.5


def reference_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    model = load(path, select("reference"))
    batch, blocks = paged_batch([len(ids)])
    return model.logits(model.forward(ids, batch, model.new_cache(blocks, 16, "float32")))


WIDE = {"hidden_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 64}  # whole FP8 blocks


# With transformers' simulated input rounding; test_transformers.py covers every recipe without it.
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("int4-gptq", {}),
        ("int4-block16-40", {}),
        ("fp8-block", WIDE | {"first_k_dense_replace": 3}),
        ("experts-reap", {"n_group": 1, "topk_group": 1}),
        ("int8", {"first_k_dense_replace": 3}),
        ("int8-kl", {"first_k_dense_replace": 3}),
    ],
)
def test_transformers_loads_it_and_computes_the_same(
    name: str, changes: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source = write_model(tmp_path / "source", num_nextn_predict_layers=0, **changes)
    recipe, out = RECIPES[name], tmp_path / "out"
    run(Job(source, out, recipe, corpus_of(data, source, 64, SMALL) if recipe.needs_data else None))
    ids = torch.randint(2, 258, (40,), generator=torch.Generator().manual_seed(3))

    def distance(actual: torch.Tensor) -> float:
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            expected = theirs(ids[None]).logits[0]
        return float((actual - expected).norm() / expected.norm())

    # transformers also rounds the activations of kv_b, which our attention absorbs.
    model = load_for(out, "reference", simulate=True)
    batch, blocks = paged_batch([len(ids)])
    cache = model.new_cache(blocks, 16, "float32")
    assert distance(model.logits(model.forward(ids, batch, cache))) < 0.1
    config = json.loads((out / "config.json").read_text())
    for group in config.get("quantization_config", {"config_groups": {}})["config_groups"].values():
        group["input_activations"] = None
    (out / "config.json").write_text(json.dumps(config))
    assert distance(reference_logits(out, ids)) < 1e-4


def test_deepseek_format_round_trips_exactly(model_dir: Path, tmp_path: Path) -> None:
    run(Job(model_dir, tmp_path / "ds", RECIPES["fp8-block"], None, export="deepseek-fp8"))
    run(Job(model_dir, tmp_path / "ct", RECIPES["fp8-block"], None))
    ids = torch.arange(2, 40)
    assert torch.equal(reference_logits(tmp_path / "ds", ids), reference_logits(tmp_path / "ct", ids))
    config = json.loads((tmp_path / "ds" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"


def test_rotation_and_scaling_preserve_the_function(model_dir: Path, corpus: Corpus, tmp_path: Path) -> None:
    ids = torch.arange(2, 60)
    expected = reference_logits(model_dir, ids)
    for i, scaling in enumerate(("awq", "smoothquant")):
        recipe = Recipe("exact", "keep", scaling=scaling, rotate=True)  # type: ignore[arg-type]
        run(Job(model_dir, tmp_path / str(i), recipe, corpus))
        actual = reference_logits(tmp_path / str(i), ids)
        assert float((actual - expected).norm() / expected.norm()) < 1e-3
        before, after = (Checkpoint.open(p) for p in (model_dir, tmp_path / str(i)))
        name = "model.layers.0.self_attn.kv_b_proj.weight"
        assert not torch.allclose(before.tensor(name), after.tensor(name), atol=1e-3)


def test_dropping_experts_keeps_the_most_salient_of_each_group(data: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", n_group=2, topk_group=1, num_nextn_predict_layers=0)
    corpus = corpus_of(data, source, 64, SMALL)
    run(Job(source, tmp_path / "out", Recipe("x", "keep", experts=0.5, neurons=0.5), corpus))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_routed_experts"], config["moe_intermediate_size"]) == (4, 32)
    model = load(source, select("reference"))
    ids = torch.cat([w.ids[:-1] for w in corpus.windows])
    batch, blocks = paged_batch([w.tokens for w in corpus.windows])
    cache = model.new_cache(blocks, 16, "float32")
    h = model.ops.embed(ids, model.embedding)
    (attention, mlp), (attention1, moe) = model.layers[:2]
    h, _ = attention(h, batch, cache, 0)
    h, _ = attention1(mlp(h), batch, cache, 1)
    n = model.ops.rms_norm(h, moe.norm, 1e-6)
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
    run(Job(model_dir, tmp_path, replace(RECIPES[name], prune=replace(prune, heal_steps=2)), corpus))
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
    run(Job(tmp_path / "source", tmp_path / "out", Recipe("x", "keep", prune=prune), None))
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
    state = run(Job(model_dir, tmp_path / "healed", Recipe("x", "keep", prune=prune), corpus))
    assert [h["layer"] for h in state.healed] == [0, 1, 2]
    assert all(h["after"] < h["before"] for h in state.healed)
    run(Job(model_dir, tmp_path / "not", Recipe("x", "keep", prune=replace(prune, heal_steps=0)), corpus))
    healed, plain = (Checkpoint.open(tmp_path / p) for p in ("healed", "not"))
    name = "model.layers.0.mlp.up_proj.weight"  # the first layer's mask cannot depend on healing
    a, b = healed.tensor(name), plain.tensor(name)
    assert torch.equal(a == 0, b == 0) and not torch.equal(a, b)


def test_calibration_matches_a_plain_forward_pass(model_dir: Path, corpus: Corpus) -> None:
    """The gram of the last layer's router input against the serving model's hidden states."""
    from farthing.compress.calibrate.recorder import Recorder, Wanted

    recorder = Recorder(Wanted(gram=True, histogram=True))
    traced = load(model_dir, recorder)
    windows = corpus.windows[:3]
    batch, blocks = paged_batch([w.tokens for w in windows])
    ids = torch.cat([w.ids[:-1] for w in windows])
    hidden = traced.forward(ids, batch, traced.new_cache(blocks, 16, "float32"))
    plain = load(model_dir, select("reference"))
    expected = plain.forward(ids, batch, plain.new_cache(blocks, 16, "float32"))
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    first = plain.ops.rms_norm(plain.ops.embed(ids, plain.embedding), plain.layers[0][0].norm, 1e-6)
    stats = recorder.inputs["model.layers.0.self_attn.kv_a_proj_with_mqa"]
    torch.testing.assert_close(stats.gram, first.T @ first, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(stats.energy, first.square().sum(0), rtol=1e-3, atol=1e-3)
    assert stats.tokens == len(ids) and stats.histogram is not None
    assert stats.histogram.absmax == pytest.approx(float(first.abs().max()))
    counts = recorder.experts["model.layers.1.mlp"].tokens
    assert int(counts.sum()) == 2 * len(ids)


def test_a_killed_run_resumes_with_the_same_result(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """SIGKILL after the second layer; the second run resumes there and writes equal bytes."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from farthing.compress.api import Options, compress\n"
        "from dataclasses import replace\n"
        "from farthing.compress.recipe import RECIPES\n"
        "recipe = RECIPES['int4-block16-40']\n"
        "recipe = replace(recipe, prune=replace(recipe.prune, heal_steps=3))\n"
        "def progress(what, done, total):\n"
        "    if what == 'layer 2' and sys.argv[4] == 'kill': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    print(what, flush=True)\n"
        "options = Options(calibration=Path(sys.argv[3]), gate=False)\n"
        "compress(Path(sys.argv[1]), Path(sys.argv[2]), recipe, options, progress)\n"
    )

    def go(out: Path, mode: str) -> subprocess.CompletedProcess[str]:
        args = [sys.executable, "-c", script, str(model_dir), str(out), str(data), mode]
        return subprocess.run(args, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    killed = go(tmp_path / "a", "kill")
    assert killed.returncode == -signal.SIGKILL and "layer 1" in killed.stdout
    assert not (tmp_path / "a" / "config.json").exists()
    resumed = go(tmp_path / "a", "finish")
    assert resumed.returncode == 0, resumed.stderr
    assert "layer 1" not in resumed.stdout and "layer 2" in resumed.stdout
    straight = go(tmp_path / "b", "finish")
    assert straight.returncode == 0
    a, b = Checkpoint.open(tmp_path / "a"), Checkpoint.open(tmp_path / "b")
    assert set(a.names()) == set(b.names())
    for name in a.names():
        assert torch.equal(a.tensor(name).view(torch.uint8), b.tensor(name).view(torch.uint8)), name
    reports = [json.loads((tmp_path / p / "report.json").read_text()) for p in "ab"]
    assert reports[0]["modules"] == reports[1]["modules"] and len(reports[0]["healed"]) == 3
    assert reports[0]["healed"] == reports[1]["healed"]


def test_another_job_does_not_resume_and_a_finished_model_is_not_overwritten(
    model_dir: Path, tmp_path: Path
) -> None:
    run(Job(model_dir, tmp_path, RECIPES["fp8-block"], None))
    with pytest.raises(ValueError, match="already has a model"):
        run(Job(model_dir, tmp_path, RECIPES["fp8-block"], None))


UNEQUAL = [
    {"intermediate_size": 96},
    {"moe_intermediate_size": 48},
    {"moe_intermediate_size": 32, "shared_intermediate_size": 64},
    {},
]


@pytest.mark.parametrize("name", ["int8", "int8-kl", "fp8-block", "int4-gptq", "auto", "prune30-block16"])
def test_layers_of_different_sizes(name: str, data: Path, tmp_path: Path) -> None:
    """As produced by `farthing train prune`."""
    source = write_model(tmp_path / "source", layer_sizes=UNEQUAL)
    recipe = RECIPES[name]
    if recipe.prune is not None:
        recipe = replace(recipe, prune=replace(recipe.prune, heal_steps=4))
    outcome = compress(source, tmp_path / "out", recipe, Options(data, data, window=64))
    assert outcome.report.quality is not None and outcome.report.quality.relative_increase < 0.1
    assert {m["module"] for m in outcome.report.modules} >= {
        "model.layers.0.mlp.down_proj", "model.layers.3.eh_proj"
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_sizes"] == UNEQUAL
    shape = Checkpoint.open(tmp_path / "out").weight("model.layers.2.mlp.experts.5.down_proj").shape
    assert shape == (64, 32)


def test_experts_of_layers_with_different_sizes_are_not_dropped(data: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", layer_sizes=UNEQUAL)
    with pytest.raises(ValueError, match=r"experts is 0\.25, but the layers of this model already differ"):
        compress(source, tmp_path / "out", RECIPES["experts-reap"], Options(data, data, window=64))
    odd = write_model(tmp_path / "odd", layer_sizes=[{"intermediate_size": 40}, {}, {}, {}])
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.gate_proj is 40x64, which blocks of 16x16 do not tile"
    ):
        compress(odd, tmp_path / "out", RECIPES["prune30-block16"], Options(data, data, window=64))


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
    (tmp_path / "auto.yaml").write_text(f"base: auto\ncalibration_tokens: {SMALL}\nsparsities: []\n")
    budget[2] = str(tmp_path / "auto.yaml")
    result = CliRunner().invoke(app, [*budget, "-o", str(tmp_path / "c"), "--calibration", str(data)])
    assert result.exit_code == 2 and "budget_bytes is 1,000 (weights read per decoded" in result.output
    result = CliRunner().invoke(app, [*args[:2], "int8", "--budget", "1kB", "-o", str(tmp_path / "d")])
    assert result.exit_code == 2 and "scheme is 'int8'; expected scheme 'auto'" in result.output
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
        ("scheme: int5", "scheme is 'int5'; expected one of"),
        ("grup_size: 3", "grup_size: unknown field; expected one of name, scheme"),
        ("prune: {sparsity: 2}", r"prune\.sparsity is 2\.0; expected a share"),
        ("prune: {shares: {'*': 2}}", r"prune\.shares\['\*'\] is 2\.0; expected a share"),
        ("prune: {shares: {'*': many}}", r"prune\.shares\['\*'\] is 'many'; expected a number"),
        ("prune: {heal_steps: few}", "prune.heal_steps is 'few'; expected a whole number"),
        ("prune: {scope: global}", "prune.score is 'obs' and prune.scope 'global'; expected one of"),
        ("experts: 1.5", "experts is 1.5; expected a share"),
        ("ignore: '*.o_proj'", r"ignore is '\*\.o_proj'; expected a list"),
        ("sparsities: [a]", r"sparsities\[0\] is 'a'; expected a number"),
        ("calibration_tokens: many", "calibration_tokens is 'many'; expected a whole number"),
        ("act_order: 1", "act_order is 1; expected true or false"),
        ("max_drop: 1%", "max_drop is '1%'; expected a number"),
        ("base: auto\nmax_drop: -1", r"max_drop is -1\.0; expected a share"),
        ("base: auto\nbudget_bytes: 5 bits", "budget_bytes is '5 bits'; expected bytes such as"),
        ("base: auto\nmeasure: disk", "measure is 'disk'; expected one of"),
        ("budget_bytes: 5MB", "budget_bytes is 5000000, but scheme is 'int8'; expected scheme 'auto'"),
        ("base: nothing", "base is 'nothing'; expected one of"),
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


@pytest.mark.parametrize("name", ["int8", "int4-rtn", "fp8-block", "prune30-magnitude", "int4-gptq"])
@pytest.mark.parametrize("tensor", ["model.layers.3.mlp.experts.7.down_proj.weight", "model.norm.weight"])
def test_error_for_non_finite_weights_names_the_tensor(
    name: str, tensor: str, model_dir: Path, data: Path, tmp_path: Path
) -> None:
    checkpoint, writer = Checkpoint.open(model_dir), CheckpointWriter(tmp_path / "source")
    for other in checkpoint.names():
        value = checkpoint.tensor(other).clone()
        if other == tensor:
            value.view(-1)[3] = torch.inf
        writer.add(other, value)
    writer.close(checkpoint.config, copy_from=model_dir)
    options = Options(data, data, window=64, gate=False)
    with pytest.raises(ValueError, match=f"{tensor} has NaN or infinity"):
        compress(tmp_path / "source", tmp_path / "out", RECIPES[name], options)


def test_predictable_failures_happen_before_the_work(model_dir: Path, data: Path, tmp_path: Path) -> None:
    for recipe, options, words in (
        (
            "auto",
            Options(data, data, export="deepseek-fp8"),
            "scheme of recipe auto is 'auto'; expected 'fp8'",
        ),
        ("auto", Options(data, data, export="gguf"), "format is 'gguf'; expected one of auto, "),
        ("int8", Options(data, data, backend="tpu"), "backend 'tpu' is unknown"),
        ("int8", Options(data, tmp_path / "none"), "data is .*none', which does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            compress(model_dir, tmp_path / "out", RECIPES[recipe], options)
        assert not (tmp_path / "out").exists()


def test_run_killed_while_renaming_shards_starts_over(model_dir: Path, tmp_path: Path) -> None:
    job = Job(model_dir, tmp_path / "out", RECIPES["fp8-block"], None)
    run(replace(job, out=tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.CheckpointWriter, "close", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(job)
    (tmp_path / "out" / "part-00001.safetensors").rename(
        tmp_path / "out" / "model-00001-of-00005.safetensors"
    )
    run(job)
    a, b = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "whole")
    assert set(a.names()) == set(b.names()) and a.stored_bytes() == b.stored_bytes()


def test_error_for_unknown_recipe_lists_known_ones() -> None:
    with pytest.raises(ValueError, match="int8-kl"):
        load_recipe("int7")


def test_v2_without_query_latent_and_without_experts(tmp_path: Path, data: Path) -> None:
    source = write_model(tmp_path / "m", q_lora_rank=None, n_routed_experts=None, num_nextn_predict_layers=0)
    corpus = corpus_of(data, source, 64, SMALL)
    run(Job(source, tmp_path / "out", RECIPES["int4-awq"], corpus))
    assert load_for(tmp_path / "out", "reference").config.n_routed_experts is None
