"""Whole recipes on a tiny checkpoint: other software loads the result, and killed runs resume."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.checkpoint.compressed_tensors import MARK, VALUES
from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.writer import CheckpointWriter
from farthing.compress import calibrate, stream, transform, work
from farthing.compress.api import Options, compress, load_for
from farthing.compress.calibrate import Wanted
from farthing.compress.evaluate import Corpus, paged_batch
from farthing.compress.recipe import known_recipes
from farthing.compress.stream import Compression, run
from farthing.model import DecoderModel
from farthing.model.load import load
from farthing.model.pack import pack_checkpoint
from farthing.ops.cpu.formats import PackedFormat
from farthing.ops.select import select
from farthing_lab.compress.ranges import StudyRecorder
from farthing_lab.compress.recipe import Study
from tests.compress.conftest import corpus_of, widen_scales, write_model

RECIPES = known_recipes()

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
    prune = recipe.prune if isinstance(recipe, Study) else None
    if isinstance(recipe, Study) and prune is not None and prune.heal_steps:
        recipe = replace(recipe, prune=replace(prune, heal_steps=8))
    outcome = compress(model_dir, tmp_path / "out", recipe, options)
    document = outcome.to_json()
    assert document["size_after"] > 0 and document["drop_interval"][0] <= document["drop"]
    report = json.loads(Path(document["report"]).read_text())
    assert report["modules"]
    # These matrices are as narrow as a block of 16 x 64, so an expert may lose all of its blocks: error 1.
    whole = prune is not None and prune.pattern == "16x64"
    assert all(0 <= m["error"] < 1 or (whole and m["error"] == 1) for m in report["modules"])
    assert (tmp_path / "out" / "report.html").read_text().count("<svg") >= 3
    assert not (tmp_path / "out" / stream.STATE).exists()
    checkpoint = Checkpoint.open(tmp_path / "out")
    for scale in (n for n in checkpoint.names() if "scale" in n):
        tensor = checkpoint.tensor(scale).float()
        if recipe.values == "fitted":  # the sign says on which side values reach further
            tensor = tensor.abs()
        assert bool((tensor > 0).all() and tensor.isfinite().all())
    for layer in ("1", "2", "3"):  # router and norms are unchanged, or exact in float32
        gate = checkpoint.tensor(f"model.layers.{layer}.mlp.gate.weight")
        assert gate.dtype == torch.float32
    assert document["drop"] < 0.5


def reference_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    return logits_of(load(path, select("reference")), ids)


def logits_of(model: DecoderModel, ids: torch.Tensor) -> torch.Tensor:
    batch, blocks = paged_batch([len(ids)])
    return model.logits(model.forward(ids, batch, model.new_cache(blocks, 16, "float32")))


WIDE = {"hidden_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 64}  # whole FP8 blocks


# With transformers' simulated input rounding; test_transformers.py covers every recipe without it.
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("w4a8", {}),
        ("int4-block16-40", {}),
        ("fp8-block", WIDE | {"first_k_dense_replace": 3}),
        ("experts-reap", {"n_group": 1, "topk_group": 1}),
        ("int8", {}),
        ("int8-kl", {}),
    ],
)
def test_transformers_loads_it_and_computes_the_same(
    name: str, changes: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "source", num_nextn_predict_layers=0, **changes)
    recipe, out = RECIPES[name], tmp_path / "out"
    run(Compression(source, out, recipe, corpus_of(data, source, 64, SMALL) if recipe.needs_data else None))
    widen_scales(out)
    sequences = torch.randint(2, 258, (16, 6), generator=torch.Generator().manual_seed(3))
    round_alike(monkeypatch)
    model = load_for(out, "reference", simulate=True)
    theirs = theirs_rounding_alike(out)
    actual = torch.stack([logits_of(model, ids) for ids in sequences])
    with torch.no_grad():
        distances = (actual - theirs(sequences).logits).norm(dim=2) / actual.norm(dim=2)
    # An input between two steps may be rounded either way, and the token and those behind it differ then.
    assert float((distances < 1e-4).float().mean()) > 0.75
    config = json.loads((out / "config.json").read_text())
    for group in config.get("quantization_config", {"config_groups": {}})["config_groups"].values():
        group["input_activations"] = None
    (out / "config.json").write_text(json.dumps(config))
    ids = sequences.flatten()[:40]
    with torch.no_grad():
        expected = theirs_of(out)(ids[None]).logits[0]
    assert float((reference_logits(out, ids) - expected).norm() / expected.norm()) < 1e-4


def theirs_of(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def round_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate what transformers rounds: not the inputs of routed experts, whose weights it fuses."""
    rounding = calibrate.Activations.rounding

    def but_experts(self: calibrate.Activations, module: str) -> calibrate.Rounding | None:
        return None if ".mlp.experts." in module else rounding(self, module)

    monkeypatch.setattr(calibrate.Activations, "rounding", but_experts)


def theirs_rounding_alike(path: Path) -> Any:
    """transformers' model, without rounded inputs of kv_b, which our attention absorbs. Rows of 8 bits are
    rounded by `round_token`: where its steps are the largest magnitude / 127, theirs are that / 127.5, which
    puts the largest value itself between two steps."""
    model = theirs_of(path)
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.input_activations is None:
            continue
        rows = scheme.input_activations.strategy == "token"
        if rows or name.endswith("kv_b_proj"):
            module.quantization_scheme = scheme.model_copy(update={"input_activations": None})
        if rows and not name.endswith("kv_b_proj"):
            module.register_forward_pre_hook(lambda module, args: (calibrate.round_token(args[0]),))
    return model


def test_rows_are_rounded_within_a_step_of_transformers() -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    args = QuantizationArgs(strategy=QuantizationStrategy.TOKEN, dynamic=True)
    scale, _ = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(96, 8))
    theirs = (x / scale).round().clamp(-128, 127) * scale
    assert bool(((calibrate.round_token(x) - theirs).abs() <= 1.01 * scale).all())


def test_transformers_reads_fitted_values_as_even_steps(data: Path, tmp_path: Path) -> None:
    """The same files, without the section that tells us what the integers stand for."""
    from transformers import AutoModelForCausalLM

    source, out = write_model(tmp_path / "source", num_nextn_predict_layers=0), tmp_path / "out"
    run(Compression(source, out, RECIPES["int4"], corpus_of(data, source, 64, SMALL)))
    ids = torch.randint(2, 258, (40,), generator=torch.Generator().manual_seed(3))
    exact = reference_logits(out, ids)
    config = json.loads((out / "config.json").read_text())
    assert config.pop(MARK) == VALUES | {"head": "int8"}
    (out / "config.json").write_text(json.dumps(config))
    even = reference_logits(out, ids)
    widen_scales(out)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    assert float((even - expected).norm() / expected.norm()) < 1e-4
    assert float((exact - expected).norm() / expected.norm()) > 0.02


def test_files_for_other_programs_have_even_steps(model_dir: Path, data: Path, tmp_path: Path) -> None:
    options = Options(calibration=data, gate=False, export="llm-compressor")
    recipe = replace(RECIPES["int4"], calibration_tokens=SMALL)
    report = compress(model_dir, tmp_path / "out", recipe, options).report
    assert report.recipe["values"] == "even"
    checkpoint = Checkpoint.open(tmp_path / "out")
    mlp, attention = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"
    assert checkpoint.weight(mlp).format == "int4" and checkpoint.weight(attention).format == "int8"
    assert "int4_values" not in checkpoint.config.get(MARK, {})
    assert checkpoint.has(f"{attention}.weight_packed")  # 8 bits without rounded inputs


def test_the_head_is_served_in_8_bits(model_dir: Path, data: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPES["int4"], calibration_tokens=SMALL)
    compress(model_dir, tmp_path / "out", recipe, Options(calibration=data, gate=False))
    pack_checkpoint(tmp_path / "out", tmp_path / "out" / "packed.bin")
    ids = torch.arange(2, 40)
    found = []
    for packed in (None, str(tmp_path / "out" / "packed.bin")):
        ops = select("cpu", packed=packed)
        model = load(tmp_path / "out", ops)
        head = model.head.packed
        assert head.format == PackedFormat.Q8 and model.mtp[0].head is model.head
        batch, blocks = paged_batch([len(ids)])
        found.append(model.logits(model.forward(ids, batch, model.new_cache(blocks, 16, "float32"))))
    assert torch.equal(*found)


def test_deepseek_format_round_trips_exactly(model_dir: Path, tmp_path: Path) -> None:
    run(Compression(model_dir, tmp_path / "ds", RECIPES["fp8-block"], None, export="deepseek-fp8"))
    run(Compression(model_dir, tmp_path / "ct", RECIPES["fp8-block"], None))
    ids = torch.arange(2, 40)
    assert torch.equal(reference_logits(tmp_path / "ds", ids), reference_logits(tmp_path / "ct", ids))
    config = json.loads((tmp_path / "ds" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"


def test_calibration_matches_a_plain_forward_pass(model_dir: Path, corpus: Corpus) -> None:
    """The gram of the last layer's router input against the serving model's hidden states."""
    recorder = StudyRecorder(Wanted(gram=True), ranges=True)
    traced = load(model_dir, recorder)
    windows = corpus.windows[:3]
    batch, blocks = paged_batch([w.tokens for w in windows])
    ids = torch.cat([w.ids[:-1] for w in windows])
    hidden = traced.forward(ids, batch, traced.new_cache(blocks, 16, "float32"))
    plain = load(model_dir, select("reference"))
    expected = plain.forward(ids, batch, plain.new_cache(blocks, 16, "float32"))
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    first = plain.ops.rms_norm(plain.ops.embed(ids, plain.embedding), plain.layers[0][0].norm)
    stats = recorder.inputs["model.layers.0.self_attn.qkv_a"]
    torch.testing.assert_close(stats.gram, first.T @ first, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(stats.energy, first.square().sum(0), rtol=1e-3, atol=1e-3)
    assert stats.tokens == len(ids)
    histogram = recorder.histograms["model.layers.0.self_attn.qkv_a"]
    assert histogram.absmax == pytest.approx(float(first.abs().max()))
    counts = recorder.experts["model.layers.1.mlp"]
    assert int(counts.sum()) == 2 * len(ids)


UNEQUAL = [
    {"intermediate_size": 96},
    {"moe_intermediate_size": 48},
    {"moe_intermediate_size": 32, "shared_intermediate_size": 64},
    {},
]


@pytest.mark.parametrize("name", ["int8", "int8-kl", "fp8-block", "int4", "auto", "prune30-block16"])
def test_layers_of_different_sizes(name: str, data: Path, tmp_path: Path) -> None:
    """As produced by `farthing train prune`."""
    source = write_model(tmp_path / "source", layer_sizes=UNEQUAL)
    recipe = RECIPES[name]
    if isinstance(recipe, Study) and recipe.prune is not None:
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


@pytest.mark.parametrize("name", ["int8", "int4-rtn", "fp8-block", "prune30-magnitude", "int4"])
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


def test_v2_without_query_latent_and_without_experts(tmp_path: Path, data: Path) -> None:
    source = write_model(tmp_path / "m", q_lora_rank=None, n_routed_experts=None, num_nextn_predict_layers=0)
    corpus = corpus_of(data, source, 64, SMALL)
    run(Compression(source, tmp_path / "out", RECIPES["int4-awq"], corpus))
    assert load_for(tmp_path / "out", "reference").config.experts is None


def test_gptq_factors_inputs_once_and_uses_one_thread_per_expert(
    model_dir: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up of an expert share their second moments; small steps never wait for other threads."""
    factored: list[int] = []
    threads: list[tuple[str, int]] = []
    of, sweep = transform.Feedback.of, transform.sweep

    def count(gram: torch.Tensor, *more: Any) -> Any:
        factored.append(len(gram))
        return of(gram, *more)

    def watch(w: torch.Tensor, *more: Any) -> Any:
        threads.append((threading.current_thread().name, torch.get_num_threads()))
        return sweep(w, *more)

    monkeypatch.setattr(transform.Feedback, "of", count)
    monkeypatch.setattr(transform, "sweep", watch)
    before = torch.get_num_threads()
    done: list[tuple[int, int]] = []
    run(
        Compression(model_dir, tmp_path / "out", RECIPES["int4"], corpus),
        lambda what, n, of: done.append((n, of)),
    )
    layers, experts = 4, 8  # one layer is dense, one drafts and has eh_proj
    attention, mlps = 4 * layers, 2 * (layers + (layers - 1) * experts)
    assert sum(factored) == attention + mlps + 1
    pooled = [n for name, n in threads if name.startswith("ThreadPool")]
    assert pooled and set(pooled) == {1} and torch.get_num_threads() == before
    assert done == sorted(done) and len({n for n, _ in done}) > 3 * layers  # several times within a layer
    assert done[0] == (0, layers * stream.STEPS) and done[-1] == (layers * stream.STEPS,) * 2


def test_products_are_rounded_only_while_calibration_text_runs(
    model_dir: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {"forward": set(), "compress_layer": set()}
    for module, name in ((work, "forward"), (stream, "compress_layer")):
        inner = getattr(module, name)

        def watch(*args: Any, name: str = name, inner: Any = inner, **named: Any) -> Any:
            seen[name].add(torch.get_float32_matmul_precision())
            return inner(*args, **named)

        monkeypatch.setattr(module, name, watch)
    run(Compression(model_dir, tmp_path / "out", RECIPES["int4"], corpus))
    assert seen == {"forward": {"medium"}, "compress_layer": {"highest"}}
    assert torch.get_float32_matmul_precision() == "highest"
