"""Memory after hostile load returns to the level of ordinary load.

One minute by default; releases run it with FARTHING_SOAK_SECONDS=1200.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

SECONDS = float(os.environ.get("FARTHING_SOAK_SECONDS", "60"))
NUMBERS = count()
JSON = {"content-type": "application/json"}


@contextlib.contextmanager
def served() -> Iterator[tuple[str, int]]:
    """(URL, process id) of `farthing serve` on the embedded model."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    code = "from farthing.cli.app import main; main()"
    # Pages of the KV cache become resident when they are first used: a small one settles early.
    command = [sys.executable, "-c", code, "serve", "--port", str(port), "--num-blocks", "512"]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        assert process.wait(60) == 0


def resident(pid: int) -> int:
    """Resident set size in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ordinary(url: str, client: httpx.Client) -> None:
    """Send completions, chats and a new schema."""
    number = next(NUMBERS)
    prompt = f"def f{number}(x):\n    return x" * 8
    schema = {"type": "object", "properties": {f"p{number}": {"type": "integer"}}}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": prompt, "max_tokens": 8}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 4, "guided_json": schema}),
        ("/tokenize", {"prompt": prompt * 20}),
    ]
    for path, body in bodies:
        assert client.post(url + path, json=body).status_code == 200


def hostile(url: str, client: httpx.Client, port: int) -> None:
    """Send oversized requests of every kind; each is rejected."""
    number = next(NUMBERS)
    user = {"role": "user", "content": "x"}
    long = f"{number} " + "a b " * 1_900_000
    for path, body in (
        ("/v1/completions", {"prompt": long}),
        ("/tokenize", {"prompt": long}),
        ("/v1/chat/completions", {"messages": [user] * 200_000}),
        ("/v1/completions", {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(200_000)), 1)}),
        ("/v1/completions", {"prompt": "x", "guided_regex": f"(x{{{900 + number % 100}}}){{1000}}"}),
    ):
        answer = client.post(url + path, content=json.dumps(body), headers=JSON, timeout=120)
        assert answer.status_code == 400
    address = ("127.0.0.1", port)
    with (
        contextlib.suppress(OSError),
        socket.create_connection(address, timeout=10) as connection,
    ):
        connection.sendall(b"GET / HTTP/1.1\r\nx: " + b"y" * 20_000_000)
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(address, timeout=10)).sendall(b"GET")


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_hostile_requests_leak_no_memory() -> None:
    pytest.importorskip("llguidance")
    with served() as (url, pid), httpx.Client(timeout=60) as client:
        port = int(url.rsplit(":", 1)[1])

        rounds = 0

        def load(share: float, attacked: bool) -> int:
            nonlocal rounds
            deadline = time.monotonic() + share * SECONDS
            while time.monotonic() < deadline:
                ordinary(url, client)
                rounds += 1
                if attacked:
                    hostile(url, client, port)
            print(f"{rounds} rounds of ordinary load, {resident(pid) / 2**20:.0f} MiB")
            return resident(pid)

        settled = load(0.25, attacked=False)
        load(0.5, attacked=True)
        after = load(0.25, attacked=False)
        assert after <= 1.10 * settled, f"{settled / 2**20:.0f} -> {after / 2**20:.0f} MiB"
