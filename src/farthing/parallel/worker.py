"""Worker processes of a parallel model: rendezvous, dispatch of calls, health monitoring, shutdown."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from farthing import process as signals
from farthing.config import EngineConfig
from farthing.model.config import ModelConfig
from farthing.ops import Batch, Blocks, Ops, PeerLost
from farthing.ops.select import resolve, select
from farthing.parallel.plan import Layout, threads_of_rank
from farthing.parallel.rank import Rank, counted_layers, open_rank, shared_bytes
from farthing.parallel.shared import DIRECTORY, Arena, available

# Rendezvous of ranks through torch.distributed, and the shared memory of ranks on one node.

log = logging.getLogger(__name__)
JOIN_TIMEOUT = 60.0  # seconds for every rank to join once all processes are running
_SIOCGIFADDR = 0x8915


def listen(host: str, layout: Layout) -> TCPStore:
    """The driver's side: listens on a system-chosen port, `store.port`."""
    return TCPStore(host, 0, layout.world, True, timedelta(seconds=JOIN_TIMEOUT), wait_for_workers=False)


def connect(host: str, port: int, layout: Layout) -> TCPStore:
    """The side of all other ranks."""
    return TCPStore(host, port, layout.world, False, timedelta(seconds=JOIN_TIMEOUT))


def join(layout: Layout, rank: int, store: TCPStore, device: str = "cpu", address: str = "") -> None:
    """Initialize torch.distributed: gloo, plus NCCL for ranks on GPUs.

    address: of this node, if there are several; by default gloo listens on the host name's address.
    """
    if address and (interface := interface_of(address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=store,
        world_size=layout.world,
        rank=rank,
        timeout=timedelta(seconds=JOIN_TIMEOUT),
    )


def interface_of(address: str) -> str | None:
    """The network interface with an IPv4 address; None if there is none (or the system is not Linux)."""
    try:
        import fcntl
    except ImportError:
        return None
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                packed = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
            except OSError:  # an interface without an address
                continue
        if socket.inet_ntoa(packed[20:24]) == address:
            return name
    return None


def node_arena(layout: Layout, rank: int, nodes: int, name: str) -> Arena | None:
    """Shared memory of the ranks on this rank's node if every node can allocate it; else None.

    name: the replica's, the same on every rank. All ranks must call it, after `join`.
    """
    node = layout.node(rank, nodes)
    path = DIRECTORY / f"{name}-{node}"
    first = layout.node(rank - 1, nodes) != node if rank else True
    arena, possible = None, available()
    if first and possible:
        try:
            arena = Arena(path, shared_bytes(layout, nodes, node))
        except OSError as error:
            log.warning("no shared memory on node %d: %s", node, error)
            possible = False
    everywhere = torch.tensor(int(possible))
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    if everywhere and arena is None:
        arena = Arena(path)
    dist.barrier()
    if first and arena is not None:
        arena.unlink()
    return arena if everywhere else None


START_TIMEOUT = 600.0  # seconds for every rank to load
STEP_TIMEOUT = 60.0  # longest wait of a collective, in seconds
BEAT, SILENCE = 1.0, 5.0  # seconds between heartbeats; silence after which a rank is unhealthy


class RankFailed(RuntimeError):
    """A worker process exited; the model cannot continue without it."""


@dataclass(frozen=True, slots=True)
class RankOptions:
    """Everything a rank needs to build its part of a model."""

    path: Path  # checkpoint directory
    config: EngineConfig

    @property
    def layout(self) -> Layout:
        """How the model is split over ranks."""
        return Layout(*self.config.sizes, self.config.dp_attention)

    def packed_file(self, rank: int) -> Path | None:
        """Path of a rank's packed file: the configured path with layout and rank appended."""
        if self.config.packed is None:
            return None
        o, packed = self.layout, Path(self.config.packed)
        kind = f"tp{o.tp}-pp{o.pp}-ep{o.ep}{'-dp' if o.dp_attention else ''}"
        return packed.with_name(f"{packed.name}.{kind}.{rank}")

    def ops(self, rank: int) -> Ops:
        """A rank's backend; by default with its share of the cores, and its own GPU if there are GPUs."""
        c, layout = self.config, self.layout
        node = layout.node(rank, c.nodes)
        neighbours = [r for r in range(layout.world) if layout.node(r, c.nodes) == node]
        if self.device == "cuda" and c.nodes == 1:  # with several nodes, Ray assigns the GPU
            torch.cuda.set_device(neighbours.index(rank) % torch.cuda.device_count())
        threads = threads_of_rank(c.threads, len(neighbours))
        file = self.packed_file(rank)
        packed = str(file) if file and file.exists() else None
        rounding = c.quantization
        return select(c.ops, c.dtype, threads, rounding, packed, c.verify, c.halves, compute=c.compute)

    @property
    def device(self) -> str:
        """The ranks' device, 'cuda' or 'cpu', known before a backend is built."""
        return "cuda" if resolve(self.config.backend) == "gpu" and torch.cuda.is_available() else "cpu"

    @property
    def arena_bytes(self) -> int:
        """Size of the groups' shared memory."""
        return shared_bytes(self.layout)


class Workers:
    """All ranks except the driver, one pipe each. If a worker exits, the replica fails."""

    notice = 2.0  # seconds until the exit of a worker is detected
    address = "127.0.0.1"

    def __init__(self, options: RankOptions, arena: Arena | None, port: int | None) -> None:
        layout = options.layout
        self._arena = arena
        self._ended = threading.Event()
        self._failure: str | None = None
        self._closed = False
        self._processes: dict[int, tuple[Any, Connection]] = {}
        self._beats: dict[Connection, int] = {}  # rank by heartbeat pipe
        self._heard: dict[int, float] = {}  # by rank, monotonic seconds
        context = multiprocessing.get_context("spawn")
        for rank in range(layout.world):
            if rank == layout.driver:
                continue
            ours, theirs = context.Pipe()
            beats, pulse = context.Pipe(duplex=False)
            path = None if arena is None else arena.path
            arguments = (options, rank, path, port, theirs, pulse)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            pulse.close()
            self._beats[beats] = rank
            self._processes[rank] = (process, ours)
        threading.Thread(target=self._watch, name="farthing-ranks", daemon=True).start()

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return {rank: process.pid for rank, (process, _) in self._processes.items()}

    def await_all(self, word: str) -> None:
        """Wait until every worker has sent `word`. Raises RankFailed with the reason of a failure."""
        for rank, (process, connection) in self._processes.items():
            if not wait([connection, process.sentinel], START_TIMEOUT):
                raise RankFailed(f"rank {rank} was not {word} after {START_TIMEOUT:g} s")
            try:
                said = connection.recv()
            except (EOFError, OSError):
                said = self.failure(wait=self.notice) or "its process exited"
            if said != word:
                raise RankFailed(f"rank {rank} could not start: {said}")

    def tell(self, method: str, *arguments: Any) -> None:
        """Send a call to every worker."""
        if self._failure:
            raise RankFailed(self._failure)
        call = (method, *(to_wire(a) for a in arguments))
        try:
            for _, connection in self._processes.values():
                connection.send(call)
        except OSError as error:
            raise RankFailed(self.failure(wait=self.notice) or f"a rank does not respond: {error}") from error

    def failure(self, wait: float = 0.0) -> str | None:
        """Why the replica failed, checked for up to `wait` seconds; None if it has not."""
        self._ended.wait(wait)
        return self._failure or silent(self._heard, len(self._processes) + 1)

    def close(self) -> None:
        """Stop every worker."""
        self._closed = True
        for _, connection in self._processes.values():
            connection.close()
        for process, _ in self._processes.values():
            process.join(0.5)
        if self._arena is not None:
            self._arena.abort()  # wakes ranks that still wait for a peer
        for process, _ in self._processes.values():
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join(5)

    def _watch(self) -> None:
        """Record heartbeats, and abort if a worker has exited: its peers would wait forever."""
        sentinels = {process.sentinel: rank for rank, (process, _) in self._processes.items()}
        ended: list[Any] = []
        while sentinels and not ended:
            ready = wait([*sentinels, *self._beats], BEAT)
            if self._closed:
                return
            ended = [each for each in ready if each in sentinels]
            for beats in [each for each in ready if each in self._beats]:
                self._hear(beats)  # type: ignore[arg-type]
        if self._closed or not ended:
            return
        rank = sentinels[ended[0]]
        process = self._processes[rank][0]
        process.join(1)
        self._failure = (
            f"rank {rank} of {len(self._processes) + 1} exited with code {process.exitcode}; "
            "restart the replica"
        )
        log.error("%s", self._failure)
        self._ended.set()
        if self._arena is not None:
            self._arena.abort()
        for peer, _ in self._processes.values():
            peer.kill()

    def _hear(self, beats: Connection) -> None:
        try:
            beats.recv_bytes()
        except (EOFError, OSError):
            self._heard.pop(self._beats.pop(beats), None)
        else:
            self._heard[self._beats[beats]] = time.monotonic()


def silent(heard: Mapping[int, float], world: int) -> str | None:
    """Report ranks without heartbeats: a suspended or starved rank stalls every step but may recover.

    heard: when each rank was last heard from, monotonic seconds.
    """
    now = time.monotonic()
    for rank, last in list(heard.items()):
        if now - last > SILENCE:
            return f"rank {rank} of {world} has not responded for {now - last:.0f} s"
    return None


def _beat(pulse: Connection) -> None:
    """Send heartbeats until the driver exits."""
    with contextlib.suppress(OSError):
        while True:
            pulse.send_bytes(b".")
            time.sleep(BEAT)


def open_own(options: RankOptions, index: int, arena: Arena | None) -> Rank:
    """Load this process's rank. Writes its packed file if requested and missing."""
    ops, file = options.ops(index), options.packed_file(index)
    rank = open_rank(
        options.path,
        options.layout,
        index,
        ops,
        options.config.experts,
        STEP_TIMEOUT,
        arena,
        options.config.nodes,
    )
    if file is not None and ops.packed_from is None:
        log.info("rank %d writes %s", index, file)
        ops.save_packed(str(file))
    config = rank.plan.config
    if rank.place.local == 0 and config.n_routed_experts:
        start = rank.plan.stages[rank.place.stage].start
        if arena is not None and options.config.nodes == 1:
            rank.counts = counts_table(arena, options.layout, config)[start:]
        else:  # reduced by `Rank.count`
            shape = counted_layers(config) - start, config.router_size
            rank.counts = torch.zeros(*shape, dtype=torch.int64, device=rank.model.ops.device)
    return rank


def counts_bytes(config: ModelConfig) -> int:
    """Size of the table of token counts per layer and expert."""
    return 8 * counted_layers(config) * config.router_size


def counts_table(arena: Arena, layout: Layout, config: ModelConfig) -> Tensor:
    """[L, E] int64 after the groups of an arena; each stage's first rank counts for its layers."""
    start, size = shared_bytes(layout), counts_bytes(config)
    table = arena.bytes[start : start + size].view(torch.int64)
    return table.view(counted_layers(config), config.router_size)


def _work(
    options: RankOptions,
    index: int,
    path: Path | None,
    port: int | None,
    connection: Connection,
    pulse: Connection,
) -> None:
    """Main loop of a worker: load, then run the driver's calls until the pipe closes."""
    signals.leave_to_parent()
    arena = None
    try:
        arena = None if path is None else Arena(path)
        if port is not None:
            connection.send("started")
            join(options.layout, index, connect("127.0.0.1", port, options.layout), options.device)
        rank = open_own(options, index, arena)
        connection.send("ready")
        threading.Thread(target=_beat, args=(pulse,), name="farthing-heartbeat", daemon=True).start()
        with torch.inference_mode():
            while True:
                method, *arguments = connection.recv()
                getattr(rank, method)(*(from_wire(a, rank.model.ops.device) for a in arguments))
    except (EOFError, PeerLost):
        return
    except BaseException as error:
        traceback.print_exc()
        if arena is not None:
            arena.abort()
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}")
        os._exit(1)


@dataclass(frozen=True, slots=True)
class _Arrays:
    """A batch, or a part of one, in wire format."""

    kind: type[Batch | Blocks]
    parts: tuple[Any, ...]


def to_wire(value: Any) -> Any:
    """Convert tensors to arrays: torch would send each one through its own file descriptor."""
    if isinstance(value, Tensor):
        return value.cpu().numpy()
    if isinstance(value, Batch | Blocks):
        return _Arrays(type(value), tuple(to_wire(getattr(value, f.name)) for f in fields(value)))
    return {key: to_wire(part) for key, part in value.items()} if isinstance(value, dict) else value


def from_wire(value: Any, device: torch.device) -> Any:
    """Inverse of `to_wire`, on a rank's device."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value).to(device)
    if isinstance(value, _Arrays):
        return value.kind(*(from_wire(part, device) for part in value.parts))
    return {key: from_wire(part, device) for key, part in value.items()} if isinstance(value, dict) else value
