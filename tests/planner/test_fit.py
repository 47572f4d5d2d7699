"""What `--fit` chooses fits, by the same plan as `farthing plan`, and is the best that does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.cli.preflight import with_fit
from farthing.config import AUTO, EngineConfig
from farthing.planner.buffers import Serving
from farthing.planner.estimate import published_config
from farthing.planner.fit import Fit, fit, needed, weight_bytes
from tests.tiny import SMALL_V3

GB = 10**9


def model(folder: Path, name: str) -> Path:
    (folder / "config.json").write_text(json.dumps(published_config(name)))
    return folder


def test_formats_by_memory(tmp_path: Path) -> None:
    path = model(tmp_path, "qwen3-30b-a3b")
    roomy, tight = fit(path, 128 * GB), fit(path, 21 * GB)
    assert roomy.quantization == "int8" and roomy.max_model_len == roomy.longest == 40_960
    assert tight.quantization == "int4" and 8_192 <= tight.max_model_len < 40_960
    assert str(tight).startswith("weights bfloat16 rounded to int4, 1")
    with pytest.raises(ValueError, match=r"needs .* GB even with int4 weights and a context of 512 tokens"):
        fit(path, 8 * GB)
    assert fit(path, 128 * GB, "int4").quantization == "int4"


def test_small_models_and_quantized_ones_stay_as_stored(tmp_path: Path) -> None:
    assert fit(model(tmp_path, "smollm2-135m"), 16 * GB).quantization is None
    assert fit(model(tmp_path, "gpt-oss-20b"), 32 * GB).stored == "mxfp4"


@given(st.integers(10, 200))
def test_what_is_chosen_fits(tmp_path_factory: pytest.TempPathFactory, gigabytes: int) -> None:
    path = model(tmp_path_factory.getbasetemp(), "qwen3-30b-a3b")
    try:
        found = fit(path, gigabytes * GB)
    except ValueError:
        assert weight_bytes(path, "int4") > 0.8 * gigabytes * GB
        return
    assert found.weights == weight_bytes(path, found.quantization)
    assert found.weights + found.kv_cache_memory <= 0.9 * gigabytes * GB
    more = fit(path, 2 * gigabytes * GB)
    assert more.max_model_len >= found.max_model_len or more.quantization != found.quantization


def test_exactly_the_memory_that_is_needed_suffices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farthing.planner.fit._USABLE", 1.0)
    path = model(tmp_path, "smollm2-135m")
    serving = Serving(cache_tokens=512, max_model_len=512, max_num_seqs=1)  # the least that `fit` chooses
    (least,) = needed(path, "int4", serving)
    found = fit(path, least.total, "int4")
    assert (found.max_model_len, found.max_num_seqs) == (512, 1)
    with pytest.raises(ValueError, match="expected a smaller model"):
        fit(path, least.total - 1, "int4")


def test_options_that_are_given_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farthing.cli.preflight.available_memory", lambda: 16 * GB)
    (tmp_path / "config.json").write_text(json.dumps(SMALL_V3))
    found = with_fit(EngineConfig(model=str(tmp_path), backend="cpu"), tmp_path)
    assert isinstance(fit(tmp_path, 16 * GB), Fit) and found.packed == AUTO
    assert found.max_model_len and found.kv_cache_memory and found.max_num_seqs == 64
    given = EngineConfig(
        model=str(tmp_path),
        backend="cpu",
        quantization="int4",
        kv_cache_memory=GB,
        max_num_seqs=3,
        packed="x",
    )
    assert with_fit(given, tmp_path) == given
    elsewhere = EngineConfig(model=str(tmp_path), backend="gpu")
    assert with_fit(elsewhere, tmp_path) == elsewhere


def test_few_sequences_take_a_small_cache(tmp_path: Path) -> None:
    """A person's conversations: the same context, and no more cache than they fill."""
    path = model(tmp_path, "smollm2-135m")
    many, few = fit(path, 24 * 10**9), fit(path, 24 * 10**9, sequences=2)
    assert (many.max_num_seqs, few.max_num_seqs) == (64, 2)
    assert few.max_model_len == many.max_model_len == few.longest
    assert few.kv_cache_memory < 0.5 * 10**9 < 4 * 10**9 < many.kv_cache_memory
    assert fit(path, 24 * 10**9, sequences=100).max_num_seqs == 100
