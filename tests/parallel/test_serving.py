"""The engine on several ranks: same tokens as one rank, expert counts, and dead ranks."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from farthing.config import EngineConfig
from farthing.engine.build import build_engine
from farthing.engine.engine import Engine
from farthing.engine.request import EngineError, SamplingParams
from farthing.llm import LLM
from farthing.model.config import ModelConfig
from farthing.model.parameters import random_parameters
from farthing.parallel.cluster import ParallelModel
from tests.tiny import SMALL_V3

pytestmark = pytest.mark.usefixtures("exact_on_amx")

PROMPTS = ["def fibonacci(n):\n", "import os\n", "class Stack:\n    def"]
COMBINATIONS = [(t, p, e) for t in (1, 2) for p in (1, 2) for e in (1, 2) if t * p * e > 1]
EVERYTHING: dict[str, Any] = dict(max_model_len=128, num_blocks=32, threads=1)


def tokens(**options: Any) -> list[list[int]]:
    with LLM("mite", **EVERYTHING, **options) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0), use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]


@pytest.fixture(scope="module")
def one_rank() -> dict[str, list[list[int]]]:
    return {}


@pytest.mark.parametrize(
    "combination",
    [pytest.param(c, marks=() if c == (2, 1, 1) else pytest.mark.slow, id="tp{}pp{}ep{}".format(*c))
     for c in COMBINATIONS],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.slow)])
def test_embedded_model_generates_the_tokens_of_one_rank(
    combination: tuple[int, int, int], backend: str, one_rank: dict[str, list[list[int]]]
) -> None:
    if backend == "cpu":
        pytest.importorskip("farthing._native")
    tp, pp, ep = combination
    if backend not in one_rank:
        one_rank[backend] = tokens(backend=backend)
    spread = tokens(
        backend=backend,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        expert_parallel_size=ep,
        speculate="mtp" if pp == 2 else None,
    )
    assert spread == one_rank[backend]


@pytest.mark.parametrize("transport", ["shared", pytest.param("gloo", marks=pytest.mark.slow)])
def test_layers_in_one_call_and_op_by_op(transport: str, one_rank: dict[str, list[list[int]]]) -> None:
    """The CPU kernels synchronize with other ranks within one call if they share memory."""
    pytest.importorskip("farthing._native")
    if "cpu" not in one_rank:
        one_rank["cpu"] = tokens(backend="cpu")
    options: dict[str, Any] = dict(tensor_parallel_size=2, expert_parallel_size=2, transport=transport)
    assert tokens(backend="cpu", **options) == one_rank["cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "redundant"), [("reference", 4), ("cpu", 4), ("cpu", 0)])
def test_experts_are_rebalanced_while_serving(
    backend: str, redundant: int, one_rank: dict[str, list[list[int]]]
) -> None:
    if backend == "cpu":
        pytest.importorskip("farthing._native")
    if backend not in one_rank:
        one_rank[backend] = tokens(backend=backend)
    options: dict[str, Any] = dict(redundant_experts=redundant, rebalance_steps=10)
    assert tokens(backend=backend, expert_parallel_size=2, **options) == one_rank[backend]


@pytest.mark.slow
def test_data_parallel_attention_generates_the_same_tokens(one_rank: dict[str, list[list[int]]]) -> None:
    if "reference" not in one_rank:
        one_rank["reference"] = tokens(backend="reference")
    options: dict[str, Any] = dict(expert_parallel_size=2, dp_attention=True, enable_prefix_caching=False)
    assert tokens(backend="reference", **options) == one_rank["reference"]


@pytest.mark.parametrize(
    "layout",
    [dict(expert_parallel_size=2),
     pytest.param(dict(tensor_parallel_size=2, expert_parallel_size=2), marks=pytest.mark.slow),
     pytest.param(dict(tensor_parallel_size=2, pipeline_parallel_size=2), marks=pytest.mark.slow)],
)  # fmt: skip
def test_every_rank_maps_its_own_packed_file(tmp_path: Path, layout: dict[str, Any]) -> None:
    pytest.importorskip("farthing._native")
    asked: dict[str, Any] = dict(
        backend="cpu", quantization="int8", packed=tmp_path / "model.bin", speculate="mtp", **layout
    )
    first = tokens(**asked)  # writes the files
    files = sorted(tmp_path.iterdir())
    ranks = math.prod(layout.values()) if "pipeline_parallel_size" in layout else 2
    assert [f.name.rpartition(".")[2] for f in files] == [str(rank) for rank in range(ranks)]
    written = [f.stat().st_mtime_ns for f in files]
    assert tokens(**asked) == first
    assert [f.stat().st_mtime_ns for f in files] == written  # mapped, not rewritten
    other = tiny_directory(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match="made from another checkpoint than"):
        LLM(other, skip_tokenizer_init=True, threads=1, **asked)


def tiny_directory(path: Path) -> Path:
    (path / "other").mkdir()
    return tiny(path / "other")


def tiny(path: Path) -> Path:
    raw = SMALL_V3 | dict(num_experts_per_tok=3, topk_group=2)
    (path / "config.json").write_text(json.dumps(raw))
    save_file(random_parameters(ModelConfig.from_json(raw), seed=7), path / "model.safetensors")
    return path


def two_ranks(path: Path, backend: str = "reference") -> Engine:
    return build_engine(
        EngineConfig(
            model=str(tiny(path)), backend=backend, skip_tokenizer_init=True, threads=1, num_blocks=16,
            tensor_parallel_size=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_dead_rank_fails_the_replica_immediately(backend: str, tmp_path: Path) -> None:
    if backend == "cpu":
        pytest.importorskip("farthing._native")
    with two_ranks(tmp_path, backend) as engine:
        stream = engine.submit([1, 2, 3], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
        assert len(stream.result().outputs[0].token_ids) == 4
        counted = engine.stats.snapshot().expert_tokens
        assert all(sum(layer) == 3 * 6 for layer in list(counted.values())[:2])  # 3 experts, 3 + 3 tokens
        assert isinstance(engine._model, ParallelModel)
        os.kill(engine._model._workers.pids[1], signal.SIGKILL)
        began = time.monotonic()
        while time.monotonic() - began < 10:  # an idle engine also detects it
            try:
                engine.health()
            except EngineError as error:
                assert "rank 1 of 2 exited with code -9" in str(error)
                break
            time.sleep(0.05)
        else:
            pytest.fail("the failure was not noticed")
        with pytest.raises(EngineError, match="rank 1 of 2 exited"):
            engine.submit([1, 2, 3], SamplingParams(max_tokens=4))


def test_ranks_ignore_the_signal_that_drains_the_server(tmp_path: Path) -> None:
    """A service manager sends SIGTERM to every process at once; requests in flight need their ranks."""
    with two_ranks(tmp_path) as engine:
        assert isinstance(engine._model, ParallelModel)
        for sent in (signal.SIGTERM, signal.SIGINT):
            os.kill(engine._model._workers.pids[1], sent)
            params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
            assert len(engine.submit([1, 2, 3], params).result().outputs[0].token_ids) == 4


def test_suspended_rank_is_unhealthy_until_it_resumes(tmp_path: Path) -> None:
    with two_ranks(tmp_path) as engine:
        assert isinstance(engine._model, ParallelModel)
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        engine.submit([1, 2, 3], params).result()
        until(lambda: engine._model._workers._heard)
        rank = engine._model._workers.pids[1]
        os.kill(rank, signal.SIGSTOP)
        try:
            until(lambda: "rank 1 of 2 has not responded" in (engine._model.failure() or ""))
            with pytest.raises(EngineError, match="has not responded"):
                engine.health()
        finally:
            os.kill(rank, signal.SIGCONT)
        until(lambda: engine._model.failure() is None)
        engine.submit([1, 2, 3], params).result()


def until(condition: Callable[[], Any], timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_rank_that_cannot_start_reports_why(tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(tiny(tmp_path)), skip_tokenizer_init=True, backend="none such", tensor_parallel_size=2
    )
    with pytest.raises(
        (RuntimeError, ValueError), match="backend: got 'none such'; expected 'auto' or one of"
    ):
        build_engine(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tensor_parallel_size=0), "tensor_parallel_size: got 0; expected an integer >= 1"),
        (dict(transport="carrier pigeon"), "transport: got 'carrier pigeon'; expected one of"),
        (dict(packed="a", rebalance_steps=5), "packed: got 'a'; expected None with rebalance_steps"),
        (dict(dp_attention=True), "dp_attention: got True; expected enable_prefix_caching False"),
        (dict(disaggregate=True, tensor_parallel_size=2), "disaggregate: got True with 2 ranks"),
        (dict(redundant_experts=4), "redundant_experts: got 4; expected 0 without"),
        (dict(deterministic=True, tensor_parallel_size=4), "expected tp 1, or tp 2 with ep 1"),
        (
            dict(deterministic=True, tensor_parallel_size=2, expert_parallel_size=2),
            "expected tp 1, or tp 2 with ep 1",
        ),
        (dict(deterministic=True, experts_on="cpu"), "with experts_on 'cpu'; expected experts_on None"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_disaggregated_prefill_generates_the_same_tokens(tmp_path: Path, backend: str) -> None:
    if backend == "cpu":
        pytest.importorskip("farthing._native")
    fixed: dict[str, Any] = dict(
        model=tiny(tmp_path), backend=backend, skip_tokenizer_init=True, threads=1, num_blocks=128,
        block_size=4, max_num_seqs=4,
    )  # fmt: skip
    prompts = [[(7 * i + j) % 40 for j in range(5 + 6 * i)] for i in range(6)]
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with LLM(**fixed) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    with LLM(**fixed, disaggregate=True) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == expected
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.num_cached_tokens == (len(prompt) - 1) // 4 * 4  # all full blocks came from there
        # Blocks were handed over.
        assert any(b >= 128 for b in llm.engine._core.scheduler.pool.blocks)
        stream = llm.engine.submit(prompts[5], params)
        stream.cancel()
        assert stream.result().outputs[0].finish_reason in ("abort", "length")
        # Without the other process, prompts are computed here.
        process = llm.engine.prefill._process._process  # type: ignore[union-attr]
        process.kill()
        process.join(10)
        fresh = [[(3 * j) % 40 for j in range(30)]]
        after = llm.generate(fresh, params, use_tqdm=False)[0].outputs[0].token_ids
    with LLM(**fixed) as llm:
        assert llm.generate(fresh, params, use_tqdm=False)[0].outputs[0].token_ids == after
