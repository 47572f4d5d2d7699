"""`farthing pack`: the bytes of an unstreamed file, resumed after a kill, never served unfinished."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

pytest.importorskip("farthing._native")

from farthing.cli.check import pack_app
from farthing.cli.errors import Exit
from farthing.model.config import ModelConfig
from farthing.model.load import load
from farthing.model.pack import pack_checkpoint
from farthing.model.parameters import random_parameters
from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.packed import PackedWriter
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from tests.tiny import tiny

CONFIG = tiny(num_nextn_predict_layers=1)


@pytest.fixture(scope="module", params=["one file", "shards out of order"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    tensors = dict(random_parameters(ModelConfig.from_json(CONFIG), 3))
    if request.param == "one file":
        save_file(tensors, str(path / "model.safetensors"))
        return path
    shard_of = {name: f"part-{random.Random(name).randrange(7)}.safetensors" for name in tensors}
    for shard in set(shard_of.values()):
        save_file({n: t for n, t in tensors.items() if shard_of[n] == shard}, str(path / shard))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return path


@pytest.fixture(scope="module", params=["int4", None])
def expected(request: pytest.FixtureRequest, model: Path) -> tuple[str | None, bytes]:
    file = model.parent / f"whole.{request.param}"
    load(model, select("cpu", threads=1, quantization=request.param)).ops.save_packed(str(file))
    return request.param, file.read_bytes()


def test_streamed_file_equals_the_whole_one(
    model: Path, expected: tuple[str | None, bytes], tmp_path: Path
) -> None:
    rounding, content = expected
    options = [] if rounding is None else ["--quantization", rounding]
    result = CliRunner().invoke(
        pack_app, [str(model), "-o", str(tmp_path / "m.packed"), "--threads", "1", *options]
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "m.packed").read_bytes() == content
    assert [f.name for f in tmp_path.iterdir()] == ["m.packed"]


KILLED = """
import os, signal, sys
from farthing.model.pack import pack_checkpoint
from farthing.ops.cpu import packed

written, limit = [], int(sys.argv[3])
original = packed.write_section

def write(file, name, *rest):
    written.append(name)
    if len(written) == limit:
        file.write(b"half of a section")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(file, name, *rest)

packed.write_section = write
pack_checkpoint(sys.argv[1], sys.argv[2], "int4", 1)
"""


@pytest.mark.parametrize("sections", [3, 25])
def test_killed_run_resumes(model: Path, tmp_path: Path, sections: int) -> None:
    target, whole = tmp_path / "m.packed", tmp_path / "whole.packed"
    load(model, select("cpu", threads=1, quantization="int4")).ops.save_packed(str(whole))
    command = [sys.executable, "-c", KILLED, model, target, str(sections)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not target.exists()
    with pytest.raises(ValueError, match=r"not a packed file|cut off"):
        CpuOps(1, packed=str(tmp_path / "m.packed.partial"))
    done = (tmp_path / "m.packed.parts").read_text().count('"part"')
    assert (done > 0) == (sections > 3)
    # Also a line of the log that was cut off by the end of a machine.
    with (tmp_path / "m.packed.parts").open("a") as log:
        log.write('{"part": "layer 7", "en')
    pack_checkpoint(model, target, "int4", 1)
    assert target.read_bytes() == whole.read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.packed", "whole.packed"]


def test_another_checkpoint_or_rounding_starts_anew(tmp_path: Path) -> None:
    target = tmp_path / "m"
    ops = CpuOps(1)
    ops._keep("a", ops.tensor(np.ones(3, np.float32)))
    with PackedWriter(target, None, "one") as writer:
        writer.add("first", ops.packed_weights())
        with pytest.raises(ValueError, match="'a' was packed twice"):
            writer.add("second", ops.packed_weights())
    with PackedWriter(target, None, "one") as writer:
        assert "first" in writer
    with PackedWriter(target, None, "two") as writer:
        assert "first" not in writer
    os.truncate(f"{target}.partial", 100)
    with PackedWriter(target, None, "two") as writer:
        assert "first" not in writer


@pytest.mark.parametrize(
    "damage",
    [
        *("5", "{}", '{"part": "layer 0"}', '{"part": 1, "end": 9, "entries": {}}', "\xff"),
        '{"part": "layer 0", "end": 9, "entries": {"a": {"offset": -1, "bytes": 1, "checksum": 0}}}',
        '{"part": "layer 0", "end": 9, "entries": {"a": 3}}',
    ],
)
def test_damaged_line_of_the_log_is_packed_again(model: Path, tmp_path: Path, damage: str) -> None:
    target, whole = tmp_path / "m.packed", tmp_path / "whole.packed"
    pack_checkpoint(model, whole, "int4", 1)
    subprocess.run([sys.executable, "-c", KILLED, model, target, "25"], check=False)
    log = tmp_path / "m.packed.parts"
    head, *lines = log.read_bytes().splitlines(keepends=True)
    assert lines
    log.write_bytes(head + damage.encode("latin-1") + b"\n" + b"".join(lines[1:]))
    pack_checkpoint(model, target, "int4", 1)
    assert target.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("at", ["first", "last"])
def test_damage_of_what_is_resumed_is_packed_again(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    target, whole = tmp_path / "m.packed", tmp_path / "whole.packed"
    pack_checkpoint(model, whole, "int4", 1)
    subprocess.run([sys.executable, "-c", KILLED, model, target, "25"], check=False)
    parts = [json.loads(x) for x in (tmp_path / "m.packed.parts").read_text().splitlines()[1:]]
    entries = parts[0 if at == "first" else -1]["entries"]
    name, entry = next(iter(entries.items())) if at == "first" else list(entries.items())[-1]
    with (tmp_path / "m.packed.partial").open("r+b") as file:
        file.seek(entry["offset"] + entry["bytes"] // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    pack_checkpoint(model, target, "int4", 1)
    assert f"{name!r} is damaged; packing again from" in caplog.text
    assert target.read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("sparse_on_amx")
def test_output_says_for_which_kernels_zero_blocks_are_left_out(tmp_path: Path) -> None:
    config = tiny(moe_intermediate_size=256, intermediate_size=256, hidden_size=256)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = dict(random_parameters(ModelConfig.from_json(config), 3))
    for name, tensor in tensors.items():
        if "experts" in name:
            tensor[:, 64:] = 0
    save_file(tensors, str(tmp_path / "model.safetensors"))
    out = tmp_path / "m.packed"
    result = CliRunner().invoke(
        pack_app, [str(tmp_path), "-o", str(out), "--threads", "1", "--quantization", "int4"]
    )
    assert result.exit_code == 0, result.output
    assert "zero blocks are left out where" in " ".join(result.output.split())


def test_full_disk_is_one_line_and_the_same_command_resumes(model: Path, tmp_path: Path) -> None:
    def limited(largest: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    target, whole = tmp_path / "m.packed", tmp_path / "whole.packed"
    pack_checkpoint(model, whole, "int4", 1)
    command = [sys.executable, "-m", "farthing", "pack", model, "-o", target, "--threads", "1"]
    command += ["--quantization", "int4"]
    for largest in (whole.stat().st_size // 2, whole.stat().st_size - 100):  # in a part, and in the index
        run = subprocess.run(
            command, check=False, capture_output=True, text=True, preexec_fn=partial(limited, largest)
        )
        assert run.returncode == Exit.STORAGE, run.stderr
        assert run.stderr.splitlines()[-1] == (
            f"error: {target}.partial: File too large; free some space, then run the same command to resume"
        )
        assert not target.exists()
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert target.read_bytes() == whole.read_bytes()


def test_second_process_is_kept_out(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.packed"
    with PackedWriter(target, "int4", "first"):
        result = CliRunner().invoke(pack_app, [str(model), "-o", str(target), "--threads", "1"])
    assert result.exit_code == 2 and "another process is packing it" in " ".join(result.output.split())
    pack_checkpoint(model, target, "int4", 1)
    assert [f.name for f in tmp_path.iterdir()] == ["m.packed"]


def test_directory_is_refused_before_packing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a directory; expected the name of a file"):
        pack_checkpoint(model, tmp_path, "int4", 1)
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.*"))


def test_a_missing_directory_is_named_as_given(tmp_path: Path) -> None:
    out = tmp_path / "missing" / "m.packed"
    result = CliRunner().invoke(pack_app, ["mite", "-o", str(out)])
    assert result.exit_code == Exit.INPUT
    assert result.stderr.strip() == f"error: out: got {str(out)!r}; expected a file in an existing directory"


@pytest.mark.parametrize("name", ["granitemoe", "minimax_m2", "smollm3", "glm4_moe", "gpt_oss"])
def test_grouped_types_are_packed_and_served_without_torch(name: str, tmp_path: Path) -> None:
    """Stacked experts, other names, tied embeddings, layers without rotation, biases."""
    pytest.importorskip("transformers")
    from tests.parity.families import build

    build(name, 3, tmp_path)
    loaded = load(tmp_path, select("cpu", threads=1, quantization="int8"))
    loaded.ops.save_packed(str(tmp_path / "whole"))
    pack_checkpoint(tmp_path, tmp_path / "packed", "int8", 1)
    assert (tmp_path / "packed").read_bytes() == (tmp_path / "whole").read_bytes()
    logits = []
    for arrays in (False, True):
        model = load(tmp_path, select("cpu", threads=1, packed=str(tmp_path / "packed"), arrays=arrays))
        ids = np.arange(2, 22)
        batch, cache = make_batch([20], [0], [[1, 0]], 16), model.new_cache(2, 16, "float32")
        hidden = model.forward(model.ops.tensor(ids), batch, cache)
        logits.append(np.asarray(model.logits(hidden)))
        assert model.first_not_finite(model.ops.tensor(ids), batch, cache) is None
    assert np.array_equal(*logits)
