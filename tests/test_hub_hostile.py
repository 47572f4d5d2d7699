"""What a hub sends decides nothing about where files are written, nor how much memory or disk is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("gguf")
pytest.importorskip("huggingface_hub")

from farthing.hub import _is_plain, find_model, resolve_model
from tests.test_hub import CONFIG, ID, SHA, Hub, hub  # noqa: F401
from tests.test_hub_gguf import own_cache  # noqa: F401

pytestmark = pytest.mark.usefixtures("own_cache")


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def outside(tmp_path: Path) -> set[str]:
    """Files that are not where the caches are."""
    return {name for name in files_below(tmp_path) if name.split("/")[0] not in ("cache", "farthing")}


@pytest.mark.parametrize(
    "name",
    [
        "{}/stolen.gguf",
        "../../../../stolen.gguf",
        "a/../../stolen.gguf",
        "..",
        "/",
        "a//b",
        "",
        "a\\..\\b",
        "\0.gguf",
    ],
)
@pytest.mark.parametrize("command", [find_model, resolve_model])
def test_names_of_files_stay_in_the_cache(
    hub: Hub,  # noqa: F811
    name: str,
    command: object,
    tmp_path: Path,
) -> None:
    name = name.format(tmp_path)
    hub.files = {name: b"x", "README.md": b"x"}
    hub.large = frozenset({name})
    with pytest.raises(OSError, match=r"the hub lists a file .*; expected names below the repository"):
        command(ID)  # type: ignore[operator]
    assert not outside(tmp_path) and not hub.fetched


@pytest.mark.parametrize("revision", ["../../../../out", "/tmp/out", "main", SHA[:39], SHA + "0", "", "None"])
def test_revision_is_a_hash(hub: Hub, revision: str, tmp_path: Path) -> None:  # noqa: F811
    hub.files, hub.revision = {"config.json": CONFIG, "model.safetensors": "x"}, revision
    with pytest.raises(OSError, match=r"the hub lists the revision .*; expected"):
        resolve_model(ID)
    assert not files_below(tmp_path)


@pytest.mark.parametrize("etag", ["../../../../stolen", "{}/stolen", "..", "a" * 39, "A" * 40, "", "x\\y"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_etags_are_checksums(hub: Hub, etag: str, name: str, tmp_path: Path) -> None:  # noqa: F811
    hub.files = {"config.json": CONFIG, "tokenizer.json": "{}", "model.safetensors": "x"}
    hub.etags = {name: etag.format(tmp_path)}
    with pytest.raises(OSError, match=f"{name} of {ID}: the hub calls it .*; expected a checksum"):
        resolve_model(ID)
    assert not outside(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_every_file_is_what_its_checksum_says(hub: Hub, name: str, tmp_path: Path) -> None:  # noqa: F811
    hub.files = {"config.json": CONFIG, "tokenizer.json": "{}", "model.safetensors": "x"}
    hub.etags = {name: "0" * 40}
    with pytest.raises(OSError, match=f"{name} of {ID}: the checksum is .*; expected 000000000000…"):
        resolve_model(ID)
    assert not list((tmp_path / "cache").rglob("0" * 40))


def test_header_without_end_is_not_read_into_memory(
    hub: Hub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here within 32 kB: a claimed array of strings goes on for ever."""
    monkeypatch.setattr("farthing.hub._MOST_HEADER", 32_000)
    text = b"general.architecture"
    entry = len(text).to_bytes(8, "little") + text + (9).to_bytes(4, "little") + (8).to_bytes(4, "little")
    start = (
        b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + entry
    )
    hub.files = {"Tiny-Q8_0.gguf": start + (1 << 15).to_bytes(8, "little") + bytes(1 << 15)}
    hub.large = frozenset(hub.files)
    with pytest.raises(OSError, match=r"Tiny-Q8_0.gguf of .*: its header does not end within"):
        find_model(ID)
    assert hub.sent < 200_000


def test_a_body_is_no_longer_than_the_hub_said(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    hub.files = {"config.json": CONFIG, "model.safetensors": b"x" * 3_000_000, "tokenizer.json": "{}"}
    hub.large = frozenset({"model.safetensors"})
    hub.said = {"model.safetensors": 1000}
    with pytest.raises(OSError, match=r"the hub sends more than the 1000 bytes"):
        resolve_model(ID)
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.incomplete")) <= 1000


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b.gguf", "\\", "\0", " "]), max_size=5).map("/".join))
def test_plain_names_stay_below_their_folder(name: str) -> None:
    folder = Path("/cache/repository")
    if _is_plain(name):
        place = folder / name
        assert folder in place.parents and ".." not in place.parts and "\\" not in name


def test_names_that_repositories_have_are_plain() -> None:
    names = ["config.json", "Q4_0/Tiny-Q4_0-00001-of-00002.gguf", ".gitattributes", "a b/ü (1)..json", "x..y"]
    assert all(map(_is_plain, names))
