"""Routing by cached prefixes: reported blocks, sent blocks, and the cost of queues."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.prompts import BLOCK, Prompt, read_prompt
from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.digests import parse
from farthing_fleet.gateway.replicas import Balancer, PrefixIndex
from tests.fleet.test_gateway import CHAT, body, fleet


def digest(blocks: tuple[int, ...] = (), requests: int = 0, waiting_bytes: int = 0) -> dict[str, Any]:
    packed = base64.b64encode(struct.pack(f"<{len(blocks)}Q", *blocks)).decode()
    return {"block": BLOCK, "blocks": packed, "requests": requests, "waiting_bytes": waiting_bytes}


def blocks_of(request: dict[str, Any]) -> tuple[int, ...]:
    return read_prompt(json.dumps(request).encode(), 1024).blocks


def balancer(count: int = 3, **options: Any) -> Balancer:
    """Healthy replicas r0, r1, …"""
    made = Balancer(GatewayConfig(**options))
    made.update({f"r{i}": f"http://127.0.0.1:{9000 + i}" for i in range(count)})
    for replica in made.replicas.values():
        replica.healthy = True
    return made


# ---- the index ----


def test_index_finds_the_longest_cached_prefix_per_replica() -> None:
    index = PrefixIndex(10)
    index.learn((1, 2, 3), "a")
    index.learn((1, 2), "b")
    assert index.depths((1, 2, 3, 4)) == {"a": 3, "b": 2}
    assert index.depths((2, 3)) == {"a": 2, "b": 1}  # a chain that starts with 2 belongs to another prompt
    assert index.depths((9, 1)) == {} and index.depths(()) == {}
    index.forget("a")
    assert index.depths((1, 2, 3)) == {"b": 2}


def test_index_is_bounded_and_keeps_shared_blocks() -> None:
    index = PrefixIndex(4)
    index.learn((1, 2, 3, 4), "a")
    index.learn((1, 5), "a")
    assert index.depths((1, 5)) == {"a": 2}
    assert index.depths((1, 2, 3, 4)) == {"a": 3}  # the deepest block was evicted first


def test_reported_blocks_replace_sent_ones_after_a_grace_period() -> None:
    now = [100.0]
    index = PrefixIndex(100, clock=lambda: now[0])
    index.learn((1, 2), "a")
    index.replace("a", (7, 8))
    assert index.depths((1, 2)) == {"a": 2} and index.depths((7, 8)) == {"a": 2}
    now[0] = 140.0
    index.replace("a", (7,))
    assert index.depths((1, 2)) == {} and index.depths((7, 8)) == {"a": 1}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 9), max_size=6, unique=True))))
def test_index_stays_bounded_and_only_claims_sent_blocks(sent: list[Any]) -> None:
    index = PrefixIndex(5)
    for replica, blocks in sent:
        index.learn(blocks, replica)
    for replica in "ab":
        known = {block for name, blocks in sent if name == replica for block in blocks}
        for blocks in (tuple(range(10)), (3, 1, 2)):
            depth = index.depths(blocks).get(replica, 0)
            assert depth <= 5 and set(blocks[:depth]) <= known


# ---- the choice ----


def test_cached_prefix_outweighs_a_short_queue_but_not_a_long_one() -> None:
    made = balancer()
    prompt = Prompt(tuple(range(1, 41)), 40 * BLOCK)
    made.learn(prompt, made.replicas["r1"])
    assert made.choose(prompt) is made.replicas["r1"]
    made.replicas["r1"].inflight = 10
    assert made.choose(prompt) is made.replicas["r1"]
    made.replicas["r1"].queued = 200 * BLOCK
    assert made.choose(prompt) is not made.replicas["r1"]


def test_load_of_others_counts() -> None:
    made = balancer(2)
    prompt = Prompt((), 100)
    made.replicas["r0"].inflight = 1
    made.replicas["r0"].report(1, 0.0)  # our own request
    assert made.replicas["r0"].load == 1
    made.replicas["r0"].report(4, 5000.0)
    assert made.replicas["r0"].load == 4 and made.replicas["r0"].queue == 5000.0
    assert made.choose(prompt) is made.replicas["r1"]


@pytest.mark.anyio
async def test_per_user_field_before_the_messages_keeps_the_prefix() -> None:
    async with fleet(4) as (_, replicas, session, _url):
        for number in range(12):
            request = {"user": f"user-{number}", **body("x" * 3000 + str(number))}
            async with session.post(CHAT, json=request) as answer:
                assert answer.status == 200
        assert sorted(len(r.requests) for r in replicas) == [0, 0, 0, 12]


# ---- digests ----


@pytest.mark.anyio
async def test_replicas_are_chosen_by_reported_blocks() -> None:
    config = GatewayConfig(health_interval_s=0.05, digest_interval_s=0.05)
    async with fleet(3, config) as (gateway, replicas, session, _url):
        request = body("z" * 4000)
        replicas[2].digest = digest(blocks_of(request))
        gateway._digests._absent.clear()
        while not gateway.balancer.prefixes.depths(blocks_of(request)):
            await asyncio.sleep(0.02)
        async with session.post(CHAT, json=request) as answer:
            assert answer.headers["x-farthing-replica"] == "r2"
        replicas[2].digest = digest(requests=500)
        while gateway.balancer.replicas["r2"].load < 500:
            await asyncio.sleep(0.02)
        async with session.post(CHAT, json=request) as answer:
            assert answer.headers["x-farthing-replica"] != "r2"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        "text",
        {**digest(), "block": 64},
        {**digest(), "blocks": "é"},
        {**digest(), "blocks": base64.b64encode(b"seven b").decode()},
        {**digest(), "requests": "many"},
    ],
)
async def test_bad_digests_are_ignored(document: Any) -> None:
    config = GatewayConfig(health_interval_s=0.05, digest_interval_s=0.05)
    async with fleet(2, config) as (gateway, replicas, session, _url):
        for replica in replicas:
            replica.digest = document
        gateway._digests._absent.clear()
        while len(gateway._digests._absent) < 2:
            await asyncio.sleep(0.02)
        async with session.post(CHAT, json=body()) as answer:
            assert answer.status == 200


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50))
def test_digest_round_trip(blocks: list[int]) -> None:
    assert parse(digest(tuple(blocks)), BLOCK) == tuple(blocks)
