"""The planned workspace of the native ops against what a backend takes for the same steps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from farthing.config import halves_of_rank
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.parameters import random_parameters
from farthing.model.source import MemorySource
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing.parallel import rank as rank_module
from farthing.parallel.collectives import Alone
from farthing.parallel.plan import Layout, ShardPlan
from farthing.parallel.rank import Rank
from farthing.planner.buffers import Serving, Shard, workspace_bytes
from farthing.planner.footprint import Holder, Stored
from tests.planner.test_memory_buffers import RAW
from tests.tiny import GLM4, QWEN3_NEXT

pytestmark = pytest.mark.pairs

pytest.importorskip("farthing._native")

SPARSE = dict(index_topk=48, index_n_heads=4, index_head_dim=64, model_type="deepseek_v32")
MODELS: dict[str, dict[str, Any]] = {
    "v3": RAW,
    "many heads": RAW | dict(num_attention_heads=32, moe_intermediate_size=96),
    "whole queries": RAW | dict(q_lora_rank=None, n_shared_experts=0, num_hidden_layers=2),
    "sparse": RAW | SPARSE,
}


def steps(model: DecoderModel, serving: Serving) -> None:
    """A prompt as long as the budget, then the last token of every sequence."""
    count, size = serving.max_num_seqs, serving.block_size
    blocks = -(-serving.max_model_len // size)
    cache = model.new_cache(count * blocks, size, serving.cache_dtype)
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(count)]
    tokens, length = serving.max_num_batched_tokens, serving.max_model_len
    prompt = make_batch([tokens], [length - tokens], tables[:1], size)
    decodes = make_batch([1] * count, [length - 1] * count, tables, size)
    for batch, sequences in ((prompt, 1), (decodes, count)):
        ids = torch.zeros(batch.positions.shape[0], dtype=torch.int64)
        model.top_logits(model.forward(ids, batch, cache)[-sequences:], 1)


def most_taken(
    config: ModelConfig, parameters: dict[str, Any], serving: Serving, make: Callable[[], Any]
) -> int:
    """What a backend took, with rows in blocks where tiles want them, and without."""
    taken = []
    for blocks in (True, False):
        ops = make()
        if not blocks:
            ops._native.tile_tokens = 0
        with torch.inference_mode():
            steps(DecoderModel(config, ops, MemorySource(parameters)), serving)
        taken.append(ops._native.workspace_bytes)
    return max(taken)


def test_planned_workspace_covers_expanded_attention() -> None:
    config = ModelConfig.from_json(RAW | dict(num_hidden_layers=2))
    ops: Any = select("cpu", torch.bfloat16, 2)
    serving = Serving(1400, 1400, max_num_seqs=1, max_num_batched_tokens=300)
    with torch.inference_mode():
        steps(DecoderModel(config, ops, MemorySource(random_parameters(config))), serving)
    plan = ShardPlan.build(config, Layout())
    shard = Shard.of(plan, plan.layout.place(0), Stored("float32"))
    planned = workspace_bytes(shard, Holder("cpu", 4, None), serving, 2)
    assert planned is not None and planned >= ops._native.workspace_bytes


@pytest.mark.parametrize("cache_dtype", ["float32", "fp8", "int8"])
@pytest.mark.parametrize("tokens", [1, 200])
def test_planned_workspace_of_other_caches(tokens: int, cache_dtype: str) -> None:
    config = ModelConfig.from_json(RAW)
    serving = Serving(
        208, 208, max_num_seqs=1, max_num_batched_tokens=tokens, cache_dtype=cache_dtype, exact=True
    )  # as the backend is with float32, unless it is told otherwise
    plan = ShardPlan.build(config, Layout())
    shard = Shard.of(plan, plan.layout.place(0), Stored("float32"))
    planned = workspace_bytes(shard, Holder("cpu", 4, None), serving, 2)
    parameters = random_parameters(config)
    assert planned == most_taken(config, parameters, serving, lambda: select("cpu", torch.float32, 2))


@pytest.mark.parametrize(
    ("stored", "quantization", "compute"),
    [
        ("float32", None, "int8"),
        ("bfloat16", "int8", "int8"),
        ("bfloat16", "int8", "exact"),
        ("bfloat16", None, "int8"),
        ("bfloat16", None, "exact"),
    ],
)
@pytest.mark.parametrize(("tokens", "threads"), [(1, 2), (7, 1), (200, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_planned_workspace_is_the_backends(
    name: str, tokens: int, stored: Any, quantization: Any, compute: Any, threads: int
) -> None:
    config = ModelConfig.from_json(MODELS[name])
    parameters = {n: t.to(getattr(torch, stored)) for n, t in random_parameters(config).items()}
    serving = Serving(
        5 * 208, 208, max_num_seqs=min(5, tokens), max_num_batched_tokens=tokens, exact=compute == "exact"
    )
    plan = ShardPlan.build(config, Layout())
    shard = Shard.of(plan, plan.layout.place(0), Stored(stored))
    planned = workspace_bytes(shard, Holder("cpu", 4, quantization), serving, threads)

    def ops() -> Any:
        return select("cpu", torch.float32, threads, quantization, compute=compute)

    assert planned == most_taken(config, parameters, serving, ops)


# Widths whose halves differ: blocks of 128 columns stay whole.
WIDE = dict(
    vocab_size=512, hidden_size=512, intermediate_size=640, moe_intermediate_size=384, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=2048, num_nextn_predict_layers=0,
)  # fmt: skip
DIVIDED: dict[str, dict[str, Any]] = {
    "latent": RAW | dict(intermediate_size=640, moe_intermediate_size=384),
    "grouped": GLM4 | WIDE,
    "odd heads": GLM4 | WIDE | dict(num_attention_heads=5, num_key_value_heads=5),
    "recurrent": QWEN3_NEXT | WIDE | dict(shared_expert_intermediate_size=640, linear_num_value_heads=16,
                                          linear_value_head_dim=64),
}  # fmt: skip


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 7, 200])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", DIVIDED)
def test_planned_workspace_with_deterministic(
    name: str, tp: int, tokens: int, quantization: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank sums halves, as two ranks would; both without the forms that depend on a step's size."""
    config = ModelConfig.from_json(DIVIDED[name])
    if config.num_attention_heads % tp:
        pytest.skip("heads are not divided among ranks")
    monkeypatch.setattr(rank_module, "DistGroup", lambda ranks, timeout: Alone())
    parameters = {n: t.to(torch.bfloat16) for n, t in random_parameters(config).items()}
    serving = Serving(5 * 208, 208, max_num_seqs=min(5, tokens), max_num_batched_tokens=tokens)
    halves, layout = halves_of_rank(tp, 1), Layout(tp)
    ops: Any = select("cpu", torch.bfloat16, 2, quantization, parts=halves)
    rank = Rank(config, MemorySource(parameters), layout, 0, ops)
    with torch.inference_mode():
        steps(rank.model, serving)
    plan = ShardPlan.build(config, layout)
    shard = Shard.of(plan, layout.place(0), Stored("bfloat16"))
    planned = workspace_bytes(shard, Holder("cpu", 4, quantization, halves), serving, 2)
    assert planned == ops._native.workspace_bytes


def test_without_the_native_module_there_is_no_figure() -> None:
    code = """
import sys
sys.modules["farthing._native"] = None
from farthing.planner.buffers import Serving, workspace_bytes
assert workspace_bytes(None, None, Serving(1400, 1400, max_num_seqs=1, max_num_batched_tokens=300), 2) is None
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
