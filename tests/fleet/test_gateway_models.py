"""Several models behind one gateway: pools by what replicas report, lists, 404s, and a model that is dead."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.replicas_file import read_replicas
from farthing_fleet.gateway.server import Gateway
from farthing_fleet.signals_scrape import ScrapeSource
from tests.fleet.doubles.replica import FakeReplica
from tests.fleet.raw_client import HOST, connect
from tests.fleet.test_gateway import CHAT, body

CONFIG = GatewayConfig(health_interval_s=0.05, wait_s=60.0, unhealthy_after=1, prefix_entries=64)


def replicas_of(models: dict[str, tuple[str, ...]], **options: Any) -> list[FakeReplica]:
    """A replica for each name; it serves the names given."""
    return [FakeReplica(name=name, models=served, **options) for name, served in models.items()]


@asynccontextmanager
async def in_front_of(
    replicas: list[FakeReplica], config: GatewayConfig = CONFIG, **options: Any
) -> AsyncIterator[tuple[Gateway, aiohttp.ClientSession]]:
    gateway = Gateway(config, **options)
    for replica in replicas:
        await replica.start()
    port = await gateway.start()
    gateway.set_replicas({r.name: r.url for r in replicas})
    await until(lambda: len(gateway.balancer.candidates()) == len(replicas))
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield gateway, session
    finally:
        await gateway.stop(0)
        for replica in replicas:
            await replica.stop()


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def served_by(session: aiohttp.ClientSession, request: dict[str, Any]) -> str:
    async with session.post(CHAT, json=request) as answer:
        assert answer.status == 200, await answer.text()
        return answer.headers["x-farthing-replica"]


TWO = {"a1": ("a",), "a2": ("a", "a-lora"), "b1": ("b",), "b2": ("b", "org/b")}


@pytest.mark.anyio
async def test_requests_go_to_the_replicas_of_their_model() -> None:
    async with in_front_of(replicas_of(TWO)) as (gateway, session):
        for model, pool in (("a", "a"), ("b", "b"), ("a-lora", "a"), ("org/b", "b"), ("b:latest", "b")):
            for turn in range(4):
                name = await served_by(session, {**body(f"turn {turn}"), "model": model})
                assert name.startswith(pool), (model, name)
        assert gateway.balancer.pools == ("a", "b")
        shown = await (await session.get("/fleet/replicas")).json()
        assert {r["name"]: r["model"] for r in shown["replicas"]} == {
            "a1": "a", "a2": "a", "b1": "b", "b2": "b",
        }  # fmt: skip


@pytest.mark.anyio
async def test_all_models_are_listed_and_an_unknown_one_is_a_404_that_names_them() -> None:
    async with in_front_of(replicas_of(TWO)) as (_, session):
        listed = await (await session.get("/v1/models")).json()
        assert [entry["id"] for entry in listed["data"]] == ["a", "b", "a-lora", "org/b"]
        assert (listed["first_id"], listed["last_id"], listed["has_more"]) == ("a", "org/b", False)
        async with session.post(CHAT, json={**body(), "model": "c"}) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"], error["param"]) == (404, "model_not_found", "model")
            assert error["message"] == "model: got 'c'; expected one of 'a', 'b', 'a-lora', 'org/b'"
        async with session.post(CHAT, json={"messages": []}) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["message"].startswith(
                "model is missing; expected one of 'a'"
            )
        async with session.get("/v1/models/nowhere") as answer:
            assert answer.status == 404


@pytest.mark.anyio
async def test_one_model_leaves_names_to_its_replicas() -> None:
    async with in_front_of(replicas_of({"r1": ("a",), "r2": ("a",)})) as (_, session):
        assert await served_by(session, {**body(), "model": "any"}) in ("r1", "r2")
        listed = await (await session.get("/v1/models")).json()
        assert listed["data"][0]["owned_by"] in ("r1", "r2")  # a replica's own answer


@pytest.mark.anyio
async def test_each_model_has_its_prefixes() -> None:
    """The replica that has a prompt of one model is no reason to send another model's prompt there."""
    async with in_front_of(replicas_of(TWO)) as (gateway, session):
        text = "x" * 4096
        first = {model: await served_by(session, {**body(text), "model": model}) for model in "ab"}
        for _ in range(3):
            for model in "ab":
                assert await served_by(session, {**body(text), "model": model}) == first[model]
        for number in range(40):  # evicts the prefixes of one model's replicas
            await served_by(session, {**body(f"{number}" + text), "model": "a"})
        index = gateway.balancer.prefixes
        assert all(len(index._blocks.get(name, ())) <= CONFIG.prefix_entries for name in TWO)
        assert await served_by(session, {**body(text), "model": "b"}) == first["b"]


@pytest.mark.anyio
async def test_dead_model_waits_while_the_other_serves() -> None:
    replicas = replicas_of(TWO)
    async with in_front_of(replicas) as (gateway, session):
        dead = [r for r in replicas if r.name.startswith("a")]
        for replica in dead:
            await replica.stop()
        await until(lambda: not gateway.balancer.candidates(model="a"))
        held = [
            asyncio.ensure_future(session.post(CHAT, json={**body(f"{n}"), "model": "a"})) for n in range(5)
        ]
        await until(lambda: gateway.holds.waiting == 5)
        for turn in range(8):
            assert (await served_by(session, {**body(f"turn {turn}"), "model": "b"})).startswith("b")
        listed = await (await session.get("/v1/models")).json()
        assert "a" in [entry["id"] for entry in listed["data"]]
        text = await (await session.get("/metrics")).text()
        assert 'farthing:gateway_requests_waiting{model_name="a"} 5.0' in text
        assert 'farthing:gateway_requests_waiting{model_name="b"}' not in text  # none ever waited
        for model, count in (("a", 5.0), ("b", 0.0), (None, 5.0)):  # a controller reads its own model's
            source = ScrapeSource(dict, gateway=str(session._base_url).rstrip("/"), model=model)
            assert (await source.read(0)).backlog == count
            await source.close()
        assert not any(answer.done() for answer in held)
        await dead[0].start()
        for answer in await asyncio.gather(*held):
            assert answer.headers["x-farthing-replica"] == "a1"


@pytest.mark.anyio
async def test_flood_of_a_dead_model_takes_no_place_of_another() -> None:
    config = GatewayConfig(health_interval_s=0.05, unhealthy_after=1, max_waiting=4, wait_s=60.0)
    replicas = replicas_of({"a1": ("a",), "b1": ("b",)})
    async with in_front_of(replicas, config) as (gateway, session):
        for replica in replicas:
            await replica.stop()
        await until(lambda: not gateway.balancer.candidates())
        flood = [asyncio.ensure_future(session.post(CHAT, json={**body(), "model": "a"})) for _ in range(8)]
        await until(lambda: sum(each.done() for each in flood) == 4)  # no room: 503
        waiting = asyncio.ensure_future(session.post(CHAT, json={**body(), "model": "b"}))
        await until(lambda: gateway.holds["b"].waiting == 1)
        await replicas[1].start()
        assert (await waiting).status == 200
        await replicas[0].start()
        assert sorted(answer.status for answer in await asyncio.gather(*flood)) == [200] * 4 + [503] * 4


@pytest.mark.anyio
async def test_adapter_that_was_loaded_since_is_found() -> None:
    replicas = replicas_of({"a1": ("a",), "b1": ("b",)})
    async with in_front_of(replicas) as (gateway, session):
        replicas[1].models.append("adapter")
        gateway.models._read_at.clear()  # as if some seconds had passed
        assert await served_by(session, {**body(), "model": "adapter"}) == "b1"


@pytest.mark.anyio
async def test_replicas_that_want_a_key_are_asked_with_the_clients() -> None:
    replicas = replicas_of({"a1": ("a",), "b1": ("b",)})
    for replica in replicas:
        replica.key = "secret"
    async with in_front_of(replicas) as (gateway, session):
        assert gateway.balancer.pools == ()
        async with session.get("/v1/models", headers={"authorization": "Bearer wrong"}) as answer:
            assert answer.status == 401
        headers = {"authorization": "Bearer secret"}
        for model in "abab":
            async with session.post(CHAT, json={**body(), "model": model}, headers=headers) as answer:
                assert answer.headers["x-farthing-replica"] == f"{model}1"
        listed = await (await session.get("/v1/models", headers=headers)).json()
        assert [entry["id"] for entry in listed["data"]] == ["a", "b"]


@pytest.mark.anyio
async def test_request_for_a_model_that_is_starting_waits_and_an_impossible_one_is_refused() -> None:
    replicas = replicas_of({"a1": ("a",), "b1": ("b",)})
    loading = FakeReplica(name="c1", models=("c",))
    async with in_front_of(replicas) as (gateway, session):
        await loading.start()
        loading.ready_at = float("inf")
        gateway.set_replicas({r.name: r.url for r in [*replicas, loading]})
        asked = [asyncio.ensure_future(session.post(CHAT, json={**body(), "model": model})) for model in "cd"]
        await until(lambda: gateway.holds.waiting == 2)
        loading.ready_at = 0.0
        found, unknown = await asyncio.gather(*asked)
        assert (found.status, found.headers["x-farthing-replica"]) == (200, "c1")
        assert unknown.status == 404
        await loading.stop()


@pytest.mark.anyio
async def test_model_of_a_long_body_is_found() -> None:
    async with in_front_of(replicas_of({"a1": ("a",), 'b"1': ('b"',)})) as (_, session):
        long = "x" * (1 << 20)
        for model, name in (("a", "a1"), ('b"', 'b"1')):
            request = {"messages": [{"role": "user", "content": f'"model": "a{long}'}], "model": model}
            assert await served_by(session, request) == name


@pytest.mark.anyio
async def test_model_of_a_long_body_is_not_that_of_an_object_in_it() -> None:
    async with in_front_of(replicas_of({"a1": ("a",), "b1": ("é",)})) as (_, session):
        call = {"type": "tool_use", "input": {"model": "a", "text": '"}]'}}
        turn = {"role": "assistant", "content": [call, {"type": "text", "text": "x" * (1 << 20)}]}
        request = {"messages": [turn], '"model': "a", "model": "é"}
        for ascii in (True, False):
            data = json.dumps(request, ensure_ascii=ascii).encode()
            async with session.post(CHAT, data=data) as answer:
                assert answer.headers["x-farthing-replica"] == "b1"
        async with session.post(CHAT, data=json.dumps({"messages": [turn]}).encode()) as answer:
            assert answer.status == 400


@pytest.mark.anyio
async def test_target_that_is_no_url_is_a_404() -> None:
    async with in_front_of(replicas_of({"a1": ("a",), "b1": ("b",)})) as (gateway, _):
        reader, writer = await connect(gateway.address[1])
        writer.write(b"GET //[ HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 404 ")
        writer.close()


@pytest.mark.anyio
async def test_replica_that_lists_the_models_of_others_takes_none_of_their_requests() -> None:
    replicas = replicas_of({"liar": ("c", "a", "b"), "a1": ("a",), "b1": ("b",)})
    async with in_front_of(replicas) as (_, session):
        for model, name in (("a", "a1"), ("b", "b1"), ("c", "liar")):
            assert await served_by(session, {**body(), "model": model}) == name


@pytest.mark.anyio
async def test_replica_that_lists_nothing_gets_no_request_for_the_model_of_others() -> None:
    async with in_front_of(replicas_of({"mute": (), "a1": ("a",)})) as (gateway, session):
        assert gateway.balancer.pools == ("a",)
        for turn in range(3):
            assert await served_by(session, {**body(f"turn {turn}"), "model": "a"}) == "a1"


@pytest.mark.anyio
async def test_replica_that_answers_404_is_asked_for_its_models_again() -> None:
    replicas = replicas_of({"a1": ("a",), "b1": ("b",)})
    async with in_front_of(replicas) as (gateway, session):
        replicas[1].models[:] = ["c"]  # restarted between two health checks
        replicas[1].status = 404
        async with session.post(CHAT, json={**body(), "model": "b"}) as answer:
            assert answer.status == 404
        replicas[1].status = 200
        await until(lambda: gateway.balancer.pools == ("a", "c"))
        assert await served_by(session, {**body(), "model": "c"}) == "b1"


@pytest.mark.parametrize("models", ["mite", [1], [""], {"a": 1}])
def test_models_of_a_replicas_file_are_a_list_of_names(models: Any, tmp_path: Path) -> None:
    file = tmp_path / "replicas.json"
    file.write_text(json.dumps({"replicas": [], "models": models}))
    with pytest.raises(ValueError, match=r"models: got .*; expected a list of names"):
        read_replicas(file)


@pytest.mark.anyio
async def test_models_at_zero_are_known_by_their_controllers() -> None:
    wake = [f"{model}=http://127.0.0.1:9/wake" for model in "ab"]
    async with in_front_of(replicas_of({"a1": ("a",)}), wake=wake) as (gateway, session):
        assert gateway.balancer.pools == ("a", "b")
        waiting = asyncio.ensure_future(session.post(CHAT, json={**body(), "model": "b"}))
        await until(lambda: gateway.holds["b"].waiting == 1)
        assert await served_by(session, {**body(), "model": "a"}) == "a1"
        async with session.post(CHAT, json={**body(), "model": "c"}) as answer:
            assert answer.status == 404
        waiting.cancel()
