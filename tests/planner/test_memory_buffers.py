"""Planned buffers against the measured memory that a step adds to a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from mmap import MADV_DONTNEED, PROT_READ, mmap
from pathlib import Path
from typing import Any

import pytest

from farthing.checkpoint.reader import Checkpoint
from farthing.config import halves_of_rank
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig
from farthing.model.load import config_of
from farthing.parallel.plan import Layout, ShardPlan
from farthing.planner.buffers import Serving, step
from farthing.planner.footprint import Holder, Stored, stored_by_checkpoint
from farthing.planner.memory import PlannedModel, memory
from tests.parallel.measured import growth
from tests.tiny import DEEPSEEK_V4, V3

ROOT = Path(__file__).parents[2]
TOKENS = 1024
# Two layers of experts: the second attention keeps its outputs when all scratch memory has been touched.
RAW = V3 | dict(
    vocab_size=512, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=3,
    first_k_dense_replace=1, num_attention_heads=8, q_lora_rank=384, kv_lora_rank=256, qk_nope_head_dim=64,
    qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=8, num_experts_per_tok=4, n_group=2, topk_group=2,
    max_position_embeddings=2048, num_nextn_predict_layers=0,
)  # fmt: skip


GROUPED = dict(
    model_type="qwen3", vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=16, num_key_value_heads=4, head_dim=64, max_position_embeddings=2048,
    rms_norm_eps=1e-6, rope_theta=1e4,
)  # fmt: skip
BACKENDS = [
    ("reference", None),
    ("cpu", "int8"),
    pytest.param("cpu", None, marks=pytest.mark.slow),
    pytest.param("cpu", "int4", marks=pytest.mark.slow),
]
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux keeps these books")


Measure = Callable[..., int]


@pytest.fixture(scope="module")
def measured() -> Iterator[Measure]:
    """Bytes that a step of `tokens` adds to a process."""
    # Every tensor in its own pages, freed with it: malloc's free lists would hide allocations.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.parallel.measured"],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None

    def measure(
        raw: dict[str, Any],
        layout: Layout,
        backend: str,
        quantization: str | None,
        tokens: int,
        rank: int = 0,
        halves: int | None = None,
    ) -> int:
        if backend == "cpu":
            pytest.importorskip("farthing._native")
        ranks = [layout.tp, layout.pp, layout.ep]
        asked = dict(raw=raw, layout=ranks, backend=backend, quantization=quantization, tokens=tokens)
        asked |= {"rank": rank, "halves": halves}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline().split()[-1])

    yield measure
    process.stdin.close()
    assert process.wait() == 0


@linux
def test_pages_of_files_are_not_counted(tmp_path: Path) -> None:
    """Libraries lose pages while a step is measured, when other processes need memory."""
    library = tmp_path / "library"
    library.write_bytes(bytes(16 << 20))
    with library.open() as file, mmap(file.fileno(), 0, prot=PROT_READ) as pages:
        sum(pages[:: 1 << 12])

        def work() -> None:
            pages.madvise(MADV_DONTNEED)
            with mmap(-1, 48 << 20) as fresh:  # malloc may have resident memory to reuse
                fresh[:: 1 << 12] = bytes(12 << 10)

        assert growth(work) == pytest.approx(48 << 20, rel=0.1)


@linux
@pytest.mark.parametrize("layout", [Layout(), Layout(2)], ids=repr)
@pytest.mark.parametrize(("backend", "quantization"), BACKENDS)
def test_step_uses_the_planned_memory(
    backend: str, quantization: str | None, layout: Layout, measured: Measure
) -> None:
    """Only buffers, of a model with few weights."""
    plan = ShardPlan.build(ModelConfig.from_json(RAW), layout)
    serving = Serving(TOKENS, TOKENS, 1, TOKENS, threads=1)
    planned = step(plan, layout.place(0), Holder(backend, 4, quantization), serving, Stored("float32"))
    taken = measured(RAW, layout, backend, quantization, TOKENS)
    print(backend, quantization, layout, planned / 1e6, taken / 1e6, planned / taken)
    assert planned == pytest.approx(taken, rel=0.1)


@linux
@pytest.mark.parametrize("layout", [Layout(), Layout(2)], ids=repr)
def test_step_of_grouped_attention_uses_the_planned_memory(layout: Layout, measured: Measure) -> None:
    plan = ShardPlan.build(ModelConfig.from_json(GROUPED), layout)
    serving = Serving(TOKENS, TOKENS, 1, TOKENS, threads=1)
    planned = step(plan, layout.place(0), Holder("cpu", 4, "int8"), serving, Stored("float32"))
    assert planned == pytest.approx(measured(GROUPED, layout, "cpu", "int8", TOKENS), rel=0.1)


@linux
@pytest.mark.parametrize("tp", [1, 2])
def test_deterministic_step_uses_the_planned_memory(tp: int, measured: Measure) -> None:
    plan, halves = ShardPlan.build(ModelConfig.from_json(RAW), layout := Layout(tp)), halves_of_rank(tp, 1)
    serving, holder = Serving(TOKENS, TOKENS, 1, TOKENS, threads=1), Holder("cpu", 4, "int8", halves)
    planned = step(plan, layout.place(0), holder, serving, Stored("float32"))
    taken = measured(RAW, layout, "cpu", "int8", TOKENS, halves=halves)
    assert planned == pytest.approx(taken, rel=0.1)


STREAMED = DEEPSEEK_V4 | dict(
    vocab_size=512, hidden_size=512, moe_intermediate_size=256, num_attention_heads=8, head_dim=64,
    qk_rope_head_dim=32, q_lora_rank=256, o_lora_rank=128, sliding_window=128, index_n_heads=8,
    compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}, index_head_dim=64,
    index_topk=64, n_routed_experts=8, num_experts_per_tok=4, rope_scaling=None,
)  # fmt: skip


_FAST = ((Layout(), 0), (Layout(1, 2), 1))


@linux
@pytest.mark.parametrize(
    ("backend", "quantization", "layout", "rank"),
    [
        pytest.param(*backend, *of, marks=() if backend[1] or of in _FAST else pytest.mark.slow)
        for backend in (("reference", None), ("cpu", "int8"), ("cpu", None))
        for of in ((Layout(), 0), (Layout(2), 0), (Layout(1, 2), 0), (Layout(1, 2), 1), (Layout(1, 1, 2), 0))
    ],
    ids=repr,
)
def test_streams_and_a_compressed_past_are_planned(
    layout: Layout, rank: int, backend: str, quantization: str | None, measured: Measure
) -> None:
    """Buffers of DeepSeek-V4 with few weights; of weights and cache, `test_memory` compares the bytes."""
    plan = ShardPlan.build(ModelConfig.from_json(STREAMED), layout)
    serving, holder = Serving(TOKENS, TOKENS, 1, TOKENS, threads=1), Holder(backend, 4, quantization)
    planned = step(plan, layout.place(rank), holder, serving, Stored("float32"))
    taken = measured(STREAMED, layout, backend, quantization, TOKENS, rank)
    assert planned == pytest.approx(taken, rel=0.05)


@linux
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(x, marks=() if x == Layout() else pytest.mark.slow, id=repr(x))
        for x in (Layout(), Layout(2), Layout(1, 1, 2))
    ],
)
@pytest.mark.parametrize(("backend", "quantization"), BACKENDS[:3])
def test_rank_uses_the_planned_memory(
    backend: str, quantization: str | None, layout: Layout, measured: Measure
) -> None:
    """Total memory of a rank of the embedded model within 5 %; `test_memory` checks weights and cache."""
    checkpoint = Checkpoint.open(resolve_model("mite"))
    plan = ShardPlan.build(config_of(checkpoint), layout)
    holder, serving = Holder(backend, 4, quantization), Serving(TOKENS, 512, 1, 512, threads=1)
    model = PlannedModel.of(plan, stored_by_checkpoint(checkpoint.path))
    planned = memory(model, plan, holder, serving)[0]
    buffers = step(plan, layout.place(0), holder, serving, model.projections)
    taken = measured(checkpoint.config, layout, backend, quantization, 512)
    print(backend, quantization, layout, buffers / 1e6, taken / 1e6, planned.total / 1e6)
    assert planned.total == pytest.approx(planned.total - buffers + taken, rel=0.05)
