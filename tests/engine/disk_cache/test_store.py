"""The threads: computed blocks are stored and read back, and no wrong block is."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.config import EngineConfig
from farthing.engine.disk_cache import store as module
from farthing.engine.disk_cache.files import Format, Index
from farthing.engine.disk_cache.store import BlockMemory, DeviceMemory, DiskStore, Shelf, identity, sample
from farthing.engine.prefetch import Load
from farthing.engine.sequence import PrefixCache
from farthing.engine.stats import DiskStats
from farthing.model.config import ModelConfig
from farthing.model.load import random_model
from farthing.ops.api import CACHE_DTYPES, LatentCache
from farthing.ops.select import select
from tests.engine.conftest import RAW

BLOCKS, SIZE = 12, 4


def cache_of(dtype: str = "bfloat16", index: bool = False) -> LatentCache:
    """A cache with random bytes in every part."""
    kind = getattr(torch, CACHE_DTYPES[dtype])
    random = torch.Generator().manual_seed(5)

    def tensor(*shape: int, kind: torch.dtype = kind) -> torch.Tensor:
        return torch.randint(0, 100, shape, generator=random).to(kind)

    eight = dtype in ("int8", "fp8")
    cache = LatentCache(
        tensor(3, BLOCKS, SIZE, 6), tensor(3, BLOCKS, SIZE, 2, kind=torch.float32) if eight else None
    )
    if index:
        from farthing.ops.api import IndexCache

        scale = tensor(2, BLOCKS, SIZE, kind=torch.float32) if eight else None
        cache.index = IndexCache(tensor(2, BLOCKS, SIZE, 5), scale)
    return cache


def copy_of(cache: LatentCache, block: int) -> list[bytes]:
    return [t[:, block].contiguous().view(torch.uint8).numpy().tobytes() for t in cache.tensors()]


class Rig:
    """A store of a cache, and its prefix cache."""

    def __init__(self, root: Path, cache: LatentCache, capacity: int = 1 << 30, device: bool = False) -> None:
        self.cache, self.stats = cache, DiskStats()
        memory = (DeviceMemory if device else BlockMemory)(cache.tensors())
        self.index = Index(root, Format(b"x" * 16, memory.block_bytes), capacity)
        self.index.create()
        self.index.refresh()
        self.ended: list[int] = []
        self.prefix = PrefixCache(SIZE)
        self.arrived = threading.Event()
        self.store = DiskStore([Shelf(self.index, memory)], SIZE, self.stats, self._loaded)
        self.store.attach([self.prefix])

    def _loaded(self, load: Load[Any], good: int) -> None:
        self.ended.append(good)
        self.arrived.set()

    def compute(self, hashes: list[bytes], blocks: list[int]) -> None:
        for digest, block in zip(hashes, blocks, strict=True):
            self.prefix.register(digest, block)
        self.store.computed(b"", hashes)

    def read(self, hashes: list[bytes], blocks: list[int]) -> int:
        self.arrived.clear()
        self.store.read(Load(hashes, blocks, [], []))
        assert self.arrived.wait(10)
        return self.ended[-1]


def hashes_of(count: int, first: int = 0) -> list[bytes]:
    return [bytes([n + 1]) * 16 for n in range(first, first + count)]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PERIOD", 0.01)
    monkeypatch.setattr(module, "_LINGER", 0.05)


@pytest.mark.parametrize("device", [False, True], ids=["in place", "by way of the host"])
@pytest.mark.parametrize("index", [False, True], ids=["latents", "and index keys"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "fp8"])
def test_every_part_of_a_block_round_trips(tmp_path: Path, dtype: str, index: bool, device: bool) -> None:
    hashes, blocks = hashes_of(4), [7, 2, 9, 4]
    rig = Rig(tmp_path, cache_of(dtype, index), device=device)
    before = [copy_of(rig.cache, block) for block in blocks]
    rig.compute(hashes, blocks)
    rig.store.close()
    assert rig.stats.written_bytes == 4 * rig.index.form.block_bytes == 4 * sum(map(len, before[0]))

    other = Rig(tmp_path, cache_of(dtype, index), device=not device)
    for tensor in other.cache.tensors():
        tensor.zero_()
    assert other.store.find([*hashes, b"?" * 16]) == 4
    assert other.read(hashes, [1, 3, 5, 6]) == 4
    assert [copy_of(other.cache, block) for block in (1, 3, 5, 6)] == before
    assert not any(map(any, copy_of(other.cache, 0)))
    assert (other.stats.hits, other.stats.read_bytes) == (4 * SIZE, rig.stats.written_bytes)
    other.store.close()


def test_layers_of_a_tensor_may_lie_apart(tmp_path: Path) -> None:
    """As those of a compressed past do, which share a memory with their windows."""

    def apart(cache: LatentCache) -> LatentCache:
        whole = torch.stack((cache.data, torch.full_like(cache.data, 7)), 1)
        return LatentCache(whole[:, 0], None)

    rig = Rig(tmp_path, apart(cache_of()))
    assert not rig.cache.data.is_contiguous()
    before = copy_of(rig.cache, 7)
    rig.compute(hashes_of(1), [7])
    rig.store.close()
    other = Rig(tmp_path, apart(cache_of()))
    other.cache.data.zero_()
    assert other.read(hashes_of(1), [3]) == 1
    assert copy_of(other.cache, 3) == before
    other.store.close()


def test_runs_of_a_chain_share_a_file_and_are_written_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path, cache_of())
    hashes = hashes_of(6)
    for digest, block in zip(hashes, range(6), strict=True):
        rig.prefix.register(digest, block)
    rig.store.computed(b"", hashes[:3])
    rig.store.computed(hashes[2], hashes[3:5])
    rig.store.computed(hashes[1], hashes[2:3])
    rig.store.used(hashes[:6])
    rig.store.close()
    assert len(list(rig.index.folder.iterdir())) == 1
    assert rig.stats.written_bytes == 6 * rig.index.form.block_bytes


def test_file_size_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 2 * BlockMemory(cache_of().tensors()).block_bytes)
    rig = Rig(tmp_path, cache_of())
    rig.compute(hashes_of(5), list(range(5)))
    rig.store.close()
    assert len(list(rig.index.folder.iterdir())) == 3
    assert len(rig.index) == 5


def test_block_reused_during_the_copy_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, cache_of())
    source = rig.store._shelves[0].memory.source

    def reused(block: int) -> Any:
        if block == 2:  # reallocated, and registered for the same tokens again
            rig.prefix.forget(2)
            rig.prefix.register(hashes_of(3)[2], 2)
        return source(block)

    monkeypatch.setattr(rig.store._shelves[0].memory, "source", reused)
    rig.compute(hashes_of(4), [0, 1, 2, 3])
    rig.store.close()
    assert rig.index.find(hashes_of(4)) == 2


def test_blocks_of_a_dropped_prefix_cache_are_not_stored(tmp_path: Path) -> None:
    rig = Rig(tmp_path, cache_of())
    rig.store.attach([PrefixCache(SIZE)])
    rig.compute(hashes_of(4), [0, 1, 2, 3])
    rig.store.close()
    assert not len(rig.index)


def test_damaged_file_is_removed_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Rig(tmp_path, cache_of())
    first.compute(hashes_of(3), [0, 1, 2])
    first.store.close()
    rig = Rig(tmp_path, cache_of())
    (path,) = rig.index.folder.iterdir()
    whole = bytearray(path.read_bytes())
    whole[-1 - rig.index.form.block_bytes] ^= 1  # in the second block
    path.write_bytes(whole)
    assert rig.read(hashes_of(3), [5, 6, 7]) == 1
    assert "checksum does not match" in caplog.text
    assert rig.stats.errors == 1 and not path.exists()
    assert rig.store.find(hashes_of(3)) == 0
    rig.store.close()


def test_file_evicted_by_another_process_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Rig(tmp_path, cache_of()), Rig(tmp_path, cache_of())
    first.compute(hashes_of(3), [0, 1, 2])
    until(lambda: second.store.find(hashes_of(3)) == 3)  # it detects the first one's files
    second.store.close()
    for path in list(second.index.folder.iterdir()):
        path.unlink()
    late = Rig(tmp_path, cache_of())
    late.index.add("0" * 32 + "-1.kv", hashes_of(1))
    assert late.read(hashes_of(3), [0, 1, 2]) == 0
    assert late.stats.errors == 0 and not caplog.text
    for rig in (first, late):
        rig.store.close()


def test_two_processes_write_the_same_blocks(tmp_path: Path) -> None:
    rigs = [Rig(tmp_path, cache_of()) for _ in range(2)]
    for rig in rigs:
        rig.compute(hashes_of(4), [0, 1, 2, 3])
    for rig in rigs:
        rig.store.close()
    reader = Rig(tmp_path, cache_of())
    assert reader.read(hashes_of(4), [8, 9, 10, 11]) == 4
    assert copy_of(reader.cache, 9) == copy_of(rigs[0].cache, 1)
    reader.store.close()


def test_directory_stays_within_its_capacity(tmp_path: Path) -> None:
    size = BlockMemory(cache_of().tensors()).block_bytes
    rig = Rig(tmp_path, cache_of(), capacity=6 * (size + 100))
    for number in range(10):
        digest = hashes_of(1, number)
        rig.compute(digest, [number])
        until(lambda digest=digest: digest[0] in rig.index)  # type: ignore[misc]
    rig.store.close()
    assert sum(path.stat().st_size for path in rig.index.folder.iterdir()) <= rig.index.capacity
    assert rig.stats.evictions >= 4
    assert rig.index.find(hashes_of(1, 9)) == 1
    assert 0 < rig.stats.stored_bytes <= rig.index.capacity


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_disk_errors_log_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    refused = 0

    def refuse(*arguments: object) -> None:
        nonlocal refused
        refused += 1
        raise OSError(number, "refused")

    monkeypatch.setattr(module, "write_segment", refuse)
    monkeypatch.setattr(module, "_PAUSE", 0.05)
    caplog.set_level(logging.WARNING)
    rig = Rig(tmp_path, cache_of())
    for n in range(3):
        rig.compute(hashes_of(1, n), [n])
        until(lambda n=n: refused > n)  # type: ignore[misc]
        time.sleep(0.06)
    assert len(caplog.records) == 1 and "cannot write" in caplog.text
    assert rig.stats.errors == refused
    monkeypatch.setattr(module, "write_segment", write_segment)
    rig.compute(hashes_of(1, 5), [5])
    rig.store.close()
    assert rig.store.find(hashes_of(1, 5)) == 1, "it tries again later"


write_segment = module.write_segment


def test_removed_directory_is_created_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "cache", cache_of())
    rig.compute(hashes_of(1, 0), [0])
    until(lambda: len(rig.index) == 1)
    (tmp_path / "cache").rename(tmp_path / "gone")  # at once: the store scans and touches it meanwhile
    until(lambda: len(rig.index) == 0)
    rig.compute(hashes_of(1, 5), [5])
    rig.store.close()
    assert rig.stats.errors == 0
    assert rig.store.find(hashes_of(1, 5)) == 1


def test_failed_reader_reports_to_the_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, cache_of())

    def broken(block: int) -> None:
        raise RuntimeError("broken")

    rig.compute(hashes_of(2), [0, 1])
    until(lambda: rig.store.find(hashes_of(2)) == 2)
    monkeypatch.setattr(rig.store._shelves[0].memory, "target", broken)
    assert rig.read(hashes_of(2), [3, 4]) == 0
    rig.store.close()


def test_file_is_told_apart_by_its_bytes_and_its_time(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    rows = torch.randint(0, 255, (1024, 1024), dtype=torch.uint8)
    file.write_bytes(rows.numpy().tobytes())
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    first = sample(file)
    assert sample(file) == first
    order = torch.cat((torch.randperm(1000), torch.arange(1000, 1024)))  # same size and same end
    file.write_bytes(rows[order].numpy().tobytes())
    os.utime(file, ns=times)
    shuffled = sample(file)
    assert shuffled != first
    os.utime(file, ns=(times[0], times[1] + 1))
    assert sample(file) != shuffled
    file.write_bytes(b"short")
    assert sample(file) != first


@pytest.mark.parametrize(
    "options",
    [
        {"deterministic": True},
        {"compute": "exact"},
        {"dtype": "float32"},
        {"quantization": "int8"},
        {"experts": "all"},
        {"experts_on": "cpu"},
        {"experts_on": "cpu", "hot_experts": 1},
        {"speculate": "mtp"},
        {"packed": True},
    ],
)
def test_options_that_change_results_change_the_identity(tmp_path: Path, options: dict[str, Any]) -> None:
    packed, shard = tmp_path / "packed", tmp_path / "shard"
    packed.write_bytes(b"p")
    shard.write_bytes(b"s")
    model = random_model(ModelConfig.from_json(RAW), select("reference"), seed=1)
    cache = LatentCache(torch.zeros(2, 4, 4, 6), None)
    if "packed" in options:
        options = {"packed": str(packed)}

    def of(**given: Any) -> bytes:
        return identity(EngineConfig(**given), model, cache.tensors())

    plain, changed = of(), of(**options)
    assert changed != plain
    if "packed" in options:
        packed.write_bytes(b"q")
        assert of(**options) != changed
    model.ops.weight_files = (shard,)
    assert of() != plain
