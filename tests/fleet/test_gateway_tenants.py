"""Several keys behind one gateway: places to wait in, its own pages, and stored responses."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from farthing.server.config import KeyRing
from farthing.server.dashboard.site import Dashboard
from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.process import pages_of
from farthing_fleet.gateway.server import Gateway
from tests.fleet.doubles.replica import FakeReplica
from tests.server.harness import Running, ScriptedEngine, running

KEYS = KeyRing(["a:sk-a", "b:sk-b"])
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.anyio
async def test_full_waiting_room_admits_another_key() -> None:
    gateway = Gateway(GatewayConfig(max_waiting=16, wait_s=30, health_interval_s=0.05), keys=KEYS)
    port = await gateway.start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session, FakeReplica() as replica:

        async def ask(key: str) -> int:
            async with session.post("/v1/chat/completions", json=CHAT, headers=bearer(key)) as answer:
                await answer.read()
                return answer.status

        flood = [asyncio.create_task(ask("sk-a")) for _ in range(16)]
        while gateway.holds.waiting < 16:
            await asyncio.sleep(0.01)
        other = [asyncio.create_task(ask("sk-b")) for _ in range(2)]
        more = asyncio.create_task(ask("sk-a"))
        assert await more == 503
        while sum(task.done() for task in flood) < 2:
            await asyncio.sleep(0.01)
        gateway.set_replicas({"r": replica.url})
        assert await asyncio.gather(*other) == [200, 200]
        assert sorted(await asyncio.gather(*flood)) == [200] * 14 + [503] * 2
    await gateway.stop(0)


@pytest.mark.anyio
async def test_dashboard_is_the_gateways_own() -> None:
    dashboard = Dashboard(lambda: {"kind": "gateway", "title": "fleet"})
    gateway = Gateway(GatewayConfig(health_interval_s=0.05), keys=KEYS, pages=pages_of(dashboard))
    port = await gateway.start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session, FakeReplica() as replica:
        gateway.set_replicas({"r": replica.url})
        while not gateway.balancer.candidates():
            await asyncio.sleep(0.01)

        async def get(path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
            async with session.request(method, path, headers=headers) as answer:
                assert "X-Farthing-Replica" not in answer.headers
                return answer.status, await answer.read()

        page = await get("/")
        assert page[0] == 200 and b"/dashboard/app.js" in page[1]
        assert await get("/dashboard") == await get("/dashboard/") == page
        assert (await get("/", "HEAD")) == (await get("/health", "HEAD")) == (200, b"")
        assert (await get("/dashboard/data"))[0] == 401
        status, data = await get("/dashboard/data", **bearer("sk-a"))
        assert status == 200 and b'"gateway"' in data
        assert (await get("/dashboard/nothing", **bearer("sk-a")))[0] == 404
    await gateway.stop(0)


@pytest.mark.anyio
async def test_preflight_of_a_browser_needs_no_key() -> None:
    ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    gateway = Gateway(GatewayConfig(health_interval_s=0.05), keys=KEYS)
    port = await gateway.start()
    with running(ScriptedEngine(["ok"]), keys=KEYS, allowed_origins=("https://page.example",)) as server:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            asleep = await session.options("/v1/completions", headers=ask)
            assert asleep.status == 401 and gateway.holds.waiting == 0  # it does not wake the fleet
            gateway.set_replicas({"r": server.url})
            while not gateway.balancer.candidates():
                await asyncio.sleep(0.01)
            granted = await session.options("/v1/completions", headers=ask)
            assert granted.status == 200
            assert granted.headers["Access-Control-Allow-Origin"] == "https://page.example"
            for refused in (ask | {"Access-Control-Request-Method": ""}, {}):
                refused.pop("Access-Control-Request-Method", None)
                assert (await session.options("/v1/completions", headers=refused)).status == 401
            body = {"json": {"prompt": "x"}}
            assert (await session.options("/v1/completions", headers=ask, **body)).status == 401  # type: ignore[arg-type]
            origin = {"Origin": "https://page.example"} | bearer("sk-a")
            answer = await session.post("/v1/completions", headers=origin, **body)  # type: ignore[arg-type]
            assert answer.status == 200 and "Access-Control-Allow-Origin" in answer.headers
    await gateway.stop(0)


@pytest.mark.anyio
async def test_stored_response_is_found_on_its_replica() -> None:
    def serve() -> Any:
        return running(ScriptedEngine(["ok"]), keys=KEYS)

    with serve() as one, serve() as two, serve() as three:
        gateway = Gateway(GatewayConfig(health_interval_s=0.05), keys=KEYS)
        port = await gateway.start()
        servers: dict[str, Running] = {"one": one, "two": two, "three": three}
        gateway.set_replicas({name: server.url for name, server in servers.items()})
        while len(gateway.balancer.candidates()) < 3:
            await asyncio.sleep(0.01)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:

            async def call(method: str, path: str, key: str = "sk-a", **body: Any) -> tuple[int, str, Any]:
                sent = {"json": body} if body else {}
                async with session.request(method, path, headers=bearer(key), **sent) as answer:
                    return answer.status, answer.headers["X-Farthing-Replica"], await answer.json()

            first = [await call("POST", "/v1/responses", input=f"{n} hello") for n in range(6)]
            assert len({replica for _, replica, _ in first}) > 1
            for _, replica, document in first:
                path = f"/v1/responses/{document['id']}"
                following = {"input": "and", "previous_response_id": document["id"]}
                for _ in range(2):
                    status, chosen, _ = await call("POST", "/v1/responses", **following)
                    assert (status, chosen) == (200, replica)
                assert (await call("POST", "/v1/responses", "sk-b", **following))[0] == 400  # not its own
                assert (await call("GET", path))[:2] == (200, replica)
                assert (await call("GET", f"{path}/input_items"))[:2] == (200, replica)
                assert (await call("DELETE", path))[:2] == (200, replica)
                assert (await call("GET", path))[0] == 404
            assert (await call("POST", "/v1/responses/input_tokens", input="x"))[0] == 200
        await gateway.stop(0)
