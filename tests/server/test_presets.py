"""The models of `farthing serve --models`: folders, files, options, and their planned memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farthing.config import EngineConfig, as_arguments
from farthing.server.config import Given, ServerConfig
from farthing.server.presets import read_models, read_presets
from tests.tiny import tiny


def model(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    raw = tiny(vocab_size=267, max_position_embeddings=4096) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_a_folder_serves_what_can_be_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model(tmp_path / "one")
    model(tmp_path / "two", model_type="bert")
    (tmp_path / "notes").mkdir()
    presets = read_presets(tmp_path, Given({}, {}))
    assert [each.name for each in presets] == ["one"] and presets[0].type == "deepseek_v3"
    assert "two is left out" in caplog.text and "bert" in caplog.text


def test_subfolders_are_searched_and_what_is_empty_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LM Studio and the hub's cache lay their folders out."""
    monkeypatch.setattr("farthing.server.presets._preset", lambda name, options, _: SimpleNamespace(
        name=name, type="tiny", path=options["model"]
    ))  # fmt: skip
    model(tmp_path / "org" / "directory")
    files = ("pub/a/x.gguf", "pub/b/x.gguf", "pub/b/mmproj-x.gguf", "z-00001-of-00002.gguf",
             "z-00002-of-00002.gguf", "hub/models--o--m/snapshots/0f/y.gguf", "a/b/c/d/e/f.gguf",
             "notes/read.me", ".hidden/h.gguf")  # fmt: skip
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "pub" / "loop").symlink_to(tmp_path, target_is_directory=True)
    names = {each.name for each in read_presets(tmp_path, Given({}, {}))}
    assert names == {"directory", "x", "x.gguf", "y", "z"}
    assert "a is left out: it has no config.json and no GGUF file" in caplog.text
    assert "notes is left out" in caplog.text and "hidden" not in caplog.text


def test_damaged_weights_and_shared_names_in_a_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(tmp_path / "all" / "one")
    (model(tmp_path / "all" / "two") / "model.safetensors").write_bytes(b"no weights")
    models, _ = read_models(tmp_path / "all", Given({}, {}), "1GB")
    assert [each.preset.name for each in models] == ["one"]
    assert "two is left out" in caplog.text and "not a safetensors file" in caplog.text
    (tmp_path / "models.toml").write_text(f'[two]\nmodel = "{tmp_path / "all" / "two"}"\n')
    with pytest.raises(ValueError, match=r"\[two\]: .*not a safetensors file"):
        read_models(tmp_path / "models.toml", Given({}, {}), "1GB")
    with pytest.raises(ValueError, match="has no model that can be served"):
        read_models(tmp_path / "all", Given({}, {}), "1MB")

    (tmp_path / "all" / "one.gguf").touch()
    monkeypatch.setattr("farthing.server.presets._preset", lambda name, options, _: SimpleNamespace(
        name=name, type="tiny", path=options["model"]
    ))  # fmt: skip
    assert [each.name for each in read_presets(tmp_path / "all", Given({}, {}))] == ["one", "one.gguf", "two"]


def test_a_start_keeps_a_packed_file_where_the_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (preset,) = read_presets(model(tmp_path / "all" / "tiny").parent, Given({}, {}))
    assert "--packed auto" in " ".join(preset.sized(10**9).command(1))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "--packed" not in preset.sized(10**9).command(1)


def test_a_file_gives_names_and_options_to_models(tmp_path: Path) -> None:
    path = model(tmp_path / "tiny")
    file = tmp_path / "models.toml"
    file.write_text(
        f'[fast]\nmodel = "{path}"\nquantization = "int4"\ntool-call-parser = "hermes"\n'
        f'["long:one"]\nmodel = "{path}"\nmax_model_len = 512\nkv_cache_memory = "1MB"\n'
    )
    fast, long = read_presets(file, Given({"threads": 1}, {"request_timeout": 5.0}))
    assert (fast.engine.quantization, fast.engine.threads, fast.server.tool_call_parser) == (
        "int4", 1, "hermes",
    )  # fmt: skip
    assert (long.name, long.engine.kv_cache_memory) == ("long:one", 1_000_000)
    command = long.sized(10**9, tmp_path / "keys").command(9)
    assert command[3:5] == ["serve", str(path)]
    line = " ".join(command)
    for words in (
        *("--port 9", "--threads 1", "--max-model-len 512", "--served-model-name long:one"),
        *("--request-timeout 5.0", f"--api-key-file {tmp_path / 'keys'}"),
    ):
        assert words in line, line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "'x': expected a table with at least `model`"),
        ("[x]\nsize = 1", "'x': expected a table"),
        ('[x]\nmodel = "MODEL"\nsize = 1', r"\[x\]: size: no such option"),
        ('[x]\nmodel = "MODEL"\nmax_model_len = 0', r"\[x\]: max_model_len: got 0; expected"),
        ('[x]\nmodel = "MODEL"\nbackend = "gpu"', r"\[x\]: backend: got 'gpu'; expected the CPU of this"),
        ('[x]\nmodel = "MODEL"\nbackend = "torch"\ndevice = "cuda"', r"\[x\]: device: got 'cuda'; expected"),
        ('[x]\nmodel = "MODEL"\ntp = 2', r"\[x\]: tp: no such option"),
        ('[x]\nmodel = "MODEL"\ntensor_parallel_size = 2\nnodes = 2', r"\[x\]: nodes: got 2; expected"),
        ('[x]\nmodel = "MODEL"\nexperts_on = "cpu"', r"\[x\]: experts_on: got 'cpu'; expected"),
        ('[x]\nmodel = "MODEL"\ndisaggregate = true', r"\[x\]: disaggregate: got True; expected"),
        ('[x]\nmodel = "/nowhere/at/all"', r"\[x\]: model: got '/nowhere/at/all'"),
        ("[x", "is no TOML"),
    ],
)
def test_errors_name_the_model_and_the_field(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "models.toml").write_text(text.replace("MODEL", str(model(tmp_path / "tiny"))))
    with pytest.raises(ValueError, match=said):
        read_presets(tmp_path / "models.toml", Given({}, {}))


def test_context_and_cache_shrink_to_the_limit(tmp_path: Path) -> None:
    (preset,) = read_presets(model(tmp_path / "all" / "tiny").parent, Given({}, {}))
    whole = preset.sized(10**12)
    assert whole.engine.max_model_len == 4096 and whole.engine.kv_cache_memory
    less, sizes = whole, []
    while True:  # first fewer contexts are cached at once, then each is shorter
        try:
            less = preset.sized(less.size - 1)
        except ValueError:
            break
        assert less.engine.kv_cache_memory and less.engine.max_model_len
        sizes.append((less.engine.max_model_len, whole.engine.kv_cache_memory / less.engine.kv_cache_memory))
    lengths = [4096, 4096, 2048, 1024, 512]
    assert [length for length, _ in sizes] == lengths
    assert [times for _, times in sizes] == pytest.approx([2, 4, 8, 16, 32], rel=0.2)
    with pytest.raises(ValueError, match=r"tiny needs .* GB; expected at most the 0.0 GB of --models-memory"):
        preset.sized(10**6)
    (longer,) = read_presets(tmp_path / "all", Given({"max_model_len": 4097}, {}))
    with pytest.raises(ValueError, match="max_model_len: got 4097; expected at most 4096"):
        longer.sized(10**12)


def test_memory_of_all_ranks_is_counted(tmp_path: Path) -> None:
    path = model(tmp_path / "tiny")
    file = tmp_path / "models.toml"
    table = f'[x]\nmodel = "{path}"\nkv_cache_memory = "1MB"\nquantization = "int4"\n'
    file.write_text(table)
    (one,) = (preset.sized(10**10) for preset in read_presets(file, Given({}, {})))
    file.write_text(f"{table}tensor_parallel_size = 2\n")
    (two,) = (preset.sized(10**10) for preset in read_presets(file, Given({}, {})))
    assert "--tensor-parallel-size 2" in " ".join(two.command(1))
    assert two.size - one.size > 300 << 20  # another process


def test_arguments_are_the_options_that_differ() -> None:
    assert as_arguments(EngineConfig()) == ["mite"]
    config = EngineConfig(model="m", check_memory=False, verify=True, max_step_ms=5.0)
    assert as_arguments(config) == ["m", "--verify", "--no-check-memory", "--max-step-ms", "5.0"]
    assert as_arguments(ServerConfig(served_model_name=("a", "b")))[:2] == ["--served-model-name", "a"]
