"""Engines that find the prefixes of stopped engines on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing import LLM
from farthing.config import EngineConfig
from farthing.engine.engine import Engine
from farthing.engine.request import RequestOutput, SamplingParams
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from tests.served import form_for, served_model

from .conftest import RAW
from .test_sparse import TYPES, save

PROMPTS = [[2 + (i * i + n) % 300 for i in range(n)] for n in (61, 45, 40)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> DecoderModel:
    """A model with an MTP layer, without and with an indexer."""
    torch.set_num_threads(1)
    name: str = getattr(request, "param", "dense")
    raw = {"dense": RAW, **TYPES}[name]
    model = served_model(ModelConfig.from_json(raw))
    model.ops.source = name
    return model


Start = Callable[..., Engine]


@pytest.fixture
def start(model: DecoderModel, tmp_path: Path) -> Iterator[Start]:
    """Start engines that share one directory."""
    engines: list[Engine] = []

    def make(directory: Path = tmp_path, **options: Any) -> Engine:
        fixed: dict[str, Any] = dict(max_num_seqs=4, num_blocks=64, block_size=4, max_num_batched_tokens=32)
        config = EngineConfig(prefix_cache_dir=str(directory), **(fixed | options))
        engines.append(Engine(form_for(model, config), config))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()
        assert engine.stats.integrity_failures == 0


def answers(engine: Engine, salt: str = "") -> list[RequestOutput]:
    streams = [engine.submit(p, GREEDY, kind="final", cache_salt=salt) for p in PROMPTS]
    return [stream.result() for stream in streams]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("model", ["dense", *TYPES], indirect=True)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
def test_another_process_reads_computed_blocks(start: Start, dtype: str) -> None:
    options: dict[str, Any] = {"kv_cache_dtype": dtype, "speculate": "mtp:2"}
    first = start(**options)
    said = answers(first)
    first.shutdown()
    assert first.stats.disk.written_bytes > 0
    second = start(**options)
    again = answers(second)
    assert tokens(again) == tokens(said)
    assert [output.num_cached_tokens for output in again] == [60, 44, 36]
    assert second.stats.disk.hits == 140
    assert second.stats.prompt_tokens == 61 + 45 + 40 - 140
    time.sleep(0.15)  # the engine checks its invariants


def test_blocks_of_other_configurations_are_not_used(
    start: Start, model: DecoderModel, monkeypatch: Any
) -> None:
    answers(start())
    for options in (
        {"kv_cache_dtype": "int8"},
        {"block_size": 8},
        {"experts": "all"},
        {"quantization": "int8"},
        {"speculate": "mtp"},
    ):
        engine = start(**options)
        answers(engine)
        assert engine.stats.disk.hits == 0, options
    assert all(output.num_cached_tokens == 0 for output in answers(start(), salt="another tenant"))
    monkeypatch.setattr(model.ops, "source", "other weights")
    assert all(output.num_cached_tokens == 0 for output in answers(start()))


def test_preempted_and_evicted_prompts_come_back_from_disk(start: Start) -> None:
    """A cache with room for one prompt: the others are on disk and read again for each turn."""
    engine = start(num_blocks=20)
    said = tokens(answers(engine))
    before = engine.stats.disk.hits
    for _ in range(3):
        assert tokens(answers(engine)) == said
    time.sleep(1.5)
    assert tokens(answers(engine)) == said
    assert engine.stats.disk.hits > before


def test_answers_are_stored(start: Start) -> None:
    first = start()
    (said, *_) = tokens(answers(first))
    first.shutdown()
    follow = [*PROMPTS[0], *said, 5, 6, 7]
    output = start().submit(follow, GREEDY, kind="final").result()
    assert output.num_cached_tokens == 68  # 61 + 7 were computed


def test_model_without_a_checkpoint_is_rejected(
    start: Start, model: DecoderModel, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(model.ops, "source", "")
    with pytest.raises(ValueError, match=r"prefix_cache_dir: got .* not loaded from a checkpoint"):
        start()


def test_file_instead_of_the_directory_is_an_error(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"prefix_cache_dir: got .*; expected a directory"):
            start(path)


def test_unusable_directory_logs_one_warning(
    start: Start, tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    engine = start(tmp_path / "new")
    said = tokens(answers(engine))
    assert tokens(answers(engine)) == said
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        f"prefix cache: cannot use {tmp_path / 'new'} (Read-only file system); continuing without it"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_prefix_caching": False}, "without enable_prefix_caching; expected both"),
        ({"tensor_parallel_size": 2}, "with 2 ranks; expected one rank"),
        ({"prefix_cache_disk_bytes": 0}, "prefix_cache_disk_bytes: got 0; expected an integer >= 1"),
    ],
)
def test_rejected_combinations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**{"prefix_cache_dir": "somewhere", **options})


def test_rejected_limits(start: Start) -> None:
    with pytest.raises(ValueError, match="prefix_cache_disk_bytes: got 5; expected no value without"):
        EngineConfig(prefix_cache_disk_bytes=5)
    with pytest.raises(ValueError, match="prefix_cache_dir: got ''; expected the path"):
        EngineConfig(prefix_cache_dir="")
    with pytest.raises(ValueError, match=r"prefix_cache_disk_bytes: got 5; expected at least \d+, the size"):
        start(prefix_cache_disk_bytes=5)


@pytest.mark.slow
def test_prefill_process_shares_the_directory(tmp_path: Path) -> None:
    path = save(RAW, tmp_path)
    said = []
    for disaggregate in (False, True, True):
        with LLM(
            path, backend="reference", skip_tokenizer_init=True, block_size=4, num_blocks=64,
            disaggregate=disaggregate, prefix_cache_dir=tmp_path / f"cache-{disaggregate}",
        ) as llm:  # fmt: skip
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            written = llm.engine.stats.disk
        said.append(tokens(outputs))
    assert said[0] == said[1] == said[2]
    assert written.written_bytes == 0, "found again"
