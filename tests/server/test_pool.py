"""Several models in one server: loading, waiting, making room, failing, unloading; with real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from farthing.server import pool as pool_module
from farthing.server.config import Given, KeyRing, ServerConfig
from farthing.server.errors import ApiError
from farthing.server.front import Front, create_front
from farthing.server.pool import Pool, PoolConfig
from farthing.server.presets import Sized, read_models
from farthing.server.run import listen, server_of

# A server of one model: `slow` streams until its client leaves, then notes it; `die` ends the process.
FAKE = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
name, folder, delay, problem, port = *sys.argv[1:5], int(sys.argv[5])
open(f"{folder}/{name}.{os.getpid()}", "w").close()
if problem:
    print(f"error: {problem}", flush=True)
    sys.exit(2)
time.sleep(float(delay))
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def do_GET(self):
        found = not self.path.startswith("/v1/responses/") or self.path.endswith(name)
        far = self.headers.get("X-Forwarded-For")
        self.answer(200 if found else 404, {"model": name, "path": self.path, "far": far})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("die"):
            os._exit(9)
        if not body.get("slow"):
            self.answer(200, {"model": name, "key": self.headers.get("Authorization"), "body": body})
            return
        self.send_response(200)
        lines = self.path.startswith("/api/")
        self.send_header("Content-Type", "application/x-ndjson" if lines else "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"3\\r\\n{}\\n\\r\\n" if lines else b"8\\r\\ndata: x\\n\\r\\n")
                self.wfile.flush()
                time.sleep(0.02)
        except OSError:
            open(f"{folder}/{name}.left", "w").close()
    def answer(self, status, document):
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@dataclass
class Fake:
    """Stands for `Sized`: a model of one byte."""

    name: str
    folder: Path
    delay: float = 0.0
    problem: str = ""
    size: int = 1
    engine: Any = field(default_factory=lambda: SimpleNamespace(model="tiny", max_model_len=64))

    @property
    def preset(self) -> Any:
        return SimpleNamespace(name=self.name, type="tiny", stored="gguf", capabilities=("completion",))

    def command(self, port: int) -> list[str]:
        words = self.name, str(self.folder), str(self.delay), self.problem, str(port)
        return [sys.executable, "-S", "-c", FAKE, *words]

    @property
    def starts(self) -> int:
        return len([each for each in self.folder.glob(f"{self.name}.*") if each.suffix[1:].isdigit()])


def pool_of(*fakes: Fake, limit: int = 2, **config: Any) -> Pool:
    return Pool(cast("list[Sized]", list(fakes)), PoolConfig(limit=limit, **config), {})


@asynccontextmanager
async def running(pool: Pool) -> Any:
    await pool.start()
    try:
        yield pool
    finally:
        await pool.drain()


@pytest.fixture(autouse=True)
def _exact_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_group_memory", lambda groups: {})
    monkeypatch.setattr(pool_module, "_LEAST_LOADED", 0.0)
    monkeypatch.setattr(pool_module, "_LEAST_LOADS", 0.0)


async def used(pool: Pool, name: str, client: str = "") -> None:
    async with pool.use(pool.models[name], client) as url, httpx.AsyncClient() as http:
        assert (await http.get(f"{url}/x")).json()["model"] == name


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.01)


def states(pool: Pool) -> dict[str, str]:
    return {name: model.state for name, model in pool.models.items()}


@pytest.mark.anyio
async def test_least_recently_used_model_makes_room(tmp_path: Path) -> None:
    async with running(pool_of(*(Fake(name, tmp_path) for name in "abc"))) as pool:
        for name in "abac":
            await used(pool, name)
        assert states(pool) == {"a": "loaded", "b": "available", "c": "loaded"}
        assert pool.loads == 3 and pool.unloads == 1


@pytest.mark.anyio
async def test_a_model_in_use_stays_and_takes_no_new_requests_while_others_wait(tmp_path: Path) -> None:
    async with running(pool_of(*(Fake(name, tmp_path) for name in "abc"))) as pool:
        a, b, c = pool.models.values()
        async with pool.use(b, "y"):
            async with pool.use(a, "x") as url:
                waiting = asyncio.create_task(used(pool, "c", "y"))
                await until(lambda: a.closing or b.closing)
                assert b.closing  # the least recently used
                assert a.state == b.state == "loaded" and c.state == "available"
                again = asyncio.create_task(used(pool, "b", "x"))  # comes after c
                await asyncio.sleep(0.05)
                async with httpx.AsyncClient() as http:
                    assert (await http.get(f"{url}/x")).status_code == 200
                assert not waiting.done() and not again.done()
            await waiting  # a became idle first, and gave way
            assert states(pool)["b"] == "loaded"
            await again


@pytest.mark.anyio
async def test_a_model_that_cannot_start_says_why_and_is_not_tried_again_at_once(tmp_path: Path) -> None:
    bad = Fake("bad", tmp_path, problem="config.json: no such layer")
    async with running(pool_of(bad)) as pool:
        for _ in range(3):
            with pytest.raises(
                ApiError, match=r"bad could not be started: config.json: no such layer"
            ) as error:
                await used(pool, "bad")
            assert error.value.status == 503 and error.value.code == "model_failed"
            assert error.value.retry_after
        assert bad.starts == 1 and states(pool) == {"bad": "failed"}
        bad.problem = ""
        await pool.load(pool.models["bad"], "admin")  # an admin need not wait
        await used(pool, "bad")
        assert bad.starts == 2


@pytest.mark.parametrize(("took", "stay"), [(1.0, 10.0), (5.0, 20.0), (100.0, 60.0)])
def test_slow_loads_do_not_make_others_wait_for_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, took: float, stay: float
) -> None:
    monkeypatch.setattr(pool_module, "_LEAST_LOADED", 10.0)
    monkeypatch.setattr(pool_module, "_LEAST_LOADS", 4.0)
    pool = pool_of(Fake("a", tmp_path), wait=600.0)
    model = pool.models["a"]
    model.loaded, model.took = 1000.0, took
    assert pool._least(model) - model.loaded == stay


@pytest.mark.anyio
async def test_a_cancelled_wait_loads_nothing(tmp_path: Path) -> None:
    async with running(pool_of(*(Fake(name, tmp_path) for name in "abc"))) as pool:
        a, b, c = pool.models.values()
        async with pool.use(a, "x"), pool.use(b, "x"):
            waiting = asyncio.create_task(used(pool, "c"))
            await until(lambda: pool.waiting)
            waiting.cancel()
            await asyncio.wait({waiting})
            assert not pool.waiting and not a.closing and not b.closing
        await asyncio.sleep(0.05)
        assert c.sized.starts == 0  # type: ignore[attr-defined]


@pytest.mark.anyio
async def test_a_turn_that_comes_as_the_wait_ends_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, loop = pool_of(Fake("a", tmp_path)), asyncio.get_running_loop()
    (model,) = pool.models.values()
    model.state = "loading"
    waiting = asyncio.create_task(pool._wait_for(model, ""))
    await until(lambda: pool.waiting)
    model.state = "loaded"
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now + 2 * pool.config.wait)
    loop.call_soon(pool._wake)  # in the round in which the timer is due
    await waiting
    assert model.users == 1


@pytest.mark.anyio
async def test_clients_take_turns_in_loading(tmp_path: Path) -> None:
    fakes = [Fake(name, tmp_path) for name in "abcdz"]
    order: list[str] = []

    async def ask(pool: Pool, name: str, client: str) -> None:
        await used(pool, name, client)
        order.append(name)

    async with running(pool_of(*fakes, limit=1)) as pool:
        first = [asyncio.create_task(ask(pool, name, "greedy")) for name in "abcd"]
        await asyncio.sleep(0)
        await asyncio.gather(*first, ask(pool, "z", "other"))
    assert order.index("z") <= 1, order


@pytest.mark.anyio
async def test_the_greediest_client_gives_way_where_too_many_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "MOST_WAITING", 3)
    async with running(pool_of(Fake("a", tmp_path, delay=0.3))) as pool:
        greedy = [asyncio.create_task(used(pool, "a", "greedy")) for _ in range(3)]
        await until(lambda: pool.waiting == 3)
        await used(pool, "a", "other")
        ended = await asyncio.gather(*greedy, return_exceptions=True)
        assert [isinstance(each, ApiError) and each.status == 429 for each in ended] == [False, False, True]


@pytest.mark.anyio
async def test_idle_models_are_unloaded_as_their_clients_wish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_LOOK", 0.05)
    async with running(pool_of(Fake("a", tmp_path), Fake("b", tmp_path))) as pool:
        a, b = pool.models.values()
        await used(pool, "b", "other")
        for model in (a, b):
            async with pool.use(model, "me", keep=0.0):
                pass
        await until(lambda: a.state == "available")
        assert b.state == "loaded"  # the other client keeps it
        pool.unload(b)
        await until(lambda: b.state == "available")
        async with pool.use(b, "me"):
            with pytest.raises(ApiError, match="in use"):
                pool.unload(b)


@pytest.mark.anyio
async def test_a_process_that_died_is_replaced_by_the_next_request(tmp_path: Path) -> None:
    async with running(pool_of(fake := Fake("a", tmp_path))) as pool:
        await used(pool, "a")
        pool.broken(pool.models["a"])
        await until(lambda: states(pool)["a"] == "available")
        await used(pool, "a")
        assert fake.starts == 2


# The front.


@dataclass
class Served:
    url: str
    front: Front


@contextmanager
def served(*fakes: Fake, limit: int = 2, idle: float = 600.0, **config: Any) -> Iterator[Served]:
    pool = pool_of(*fakes, limit=limit, idle=idle, drain_timeout=5.0)
    front = Front(ServerConfig(**config), pool)
    server = server_of(create_front(front), front)
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", front)
        finally:
            server._loop.call_soon_threadsafe(server.begin_drain)
            thread.join(20)
            assert not thread.is_alive()


def test_requests_go_to_the_process_of_their_model(tmp_path: Path) -> None:
    with (
        served(Fake("a", tmp_path), Fake("b", tmp_path)) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        for name in ("a", "b", "a:latest"):
            answer = http.post("/v1/chat/completions", json={"model": name}, headers={"X-Request-Id": "mine"})
            assert answer.json()["model"] == name[0] and answer.headers["X-Request-Id"] == "mine"
        assert http.get("/v1/responses/resp_b").json()["model"] == "b"  # asks each of them
        assert http.get("/v1/responses/resp_x").status_code == 404
        wrong = http.post("/v1/chat/completions", json={"model": "c"})
        assert wrong.status_code == 404 and "expected one of 'a', 'b'" in wrong.text
        assert (
            http.post("/v1/chat/completions", json={}).json()["error"]["code"] == "missing_required_parameter"
        )
        assert "base URL" in http.post("/chat/completions", json={"model": "a"}).text
        listed = http.get("/v1/models").json()["data"]
        assert [(each["id"], each["state"], each["size"]) for each in listed] == [
            ("a", "loaded", 1), ("b", "loaded", 1),
        ]  # fmt: skip
        assert http.get("/v1/models/a").json()["max_model_len"] == 64
        assert 'model_state{model_name="a",state="loaded"} 1.0' in http.get("/metrics").text
        assert http.get("/metrics?model=a").json()["path"] == "/metrics?model=a"
        assert b"<html" in http.get("/").content


def test_a_client_that_leaves_ends_its_request_upstream(tmp_path: Path) -> None:
    with served(Fake("a", tmp_path)) as server:
        body = json.dumps({"model": "a", "slow": True}).encode()
        request = urllib.request.Request(
            f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.readline() == b"data: x\n"
        deadline = time.monotonic() + 20
        while not (tmp_path / "a.left").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        while server.front.pool.models["a"].users:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@contextmanager
def streaming(server: Served, path: str = "/v1/completions") -> Iterator[httpx.Response]:
    """An answer of model `a` that has begun and does not end by itself."""
    body = {"model": "a", "slow": True}
    with httpx.stream("POST", f"{server.url}{path}", json=body, timeout=20) as answer:
        while not server.front.pool.models["a"].users:
            time.sleep(0.01)
        yield answer


def kill(server: Served) -> None:
    process = server.front.pool.models["a"].server
    assert process is not None
    os.kill(process.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while server.front.pool.models["a"].server is process:  # until then it may take, and lose, a request
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_killed_amid_a_stream_is_an_error_event(tmp_path: Path) -> None:
    fake = Fake("a", tmp_path)
    with served(fake) as server, httpx.Client(base_url=server.url, timeout=20) as http:
        with streaming(server) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "data: x"
            kill(server)
            (event,) = [line for line in lines if "error" in line]
        assert "process ended" in json.loads(event.removeprefix("data: "))["error"]["message"]
        assert http.post("/v1/completions", json={"model": "a"}).status_code == 200
        kill(server)  # while idle
        assert http.post("/v1/completions", json={"model": "a"}).status_code == 200
        assert fake.starts == 3


def test_a_process_killed_amid_a_stream_of_lines_is_an_error_line(tmp_path: Path) -> None:
    """Each line is a document, as Ollama's clients read them."""
    with served(Fake("a", tmp_path)) as server:
        with streaming(server, "/api/chat") as answer:
            lines = answer.iter_lines()
            assert next(lines) == "{}"
            kill(server)
            *_, last = map(json.loads, lines)
        assert last == {"error": "the model's process ended"}


def test_a_model_that_streams_is_neither_unloaded_nor_listed_as_expired(tmp_path: Path) -> None:
    with served(Fake("a", tmp_path)) as server, streaming(server):
        refused = httpx.post(f"{server.url}/models/unload", json={"model": "a"})
        assert refused.status_code == 409 and refused.json()["error"]["code"] == "model_in_use"
        (listed,) = httpx.get(f"{server.url}/api/ps").json()["models"]
        assert datetime.fromisoformat(listed["expires_at"]) > datetime.now(UTC) + timedelta(seconds=500)


@pytest.mark.slow
def test_a_model_of_two_ranks_answers_as_one_of_one(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text('[one]\nmodel = "mite"\n[two]\nmodel = "mite"\ntensor_parallel_size = 2\n')
    models, limit = read_models(file, Given({"kv_cache_memory": 10**8}, {}), "8GB")
    body = {"prompt": "import os\n", "max_tokens": 8, "temperature": 0.0}
    with (
        served(*cast("list[Fake]", models), limit=limit) as server,
        httpx.Client(base_url=server.url, timeout=200) as http,
    ):
        texts = [http.post("/v1/completions", json={"model": name, **body}) for name in ("one", "two")]
        one, two = (each.raise_for_status().json()["choices"][0]["text"] for each in texts)
        assert one == two
        process = server.front.pool.models["two"].server
        assert process is not None
        ranks = [each for each in Path("/proc").glob("[0-9]*") if in_group(each, process.process.pid)]
        assert len(ranks) >= 2
    deadline = time.monotonic() + 60
    while left := [each for each in ranks if in_group(each, process.process.pid)]:
        assert time.monotonic() < deadline, [(each / "cmdline").read_text() for each in left]
        time.sleep(0.02)


def in_group(process: Path, group: int) -> bool:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[2]) == group
    except OSError:
        return False


# A front as a process of its own, by a program that serves one fake model.
FRONT = """
import asyncio, pathlib, sys
from tests.server.test_pool import Fake, Front, ServerConfig, create_front, listen, pool_of, server_of
front = Front(ServerConfig(), pool_of(Fake("a", pathlib.Path(sys.argv[1])), drain_timeout=1.0))
with listen("127.0.0.1", 0) as listener:
    print(listener.getsockname()[1], flush=True)
    asyncio.run(server_of(create_front(front), front).serve([listener]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_model_outlives_its_front(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", FRONT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as front:
        assert front.stdout is not None
        url = f"http://127.0.0.1:{front.stdout.readline().strip()}/v1/completions"
        body = {"model": "a", "slow": True}
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "data: x"
            (started,) = [int(each.suffix[1:]) for each in tmp_path.glob("a.*")]
            front.send_signal(number)
            if number == signal.SIGTERM:  # the stream, which does not end by itself, has its drain time
                refused = until_refused(url)
                assert refused is None or refused.status_code == 503
                assert sum("error" in line for line in lines) == 1
        assert front.wait(20) in (0, 1) if number == signal.SIGTERM else front.wait(20) == -number
    deadline = time.monotonic() + 20
    while running_as(started):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def until_refused(url: str) -> httpx.Response | None:
    """The first answer that is no success; None if the port is closed."""
    while True:
        try:
            answer = httpx.post(url, json={"model": "a"}, timeout=20)
        except httpx.TransportError:
            return None
        if not answer.is_success:
            return answer
        time.sleep(0.02)


def running_as(pid: int) -> bool:
    """Whether that process runs, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_lost_process_is_an_error_of_its_request_alone(tmp_path: Path) -> None:
    with served(Fake("a", tmp_path)) as server, httpx.Client(base_url=server.url, timeout=20) as http:
        lost = http.post("/v1/completions", json={"model": "a", "die": True})
        assert lost.status_code == 503
        assert lost.json()["error"]["message"] == "model: a: its process ended"  # and no address of it
        assert lost.headers["Retry-After"] == "1"  # another process may answer; this request may end it, too
        deadline = time.monotonic() + 60
        while states(server.front.pool)["a"] != "available":  # until then it may take, and lose, another
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert http.post("/v1/completions", json={"model": "a"}).status_code == 200


def test_only_admins_load_and_unload(tmp_path: Path) -> None:
    keys = {"keys": KeyRing(["me:k1"]), "admin_keys": KeyRing(["root:k2"])}
    with served(Fake("a", tmp_path), **keys) as server, httpx.Client(base_url=server.url, timeout=20) as http:
        me, root = ({"Authorization": f"Bearer {key}"} for key in ("k1", "k2"))
        assert http.get("/v1/models").status_code == 401
        assert http.post("/models/load", json={"model": "a"}, headers=me).status_code == 403
        assert http.post("/models/load", json={"model": "a"}, headers=root).json()["state"] == "loaded"
        answer = http.post("/v1/completions", json={"model": "a"}, headers=me)
        assert answer.json()["key"] == "Bearer k1"  # so that the model's server knows its clients
        unloaded = http.post("/models/unload", json={"model": "a"}, headers=root)
        assert unloaded.status_code == 200 and server.front.pool.unloads == 1


def test_watching_neither_loads_nor_keeps_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_LOOK", 0.05)
    fakes = [Fake(name, tmp_path) for name in "ab"]
    with served(*fakes) as server, httpx.Client(base_url=server.url, timeout=20) as http:
        for path in ("/dashboard/data", "/dashboard/data?model=b", "/metrics?model=a"):
            answer = http.get(path)
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_loaded"
        http.post("/v1/completions", json={"model": "a"})
        assert http.get("/dashboard/data").json()["model"] == "a"
        server.front.pool.models["a"].keep.clear()  # as if it had been idle for as long as that
        deadline = time.monotonic() + 60
        while http.get("/dashboard/data").status_code == 200:  # as an open page asks
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert server.front.pool.loads == server.front.pool.unloads == 1


def test_numbers_of_every_key_are_for_admins(tmp_path: Path) -> None:
    keys = {"keys": KeyRing(["me:k1"]), "admin_keys": KeyRing(["root:k2"])}
    with served(Fake("a", tmp_path), **keys) as server, httpx.Client(base_url=server.url, timeout=20) as http:
        me, root = ({"Authorization": f"Bearer {key}"} for key in ("k1", "k2"))
        http.post("/v1/completions", json={"model": "a"}, headers=me)
        proxied = {"X-Forwarded-For": "203.0.113.9"}
        assert "203.0.113.9" in http.get("/metrics?model=a", headers=proxied).json()["far"]
        assert http.get("/metrics?model=a", headers=root | proxied).json()["far"] is None
        assert http.get("/metrics?model=a").json()["far"] is None  # from this machine
        assert http.get("/dashboard/data", headers=me).json()["far"]


def test_an_admin_key_alone_leaves_the_models_open(tmp_path: Path) -> None:
    with (
        served(Fake("a", tmp_path), admin_keys=KeyRing(["root:k2"])) as server,
        httpx.Client(base_url=server.url, timeout=20) as http,
    ):
        for headers in ({}, {"Authorization": "Bearer k2"}, {"Authorization": "Bearer other"}):
            assert http.post("/v1/completions", json={"model": "a"}, headers=headers).status_code == 200


def test_web_pages_of_others_load_nothing(tmp_path: Path) -> None:
    with served(Fake("a", tmp_path)) as server, httpx.Client(base_url=server.url) as http:
        for path in ("/models/load", "/models/unload", "/api/pull", "/v1/completions", "/api/chat"):
            headers = {"Content-Type": "text/plain", "Origin": "https://evil.example"}
            answer = http.post(path, content=b'{"model": "a"}', headers=headers)
            assert answer.status_code == 400 and "expected 'application/json'" in answer.text
        assert server.front.pool.loads == 0


def test_ollama_clients_see_all_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_LOOK", 0.05)
    fakes = [Fake(name, tmp_path) for name in "ab"]
    with served(*fakes) as server, httpx.Client(base_url=f"{server.url}/api", timeout=20) as http:
        assert [each["name"] for each in http.get("/tags").json()["models"]] == ["a", "b"]
        assert http.get("/tags").json()["models"][0]["details"]["format"] == "gguf"
        assert http.get("/ps").json() == {"models": []}
        shown = http.post("/show", json={"name": "b:latest"}).json()
        assert shown["model_info"]["tiny.context_length"] == 64 and shown["capabilities"] == ["completion"]
        assert http.post("/pull", json={"model": "c"}).json()["error"].endswith("expected one of 'a', 'b'")
        assert http.post("/chat", json={"model": "a", "keep_alive": "1h"}).json()["model"] == "a"
        (kept,) = http.get("/ps").json()["models"]
        left = datetime.fromisoformat(kept["expires_at"]) - datetime.now(UTC)
        assert kept["name"] == "a" and 3500 < left.total_seconds() <= 3600
        assert http.post("/chat", json={"model": "a", "keep_alive": 0}).status_code == 200
        deadline = time.monotonic() + 20
        while http.get("/ps").json()["models"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
