"""Files of a command's last start are requested before they are imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from farthing.cli import read_ahead as module
from farthing.cli.read_ahead import read_ahead, remember


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def listed(cache: Path) -> list[str]:
    (file,) = (cache / "farthing" / "start").iterdir()
    return file.read_text(encoding="utf-8").splitlines()


def test_modules_and_libraries_are_listed_once(cache: Path) -> None:
    remember("serve")
    names = listed(cache)
    assert any(name.endswith(".pyc") and "read_ahead" in name for name in names)
    assert not Path("/proc/self/maps").is_file() or any(".so" in name for name in names)
    assert len(names) == len(set(names))
    assert all(Path(name).is_absolute() for name in names)


def test_requests_every_listed_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember("serve")
    requested: list[str] = []
    monkeypatch.setattr(module, "_request", lambda paths: requested.extend(paths))
    read_ahead("serve")
    assert sorted(requested) == listed(cache)


def test_missing_files_and_lists_are_skipped(cache: Path) -> None:
    read_ahead("serve")
    remember("serve")
    (file,) = (cache / "farthing" / "start").iterdir()
    file.write_text(f"{cache}/gone.pyc\n{__file__}\n", encoding="utf-8")
    read_ahead("serve")
    good = listed(cache)
    for text in (b"\xff\xfe\n/\x00\n", b"/x\n" * (1 << 23)):
        file.write_bytes(text)
        read_ahead("serve")
        remember("serve")
        assert listed(cache) != good and len(listed(cache)) < 1 << 20, "rewritten"


def test_pipes_do_not_wait(cache: Path) -> None:
    remember("serve")
    (file,) = (cache / "farthing" / "start").iterdir()
    os.mkfifo(cache / "pipe")
    file.write_text(f"{cache}/pipe\n", encoding="utf-8")
    read_ahead("serve")
    file.unlink()
    os.mkfifo(file)
    read_ahead("serve")


def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    remember("serve")
    assert listed(cache), "XDG_CACHE_HOME is enough"
    monkeypatch.delenv("XDG_CACHE_HOME")
    read_ahead("serve")
    remember("serve")


def test_nothing_is_written_where_the_cache_cannot_be(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "farthing").write_text("a file", encoding="utf-8")
    remember("serve")
    read_ahead("serve")


def test_descriptors_are_closed(cache: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    remember("serve")
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    read_ahead("serve")
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before


def test_installations_have_lists_of_their_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember("serve")
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    remember("serve")
    assert len(list((cache / "farthing" / "start").iterdir())) == 2
