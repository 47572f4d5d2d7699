"""Rendezvous of ranks through torch.distributed, and the shared memory of ranks on one node."""

from __future__ import annotations

import logging
import os
import socket
import struct
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from farthing.parallel.plan import Layout
from farthing.parallel.rank import shared_bytes
from farthing.parallel.shared import DIRECTORY, Arena, available

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
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
            except OSError:  # an interface without an address
                continue
        if socket.inet_ntoa(found[20:24]) == address:
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
