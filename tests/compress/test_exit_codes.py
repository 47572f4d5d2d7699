"""What `farthing compress` and `farthing eval` tell a script: exit codes, one-line errors, valid JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from farthing.checkpoint import Checkpoint, CheckpointWriter
from farthing.cli.compress import app as compress_app
from farthing.cli.eval import app as eval_app
from farthing.cli.exits import Exit
from farthing.compress.evaluate import BLOCK, paged_batch
from farthing.model import load
from farthing.ops import select
from tests.compress.conftest import write_model


def invoke(app: Any, *arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def strict(text: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def changed(source: Path, out: Path, factor: float) -> Path:
    """`source` with its head multiplied by `factor`."""
    checkpoint, writer = Checkpoint.open(source), CheckpointWriter(out)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        writer.add(name, tensor * factor if name == "lm_head.weight" else tensor)
    writer.close(checkpoint.config, copy_from=source)
    return out


def test_worse_than_the_bound_is_not_the_code_of_a_defect(
    model_dir: Path, data: Path, tmp_path: Path
) -> None:
    same = invoke(eval_app, model_dir, "--against", model_dir, "--data", data, "--max-drop", "1%", "--json")
    assert same.exit_code == Exit.DONE and strict(same.stdout)["verdict"] == "pass"
    flat = changed(model_dir, tmp_path / "flat", -3.0)
    worse = invoke(eval_app, model_dir, "--against", flat, "--data", data, "--max-drop", "1%", "--json")
    assert worse.exit_code == Exit.WORSE == 4 and strict(worse.stdout)["verdict"] == "fail"
    near = changed(model_dir, tmp_path / "near", 1.01)
    short = ("--data", data, "--max-tokens", "10", "--window", "256")
    unsure = invoke(eval_app, model_dir, "--against", near, *short, "--max-drop", "0%", "--json")
    assert unsure.exit_code == Exit.UNDECIDED == 3 and strict(unsure.stdout)["interval"] == [-1, None]
    assert invoke(eval_app, "nowhere-at-all", "--data", data).exit_code == Exit.INPUT == 2


def own_text(model: Path, out: Path) -> Path:
    """What the model itself says, so that any change makes it worse."""
    served, rows = load(model, select("reference")), []
    for start in range(2, 10):
        ids = [start]
        for _ in range(40):
            batch, blocks = paged_batch([len(ids)])
            hidden = served.forward(torch.tensor(ids), batch, served.new_cache(blocks, BLOCK, "float32"))
            ids.append(int(served.logits(hidden[-1:]).argmax()))
        rows.append(json.dumps({"ids": ids}))
    out.write_text("\n".join(rows) + "\n")
    return out


def test_compress_says_worse_with_its_own_code(model_dir: Path, tmp_path: Path) -> None:
    """Nine of ten weights zero, and nothing to make up for it."""
    recipe = tmp_path / "cut.yaml"
    recipe.write_text(
        "scheme: keep\nprune: {pattern: unstructured, sparsity: 0.9, score: magnitude, compensation: none, "
        "targets: all, scope: matrix}\n"
    )
    options = ("-o", tmp_path / "out", "--data", own_text(model_dir, tmp_path / "own.jsonl"), "--no-timing")
    bound = ("--max-drop", "0.1%", "--json")
    result = invoke(compress_app, model_dir, "--recipe", recipe, *options, *bound)
    assert result.exit_code == Exit.WORSE, result.output
    assert strict(result.stdout)["verdict"] == "fail" and "fail: at most 0.10%" in result.stderr


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_weights_are_named_and_json_stays_valid(
    value: float, model_dir: Path, data: Path, tmp_path: Path
) -> None:
    broken = changed(model_dir, tmp_path / "broken", value)
    alone = invoke(eval_app, broken, "--data", data, "--json")
    assert alone.exit_code == Exit.INPUT and "logits are NaN or infinite" in alone.stderr
    assert "the first output that is not finite is that of the head" in alone.stderr
    assert not alone.stdout and "\n" not in alone.stderr.strip()
    against = invoke(eval_app, model_dir, "--against", broken, "--data", data, "--max-drop", "1%", "--json")
    document = strict(against.stdout)
    assert against.exit_code == Exit.WORSE
    assert document["perplexity_b"] is None and document["verdict"] == "fail"
    first = invoke(eval_app, broken, "--against", model_dir, "--data", data, "--json")
    assert first.exit_code == Exit.INPUT and "A: " in first.stderr


def test_calibration_ids_out_of_range_are_one_line(model_dir: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"ids": [1, 2, 3, 264]}) + "\n")
    result = invoke(compress_app, model_dir, "-o", tmp_path / "out", "--calibration", bad, "--no-gate")
    assert result.exit_code == Exit.INPUT
    assert result.stderr.strip() == (f"error: {bad}:1: token id 264; expected a whole number from 0 to 263")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from farthing.cli.compress import app
app(sys.argv[2:])
"""


def test_a_full_disk_is_one_line_and_the_run_resumes(data: Path, tmp_path: Path) -> None:
    """A file size limit simulates a full disk: the first shard beyond it fails."""
    source = write_model(tmp_path / "model", moe_intermediate_size=256, first_k_dense_replace=1)
    arguments = [str(source), "-o", str(tmp_path / "out"), "--recipe", "prune30-magnitude", "--no-gate"]
    run = [sys.executable, "-c", LIMITED, "400000", *arguments]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == Exit.STORAGE, result.stderr
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error:")]
    assert "Traceback" not in result.stderr
    assert "File too large; free some space, then run the same command to resume" in line
    parts = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("part-*")}
    assert parts and not list((tmp_path / "out").rglob("*.tmp"))
    again = subprocess.run([sys.executable, "-c", LIMITED, str(2**30), *arguments], check=False)
    assert again.returncode == Exit.DONE
    whole = tmp_path / "whole"
    invoke(compress_app, source, "-o", whole, "--recipe", "prune30-magnitude", "--no-gate")
    kept = sorted(p.stat().st_mtime_ns for p in (tmp_path / "out").glob("model-*.safetensors"))
    assert set(parts.values()) <= set(kept)  # what was complete was not written again
    resumed, straight = Checkpoint.open(tmp_path / "out"), Checkpoint.open(whole)
    assert set(resumed.names()) == set(straight.names())
    assert all(torch.equal(resumed.tensor(n), straight.tensor(n)) for n in straight.names())
