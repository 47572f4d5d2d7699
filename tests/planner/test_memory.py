"""Planned bytes against a rank's actual bytes, and the output and errors of `farthing plan`."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from farthing.bench.cost import bf16_checkpoint
from farthing.checkpoint.reader import Checkpoint
from farthing.cli.errors import Exit
from farthing.cli.plan import app
from farthing.config import parse_bytes
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig
from farthing.model.kinds import Sizing, cache_kinds
from farthing.model.load import config_of
from farthing.model.parameters import random_parameters
from farthing.model.source import MemorySource
from farthing.ops.select import select
from farthing.parallel import rank as rank_module
from farthing.parallel.collectives import Alone
from farthing.parallel.plan import Layout, ShardPlan
from farthing.parallel.rank import Rank
from farthing.planner.buffers import Serving
from farthing.planner.footprint import Holder, Stored, stored_by_checkpoint, stored_by_config
from farthing.planner.memory import PlannedModel, RankMemory, memory
from tests.tiny import DEEPSEEK_V4, GLM4, GPT_OSS, QWEN3_NEXT, V3

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from random_model import config as bench_config

MITE = resolve_model("mite")
SERVING = Serving(1024, 2048)


def planned(layout: Layout, holder: Holder) -> list[RankMemory]:
    config = config_of(Checkpoint.open(MITE))
    plan = ShardPlan.build(config, layout)
    return memory(PlannedModel.of(plan, stored_by_checkpoint(MITE)), plan, holder, SERVING)


def held(rank: Rank) -> tuple[int, int]:
    """(weights, cache) bytes of a rank's tensors, each counted once."""
    weights: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[object] = [rank.model, rank._draft_norms]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, str | int | float | type):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            weights[item.data_ptr()] = max(
                weights.get(item.data_ptr(), 0), item.numel() * item.element_size()
            )
        elif type(item).__name__ == "Packed":
            weights[id(item)] = item.nbytes  # type: ignore[attr-defined]
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list | tuple):
            stack += item
        elif type(item).__module__.startswith("farthing."):
            slots = [s for c in type(item).__mro__ for s in getattr(c, "__slots__", ())]
            stack += [getattr(item, s) for s in slots if hasattr(item, s)]
            stack += list(getattr(item, "__dict__", {}).values())
    tables = {id(table): table.nbytes for table in rank.model.rotations.tables}
    return sum(weights.values()) - sum(tables.values()), cache_of(rank, SERVING)


def cache_of(rank: Rank, serving: Serving) -> int:
    """Bytes of a rank's cache."""
    blocks = serving.cache_tokens // serving.block_size
    kinds = cache_kinds(rank.plan.config)
    sizing = Sizing(kinds, serving.cache_dtype, serving.block_size, serving.max_num_batched_tokens)
    sizes = sizing.sizes(serving.max_num_seqs, sizing.checkpoints(serving.max_num_seqs, blocks))
    cache = rank.new_cache(blocks, serving.block_size, "bfloat16", sizes.windows, sizes.slots)
    return sum(each.nbytes for kind in cache.by_kind() for each in kind)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("layout", [Layout(2, 2), Layout(1, 1, 2)], ids=repr)
def test_rank_has_the_planned_bytes(backend: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cpu":
        pytest.importorskip("farthing._native")
    checkpoint = Checkpoint.open(MITE)
    # A single rank works because loading calls no collectives.
    monkeypatch.setattr(rank_module, "DistGroup", lambda ranks, timeout: Alone())
    for planned_rank in planned(layout, Holder(backend)):
        rank = Rank(config_of(checkpoint), checkpoint, layout, planned_rank.rank, select(backend, None, 1))
        weights, cache = held(rank)
        assert planned_rank.weights == pytest.approx(weights, rel=0.05)
        assert planned_rank.cache == cache


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("raw", [V3, GLM4, QWEN3_NEXT], ids=lambda raw: str(raw["model_type"]))
def test_halves_have_the_planned_bytes(
    raw: dict[str, Any], quantization: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--deterministic` packs some matrices in two, each with scales and padding of its own."""
    pytest.importorskip("farthing._native")
    monkeypatch.setattr(rank_module, "DistGroup", lambda ranks, timeout: Alone())
    sizes = dict(hidden_size=256, intermediate_size=640, moe_intermediate_size=384, num_hidden_layers=3,
                 num_attention_heads=4, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2,
                 first_k_dense_replace=1, vocab_size=512, num_nextn_predict_layers=0)  # fmt: skip
    config = ModelConfig.from_json(raw | sizes)
    source, plan = MemorySource(random_parameters(config)), ShardPlan.build(config, Layout())
    model = PlannedModel.of(plan, lambda name: Stored("float32"))
    differ = []
    for halves in (1, 2):
        (expected,) = memory(model, plan, Holder("cpu", 4, quantization, halves), SERVING)
        rank = Rank(config, source, Layout(), 0, select("cpu", None, 1, quantization, parts=halves))
        differ.append(expected.weights - held(rank)[0])
        assert expected.weights == pytest.approx(held(rank)[0], rel=0.01)
    assert differ[0] == differ[1]


V4 = DEEPSEEK_V4 | dict(
    vocab_size=512, hidden_size=256, moe_intermediate_size=128, num_attention_heads=8, head_dim=64,
    qk_rope_head_dim=32, q_lora_rank=128, o_lora_rank=64, index_n_heads=8, index_head_dim=64,
    n_routed_experts=8, num_nextn_predict_layers=1,
)  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("layout", [Layout(2), Layout(1, 2), Layout(1, 1, 2)], ids=repr)
def test_rank_of_a_compressed_past_has_the_planned_bytes(
    backend: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "cpu":
        pytest.importorskip("farthing._native")
    monkeypatch.setattr(rank_module, "DistGroup", lambda ranks, timeout: Alone())
    config = ModelConfig.from_json(V4)
    source, plan = MemorySource(random_parameters(config)), ShardPlan.build(config, layout)
    model = PlannedModel.of(plan, lambda name: Stored("float32"))
    for expected in memory(model, plan, Holder(backend, 4), SERVING):
        rank = Rank(config, source, layout, expected.rank, select(backend, torch.float32, 1))
        weights, cache = held(rank)
        assert expected.weights == pytest.approx(weights, rel=0.05)
        assert expected.cache == pytest.approx(cache, rel=0.01)


@pytest.mark.parametrize("layout", [Layout(), Layout(1, 1, 2)], ids=repr)
def test_experts_with_biases_have_the_planned_bytes(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_module, "DistGroup", lambda ranks, timeout: Alone())
    config = ModelConfig.from_json(GPT_OSS)
    source, plan = MemorySource(random_parameters(config)), ShardPlan.build(config, layout)
    model = PlannedModel.of(plan, lambda name: Stored("float32"))
    for expected in memory(model, plan, Holder("reference", 4), SERVING):
        rank = Rank(config, source, layout, expected.rank, select("reference", torch.float32))
        assert expected.weights == held(rank)[0]


def test_float16_checkpoint_is_packed_in_float32(tmp_path: Path) -> None:
    pytest.importorskip("farthing._native")
    torch.manual_seed(0)
    shutil.copytree(MITE, tmp_path / "model")
    with bf16_checkpoint(MITE) as dense:
        raw = json.loads((dense / "config.json").read_text()) | {"torch_dtype": "float16"}
        tensors = {
            name: (value + 1e-5 * torch.randn(value.shape)).half()  # no bfloat16 values
            for file in dense.glob("*.safetensors")
            for name, value in load_file(file).items()
        }
    for old in tmp_path.glob("model/*.safetensors*"):
        old.unlink()
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "model")
    rank = Rank(config_of(checkpoint), checkpoint, Layout(), 0, select("cpu", None, 1))
    plan = ShardPlan.build(config_of(checkpoint), Layout())
    for stored_of in (stored_by_checkpoint(tmp_path / "model"), stored_by_config(raw)):
        (planned_rank,) = memory(PlannedModel.of(plan, stored_of), plan, Holder("cpu"), SERVING)
        assert planned_rank.weights == pytest.approx(held(rank)[0], rel=0.05)


@pytest.mark.parametrize("backend", ["reference", "cpu", "gpu"])
def test_two_by_two_ranks_have_at_most_30_percent_of_one_each(backend: str) -> None:
    holder = Holder(backend)
    one = planned(Layout(), holder)[0].weights
    assert max(r.weights for r in planned(Layout(2, 2), holder)) <= 0.3 * one

    raw = bench_config("L")
    stored = stored_by_config(raw)

    def weights(layout: Layout) -> list[int]:
        from farthing.model.config import ModelConfig

        plan = ShardPlan.build(ModelConfig.from_json(raw), layout)
        return [r.weights for r in memory(PlannedModel.of(plan, stored), plan, holder, SERVING)]

    assert max(weights(Layout(2, 2))) <= 0.3 * weights(Layout())[0]


def test_error_for_a_bare_config_suggests_a_fitting_layout(tmp_path: Path) -> None:
    file = tmp_path / "deepseek-v3.json"
    fp8 = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128])
    file.write_text(json.dumps(V3 | dict(quantization_config=fp8, torch_dtype="bfloat16")))
    run = CliRunner().invoke(app, [str(file), "--tp", "8", "--gpu", "h100", "--kv-tokens", "32768"])
    assert run.exit_code == Exit.MISFIT
    assert "--tp 8 --pp 1 --ep 16 (16 ranks) would fit" in run.output
    run = CliRunner().invoke(
        app, [str(file), "--tp", "8", "--ep", "16", "--gpu", "h100", "--kv-tokens", "32768", "--json"]
    )
    assert run.exit_code == 0
    document = json.loads(run.stdout)
    assert document["fits"] and len(document["ranks"]) == 16
    assert document["more_cache_tokens"] > 100_000
    total = sum(r["weights"] for r in document["ranks"])
    assert 671e9 < total < 1.15 * 671e9  # one byte per parameter, plus replicated weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "80 elephants"], "memory: got '80 elephants'; expected bytes such as"),
        (["--gpu", "abacus"], "gpu: got 'abacus'; expected one of h100"),
        (["--tp", "3"], "tp: got 3; expected a divisor of num_attention_heads = 4"),
        (["--price", "2"], "price is set without a GPU; expected --gpu NAME"),
        (["--kv-tokens", "0"], "kv_tokens: got 0; expected an integer >= 1"),
        (["--cache-hit", "1.5"], "cache_hit: got 1.5; expected a number >= 0 and <= 0.99"),
    ],
)
def test_errors(arguments: list[str], message: str) -> None:
    run = CliRunner().invoke(app, ["mite", *arguments])
    assert run.exit_code == Exit.INPUT
    assert message in run.output


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("--kv-cache-dtype", "int3", "'float32'"),
        ("--experts-on", "moon", "'cpu'"),
        ("--backend", "abacus", "'reference'"),
    ],
)
def test_unknown_choices(option: str, value: str, accepted: str) -> None:
    run = CliRunner().invoke(app, ["mite", option, value])
    assert run.exit_code == 2
    assert option in run.output and repr(value) in run.output and accepted in run.output


def test_deterministic() -> None:
    """One rank's halves, and layouts without them."""

    def plan(*options: str) -> Result:
        return CliRunner().invoke(app, ["mite", "--json", *options])

    plain, halved = (json.loads(plan(*more).stdout)["ranks"][0] for more in ([], ["--deterministic"]))
    assert halved["buffers"] > plain["buffers"] and halved["cache"] == plain["cache"]
    pair = [json.loads(plan("--tp", "2", *more).stdout)["ranks"] for more in ([], ["--deterministic"])]
    for plain, same in zip(*pair, strict=True):  # on tiles, rows in blocks may take more
        saved = plain["buffers"] - same["buffers"]
        assert saved >= 0 and plain | {"buffers": 0, "total": 0} == same | {"buffers": 0, "total": 0}
        assert plain["total"] - same["total"] == saved
    for options in (["--tp", "4"], ["--tp", "2", "--ep", "2"], ["--gpu", "h100"], ["--experts-on", "cpu"]):
        refused = plan("--deterministic", *options)
        assert refused.exit_code == Exit.INPUT and "deterministic" in refused.output


def test_parse_bytes() -> None:
    assert parse_bytes("memory", "80GB") == 80_000_000_000
    assert parse_bytes("memory", "64 GiB") == 64 * 2**30
    assert parse_bytes("memory", "1.5e9") == 1_500_000_000


def test_experts_on_the_host(tmp_path: Path) -> None:
    """GPU memory without routed experts; host memory equals the rest of the plain plan."""
    fp8 = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128])
    file = tmp_path / "deepseek-v3.json"
    file.write_text(json.dumps(V3 | dict(quantization_config=fp8, torch_dtype="bfloat16")))

    def plan(*options: str) -> dict[str, int]:
        run = CliRunner().invoke(app, [str(file), "--backend", "gpu", "--json", *options])
        assert run.exit_code == 0, run.output
        rank: dict[str, int] = json.loads(run.stdout)["ranks"][0]
        return rank

    whole, device = plan(), plan("--experts-on", "cpu", "--gpu", "h100", "--kv-tokens", "65536")
    hot = plan("--experts-on", "cpu", "--hot-experts", "16")
    rounded = plan("--experts-on", "cpu", "--quantization", "int4")
    assert device["experts"] == 0 and hot["experts"] == 16
    assert device["weights"] < 22e9 < 600e9 < device["host"]
    assert hot["weights"] - device["weights"] == pytest.approx((whole["weights"] - device["weights"]) / 16)
    assert rounded["weights"] == device["weights"] and rounded["host"] < 0.55 * device["host"]

    def hot_experts(count: int) -> Result:
        options = f"--gpu h100 --experts-on cpu --kv-tokens 65536 --hot-experts {count}".split()
        return CliRunner().invoke(app, [str(file), *options])

    refused = hot_experts(64)
    advice = re.search(r"--hot-experts (\d+) would fit", refused.output)
    assert refused.exit_code == Exit.MISFIT and advice  # does not suggest more ranks, which are unsupported
    fits = int(advice[1])
    assert [hot_experts(n).exit_code for n in (fits, fits + 1)] == [Exit.DONE, Exit.MISFIT]
    few = [str(file), "--memory", "9GB", "--experts-on", "cpu", "--hot-experts", "2"]
    none = CliRunner().invoke(app, few)
    assert none.exit_code == Exit.MISFIT and "no layout" in none.output
    for options in (["--experts-on", "cpu", "--tp", "2"], ["--hot-experts", "2"]):
        run = CliRunner().invoke(app, [str(file), *options])
        assert run.exit_code == Exit.INPUT and "; expected " in run.output


@pytest.mark.parametrize(("model", "memory_limit"), [("qwen3.6-35b-a3b", "32GB"), ("qwen3-30b-a3b", "24GB")])
def test_error_names_options_with_which_one_rank_fits(model: str, memory_limit: str) -> None:
    refused = CliRunner().invoke(app, [model, "--memory", memory_limit])
    assert refused.exit_code == Exit.MISFIT
    options = re.search(r"(--quantization int4(?: --max-\S+ \d+)*)", refused.output)
    assert options, refused.output
    assert CliRunner().invoke(app, [model, "--memory", memory_limit, *options[1].split()]).exit_code == 0
