"""A state directory on a full disk is an alarm; scaling continues."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from farthing.files import partial_of
from farthing.upstream import launch
from farthing_fleet.config import PolicyConfig
from farthing_fleet.controller import Controller
from farthing_fleet.decision_log import DecisionLog, read_log
from farthing_fleet.gateway.replicas_file import read_replicas, write_replicas
from farthing_fleet.policy import Policy
from farthing_fleet.types import Decision, Levels, Snapshot

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


class Steady:
    """A load that needs three replicas."""

    async def read(self, current: int) -> Snapshot:
        return Snapshot(1.0, current, ready=current, request_rate=2.1, backlog=0.0, queue_time_s=0.0)

    async def close(self) -> None: ...


class Counter:
    """An actuator that applies every target."""

    count = 1

    async def start(self) -> None: ...

    async def current(self) -> int:
        return self.count

    async def apply(self, decision: Decision) -> None:
        self.count = decision.target

    async def close(self) -> None: ...


def test_full_disk_is_an_alarm_and_scaling_continues(tmp_path: Path) -> None:
    actuator = Counter()
    policy = Policy(PolicyConfig(capacity=1.0, interval_s=0.05))
    loop = Controller(
        policy,
        Steady(),
        actuator,
        log_path=tmp_path / "decisions.jsonl",
        state_path=tmp_path / "policy.json",
        wall=lambda: 1.0,
    )
    partial_of(tmp_path / "policy.json").symlink_to(FULL)
    (tmp_path / "decisions.jsonl").symlink_to(FULL)

    async def turns() -> None:
        for _ in range(2):
            await loop.turn()

    asyncio.run(turns())
    assert actuator.count == 3
    assert loop.metrics.last is not None and loop.metrics.last.target == 3
    assert any("disk: decision log" in alarm for alarm in loop.metrics.last.alarms)
    (tmp_path / "decisions.jsonl").unlink()  # space is available again

    async def after() -> None:
        await loop.turn()
        await loop.turn()

    asyncio.run(after())
    assert not any("decision log" in alarm for alarm in loop.metrics.last.alarms)


def test_partial_line_is_removed_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    decision = Decision(1.0, 1, 2, "up", "realtime", Levels(), "first")
    log.append(decision)
    real = Path.open

    class Full:
        """A file on a disk with room for ten bytes."""

        def __init__(self, path: Path) -> None:
            self.file = real(path, "ab", buffering=0)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def seek(self, *arguments: int) -> int:
            return self.file.seek(*arguments)

        def fileno(self) -> int:
            return self.file.fileno()

        def write(self, data: bytes) -> int:
            return self.file.write(data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *_, **__: Full(path))
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            log.append(decision)
    log.append(decision)
    assert [d.reason for d in read_log(log.path)] == ["first", "first"]


def test_replicas_file_is_overwritten_in_place(tmp_path: Path) -> None:
    path = tmp_path / "replicas.json"
    write_replicas(path, {"a": "http://127.0.0.1:1"})
    partial_of(path).mkdir()  # the new file cannot be written
    many = {f"r{i}": f"http://127.0.0.1:{i}" for i in range(50)}
    write_replicas(path, many)
    assert read_replicas(path) == (many, ())
    write_replicas(path, {"b": "http://127.0.0.1:2"})
    assert read_replicas(path) == ({"b": "http://127.0.0.1:2"}, ())


def test_process_starts_without_a_log_it_cannot_open(tmp_path: Path) -> None:
    async def start() -> int:
        process = await launch(("sh", "-c", "echo said"), tmp_path / "missing" / "log", {})
        return await process.wait()

    assert asyncio.run(start()) == 0
