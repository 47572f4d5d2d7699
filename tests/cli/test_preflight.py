"""What `farthing serve` and `farthing compress` refuse before they begin."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from farthing.checkpoint.reader import Checkpoint
from farthing.cli.app import app
from farthing.cli.preflight import preflight
from farthing.config import EngineConfig
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig
from farthing.model.parameters import random_parameters
from farthing.planner.fit import weight_bytes
from tests.tiny import DEEPSEEK_V4, V3, tiny


@pytest.fixture
def no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise AssertionError("the port was opened")

    monkeypatch.setattr("farthing.server.run.serve", refuse)


def said(*arguments: str) -> str:
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2, refused.output
    return " ".join(refused.output.split())


@pytest.mark.usefixtures("no_port")
def test_errors_of_a_model_come_before_the_port(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3 | {"model_type": "cohere2"}))
    assert "form of layers is not served yet" in said("serve", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(V3 | {"hidden_size": -1}))
    assert "hidden_size: got -1" in said("serve", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(V3))
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json: not valid JSON" in said("serve", str(tmp_path))


@pytest.mark.usefixtures("no_port")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "nope"), "backend: got 'nope'; expected 'auto' or one of"),
        (("--backend", "cpu/avx9"), "instruction set 'avx9' is unknown or not supported"),
        (("--backend", "torch/nope"), "device: got 'nope'"),
        (("--max-model-len", "9999999"), "max_model_len: got 9999999; expected at most 2048, the model's"),
        (("--chat-template", "nope.jinja"), "chat_template: got 'nope.jinja'; expected a readable file or"),
        (("--chat-template", "{broken}"), "chat_template does not compile: Expected an expression"),
    ],
)
def test_options_are_checked_before_the_port(
    arguments: tuple[str, str], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("farthing._native")
    (tmp_path / "broken").write_text("{% if %}")
    option, value = arguments
    assert message in said("serve", option, value.format(broken=tmp_path / "broken"))


@pytest.mark.usefixtures("no_port")
@pytest.mark.parametrize(
    ("raw", "size", "weights"),
    [
        (tiny(), "num_attention_heads", False),
        (tiny(), "num_attention_heads", True),
        (DEEPSEEK_V4, "o_groups", True),
    ],
)
def test_ranks_and_drafts_are_checked_before_the_port(
    raw: dict[str, Any], size: str, weights: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if weights:
        config = ModelConfig.from_json(raw)
        parameters = random_parameters(config, 7)
        save_file({name: x.contiguous() for name, x in parameters.items()}, tmp_path / "model.safetensors")
    served = "serve", str(tmp_path), "--backend", "cpu", "--packed", "auto"
    assert f"tp: got 3; expected a divisor of {size} = {raw[size]}" in said(*served, "--tp", "3")
    refused = said(*served, "--speculate", "mtp")
    assert "speculate: got 'mtp', but the model has no MTP layer; expected 'ngram' or None" in refused


@pytest.mark.usefixtures("no_port")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "mite", "x", "--temperature", "-3"), "Invalid value for '--temperature'"),
        (("chat", "mite", "--max-tokens", "0"), "Invalid value for '--max-tokens'"),
        (("generate", "mite", "--top-p", "3"), "Invalid value for '--top-p'"),
        (("generate", "mite", "-n", "-1"), "Invalid value for '-n'"),
        (("serve", "mite", "--api-key-file", "gone"), "gone', which cannot be read (No such file"),
        (("serve", "mite", "--api-key-file", "/dev/null"), "which has no key; expected `name:key` or a key"),
    ],
)
def test_a_mistake_is_named_before_a_model_is_loaded(arguments: tuple[str, ...], message: str) -> None:
    assert message in re.sub(r"[│╭╰─╮╯\s]+", " ", said(*arguments))


@pytest.mark.usefixtures("no_port")
def test_cache_larger_than_memory_is_refused_in_one_line() -> None:
    refused = said("serve", "--kv-cache-memory", "100TB")
    assert refused.startswith("error: kv_cache_memory: got 100,000.0 GB; expected at most the ")
    assert "not a valid integer" not in refused
    assert "such as 1500000, 1.5MB" in said("serve", "--kv-cache-memory", "much")


@pytest.mark.usefixtures("no_port")
def test_model_larger_than_memory_names_what_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3 | {"torch_dtype": "bfloat16"}))
    whole, four = (weight_bytes(tmp_path, kind) for kind in (None, "int4"))
    assert four < whole / 2
    for free, hint in ((four, "expected --quantization int4, a smaller"), (four - 1, "expected a smaller")):
        monkeypatch.setattr("farthing.cli.preflight.available_memory", lambda free=free: free)
        refused = said("serve", str(tmp_path), "--backend", "cpu")
        assert f"needs {whole / 1e9:,.1f} GB for weights" in refused and hint in refused
    for fits in ({"check_memory": False}, {"quantization": "int4"}, {"backend": "gpu"}, {"packed": "file"}):
        monkeypatch.setattr("farthing.cli.preflight.available_memory", lambda: four)
        preflight(EngineConfig(**({"model": str(tmp_path), "backend": "cpu"} | fits)))  # type: ignore[arg-type]


def test_compress_compares_disk_and_memory_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farthing.compress.needs.free_disk", lambda path: 1000)
    out = str(tmp_path / "out")
    assert "out: the result takes about" in said("compress", "-o", out, "--recipe", "int4-rtn")
    monkeypatch.setattr("farthing.compress.needs.free_disk", lambda path: 10**12)
    monkeypatch.setattr("farthing.compress.needs.available_memory", lambda: 10**6)
    refused = said("compress", "-o", out, "--recipe", "int4", "--no-gate")
    assert "model: compressing its largest layer takes about" in refused and "--no-check-memory" in refused
    assert not Path(out).exists()


def test_weights_of_the_embedded_model_by_headers_and_by_config(tmp_path: Path) -> None:
    path = resolve_model("mite")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    files = Checkpoint.open(path).stored_bytes()
    assert files / 2 < weight_bytes(path) < 4 * files
    assert weight_bytes(tmp_path) == pytest.approx(weight_bytes(path), rel=0.1)


def test_threads_of_torch_sleep_while_they_wait() -> None:
    """Read when torch is imported, so the command sets it first."""
    script = (
        "import os, sys, farthing.cli.app, farthing.cli.compress as command\n"
        "assert 'torch' not in sys.modules\n"
        "try: command._run(command.CompressOptions(model='/none'), None)\n"
        "except FileNotFoundError: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)\n"
        "assert os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'] == os.environ['LRU_CACHE_CAPACITY'] == '16'"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert ran.stdout == "PASSIVE True\n", ran.stderr
