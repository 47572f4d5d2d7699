"""Files are read into the page cache by a thread, unless memory is too small for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from farthing import page_in as module
from farthing.page_in import page_in


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


def test_files_larger_than_memory_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "packed"
    file.write_bytes(bytes(1001))
    monkeypatch.setattr(module, "_available", lambda: 2000)
    assert page_in(file) is None
    assert page_in(tmp_path / "missing") is None


def test_empty_files_do_not_stop_a_thread(tmp_path: Path) -> None:
    file = tmp_path / "packed"
    file.touch()
    assert page_in(file) is None
