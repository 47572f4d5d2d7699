"""Torn, damaged and foreign files raise errors and are never used."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.engine.disk_cache import segment
from farthing.engine.disk_cache.segment import (
    Format,
    SegmentError,
    Source,
    read_block,
    read_header,
    write_segment,
)

FORM = Format(b"i" * 16, 24)


def contents(number: int, size: int = 24) -> bytes:
    return bytes((number * 7 + i) % 251 for i in range(size))


def digest(number: int) -> bytes:
    return bytes([number]) * 16


def source(number: int, intact: bool = True, cuts: tuple[int, ...] = (5, 11)) -> Source:
    whole = bytearray(contents(number))
    edges = [0, *cuts, len(whole)]
    pieces = [memoryview(whole)[a:b] for a, b in pairwise(edges)]
    return Source(digest(number), pieces, lambda: intact)


def load(path: Path, number: int, form: Format = FORM) -> bytes:
    memory = bytearray(form.block_bytes)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        pieces = [memoryview(memory)[:7], memoryview(memory)[7:]]
        read_block(descriptor, form, read_header(descriptor, form), digest(number), pieces)
    finally:
        os.close(descriptor)
    return bytes(memory)


def written(folder: Path, numbers: list[int]) -> Path:
    result = write_segment(folder, FORM, len(numbers), map(source, numbers))
    assert result is not None
    assert result[1] == [digest(n) for n in numbers]
    return folder / result[0]


def test_blocks_round_trip_with_any_pieces(tmp_path: Path) -> None:
    path = written(tmp_path, [1, 2, 3])
    assert [load(path, n) for n in (3, 1, 2)] == [contents(3), contents(1), contents(2)]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o077 == 0, "prompts can be read from a block"


def test_more_pieces_than_one_system_call_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "_MOST_PIECES", 2)
    result = write_segment(tmp_path, FORM, 1, [source(9, cuts=(1, 2, 3, 4, 5, 6))])
    assert result is not None
    assert load(tmp_path / result[0], 9) == contents(9)


@pytest.mark.parametrize("at_once", [1, 5])
def test_short_reads_and_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda f, pieces, o: write(f, [pieces[0][:at_once]], o))
    monkeypatch.setattr(os, "preadv", lambda f, pieces, o: read(f, [pieces[0][:at_once]], o))
    assert load(written(tmp_path, [4, 5]), 5) == contents(5)


def test_block_with_reused_memory_ends_the_file(tmp_path: Path) -> None:
    result = write_segment(tmp_path, FORM, 3, [source(1), source(2, intact=False), source(3)])
    assert result is not None
    name, hashes = result
    assert hashes == [digest(1)]
    assert load(tmp_path / name, 1) == contents(1)
    assert write_segment(tmp_path, FORM, 1, [source(2, intact=False)]) is None
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space"):
        write_segment(tmp_path, FORM, 1, [source(1)])
    assert not list(tmp_path.iterdir())


@given(data=st.data())
def test_any_damage_is_detected(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Truncate the file, append to it, or change any byte: each block is correct or rejected."""
    path = written(tmp_path_factory.mktemp("segment"), [1, 2])
    whole = path.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "append", "change"]))
    if kind == "cut":
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "append":
        damaged = whole + data.draw(st.binary(min_size=1, max_size=40))
    else:
        place = data.draw(st.integers(0, len(whole) - 1))
        byte = data.draw(st.integers(1, 255))
        damaged = whole[:place] + bytes([whole[place] ^ byte]) + whole[place + 1 :]
    path.write_bytes(damaged)
    refused = 0
    for number in (1, 2):
        try:
            assert load(path, number) == contents(number)
        except SegmentError:
            refused += 1
    assert refused, "some block lost its checksum"


@pytest.mark.parametrize(
    "other",
    [Format(b"j" * 16, 24), Format(FORM.identity, 12), Format(FORM.identity, 48)],
    ids=["model", "smaller", "larger"],
)
def test_file_of_another_model_is_rejected(tmp_path: Path, other: Format) -> None:
    path = written(tmp_path, [1, 2])
    with pytest.raises(SegmentError, match="another model"):
        load(path, 1, other)


@given(text=st.binary(max_size=300))
def test_foreign_file_is_rejected(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.mktemp("foreign") / "file"
    path.write_bytes(text)
    with pytest.raises(SegmentError):
        load(path, 1)
