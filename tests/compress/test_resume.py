"""Runs that were killed resume with the same result; finished models are not overwritten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from farthing.checkpoint.reader import Checkpoint
from farthing.compress import stream
from farthing.compress.api import Options, compress
from farthing.compress.recipe import RECIPES
from farthing.compress.stream import STATE, Compression, run


def test_a_killed_run_resumes_with_the_same_result(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """SIGKILL after the second layer; the second run resumes there and writes equal bytes."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from farthing.compress.api import Options, compress\n"
        "from dataclasses import replace\n"
        "from farthing.compress.recipe import known_recipes\n"
        "recipe = known_recipes()['int4-block16-40']\n"
        "recipe = replace(recipe, prune=replace(recipe.prune, heal_steps=3))\n"
        "def progress(what, done, total):\n"
        "    if what.startswith('layer 3') and sys.argv[4] == 'kill': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    print(what, flush=True)\n"
        "options = Options(calibration=Path(sys.argv[3]), gate=False)\n"
        "compress(Path(sys.argv[1]), Path(sys.argv[2]), recipe, options, progress)\n"
    )

    def go(out: Path, mode: str) -> subprocess.CompletedProcess[str]:
        args = [sys.executable, "-c", script, str(model_dir), str(out), str(data), mode]
        return subprocess.run(args, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    killed = go(tmp_path / "a", "kill")
    assert killed.returncode == -signal.SIGKILL and "layer 2 of" in killed.stdout
    assert not (tmp_path / "a" / "config.json").exists()
    resumed = go(tmp_path / "a", "finish")
    assert resumed.returncode == 0, resumed.stderr
    assert "layer 2 of" not in resumed.stdout and "layer 3 of" in resumed.stdout
    straight = go(tmp_path / "b", "finish")
    assert straight.returncode == 0
    a, b = Checkpoint.open(tmp_path / "a"), Checkpoint.open(tmp_path / "b")
    assert set(a.names()) == set(b.names())
    for name in a.names():
        assert torch.equal(a.tensor(name).view(torch.uint8), b.tensor(name).view(torch.uint8)), name
    reports = [json.loads((tmp_path / p / "report.json").read_text()) for p in "ab"]
    assert reports[0]["modules"] == reports[1]["modules"] and len(reports[0]["healed"]) == 3
    assert reports[0]["healed"] == reports[1]["healed"]


def test_an_automatic_plan_killed_while_it_measures_resumes(
    model_dir: Path, data: Path, tmp_path: Path
) -> None:
    """SIGKILL before the second layer; the second run measures from there on, and plans the same."""
    script = (
        "import os, signal, sys\n"
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from farthing.compress.api import Options, compress\n"
        "from farthing.compress.recipe import RECIPES\n"
        "recipe = replace(RECIPES['auto'], max_drop=0.02, calibration_tokens=600)\n"
        "def progress(what, done, total):\n"
        "    print(what, flush=True)\n"
        "    if what == 'sensitivity of layer 1' and sys.argv[4] == 'kill':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "options = Options(calibration=Path(sys.argv[3]), gate=False)\n"
        "compress(Path(sys.argv[1]), Path(sys.argv[2]), recipe, options, progress)\n"
    )

    def go(out: str, mode: str) -> subprocess.CompletedProcess[str]:
        args = [sys.executable, "-c", script, str(model_dir), str(tmp_path / out), str(data), mode]
        return subprocess.run(args, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    killed = go("a", "kill")
    assert killed.returncode == -signal.SIGKILL and "sensitivity of layer 0" in killed.stdout
    assert not list((tmp_path / "a").glob("*.safetensors"))
    resumed, straight = go("a", "finish"), go("b", "finish")
    assert resumed.returncode == straight.returncode == 0, resumed.stderr
    assert "sensitivity of layer 0" not in resumed.stdout and "sensitivity of layer 1" in resumed.stdout
    a, b = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    assert a["plan"] == b["plan"] and a["modules"] == b["modules"]


def test_another_job_does_not_resume_and_a_finished_model_is_not_overwritten(
    model_dir: Path, tmp_path: Path
) -> None:
    run(Compression(model_dir, tmp_path, RECIPES["fp8-block"], None))
    with pytest.raises(ValueError, match="already has a model"):
        run(Compression(model_dir, tmp_path, RECIPES["fp8-block"], None))


def test_run_killed_while_renaming_shards_starts_over(model_dir: Path, tmp_path: Path) -> None:
    job = Compression(model_dir, tmp_path / "out", RECIPES["fp8-block"], None)
    run(replace(job, out=tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.CheckpointWriter, "close", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(job)
    (tmp_path / "out" / "part-00001.safetensors").rename(
        tmp_path / "out" / "model-00001-of-00005.safetensors"
    )
    run(job)
    a, b = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "whole")
    assert set(a.names()) == set(b.names()) and a.stored_bytes() == b.stored_bytes()


def test_a_run_that_ended_while_it_was_measured_resumes(model_dir: Path, data: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "measuring":
            raise KeyboardInterrupt

    out, options = tmp_path / "out", Options(data, data, window=64)
    with pytest.raises(KeyboardInterrupt):
        compress(model_dir, out, RECIPES["int4-rtn"], options, stop)
    assert (out / "config.json").exists() and not (out / "report.json").exists()
    written = {f.name: f.stat().st_mtime_ns for f in out.glob("*.safetensors")}
    with pytest.raises(ValueError, match="already has a model"):
        compress(model_dir, out, RECIPES["int8"], options)
    outcome = compress(model_dir, out, RECIPES["int4-rtn"], options)
    assert outcome.path.exists() and outcome.report.modules and not (out / STATE).exists()
    assert written == {f.name: f.stat().st_mtime_ns for f in out.glob("*.safetensors")}
