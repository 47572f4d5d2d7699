"""Starting and resuming runs: the settings they must share, the cache of their text, their lengths."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from farthing.cli.errors import Exit
from farthing_lab.cli.train import app
from farthing_lab.train import data, finetune, qat
from farthing_lab.train.finetune import Settings, Sources, Text
from farthing_lab.train.loop import plain, require_same
from farthing_lab.train.lsq import Precision
from farthing_lab.train.pruning import PruneConfig, train_prune
from farthing_lab.train.qat import train_qat
from farthing_lab.train.qat_model import QatConfig, parse_stages
from tests.lab.train.conftest import settings_of, sharded

QUIET = Console(quiet=True)
CONFIG = QatConfig(group=32, block_steps=0, block_windows=2)


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path, sources: Path) -> Settings:
    return settings_of(checkpoint, tmp_path / "run", sources)


def heldout(text: Text) -> list[list[int]]:
    return [ids.tolist() for ids in text.heldout]


def test_other_text_or_rule_replaces_the_cached_ids(
    settings: Settings, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = settings.out / "text.npz"
    first = heldout(Text.load(settings))
    written = cache.stat().st_mtime_ns
    assert heldout(Text.load(settings)) == first
    assert cache.stat().st_mtime_ns == written and not capsys.readouterr().err
    assert heldout(Text.load(dataclasses.replace(settings, heldout_every=2))) != first
    assert "writing it again" in " ".join(capsys.readouterr().err.split())
    assert heldout(Text.load(settings)) == first
    with (sources / "module_01.py").open("a") as file:
        file.write("changed = 1\n")
    written = cache.stat().st_mtime_ns
    Text.load(settings, QUIET)
    assert cache.stat().st_mtime_ns != written


def test_other_tokenizer_replaces_the_cached_ids(settings: Settings) -> None:
    Text.load(settings)
    with np.load(settings.out / "text.npz") as parts:
        before = str(parts["key"])
    file = settings.model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=3))
    Text.load(settings, QUIET)
    with np.load(settings.out / "text.npz") as parts:
        assert str(parts["key"]) != before


@pytest.mark.parametrize("keep", [0, 3, 200, -30])
def test_truncated_cache_is_written_again(settings: Settings, keep: int) -> None:
    first = heldout(Text.load(settings))
    cache = settings.out / "text.npz"
    cache.write_bytes(cache.read_bytes()[:keep])
    assert heldout(Text.load(settings, QUIET)) == first
    assert not list(settings.out.glob("*.tmp"))
    assert heldout(Text.load(settings)) == first


def test_resumed_qat_must_have_the_stored_settings(
    settings: Settings, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_qat(settings, CONFIG, console=QUIET)
    assert first is not None and first["budgets"] == [{"from_step": 0, "tokens": 640}]
    longer = dataclasses.replace(settings, tokens=768)
    again = train_qat(longer, CONFIG, resume=True, console=QUIET)
    assert again is not None
    assert again["budgets"] == [*first["budgets"], {"from_step": first["tokens"] // 64, "tokens": 768}]
    untrained = {k: v for k, v in first["perplexity"].items() if k != "trained"}
    assert {k: again["perplexity"][k] for k in untrained} == untrained

    def unreached(*_: Any) -> None:
        raise AssertionError("worked before the check")

    monkeypatch.setattr(qat, "build", unreached)
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "seed: got 1; expected 0": ({"seed": 1}, {}),
        "window: got 16; expected 32": ({"window": 16}, {}),
        "batch_tokens: got 128; expected 64": ({"batch_tokens": 128}, {}),
        "heldout_every: got 5; expected 4": ({"heldout_every": 5}, {}),
        "hard: got 0.5; expected 0.0": ({}, {"hard": 0.5}),
        r'stages: got \[\[0.0, "W4A8"\]\]; expected \[\[0.0, "W4A4"\]\]': (
            {},
            {"stages": ((0.0, Precision(4, 8)),)},
        ),
    }
    for message, (ours, theirs) in changes.items():
        with pytest.raises(ValueError, match=message):
            train_qat(
                dataclasses.replace(settings, **ours), dataclasses.replace(CONFIG, **theirs), True, QUIET
            )
    with pytest.raises(ValueError, match="already has a run; use --resume"):
        train_qat(settings, CONFIG, console=QUIET)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        train_qat(dataclasses.replace(settings, out=settings.out / "new"), CONFIG, True, QUIET)
    weights = checkpoint / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r'model: got "sha256 .*; expected "sha256 '):
        train_qat(settings, CONFIG, True, QUIET)


def test_runs_start_from_a_checkpoint_in_shards(settings: Settings, tmp_path: Path) -> None:
    settings = dataclasses.replace(settings, tokens=2 * settings.batch_tokens)
    parts = dataclasses.replace(
        settings, model=sharded(settings.model, tmp_path / "parts"), out=tmp_path / "run-parts"
    )
    assert len(list(parts.model.glob("*.safetensors"))) > 2
    config = PruneConfig(target=0.1, multiple=8, bound=10.0, calibration_windows=2)
    for train in (
        lambda s: train_qat(s, CONFIG, console=QUIET),
        lambda s: train_prune(s, config, False, QUIET),
    ):
        whole, found = train(settings), train(parts)
        assert whole is not None and found is not None
        assert found["perplexity"] == whole["perplexity"]
        assert found["checkpoint_sha256"] == whole["checkpoint_sha256"]
        assert len(found["base_sha256"]) == 64 and found["base_sha256"] != whole["base_sha256"]
        (settings.out / "state.pt").unlink()
        (parts.out / "state.pt").unlink()
    weights = next(parts.model.glob("*-00002-of-*"))
    before = Sources.read(parts).weights
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert Sources.read(parts).weights != before


def test_sources_are_read_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for module, name in ((finetune, "weights_sha256"), (data, "find_sources")):
        original = getattr(module, name)

        def counted(path: Path, name: str = name, original: Any = original) -> Any:
            calls.append(f"{name} {path.name}")
            return original(path)

        monkeypatch.setattr(module, name, counted)
    assert train_qat(settings, CONFIG, console=QUIET) is not None
    assert sorted(calls) == ["find_sources sources", "weights_sha256 model"]


def test_prune_copies_the_files_next_to_the_weights(settings: Settings) -> None:
    file = settings.model / "generation_config.json"
    file.write_text('{"temperature": 0.125}')
    config = PruneConfig(target=0.1, multiple=8, bound=10.0, calibration_windows=2)
    assert train_prune(settings, config, console=QUIET) is not None
    assert (settings.out / "checkpoint" / file.name).read_text() == file.read_text()


def test_prune_refuses_a_used_directory_and_other_settings(settings: Settings) -> None:
    settings.out.mkdir()
    (settings.out / "state.pt").touch()
    with pytest.raises(ValueError, match="already has a run; use --resume"):
        train_prune(settings, PruneConfig(), console=QUIET)
    (settings.out / "state.pt").unlink()
    config = PruneConfig(target=0.1, multiple=8, bound=10.0, calibration_windows=2)
    assert train_prune(settings, config, console=QUIET) is not None
    with pytest.raises(ValueError, match=r"target: got 0.2; expected 0.1"):
        train_prune(settings, dataclasses.replace(config, target=0.2), True, QUIET)


def test_refusal_is_one_line_and_invalid_input(checkpoint: Path, tmp_path: Path, sources: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "state.pt").touch()
    result = CliRunner().invoke(app, ["qat", str(checkpoint), "-o", str(out), "--data", str(sources)])
    assert result.exit_code == Exit.INPUT
    assert result.stderr.strip() == (
        f"error: {out} already has a run; use --resume to continue it or choose another --out"
    )


def test_sparsity_without_blocks_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["qat", "--sparsity", "0.3", "-o", str(tmp_path)])
    assert result.exit_code == Exit.INPUT
    assert result.stderr.strip() == "error: sparsity: got 0.3 without --blocks; expected both"


def test_options_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    for words, error in (
        (["qat", "--group", "48"], "group: got 48; expected 32 or 64, which the CPU kernels have"),
        (
            ["prune", "--units", "experts", "--multiple", "64"],
            "multiple: got 64 with units 'experts'; expected units with neurons",
        ),
    ):
        result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "run")])
        assert result.exit_code == Exit.INPUT
        assert result.stderr.strip() == f"error: {error}"
        assert not (tmp_path / "run").exists()


def test_every_command_has_a_short_form_of_out() -> None:
    for command in ("mite", "qat", "prune"):
        result = CliRunner().invoke(app, [command, "-o"])
        assert "Option '-o' requires an argument" in " ".join(result.stderr.split())


def test_full_disk_names_the_option_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "state.pt")

    monkeypatch.setattr(qat, "train_qat", full)
    result = CliRunner().invoke(app, ["qat", "-o", str(tmp_path)])
    assert result.exit_code == Exit.STORAGE
    assert "free some space, then add --resume to continue from the last state.pt" in result.stderr


def test_settings_are_compared_as_json_has_them() -> None:
    stored = plain({"stages": ((0.0, Precision(4, 4)),), "block": None})
    require_same(Path("state.pt"), stored, plain({"stages": ((0.0, Precision(4, 4)),), "added later": 1}))
    with pytest.raises(ValueError, match=r"block: got \[16, 16\]; expected null, as in state.pt"):
        require_same(Path("state.pt"), stored, plain({"block": (16, 16)}))


@pytest.mark.parametrize(
    "text", ["0:W4A4,2:W4A4", "0:W4A4,0:W4A8", "0:W8A8,0.5:W4A8,0.2:W4A4", "0:W8A8,1:W4A4"]
)
def test_stages_that_never_begin_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="expected rising shares of the run below 1"):
        QatConfig(stages=parse_stages(text))


@pytest.mark.parametrize("stage", ["W8A8", "W4A16", "W16A16"])
def test_stages_that_no_checkpoint_holds_are_refused_before_the_run(settings: Settings, stage: str) -> None:
    stages = parse_stages(f"0:W4A4,0.5:{stage}")
    with pytest.raises(ValueError, match=f"stages: got {stage} at the end; expected W4A4 or W4A8"):
        train_qat(settings, dataclasses.replace(CONFIG, stages=stages), console=QUIET)
    assert not (settings.out / "state.pt").exists()


def test_inputs_per_tensor_are_measured_and_not_exported(settings: Settings) -> None:
    found = train_qat(settings, dataclasses.replace(CONFIG, inputs="tensor"), console=QUIET)
    assert found is not None and found["perplexity"]["trained"] > 0
    assert not (settings.out / "checkpoint").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
def test_damaged_state_is_named(settings: Settings, content: bytes) -> None:
    settings.out.mkdir(exist_ok=True)
    (settings.out / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.pt: unreadable"):
        train_qat(settings, CONFIG, resume=True, console=QUIET)
