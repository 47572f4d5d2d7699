"""Ranks on several nodes: Ray places one actor per rank, torch.distributed connects them.

Only this module imports Ray (extra `ray`). The driver is the serving process. It runs on a cluster node next
to the ranks of its stage, with its resources reserved in the placement group like theirs.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import socket
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

import torch

from farthing.extras import how_to_install
from farthing.parallel.shared import Arena
from farthing.parallel.worker import (
    START_TIMEOUT,
    RankFailed,
    RankOptions,
    connect,
    from_wire,
    join,
    node_arena,
    open_own,
    silent,
    to_wire,
)

log = logging.getLogger(__name__)
CONNECT_TIMEOUT = 5.0  # seconds
PLACE_TIMEOUT = 60.0  # seconds for the cluster to place the ranks
BEAT = 0.5  # seconds between liveness checks of a rank
MISSED_BEATS = 16  # in a row: the rank is lost. A count, not a time, so that a suspended replica survives


def import_ray() -> Any:
    """The ray package. Raises ValueError with the install command if it is missing."""
    try:
        import ray.util.scheduling_strategies

        import ray
    except ImportError as error:
        raise ValueError(f"nodes is more than 1, which requires Ray: {how_to_install('ray')}") from error
    return ray


def own_address() -> str:
    """The address of this process's node, as known to the cluster."""
    address: str = import_ray().util.get_node_ip_address()
    return address


class RankActor:
    """One rank. Calls run in submission order; `beat` runs concurrently."""

    def __init__(self, options: RankOptions, index: int, version: str) -> None:
        """version: the driver's version, which must match."""
        if (mine := importlib.metadata.version("farthing")) != version:
            raise ValueError(f"farthing version on this node is {mine}; expected {version}, the driver's")
        self._options, self._index = options, index
        self._arena: Arena | None = None
        self._problem: str | None = None

    def started(self) -> tuple[int, str]:
        """(process id, node id)."""
        return os.getpid(), str(import_ray().get_runtime_context().get_node_id())

    def open(self, host: str, port: int, name: str | None) -> None:
        """Join the other ranks and load this rank's slices. name: of the shared memory; None: gloo only."""
        options, layout = self._options, self._options.layout
        join(layout, self._index, connect(host, port, layout), options.device, own_address())
        if name is not None:
            self._arena = node_arena(layout, self._index, options.config.nodes, name)
        self._rank = open_own(options, self._index, self._arena)

    def call(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Run one of the driver's calls. Errors are reported with the next beat."""
        try:
            with torch.inference_mode():
                device = self._rank.model.ops.device
                getattr(self._rank, method)(*(from_wire(a, device) for a in arguments))
        except BaseException as error:
            traceback.print_exc()
            self._problem = self._problem or f"{type(error).__name__}: {error}"
            if self._arena is not None:
                self._arena.abort()

    def beat(self) -> str | None:
        """Why this rank cannot continue; None if it can."""
        return self._problem

    def gpus(self) -> list[str]:
        """The GPU ids that Ray assigned to this process."""
        return [str(g) for g in import_ray().get_gpu_ids()]


class RayWorkers:
    """Like `Workers`, on the nodes of a Ray cluster."""

    notice = (MISSED_BEATS + 2) * BEAT  # seconds until a lost rank is detected

    def __init__(self, options: RankOptions) -> None:
        self._options, self._layout = options, options.layout
        self._failure: str | None = None
        self._ended = threading.Event()
        self._closed = False
        self._heard: dict[int, float] = {}  # by rank, monotonic seconds
        self._actors: dict[int, Any] = {}
        self._opened: dict[int, Any] = {}
        self.pids: dict[int, int] = {}
        self.nodes: dict[int, str] = {}  # by rank
        self.arena: Arena | None = None  # shared memory of the driver's node
        self._group: Any = None
        self._seat: Any = None  # the driver's reservation, if there are GPUs
        self._watcher: threading.Thread | None = None
        self._ray = import_ray()
        self._own_connection = _connect(self._ray, options.config.ray_address)
        self.address = own_address()
        try:
            self._place()
        except BaseException:
            self.close()
            raise

    def await_all(self, word: str) -> None:
        """Wait until every rank is `started` or `ready`. Raises RankFailed with the reason of a failure."""
        if word == "started":
            for rank, at in self._get({r: a.started.remote() for r, a in self._actors.items()}).items():
                self.pids[rank], self.nodes[rank] = at
            return
        self._get(self._opened)
        self._watcher = threading.Thread(target=self._watch, name="farthing-ranks", daemon=True)
        self._watcher.start()

    def open(self, port: int, name: str | None) -> None:
        """Make every rank join the driver and load; `await_all("ready")` waits for completion."""
        self._opened = {r: a.open.remote(self.address, port, name) for r, a in self._actors.items()}

    def tell(self, method: str, *arguments: Any) -> None:
        """Send a call to every rank."""
        if self._failure:
            raise RankFailed(self._failure)
        wired = tuple(to_wire(a) for a in arguments)
        for actor in self._actors.values():
            actor.call.remote(method, wired)

    def failure(self, wait: float = 0.0) -> str | None:
        """Why the replica failed, checked for up to `wait` seconds; None if it has not."""
        self._ended.wait(wait)
        return self._failure or silent(self._heard, self._layout.world)

    def close(self) -> None:
        """Stop every rank and release the resources."""
        if self._closed:
            return
        self._closed = True
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join(5)
        self._kill()
        if self._group is not None:
            with suppress(Exception):  # the cluster may be gone
                self._ray.util.remove_placement_group(self._group)
        if self._own_connection:
            self._ray.shutdown()

    # -- placing

    def _place(self) -> None:
        """Create a placement group with one bundle per node, then one actor per rank in its node's bundle."""
        ray, layout, nodes = self._ray, self._layout, self._options.config.nodes
        kinds = ("CPU", "GPU") if self._options.device == "cuda" else ("CPU",)
        ranks = [r for r in range(layout.world) if r != layout.driver]
        most = max(sum(layout.node(r, nodes) == n for r in range(layout.world)) for n in range(nodes))
        bundles: list[dict[str, float]] = [dict.fromkeys(kinds, most) for _ in range(nodes)]
        bundles[layout.node(layout.driver, nodes)][f"node:{self.address}"] = 0.001  # where the driver runs
        self._group = ray.util.placement_group(bundles, strategy="STRICT_SPREAD")
        if not self._group.wait(PLACE_TIMEOUT):
            have = [{k: n["Resources"].get(k, 0) for k in kinds} for n in ray.nodes() if n["Alive"]]
            raise RankFailed(
                f"Ray could not place {nodes} nodes of {dict.fromkeys(kinds, most)} "
                f"within {PLACE_TIMEOUT:g} s; the cluster's nodes have {have}"
            )
        bundle = self._bundles()
        actor = ray.remote(concurrency_groups={"beat": 1})(RankActor)
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        version = importlib.metadata.version("farthing")
        for r in [*ranks, *([layout.driver] if "GPU" in kinds else [])]:
            at = strategy(self._group, placement_group_bundle_index=bundle[layout.node(r, nodes)])
            worker = actor.options(
                num_cpus=1, num_gpus=int("GPU" in kinds), max_restarts=0, scheduling_strategy=at
            ).remote(self._options, r, version)
            if r == layout.driver:
                self._seat = worker  # idle actor that reserves the GPU this process uses
                torch.cuda.set_device(_ordinal(ray.get(worker.gpus.remote())[0]))
            else:
                self._actors[r] = worker

    def _bundles(self) -> list[int]:
        """The bundle of each node of the layout; the driver's is the one on this process's node."""
        placed = self._ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        own = self._ray.get_runtime_context().get_node_id()
        here = [index for index, node in placed.items() if node == own]
        if not here:
            raise RankFailed(
                f"Ray placed no ranks on the driver's node {self.address}; check its free resources"
            )
        driver = self._layout.node(self._layout.driver, self._options.config.nodes)
        bundle = list(range(self._options.config.nodes))
        bundle[driver], bundle[here[0]] = bundle[here[0]], bundle[driver]
        return bundle

    # -- watching

    def _get(self, references: dict[int, Any]) -> dict[int, Any]:
        """Results by rank. Raises RankFailed with the reason of the first failure."""
        open_, results = {ref: rank for rank, ref in references.items()}, {}
        while open_:
            done, _ = self._ray.wait(list(open_), timeout=START_TIMEOUT)
            if not done:
                raise RankFailed(f"ranks {sorted(open_.values())} did not start within {START_TIMEOUT:g} s")
            for reference in done:
                rank = open_.pop(reference)
                try:
                    results[rank] = self._ray.get(reference)
                except Exception as error:
                    raise RankFailed(f"rank {rank} could not start: {_reason(error)}") from error
        return results

    def _watch(self) -> None:
        """Fail the replica if a rank exits, fails, or stops responding."""
        missed = dict.fromkeys(self._actors, 0)
        asked: dict[int, Any] = {}
        while not self._closed:
            for rank, actor in self._actors.items():
                if rank not in asked:
                    asked[rank] = actor.beat.options(concurrency_group="beat").remote()
            self._ended.wait(BEAT)
            done, _ = self._ray.wait(list(asked.values()), num_returns=len(asked), timeout=0)
            for rank, reference in list(asked.items()):
                missed[rank] += 1
                if reference in done:
                    missed[rank] = 0
                    self._heard[rank] = time.monotonic()
                    del asked[rank]
                    try:
                        problem = self._ray.get(reference)
                    except Exception as error:
                        problem = _reason(error)
                elif missed[rank] >= MISSED_BEATS:
                    problem = f"no response for {MISSED_BEATS * BEAT:g} s"
                else:
                    continue
                if problem is not None:
                    self._fail(rank, problem)
                    return

    def _fail(self, rank: int, problem: str) -> None:
        if self._closed:
            return
        self._failure = f"rank {rank} of {self._layout.world} failed: {problem}; restart the replica"
        log.error("%s", self._failure)
        self._ended.set()
        if self.arena is not None:
            self.arena.abort()
        self._kill()  # its peers would wait forever

    def _kill(self) -> None:
        for actor in [*self._actors.values(), self._seat]:
            if actor is not None:
                with suppress(Exception):
                    self._ray.kill(actor)


def _connect(ray: Any, address: str | None) -> bool:
    """Join the cluster; returns whether this call did. Raises ValueError if there is no cluster."""
    if ray.is_initialized():
        return False
    try:
        if address is not None:
            host, _, port = address.rpartition(":")
            socket.create_connection(
                (host, int(port)), CONNECT_TIMEOUT
            ).close()  # fail fast: Ray itself retries for minutes
        ray.init(address=address or "auto", logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"ray_address: got {address!r}, but there is no Ray cluster; expected HOST:PORT of a cluster "
            f"that this host belongs to (`ray start` creates or joins one): {error}"
        ) from error
    return True


def _reason(error: Exception) -> str:
    """The error in one line, without the remote traceback in Ray's messages."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Failed|Lost): ", line)]
    return raised[-1] if raised else lines[0] if lines else type(error).__name__


def _ordinal(gpu: str) -> int:
    """This process's CUDA index of a GPU id from Ray."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",").index(gpu) if visible else int(gpu)
