"""Collectives through memory shared by the ranks of one host: one copy in, sums read in place.

A group owns a few pages of one mapped file: per rank one counter, on its own cache line, and two slots. In
collective number s a rank writes its slot s mod 2 and then sets its counter to s; a reader waits for that
counter and reads the slot in place. Before a slot is overwritten, every peer must have posted s - 1, which
means that it has finished reading s - 2 from the same slot.

Counters require stores that other cores see in order, which x86-64 guarantees; elsewhere ranks use gloo.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from farthing.lazy import torch
from farthing.ops.weights import PeerLost, SharedSum

if TYPE_CHECKING:
    from torch import Tensor

DIRECTORY = Path("/dev/shm")
SLOT_BYTES = 1 << 20
LINE = 64  # bytes of a cache line
_WORDS = LINE // 8
_HEADER = 4096
_SPINS = 400  # polls of a counter before yielding the core (about 20 us)
_YIELDS = 2000
_NAP = 50e-6  # seconds


def available() -> bool:
    """Whether ranks on this host can use shared memory."""
    return DIRECTORY.is_dir() and platform.machine() in ("x86_64", "AMD64")


class Arena:
    """One mapped file for all groups of a replica. Its first word is a flag that a rank has failed."""

    def __init__(self, path: Path, create: int | None = None) -> None:
        """create: bytes of a new file, allocated immediately. Raises OSError if memory is insufficient."""
        self.path = path
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if create:
                try:
                    os.posix_fallocate(descriptor, 0, create)
                except OSError:
                    path.unlink()
                    raise
            self._map = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self.words = memoryview(self._map).cast("Q")
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        # The driver's parent may exit normally; a rank whose parent, the driver, exits is lost.
        self.parent = None if create else os.getppid()

    @classmethod
    def create(cls, nbytes: int) -> Arena:
        """Create a file in /dev/shm; `unlink` it once every rank has opened it."""
        name = tempfile.mktemp(prefix="farthing-", dir=DIRECTORY)
        return cls(Path(name), max(nbytes, _HEADER))

    def unlink(self) -> None:
        """Remove the name; the memory is freed when the last rank exits or crashes."""
        self.path.unlink(missing_ok=True)

    def abort(self) -> None:
        """Wake every waiting rank; its collective raises PeerLost."""
        self.words[0] = 1

    def check(self) -> None:
        """Raise PeerLost if a rank has failed or the parent process has exited."""
        if self.words[0]:
            raise PeerLost("another rank has failed")
        if self.parent is not None and os.getppid() != self.parent:
            raise PeerLost("the parent process has ended")


def group_bytes(size: int, slot_bytes: int = SLOT_BYTES) -> int:
    """Bytes used by a group of `size` ranks."""
    return -(-size * LINE // 4096) * 4096 + size * 2 * slot_bytes


def arena_bytes(sizes: Sequence[int], slot_bytes: int = SLOT_BYTES) -> int:
    """Bytes of an arena for groups of these sizes."""
    return _HEADER + sum(group_bytes(size, slot_bytes) for size in sizes)


class SharedGroup:
    """A group in an arena, starting at `offset`. Every rank makes the same calls in the same order."""

    def __init__(
        self,
        arena: Arena,
        offset: int,
        size: int,
        index: int,
        timeout: float = 60.0,
        slot_bytes: int = SLOT_BYTES,
        crowded: bool = False,
    ) -> None:
        """timeout: seconds to wait in one collective. crowded: more ranks than cores, so do not spin."""
        self.size, self.index = size, index
        self._arena, self._words, self._timeout = arena, arena.words, timeout
        self._first = (_HEADER + offset) // 8
        self._slots = _HEADER + offset + group_bytes(size, 0)
        self._slot_bytes, self._spins = slot_bytes, 1 if crowded else _SPINS
        self._count = ctypes.c_uint64(0)  # collectives started; native code continues the count
        self._crowded = crowded
        self._views: dict[tuple[int, int, int, torch.dtype], Tensor] = {}

    @property
    def _step(self) -> int:
        return self._count.value

    def shared_sum(self) -> SharedSum:
        """This group for native code; its sums can be interleaved with these collectives."""
        memory = self._arena.bytes.data_ptr()
        return SharedSum(
            memory + self._first * 8, memory + self._slots, self._slot_bytes, ctypes.addressof(self._count),
            memory, self.size, self.index, self._arena.parent or 0, self._crowded, self._timeout,
        )  # fmt: skip

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of every rank's x, in place where x is contiguous; the same bits on every rank."""
        x = x.contiguous()
        for part in self._chunks(x):
            self._write(part)
            first, *others = [self._read(peer, part) for peer in range(self.size)]
            if len(others) == 1:
                torch.add(first, others[0], out=part)
                continue
            part.copy_(first)
            for other in others:
                part.add_(other)
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x (equal shapes)."""
        x = x.contiguous()
        out = [torch.empty_like(x) for _ in range(self.size)]
        for i, part in enumerate(self._chunks(x)):
            self._write(part)
            for peer, whole in enumerate(out):
                self._chunk(whole, i).copy_(self._read(peer, part))
        return out

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        """The root's x; on other ranks x defines shape and dtype and is overwritten."""
        x = x.contiguous()
        for part in self._chunks(x):
            if self.index == root:
                self._write(part)
            else:
                self._begin()
                part.copy_(self._read(root, part))
                self._post()
        return x

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send parts[j] [m_j, …] to rank j; part j of the result comes from rank j."""
        row = parts[0][:1].numel() if len(parts[0]) else parts[0].new_empty(1, *parts[0].shape[1:]).numel()
        counts = torch.tensor([len(p) for p in parts])
        table = torch.stack(self.all_gather(counts)) * row  # [from, to] elements
        stream = torch.cat([p.reshape(-1) for p in parts])
        step = self._slot_bytes // stream.element_size()
        ends = table.cumsum(1)
        out = [stream.new_empty(int(n)) for n in table[:, self.index]]
        for low in range(0, max(1, int(ends[:, -1].max())), step):
            self._write(stream[low : low + step])
            for peer, received in enumerate(out):
                stop, start = int(ends[peer, self.index]), int(ends[peer, self.index]) - received.numel()
                a, b = max(start, low), min(stop, low + step)
                if a < b:
                    received[a - start : b - start] = self._read(peer, stream, b - low)[a - low :]
                else:
                    self._wait(peer, self._step)
        return [o.view(-1, *parts[0].shape[1:]) for o in out]

    # -- one collective: begin, write, post, read

    def _chunks(self, x: Tensor) -> Sequence[Tensor]:
        if x.numel() * x.element_size() <= self._slot_bytes:
            return (x.view(-1),)
        parts: Sequence[Tensor] = x.view(-1).split(self._slot_bytes // x.element_size())
        return parts

    def _chunk(self, x: Tensor, i: int) -> Tensor:
        return self._chunks(x)[i]

    def _begin(self) -> None:
        self._count.value += 1
        for peer in range(self.size):
            self._wait(peer, self._step - 1)

    def _write(self, part: Tensor) -> None:
        self._begin()
        self._view(self.index, part, part.numel()).copy_(part)
        self._post()

    def _post(self) -> None:
        self._words[self._first + self.index * _WORDS] = self._step

    def _read(self, peer: int, like: Tensor, count: int | None = None) -> Tensor:
        self._wait(peer, self._step)
        return self._view(peer, like, like.numel() if count is None else count)

    def _view(self, rank: int, like: Tensor, count: int) -> Tensor:
        key = (rank, self._step & 1, count, like.dtype)
        view = self._views.get(key)
        if view is None:
            start = self._slots + (2 * rank + (self._step & 1)) * self._slot_bytes
            raw = self._arena.bytes[start : start + count * like.element_size()]
            view = raw.view(like.dtype)
            if len(self._views) < 1024:
                self._views[key] = view
        return view

    def _wait(self, peer: int, step: int) -> None:
        words, at = self._words, self._first + peer * _WORDS
        for _ in range(self._spins):
            if words[at] >= step:
                return
        naps = 0
        # Count naps instead of clock time, so that a suspended and resumed replica does not time out.
        while words[at] < step:
            naps += 1
            if naps < _YIELDS:
                os.sched_yield()
                continue
            time.sleep(_NAP)
            if naps % 256 == 0:
                self._arena.check()
                if (naps - _YIELDS) * _NAP * 2 > self._timeout:
                    raise PeerLost(
                        f"rank {peer} of a group of {self.size} did not answer in {self._timeout:g} s"
                    )
