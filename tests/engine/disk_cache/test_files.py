"""The shared directory against a model: two processes that write, read, evict and crash."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from farthing.engine.disk_cache import files
from farthing.engine.disk_cache.files import (
    TEMPORARY,
    Format,
    Index,
    SegmentError,
    Source,
    file_name,
    read_block,
    read_header,
    write_segment,
)

FORM = Format(b"m" * 16, 64)
CAPACITY = 1500
FOREIGN = {"notes.txt": b"keep me", "0" * 32 + "-x.kv": b"keep me too", "README": b""}


def digest(chain: Sequence[int]) -> bytes:
    """Digest of a prefix, like the engine's: identifies the whole chain."""
    return bytes(chain).ljust(16, b"\xff")


def contents(digest: bytes) -> bytes:
    return digest * 4


def put(index: Index, chain: Sequence[int], start: int) -> None:
    """Write a chain's blocks from `start` on."""
    hashes = [digest(chain[: i + 1]) for i in range(start, len(chain))]
    blocks = [Source(h, [memoryview(bytearray(contents(h)))], lambda: True) for h in hashes]
    result = write_segment(index.folder, FORM, len(blocks), blocks)
    assert result is not None
    index.add(*result)


def get(index: Index, wanted: bytes) -> bytes | None:
    """Read a block as the store does: from the first intact file."""
    while name := index.file_of(wanted):
        try:
            descriptor = os.open(index.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            index.drop(name)
            continue
        memory = bytearray(64)
        try:
            segment = read_header(descriptor, FORM)
            read_block(descriptor, FORM, segment, wanted, [memoryview(memory)])
        except SegmentError:
            index.drop(name)
            index.discard(name)
            continue
        finally:
            os.close(descriptor)
        return bytes(memory)
    return None


chains = st.lists(st.integers(0, 2), min_size=1, max_size=6)


class IndexMachine(RuleBasedStateMachine):
    """Every block read is correct, whatever happened to the files."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.indexes = [Index(self.root, FORM, CAPACITY) for _ in range(2)]
        self.folder = self.indexes[0].folder
        self.folder.mkdir()
        for name, text in FOREIGN.items():
            (self.folder / name).write_bytes(text)
        self.ever: set[bytes] = set()

    @rule(who=st.integers(0, 1), chain=chains, start=st.integers(0, 5))
    def put(self, who: int, chain: list[int], start: int) -> None:
        start = min(start, len(chain) - 1)
        put(self.indexes[who], chain, start)
        self.ever |= {digest(chain[: i + 1]) for i in range(start, len(chain))}

    @rule(who=st.integers(0, 1), chain=chains)
    def get(self, who: int, chain: list[int]) -> None:
        index = self.indexes[who]
        hashes = [digest(chain[: i + 1]) for i in range(len(chain))]
        found = index.find(hashes)
        for number, wanted in enumerate(hashes):
            data = get(index, wanted)
            assert data in (None, contents(wanted))
            assert data is None or wanted in self.ever
            if data is None:
                assert wanted not in index
            assert number >= found or wanted in self.ever
        index.touch(hashes)

    @rule(who=st.integers(0, 1))
    def refresh(self, who: int) -> None:
        index = self.indexes[who]
        index.refresh()
        index.refresh()
        assert all((self.folder / name).exists() for name in index._files)
        other = Index(self.root, FORM, CAPACITY)
        other.refresh()
        assert index._holders.keys() >= other._holders.keys(), "what a new process finds"

    @rule(who=st.integers(0, 1))
    def evict(self, who: int) -> None:
        index = self.indexes[who]
        index.evict()
        stored = sum(path.stat().st_size for path in self.files())
        assert stored <= CAPACITY
        assert index.stored_bytes == stored

    @rule(who=st.integers(0, 1))
    def restart(self, who: int) -> None:
        self.indexes[who] = Index(self.root, FORM, CAPACITY)
        self.indexes[who].refresh()

    @rule(age=st.sampled_from([0, 10_000]))
    def crash_while_writing(self, age: int) -> None:
        path = self.folder / f"{os.urandom(8).hex()}{TEMPORARY}"
        path.write_bytes(b"half")
        then = time.time() - age
        os.utime(path, (then, then))
        self.indexes[0].evict()
        assert path.exists() == (age == 0)

    @precondition(lambda self: any(True for _ in self.files()))
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.files())))
        whole = path.read_bytes() or b"empty"
        place = data.draw(st.integers(0, len(whole) - 1))
        changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        path.write_bytes(data.draw(st.sampled_from([changed, whole[:place], b""])))

    @rule(chain=chains)
    def foreign_file_of_our_name(self, chain: list[int]) -> None:
        (self.folder / file_name([digest(chain)])).write_bytes(b"not ours")

    @precondition(lambda self: any(True for _ in self.files()))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(sorted(self.files()))).unlink()

    def files(self) -> list[Path]:
        return [path for path in self.folder.glob("*-[0-9]*.kv") if path.name not in FOREIGN]

    @invariant()
    def tables_agree(self) -> None:
        for index in self.indexes:
            listed = {h: name for name, hashes in index._files.items() for h in hashes}
            assert listed.keys() == index._holders.keys()
            assert all(set(names) <= index._files.keys() for names in index._holders.values())

    @invariant()
    def foreign_files_stay(self) -> None:
        assert all((self.folder / name).read_bytes() == text for name, text in FOREIGN.items())

    def teardown(self) -> None:
        shutil.rmtree(self.root)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


def index_over(root: Path, capacity: int = CAPACITY, identity: bytes = FORM.identity) -> Index:
    index = Index(root, Format(identity, FORM.block_bytes), capacity)
    index.folder.mkdir(exist_ok=True)
    return index


def age(index: Index, seconds: float) -> None:
    """Set the last use of all files to `seconds` ago."""
    for path in index.folder.glob("*.kv"):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def test_least_recently_used_files_are_evicted_first(tmp_path: Path) -> None:
    index = index_over(tmp_path, 3 * FORM.segment_bytes(1))
    for number in range(3):
        put(index, [number], 0)
        age(index, 10)
    index.touch([digest([0])])
    put(index, [3], 0)
    index.evict()
    assert [get(index, digest([n])) is not None for n in range(4)] == [True, False, False, True]
    assert index.evictions == 2  # to 95 %


def test_end_of_a_chain_is_evicted_before_its_beginning(tmp_path: Path) -> None:
    index = index_over(tmp_path, 3 * FORM.segment_bytes(1))
    chain = [1, 2, 3, 4]
    for end in range(1, 5):
        put(index, chain[:end], end - 1)
        age(index, 10)
    index.touch([digest(chain[:end]) for end in range(1, 5)])
    index.evict()
    assert index.find([digest(chain[:end]) for end in range(1, 5)]) == 2


def test_capacity_is_shared_by_all_models(tmp_path: Path) -> None:
    old, new = index_over(tmp_path, 200, b"o" * 16), index_over(tmp_path, 200, b"n" * 16)
    put(old, [1], 0)
    age(old, 100)
    put(new, [1], 0)
    put(new, [2], 0)
    new.evict()
    assert not list(old.folder.iterdir())
    assert new.find([digest([1])]) + new.find([digest([2])]) == 1
    assert old.find([digest([1])]) == 1
    assert get(old, digest([1])) is None, "evicted by another process: a miss"


SEGMENT_FORM = Format(b"i" * 16, 24)


def segment_contents(number: int, size: int = 24) -> bytes:
    return bytes((number * 7 + i) % 251 for i in range(size))


def segment_digest(number: int) -> bytes:
    return bytes([number]) * 16


def source(number: int, intact: bool = True, cuts: tuple[int, ...] = (5, 11)) -> Source:
    whole = bytearray(segment_contents(number))
    edges = [0, *cuts, len(whole)]
    pieces = [memoryview(whole)[a:b] for a, b in pairwise(edges)]
    return Source(segment_digest(number), pieces, lambda: intact)


def load(path: Path, number: int, form: Format = SEGMENT_FORM) -> bytes:
    memory = bytearray(form.block_bytes)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        pieces = [memoryview(memory)[:7], memoryview(memory)[7:]]
        read_block(descriptor, form, read_header(descriptor, form), segment_digest(number), pieces)
    finally:
        os.close(descriptor)
    return bytes(memory)


def written(folder: Path, numbers: list[int]) -> Path:
    result = write_segment(folder, SEGMENT_FORM, len(numbers), map(source, numbers))
    assert result is not None
    assert result[1] == [segment_digest(n) for n in numbers]
    return folder / result[0]


def test_blocks_round_trip_with_any_pieces(tmp_path: Path) -> None:
    path = written(tmp_path, [1, 2, 3])
    assert [load(path, n) for n in (3, 1, 2)] == [
        segment_contents(3),
        segment_contents(1),
        segment_contents(2),
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o077 == 0, "prompts can be read from a block"


def test_more_pieces_than_one_system_call_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_PIECES", 2)
    result = write_segment(tmp_path, SEGMENT_FORM, 1, [source(9, cuts=(1, 2, 3, 4, 5, 6))])
    assert result is not None
    assert load(tmp_path / result[0], 9) == segment_contents(9)


@pytest.mark.parametrize("at_once", [1, 5])
def test_short_reads_and_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda f, pieces, o: write(f, [pieces[0][:at_once]], o))
    monkeypatch.setattr(os, "preadv", lambda f, pieces, o: read(f, [pieces[0][:at_once]], o))
    assert load(written(tmp_path, [4, 5]), 5) == segment_contents(5)


def test_block_with_reused_memory_ends_the_file(tmp_path: Path) -> None:
    result = write_segment(tmp_path, SEGMENT_FORM, 3, [source(1), source(2, intact=False), source(3)])
    assert result is not None
    name, hashes = result
    assert hashes == [segment_digest(1)]
    assert load(tmp_path / name, 1) == segment_contents(1)
    assert write_segment(tmp_path, SEGMENT_FORM, 1, [source(2, intact=False)]) is None
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space"):
        write_segment(tmp_path, SEGMENT_FORM, 1, [source(1)])
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
            assert load(path, number) == segment_contents(number)
        except SegmentError:
            refused += 1
    assert refused, "some block lost its checksum"


@pytest.mark.parametrize(
    "other",
    [Format(b"j" * 16, 24), Format(SEGMENT_FORM.identity, 12), Format(SEGMENT_FORM.identity, 48)],
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
