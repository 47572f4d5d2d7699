"""GGUF models of hub repositories and folders: which is chosen, and what is fetched before it is accepted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("gguf")
pytest.importorskip("huggingface_hub")

from farthing.cli.app import app
from farthing.cli.preflight import preflight
from farthing.config import EngineConfig
from farthing.hub import find_model, resolve_config, resolve_model
from farthing.model.load import load
from farthing.ops.select import select
from tests.checkpoint.test_gguf import write
from tests.parity.paged import run
from tests.test_hub import ID, Hub, hub, refused_by, use  # noqa: F401


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "farthing"))
    monkeypatch.setattr("farthing.hub._HEADER", 1000)  # less than a header: it is doubled


@pytest.fixture(scope="module")
def quants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("quants")
    files = {"Tiny-Q8_0.gguf": "Q8_0", "Q4_0/Tiny-Q4_0-00001-of-00002.gguf": "Q4_0", "Tiny-F16.gguf": "F16"}
    found = {
        name: write(folder / "x.gguf", "llama", kind, layers=1).read_bytes() for name, kind in files.items()
    }
    # The second part is not read for its metadata.
    found["Q4_0/Tiny-Q4_0-00002-of-00002.gguf"] = _without_tensors(folder / "y.gguf")
    return {**found, "mmproj-F16.gguf": b"x", "README.md": b"x", "config.json": b"{}"}


def _without_tensors(path: Path) -> bytes:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("rope_freqs.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def served(hub: Hub, quants: dict[str, bytes]) -> Hub:  # noqa: F811
    hub.files = dict(quants)
    hub.files.pop("Q4_0/Tiny-Q4_0-00002-of-00002.gguf")
    hub.files = {name.replace("-00001-of-00002", ""): data for name, data in hub.files.items()}
    hub.large = frozenset(name for name in hub.files if name.endswith(".gguf"))
    return hub


@pytest.mark.parametrize(("named", "file"), [("", "Q4_0/Tiny-Q4_0.gguf"), (":q8_0", "Tiny-Q8_0.gguf")])
def test_one_quantization_is_fetched_and_served(served: Hub, named: str, file: str, tmp_path: Path) -> None:
    path = resolve_model(ID + named)
    assert set(served.fetched) == {file}
    again = resolve_model(ID + named)
    assert again == path and len([name for name in served.fetched if name == file]) < 12
    local = tmp_path / "local.gguf"
    local.write_bytes(bytes(served.files[file]))  # type: ignore[arg-type]
    ids = torch.arange(12)
    found, expected = (run(load(p, select("reference")), ids, [12]) for p in (path, resolve_model(local)))
    assert torch.equal(found, expected)


def test_headers_are_enough_to_plan_and_inspect(served: Hub) -> None:
    whole = len(served.body("Tiny-F16.gguf"))
    for command in ("plan", "inspect", "show"):
        done = CliRunner().invoke(app, [command, f"{ID}:F16", "--json"])
        assert done.exit_code == 0, done.output
    asked = [tuple(map(int, re.findall(r"\d+", each))) for each in served.ranges]
    assert [begin for begin, _ in asked] == [0, *(end + 1 for _, end in asked[:-1])], "no byte twice"
    assert served.sent == asked[-1][1] + 1 < 80_000 < whole
    figures = json.loads(CliRunner().invoke(app, ["inspect", f"{ID}:F16", "--json"]).output)
    assert 0.9 * whole < figures["weight_bytes"] < whole
    config = json.loads((resolve_config(f"{ID}:F16") / "config.json").read_text())
    assert config["hidden_size"] == 512


def test_a_server_without_ranges_is_left_early(served: Hub) -> None:
    served.deaf = True
    found = find_model(f"{ID}:F16")
    assert found.absent == ("Tiny-F16.gguf",) and not served.ranges


def test_split_files_are_one_model(hub: Hub, quants: dict[str, bytes]) -> None:  # noqa: F811
    hub.files = {name: data for name, data in quants.items() if "Q4_0" in name}
    hub.large = frozenset(hub.files)
    found = find_model(f"{ID}:Q4_0")
    assert found.absent == tuple(sorted(hub.files))
    assert found.to_download == sum(map(len, hub.files.values()))


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--port", "0"], ["check"], ["pack", "-o", "{}/packed.bin"], ["eval"],
        ["compress", "-o", "{}/out"], ["export", "{}/x.gguf"],
    ],
)  # fmt: skip
def test_what_is_not_served_costs_a_header(hub: Hub, arguments: list[str], tmp_path: Path) -> None:  # noqa: F811
    data = write(tmp_path / "x.gguf", "mamba", "F16", layers=1).read_bytes()
    hub.files = {"x-F16.gguf": data}
    hub.large = frozenset(hub.files)
    command, *options = (each.format(tmp_path) for each in arguments)
    done = CliRunner().invoke(app, [command, ID, *options])
    assert done.exit_code in (1, 2) and "general.architecture: got 'mamba'; expected one of" in " ".join(
        done.output.split()
    )
    assert hub.sent < 80_000 < len(data)


def test_bad_options_are_refused_before_a_download(served: Hub, tmp_path: Path) -> None:
    for arguments in (
        ["eval", f"{ID}:F16", "--data", str(tmp_path / "none.jsonl")],
        ["eval", f"{ID}:F16", "--backend", "abacus"],
        ["eval", f"{ID}:F16", "--against", f"{ID}:Q2_K"],
        ["pack", f"{ID}:F16", "-o", str(tmp_path / "none/packed.bin")],
        ["compress", f"{ID}:F16", "-o", str(tmp_path / "out"), "--recipe", "int7"],
    ):
        assert "expected" in refused_by(*arguments)
    assert served.sent < 80_000


def test_what_there_is_is_listed(served: Hub) -> None:
    listed = f"model: got '{ID}:Q2_K', which has the GGUF models Q4_0 (0.0 GB), F16 (0.0 GB), Q8_0 (0.0 GB)"
    for command in ("serve", "plan", "inspect"):
        assert listed in refused_by(command, f"{ID}:Q2_K")
    assert not served.fetched


def test_too_little_disk_and_memory_are_said_before_the_download(
    served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farthing.cli.preflight.available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"model: .* needs"):
        preflight(EngineConfig(model=f"{ID}:F16", backend="cpu"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(OSError, match="free some space, or set HF_HOME"):
        find_model(f"{ID}:F16")
    assert served.sent < 80_000


def test_without_a_connection_the_cache_serves(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = resolve_model(f"{ID}:Q8_0")
    listed = json.loads(CliRunner().invoke(app, ["list", "--json"]).output)
    (mine,) = (each for each in listed if each["model"] == ID)
    assert (mine["type"], mine["state"]) == ("gguf", "")
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert resolve_model(f"{ID}:Q8_0") == resolve_model(ID) == path
    with pytest.raises(FileNotFoundError, match="Q8_0"):
        resolve_model(f"{ID}:F16")


def test_a_folder_is_as_a_repository(served: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name, data in served.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(data))  # type: ignore[arg-type]
    assert resolve_model(folder) == resolve_model(folder / "Q4_0/Tiny-Q4_0.gguf")
    assert resolve_model(f"{folder}:Q8_0") == resolve_model(folder / "Tiny-Q8_0.gguf")
    with pytest.raises(FileNotFoundError, match="folder:Q2_K', which has the GGUF models Q4_0"):
        resolve_model(f"{folder}:Q2_K")
