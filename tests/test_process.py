"""The time since launch, of a process and of a standby that became a replica."""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from farthing import process
from farthing import process as module
from farthing.cli import app
from farthing.process import page_in, read_ahead, remember
from farthing_fleet import up


def test_counts_from_the_start_of_the_process() -> None:
    script = "import time; time.sleep(0.4); from farthing import process; print(process.seconds())"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.4 <= float(done.stdout) <= time.monotonic() - started + 0.02  # the kernel counts in ticks


def test_a_standbys_wait_is_not_part_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[float]()
    monkeypatch.setattr(process, "_begun", None)
    monkeypatch.setattr(up, "PRELOAD", ())
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "stdin", io.StringIO('["serve"]\n'))
    monkeypatch.setattr(app, "main", lambda: seen.append(process.seconds()))
    waited = process.seconds()
    up.main()
    assert seen[0] < waited


@pytest.mark.parametrize("size", [1, 4096, 3 * 4096 + 5])
def test_reads_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(module, "STEP", 8192)
    file = tmp_path / "packed"
    file.write_bytes(os.urandom(size))
    content = file.read_bytes()
    thread = page_in(file)
    if thread is not None:  # None on systems without large pages
        thread.join(60)
        assert not thread.is_alive()
    assert file.read_bytes() == content


def test_every_part_is_let_go_before_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice: list[tuple[int, int]] = []

    def madvise(start: ctypes.c_void_p, size: ctypes.c_size_t, what: int) -> int:
        advice.append((size.value, what))
        return 0

    monkeypatch.setattr(module, "STEP", 8192)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: SimpleNamespace(madvise=madvise))
    (tmp_path / "packed").write_bytes(bytes(8193))
    module._read(tmp_path / "packed")
    whats = (module.POPULATE_READ, mmap.MADV_DONTNEED)
    assert advice == [(size, what) for size in (8192, 1) for what in whats]


def test_files_larger_than_memory_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "packed"
    file.write_bytes(bytes(1001))
    monkeypatch.setattr(module, "_available", lambda: 2000)
    assert page_in(file) is None
    assert page_in(tmp_path / "missing") is None


def test_the_page_cache_counts_as_available(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "MemTotal: 900 kB\nSwapCached: 3 kB\nCached:  7 kB\nActive: 5 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: told)
    assert module._cached() == 7 << 10


def test_empty_files_do_not_stop_a_thread(tmp_path: Path) -> None:
    file = tmp_path / "packed"
    file.touch()
    assert page_in(file) is None


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
    assert any(name.endswith(".pyc") and "process" in name for name in names)
    assert not Path("/proc/self/maps").is_file() or any(".so" in name for name in names)
    assert len(names) == len(set(names))
    assert all(Path(name).is_absolute() for name in names)


def test_requests_every_listed_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember("serve")
    requested: list[str] = []
    monkeypatch.setattr(module, "_request", lambda paths: requested.extend(paths))
    read_ahead("serve")
    assert sorted(requested) == listed(cache)


def test_files_are_requested_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda file, *range_: asked.append(range_), raising=False)
    monkeypatch.setattr("os.POSIX_FADV_WILLNEED", 3, raising=False)
    module._request([__file__])
    assert asked == [(0, 0, 3)]


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
