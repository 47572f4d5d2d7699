"""Every kind of cache in an engine: prefix hits, preemption, drafts and restarts change no token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.config import EngineConfig
from farthing.engine.drafters import MtpDrafter
from farthing.engine.engine import Engine
from farthing.engine.request import SamplingParams
from farthing.engine.runner import resolve
from farthing.engine.speculation import Speculator
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.kinds import Sizing, cache_kinds
from farthing.model.load import random_model
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from tests.served import served_model
from tests.tiny import DEEPSEEK_V4

from .conftest import GREEDY, RAW, VOCAB, Always, Greedy, Guesses, greedy_of, tokens_of

WINDOW = 10
DENSE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    sliding_window=WINDOW,
    rms_norm_eps=1e-6,
)
MODELS: dict[str, dict[str, Any]] = {
    "latents": RAW,
    "heads": DENSE | {"model_type": "llama"},
    "every layer": DENSE | {"model_type": "mistral"},
    "some layers": DENSE
    | {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "two widths": DENSE
    | {
        "model_type": "gemma4_text",
        "global_head_dim": 16,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "states": DENSE
    | {
        "model_type": "qwen3_next",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "compressed": DEEPSEEK_V4
    | {
        "vocab_size": VOCAB,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "max_position_embeddings": 256,
    },
}
Start = Callable[..., Engine]


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> DecoderModel:
    torch.set_num_threads(1)
    found = served_model(ModelConfig.from_json(MODELS[request.param]))
    found.ops.source = request.param
    return found


@pytest.fixture(scope="module")
def greedy(model: DecoderModel) -> Greedy:
    return greedy_of(served_model(model.config))


@pytest.fixture
def start(model: DecoderModel) -> Iterator[Start]:
    """Start engines; at the end of the test they are shut down and their invariants checked."""
    engines: list[Engine] = []

    def make(**options: Any) -> Engine:
        fixed: dict[str, Any] = dict(max_num_seqs=4, num_blocks=96, block_size=4, max_num_batched_tokens=24)
        engines.append(Engine(model, EngineConfig(**(fixed | options))))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()
        engine._core.scheduler.check()
        assert engine._core.scheduler.unused and engine.stats.integrity_failures == 0


def prompt(length: int, seed: int = 0) -> list[int]:
    return [2 + (i * i + 7 * seed + i) % 300 for i in range(length)]


def test_concurrent_requests_get_the_tokens_of_a_run_alone(start: Start, greedy: Greedy) -> None:
    engine = start()
    prompts = [prompt(n, n) for n in (5, 12, 37, 70, 44)]
    streams = [engine.submit(p, GREEDY) for p in prompts]
    assert [tokens_of(s.result()) for s in streams] == [greedy(p, 12) for p in prompts]


def test_the_next_turn_continues_at_the_end_of_the_last_one(start: Start, greedy: Greedy) -> None:
    engine, tokens = start(), prompt(45)
    for turn in range(3):
        known = len(tokens)
        output = engine.submit(tokens, GREEDY).result()
        assert tokens_of(output) == greedy(tokens, 12)
        assert output.metrics.cached_tokens == (known - len(prompt(6, turn - 1)) - 1 if turn else 0)
        tokens = tokens + tokens_of(output) + prompt(6, turn)


def test_an_edited_turn_continues_at_the_end_of_the_prompt(start: Start, greedy: Greedy) -> None:
    engine, tokens = start(), prompt(75)
    engine.submit(tokens, GREEDY).result()
    edited = tokens[:73] + prompt(9, 3)
    output = engine.submit(edited, GREEDY).result()
    assert tokens_of(output) == greedy(edited, 12)
    assert output.metrics.cached_tokens == 72


def test_preempted_and_cancelled_requests(start: Start, greedy: Greedy) -> None:
    engine = start(num_blocks=24)
    prompts = [prompt(n, n) for n in (30, 31, 33)]
    longer = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    streams = [engine.submit(p, longer) for p in prompts]
    other = engine.submit(prompt(20, 1), longer)
    other.cancel()
    assert [tokens_of(s.result()) for s in streams] == [greedy(p, 30) for p in prompts]
    assert engine._core.scheduler.num_preemptions


def test_rejected_and_accepted_drafts(start: Start, greedy: Greedy) -> None:
    engine, tokens = start(speculate="ngram:4"), prompt(29)
    expected = greedy(tokens, 40)
    guesses = Guesses(tokens + expected)
    engine._core._speculator = Speculator([guesses], Always)
    output = engine.submit(tokens, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)).result()
    assert tokens_of(output) == expected
    assert guesses.wrong > 3 and engine.stats.accepted_tokens > 3


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_rejected_drafts_in_caches_of_8_bits(dtype: Any) -> None:
    """DeepSeek-V4's entries and open windows keep nothing of them: tokens equal those without drafts."""
    torch.set_num_threads(1)
    model = served_model(ModelConfig.from_json(MODELS["compressed"]))
    options: dict[str, Any] = dict(max_num_seqs=4, num_blocks=96, block_size=4, kv_cache_dtype=dtype)
    sampled, found = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), []
    for speculate in (None, "ngram:4"):
        engine = Engine(model, EngineConfig(**options, speculate=speculate))
        if found:
            guesses = Guesses(prompt(29) + found[0])
            engine._core._speculator = Speculator([guesses], Always)
        found.append(tokens_of(engine.submit(prompt(29), sampled).result()))
        engine.shutdown()
    assert found[0] == found[1]
    assert guesses.wrong > 3 and engine.stats.accepted_tokens > 3


def test_drafts_of_a_layer_with_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V4's own: drafts are those of a layer that saw the whole text, and rejected ones leave nothing
    behind: in prompts of several steps, continued turns and preempted requests."""
    raw = MODELS["compressed"] | {"num_nextn_predict_layers": 1}
    model = random_model(ModelConfig.from_json(raw), select("reference"), seed=7)
    greedy, drafted, size = greedy_of(model), [], 4
    original = MtpDrafter.draft

    def draft(self: MtpDrafter, seqs: list[Any], most: list[int], price: float) -> list[list[int]]:
        found = original(self, seqs, most, price)
        for seq, drafts in zip(seqs, found, strict=True):
            ids = torch.tensor(seq.tokens)
            blocks = -(-len(ids) // size)
            cache = model.new_cache(blocks, size, "float32")
            batch = make_batch([len(ids) - 1], [0], [list(range(blocks))], size)
            last = model.draft(ids[1:], model.forward(ids[:-1], batch, cache), batch, cache)[-1:]
            drafted.append((drafts[:1], model.draft_logits(last).argmax(-1).tolist()))
        return found

    monkeypatch.setattr(MtpDrafter, "draft", draft)
    fixed: dict[str, Any] = dict(max_num_seqs=4, block_size=size, max_num_batched_tokens=24)
    engine = Engine(model, EngineConfig(num_blocks=30, speculate="mtp:3", **fixed))
    engine._core._speculator = Speculator([MtpDrafter(engine._core.runner, 3)], Always)
    prompts = [prompt(n, n) for n in (5, 31, 33)]
    longer = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    answers = [tokens_of(stream.result()) for stream in [engine.submit(p, longer) for p in prompts]]
    assert answers == [greedy(p, 30) for p in prompts]
    turn = prompts[1] + answers[1] + prompt(5, 2)
    assert tokens_of(engine.submit(turn, GREEDY).result()) == greedy(turn, 12)
    engine.shutdown()
    engine._core.scheduler.check()
    assert len(drafted) > 20 and all(not first or first == expected for first, expected in drafted)


def test_a_restarted_engine_continues_from_the_disk(start: Start, greedy: Greedy, tmp_path: Path) -> None:
    tokens = prompt(75)
    first = start(prefix_cache_dir=str(tmp_path))
    answer = tokens_of(first.submit(tokens, GREEDY).result())
    kept = first._core.runner.cache
    states = bool(kept.state or kept.open)
    first.shutdown()
    again = start(prefix_cache_dir=str(tmp_path))
    follow_up = tokens + answer + prompt(3)
    output = again.submit(follow_up, GREEDY).result()
    assert tokens_of(output) == greedy(follow_up, 12)
    # All full blocks of the turn before; a state is kept at the end of the prompt.
    assert output.metrics.cached_tokens == (72 if states else 84)


def test_what_a_damaged_file_had_is_computed_instead(start: Start, greedy: Greedy, tmp_path: Path) -> None:
    tokens = prompt(75)
    first = start(prefix_cache_dir=str(tmp_path))
    first.submit(tokens, GREEDY).result()
    first.shutdown()
    for file in tmp_path.glob("*/*.kv"):
        whole = bytearray(file.read_bytes())
        whole[-1] ^= 1
        file.write_bytes(whole)
    again = start(prefix_cache_dir=str(tmp_path))
    assert tokens_of(again.submit(tokens, GREEDY).result()) == greedy(tokens, 12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_planned_bytes_are_those_that_are_allocated(model: DecoderModel, dtype: Any) -> None:
    config, sizes = resolve(EngineConfig(num_blocks=40, max_num_seqs=3, kv_cache_dtype=dtype), model)
    assert config.num_blocks and config.max_num_batched_tokens
    cache = model.new_cache(40, config.block_size, dtype, sizes.windows, sizes.slots)
    held = sum(t.nbytes for kind in cache.by_kind() for t in kind)
    sizing = Sizing(cache_kinds(model.config), dtype, config.block_size, config.max_num_batched_tokens)
    assert sizing.used(40, sizing.sizes(3, sizing.checkpoints(3, 40))) == held


def test_a_cache_of_any_memory_keeps_no_more_states_than_its_blocks_can_use(model: DecoderModel) -> None:
    """As many as if its number of blocks had been given, which `farthing plan` assumes."""
    given = EngineConfig(max_num_seqs=3, kv_cache_dtype="float32", max_model_len=256)
    config, sizes = resolve(given, model)
    assert sizes == resolve(replace(given, num_blocks=config.num_blocks), model)[1]


@given(memory=st.integers(1, 1 << 22), sequences=st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_a_cache_stays_within_its_memory(memory: int, sequences: int) -> None:
    config = ModelConfig.from_json(MODELS["some layers"])
    model: Any = type("Shape", (), {"config": config, "ops": select("reference")})
    given = EngineConfig(
        kv_cache_memory=memory, max_num_seqs=sequences, max_num_batched_tokens=64, check_memory=False
    )
    try:
        found, sizes = resolve(given, model)
    except ValueError as error:
        assert f"kv_cache_memory: got {memory} bytes" in str(error)
        return
    assert found.num_blocks and found.max_num_seqs <= sequences
    sizing = Sizing(cache_kinds(config), "float32", found.block_size, 64)
    assert sizing.used(found.num_blocks, sizes) <= memory  # type: ignore[arg-type]
