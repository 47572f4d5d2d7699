"""Copying a prefix between hosts: seconds for N tokens of latents over a limited link, in medians.

Three processes on loopback: a holder of the cache, a relay that limits the rate, and this one, which receives
one message per block and verifies its checksum before the next.

    python bench/prefix_copy.py [--bytes 70272] [--tokens 2048 8192] [--gbit 1 10] [--rounds 5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import struct
import time
from multiprocessing.connection import Connection

import numpy as np
import xxhash

BLOCK = 16  # tokens
PIECE = 256 << 10  # bytes that the relay passes on at once
BURST_S = 0.002  # that a late relay may catch up


def listening(ready: Connection) -> socket.socket:
    """A socket on a free port, which is told to the parent."""
    sock = socket.create_server(("127.0.0.1", 0))
    ready.send(sock.getsockname()[1])
    return sock


def hold(ready: Connection, block_bytes: int, blocks: int) -> None:
    """Answer a number of blocks with their checksums and bytes."""
    cache = np.random.default_rng(0).integers(0, 256, (blocks, block_bytes), np.uint8)
    sock = listening(ready)
    while True:
        with sock.accept()[0] as client:
            (count,) = struct.unpack("<Q", client.recv(8, socket.MSG_WAITALL))
            for row in cache[:count]:
                client.sendall(struct.pack("<Q", xxhash.xxh3_64_intdigest(row.data)))
                client.sendall(row.data)


def limit(ready: Connection, port: int, gbit: float) -> None:
    """Pass answers on at `gbit` Gbit/s."""
    sock, rate, buffer = listening(ready), gbit * 1e9 / 8, memoryview(bytearray(PIECE))
    while True:
        with sock.accept()[0] as client, socket.create_connection(("127.0.0.1", port)) as holder:
            holder.sendall(client.recv(8, socket.MSG_WAITALL))
            free = time.perf_counter()
            while size := holder.recv_into(buffer):
                client.sendall(buffer[:size])
                free = max(free, time.perf_counter() - BURST_S) + size / rate
                time.sleep(max(0.0, free - time.perf_counter()))


def start(target: object, *arguments: object) -> int:
    """Start one of the above; returns its port."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=target, args=(theirs, *arguments), daemon=True)  # type: ignore[arg-type]
    process.start()
    return int(ours.recv())


def copy(port: int, block_bytes: int, blocks: int) -> float:
    """Seconds to receive and verify."""
    cache = np.empty((blocks, block_bytes), np.uint8)
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(struct.pack("<Q", blocks))
        for row in cache:
            (checksum,) = struct.unpack("<Q", sock.recv(8, socket.MSG_WAITALL))
            left = row.data
            while left:
                left = left[sock.recv_into(left) :]
            assert xxhash.xxh3_64_intdigest(row.data) == checksum
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=int, default=70_272, help="per token (DeepSeek-V3's latents)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--gbit", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    block_bytes = BLOCK * options.bytes
    port = start(hold, block_bytes, max(options.tokens) // BLOCK)
    ports = {f"{gbit:g} Gbit/s": start(limit, port, gbit) for gbit in options.gbit} | {"loopback": port}
    taken: dict[tuple[int, str], list[float]] = {}
    for _ in range(options.rounds):
        for tokens in options.tokens:
            for name, each in ports.items():
                seconds = copy(each, block_bytes, tokens // BLOCK)
                taken.setdefault((tokens, name), []).append(seconds)
    for (tokens, name), each_s in taken.items():
        spread = f"({min(each_s):.3f} ... {max(each_s):.3f})"
        print(f"{tokens:7} tokens, {name:12} {statistics.median(each_s):.3f} s {spread}")


if __name__ == "__main__":
    main()
