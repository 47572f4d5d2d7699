"""The digest of the prefix cache: contents, evictions, and access."""

from __future__ import annotations

import base64
import struct
from typing import Any

import httpx

from farthing.prompts import BLOCK, read_prompt
from farthing.server.config import KeyRing
from tests.server.harness import Running, running, tiny_engine

KEYS = KeyRing(["alice:sk-a", "bob:sk-b"])
ADMIN, SCRAPER = KeyRing(["root:sk-root"]), KeyRing(["prom:sk-prom"])
PROXIED = {"X-Forwarded-For": "203.0.113.9"}


def digest(server: Running, **headers: str) -> tuple[dict[str, Any], set[int]]:
    answer = httpx.get(f"{server.url}/cache/digest", headers=headers)
    assert answer.status_code == 200, answer.text
    document = answer.json()
    data = base64.b64decode(document["blocks"])
    return document, set(struct.unpack(f"<{len(data) // 8}Q", data))


def ask(server: Running, text: str, **fields: Any) -> tuple[int, ...]:
    """Complete a prompt. Returns the blocks that a gateway computes for the request."""
    body = {"prompt": text, "max_tokens": 2, "ignore_eos": True, **fields}
    request = httpx.Request("POST", f"{server.url}/v1/completions", json=body)
    with httpx.Client() as client:
        assert client.send(request).status_code == 200
    return read_prompt(request.content, 1024).blocks


def test_cached_prompts_are_listed_and_evicted_ones_are_not() -> None:
    with running(tiny_engine(num_blocks=130, block_size=16)) as server:  # 2,080 tokens, one per byte
        assert digest(server)[1] == set()
        first = ask(server, "a" * 1100)
        assert len(first) == 2
        assert set(first) <= digest(server)[1]
        second = ask(server, "b" * 1100, user="someone")  # not part of the prompt
        assert set(second) <= digest(server)[1]
        third = ask(server, "c" * 1500)
        document, held = digest(server)
        assert set(third) <= held
        assert not set(first) <= held  # there is room for two prompts
        assert document["block"] == BLOCK and document["requests"] == 0


def test_prefixes_share_their_blocks() -> None:
    with running(tiny_engine(num_blocks=300, block_size=16)) as server:
        digest(server)
        one = ask(server, "s" * 1024 + "x" * 600)
        two = ask(server, "s" * 1024 + "y" * 600)
        assert one[:2] == two[:2] and one[2:] != two[2:]
        assert set(one) | set(two) <= digest(server)[1]


def test_digest_records_nothing_until_it_is_read() -> None:
    with running(tiny_engine(num_blocks=300)) as server:
        ask(server, "a" * 1100)
        assert digest(server)[1] == set()


def test_digest_requires_access_to_all_metrics() -> None:
    with running(tiny_engine(), keys=KEYS, admin_keys=ADMIN) as server:
        url = f"{server.url}/cache/digest"
        for key, status in (("sk-a", 403), ("wrong", 403), ("sk-root", 200)):
            headers = {"Authorization": f"Bearer {key}", **PROXIED}
            assert httpx.get(url, headers=headers).status_code == status, key
        assert httpx.get(url).status_code == 200  # this machine
    with running(tiny_engine(), keys=KEYS, metrics_keys=SCRAPER) as server:
        url = f"{server.url}/cache/digest"
        for key, status in (("sk-a", 401), ("sk-prom", 200)):
            headers = {"Authorization": f"Bearer {key}", **PROXIED}
            assert httpx.get(url, headers=headers).status_code == status, key
