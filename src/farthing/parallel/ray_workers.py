"""Ranks on several nodes: Ray places one actor a rank, torch.distributed connects them.

Ray is imported here alone (extra `ray`). The driver is the process that serves; it runs on a node of the
cluster, beside the ranks of its stage. Its place in the placement group is reserved like theirs.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import socket
import threading
import traceback
from contextlib import suppress
from typing import Any

import torch

from farthing.parallel.rendezvous import connect, join, node_arena
from farthing.parallel.shared import Arena
from farthing.parallel.worker import (
    START_TIMEOUT,
    RankFailed,
    RankOptions,
    from_wire,
    open_own,
    to_wire,
)

log = logging.getLogger(__name__)
CONNECT_TIMEOUT = 5.0  # seconds
PLACE_TIMEOUT = 60.0  # seconds for the cluster to find room
BEAT = 0.5  # seconds between two questions to a rank whether it is there
MISSED_BEATS = 16  # in a row: the rank is lost. Counted, so that a replica that was stopped has not failed


def import_ray() -> Any:
    """The package. Raises ValueError saying how to install it."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ValueError("nodes is more than 1, which needs Ray: pip install 'farthing[ray]'") from error
    return ray


def own_address() -> str:
    """Of the node this process is on, as the cluster knows it."""
    address: str = import_ray().util.get_node_ip_address()
    return address


class RankActor:
    """One rank. Calls run in the order they were made; `beat` answers beside them."""

    def __init__(self, options: RankOptions, index: int, version: str) -> None:
        """version: the driver's."""
        if (mine := importlib.metadata.version("farthing")) != version:
            raise ValueError(f"farthing {mine} is on this node; expected {version}, the driver's")
        self._options, self._index = options, index
        self._arena: Arena | None = None
        self._problem: str | None = None

    def started(self) -> tuple[int, str]:
        """(process id, node id)."""
        return os.getpid(), str(import_ray().get_runtime_context().get_node_id())

    def open(self, host: str, port: int, name: str | None) -> None:
        """Join the others and load this rank's slices. name: of shared memory; None: gloo alone."""
        options, layout = self._options, self._options.layout
        join(layout, self._index, connect(host, port, layout), options.device, own_address())
        if name is not None:
            self._arena = node_arena(layout, self._index, options.config.nodes, name)
        self._rank = open_own(options, self._index, self._arena)

    def call(self, method: str, arguments: tuple[Any, ...]) -> None:
        """One of the driver's calls. What goes wrong is told with the next beat."""
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
        """Why this rank cannot go on; None if it can."""
        return self._problem

    def gpus(self) -> list[str]:
        """What Ray gave this process."""
        return [str(g) for g in import_ray().get_gpu_ids()]


class RayWorkers:
    """As `Workers`, on the nodes of a Ray cluster."""

    notice = (MISSED_BEATS + 2) * BEAT  # seconds after which a lost rank is known

    def __init__(self, options: RankOptions) -> None:
        self._options, self._layout = options, options.layout
        self._failure: str | None = None
        self._ended = threading.Event()
        self._closed = False
        self._actors: dict[int, Any] = {}
        self._opened: dict[int, Any] = {}
        self.pids: dict[int, int] = {}
        self.nodes: dict[int, str] = {}  # by rank
        self.arena: Arena | None = None  # of the driver's node
        self._group: Any = None
        self._seat: Any = None  # of the driver, where there are GPUs
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
        """Wait until every rank is `started` or `ready`. Raises RankFailed with why one cannot."""
        if word == "started":
            for rank, at in self._get({r: a.started.remote() for r, a in self._actors.items()}).items():
                self.pids[rank], self.nodes[rank] = at
            return
        self._get(self._opened)
        self._watcher = threading.Thread(target=self._watch, name="farthing-ranks", daemon=True)
        self._watcher.start()

    def open(self, port: int, name: str | None) -> None:
        """Have every rank join the driver and load; `await_all("ready")` waits for it."""
        self._opened = {r: a.open.remote(self.address, port, name) for r, a in self._actors.items()}

    def tell(self, method: str, *arguments: Any) -> None:
        """Have every rank make a call."""
        if self._failure:
            raise RankFailed(self._failure)
        wired = tuple(to_wire(a) for a in arguments)
        for actor in self._actors.values():
            actor.call.remote(method, wired)

    def failure(self, wait: float = 0.0) -> str | None:
        """Why the replica has failed, looked for during `wait` seconds."""
        self._ended.wait(wait)
        return self._failure

    def close(self) -> None:
        """End every rank and give the resources back."""
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
        """A placement group of one bundle a node; then an actor a rank in its node's bundle."""
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
                f"Ray found no room for {nodes} nodes of {dict.fromkeys(kinds, most)} "
                f"in {PLACE_TIMEOUT:g} s; the cluster's nodes have {have}"
            )
        bundle = self._bundles()
        actor = ray.remote(concurrency_groups={"beat": 1})(RankActor)
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        version = importlib.metadata.version("farthing")
        for r in [*ranks, *([layout.driver] if "GPU" in kinds else [])]:
            at = strategy(self._group, placement_group_bundle_index=bundle[layout.node(r, nodes)])
            made = actor.options(
                num_cpus=1, num_gpus=int("GPU" in kinds), max_restarts=0, scheduling_strategy=at
            ).remote(self._options, r, version)
            if r == layout.driver:
                self._seat = made  # computes nothing: it holds the GPU that this process uses
                torch.cuda.set_device(_ordinal(ray.get(made.gpus.remote())[0]))
            else:
                self._actors[r] = made

    def _bundles(self) -> list[int]:
        """The bundle of every node of the layout: the driver's is the one on this process's node."""
        placed = self._ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        own = self._ray.get_runtime_context().get_node_id()
        here = [index for index, node in placed.items() if node == own]
        if not here:
            raise RankFailed(f"Ray did not place ranks on the driver's node {self.address}; has it room?")
        driver = self._layout.node(self._layout.driver, self._options.config.nodes)
        bundle = list(range(self._options.config.nodes))
        bundle[driver], bundle[here[0]] = bundle[here[0]], bundle[driver]
        return bundle

    # -- watching

    def _get(self, references: dict[int, Any]) -> dict[int, Any]:
        """The results by rank; RankFailed with the reason of the first that fails."""
        open_, found = {ref: rank for rank, ref in references.items()}, {}
        while open_:
            done, _ = self._ray.wait(list(open_), timeout=START_TIMEOUT)
            if not done:
                raise RankFailed(f"ranks {sorted(open_.values())} did not start in {START_TIMEOUT:g} s")
            for reference in done:
                rank = open_.pop(reference)
                try:
                    found[rank] = self._ray.get(reference)
                except Exception as error:
                    raise RankFailed(f"rank {rank} could not start: {_reason(error)}") from error
        return found

    def _watch(self) -> None:
        """A rank that ends, that fails, or that does not answer takes the replica with it."""
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
                    del asked[rank]
                    try:
                        problem = self._ray.get(reference)
                    except Exception as error:
                        problem = _reason(error)
                elif missed[rank] >= MISSED_BEATS:
                    problem = f"no answer for {MISSED_BEATS * BEAT:g} s"
                else:
                    continue
                if problem is not None:
                    self._fail(rank, problem)
                    return

    def _fail(self, rank: int, problem: str) -> None:
        if self._closed:
            return
        self._failure = f"rank {rank} of {self._layout.world} ended: {problem}; restart the replica"
        log.error("%s", self._failure)
        self._ended.set()
        if self.arena is not None:
            self.arena.abort()
        self._kill()  # its peers would wait in vain

    def _kill(self) -> None:
        for actor in [*self._actors.values(), self._seat]:
            if actor is not None:
                with suppress(Exception):
                    self._ray.kill(actor)


def _connect(ray: Any, address: str | None) -> bool:
    """Join the cluster; whether this call did. Raises ValueError where there is none."""
    if ray.is_initialized():
        return False
    try:
        if address is not None:
            host, _, port = address.rpartition(":")
            socket.create_connection(
                (host, int(port)), CONNECT_TIMEOUT
            ).close()  # Ray itself tries for minutes
        ray.init(address=address or "auto", logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"ray_address is {address!r} and no Ray cluster was found there; expected HOST:PORT of one that "
            f"this host belongs to (`ray start` makes or joins one): {error}"
        ) from error
    return True


def _reason(error: Exception) -> str:
    """What went wrong in one line, without the traceback of another process that Ray's messages carry."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Failed|Lost): ", line)]
    return raised[-1] if raised else lines[0] if lines else type(error).__name__


def _ordinal(gpu: str) -> int:
    """CUDA's number in this process of a GPU that Ray names."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",").index(gpu) if visible else int(gpu)
