"""`farthing fleet up` end to end: keys, a request, Ctrl-C, and the error if replicas cannot start."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import sys
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from farthing_fleet import up
from farthing_fleet.cli import UpOptions, _up
from farthing_fleet.config import load, local_fleet
from farthing_fleet.up import serve_command
from tests.fleet.doubles import replica as double
from tests.fleet.doubles.services import free_port


async def start(tmp_path: Path, port: int, *more: str, replica: str = "") -> asyncio.subprocess.Process:
    command = f"{sys.executable} {double.__file__} --port {{port}} {replica}"
    options = (
        "--command",
        command,
        "--health-path",
        "/health",
        "--port",
        str(port),
        "--metrics",
        "127.0.0.1:0",
    )
    words = ("-m", "farthing.cli.app", "fleet", "up", *options, "--state", str(tmp_path / "state"), *more)
    return await asyncio.create_subprocess_exec(sys.executable, *words, stderr=asyncio.subprocess.PIPE)


def children(state: Path) -> list[Path]:
    """/proc entries of processes started for this state directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(state).encode() in (entry / "cmdline").read_bytes():
                found.append(entry)
        except OSError:
            continue
    return found


@pytest.mark.anyio
async def test_up_serves_with_keys_and_exits_cleanly(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("# who may ask\nalice:secret\n")
    port = free_port()
    process = await start(tmp_path, port, "--api-key-file", str(tmp_path / "keys.txt"))
    assert process.stderr is not None
    said = []
    while b"ready\n" not in said:
        line = await process.stderr.readline()
        assert line, said
        said.append(line)
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    async with aiohttp.ClientSession() as session:
        async with session.post(url, json={"messages": []}) as answer:
            assert answer.status == 401
        headers = {"authorization": "Bearer secret"}
        async with session.post(url, json={"messages": []}, headers=headers) as answer:
            assert answer.status == 200
    process.terminate()
    rest = await process.stderr.read()
    assert await process.wait() == 0, rest
    assert children(tmp_path / "state") == []


@pytest.mark.anyio
async def test_up_reports_why_no_replica_started(tmp_path: Path) -> None:
    process = await start(tmp_path, free_port(), replica="--die-at-start")
    _, said = await process.communicate()
    assert process.returncode == 1
    assert b"no replica became ready" in said
    assert b"told to die at start" in said
    assert children(tmp_path / "state") == []


@pytest.mark.anyio
async def test_up_launches_an_unknown_model_once(tmp_path: Path) -> None:
    options = ("--port", str(free_port()), "--metrics", "127.0.0.1:0", "--state", str(tmp_path))
    words = ("-m", "farthing", "fleet", "up", "unknown", *options)
    process = await asyncio.create_subprocess_exec(sys.executable, *words, stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    assert process.returncode == 1
    assert b"unknown: no replica became ready: r1: ended with 2 " in said
    assert b"got 'unknown'; expected " in said
    assert not (tmp_path / "replicas" / "r2.log").exists()


@pytest.mark.anyio
async def test_up_rejects_a_port_in_use(tmp_path: Path) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    process = await start(tmp_path, port)
    _, said = await process.communicate()
    server.close()
    assert process.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}".encode() in said


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.anyio
async def test_keys_are_separate_tenants_behind_the_gateway(tmp_path: Path) -> None:
    """Replicas that know no keys shared the prefix cache and the stored responses of all clients."""
    (tmp_path / "keys.txt").write_text("alice:secret-a\nbob:secret-b\n")
    port = free_port()
    options = ("--port", str(port), "--metrics", "127.0.0.1:0", "--max-replicas", "1", "--no-standby")
    options += ("--api-key-file", str(tmp_path / "keys.txt"), "--state", str(tmp_path / "state"))
    words = ("-m", "farthing.cli.app", "fleet", "up", "mite", *options)
    process = await asyncio.create_subprocess_exec(sys.executable, *words, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    while line := await process.stderr.readline():
        if line == b"ready\n":
            break
    alice, bob = {"authorization": "Bearer secret-a"}, {"x-api-key": "secret-b"}
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:

        async def cached(key: dict[str, str]) -> int:
            body = {"prompt": "the same prompt " * 20, "max_tokens": 1}
            async with session.post("/v1/completions", json=body, headers=key) as answer:
                usage = (await answer.json())["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert await cached(alice) == 0 and await cached(bob) == 0
        assert await cached(alice) > 0
        body = {"input": "private", "max_output_tokens": 16}
        async with session.post("/v1/responses", json=body, headers=alice) as answer:
            path = f"/v1/responses/{(await answer.json())['id']}"
        for method in ("GET", "DELETE"):
            async with session.request(method, path, headers=bob) as answer:
                assert answer.status == 404
        async with session.get(path, headers=alice) as answer:
            assert answer.status == 200
    process.terminate()
    await process.communicate()
    assert process.returncode == 0


def test_replicas_get_the_key_file() -> None:
    command = serve_command("mite", ("--seed", "1"), Path("keys.txt"))
    assert command[-4:] == ("--api-key-file", "keys.txt", "--seed", "1")
    assert "--api-key-file" not in serve_command("mite")


def test_options_take_precedence_over_the_file_which_does_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("policy: {capacity: 3, max_replicas: 8}\nstate: there\nmetrics: 0.0.0.0:9500\n")
    given = UpOptions(min_replicas=0, config=file)
    fleet = local_fleet(
        file, given.policy, metrics_names="auto", state=given.state, metrics=given.metrics, advise=False
    )
    assert (fleet.policy.min_replicas, fleet.policy.max_replicas, fleet.policy.capacity) == (0, 8, 3)
    assert (fleet.state, fleet.metrics) == (Path("there"), "0.0.0.0:9500")
    alone = local_fleet(None, UpOptions().policy, metrics_names="auto", state=tmp_path)
    assert (alone.policy.min_replicas, alone.policy.max_replicas, alone.policy.capacity) == (1, 2, 1)
    assert (alone.policy.interval_s, alone.state, alone.advise) == (1.0, tmp_path, False)
    file.write_text("policy: {capacity: 3}\ngateway: {max_waiting: 7}\n")
    with pytest.raises(ValueError, match="gateway: unknown field"):  # no command would read it
        load(file)


@pytest.mark.anyio
async def test_what_a_model_has_opened_closes_with_its_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = list[str]()

    async def nothing(*_: object) -> int:
        return 0

    class Part:
        ready, cold_starts, start, scale = (), None, nothing, nothing

        async def close(self) -> None:
            closed.append(type(self).__name__)

    class Source(Part):
        pass

    monkeypatch.setattr(up, "LocalReplicas", lambda *_, **__: Part())
    monkeypatch.setattr(up, "ScrapeSource", lambda *_, **__: Source())
    monkeypatch.setattr(up, "make_controller", lambda *_: None)
    monkeypatch.setattr(up, "make_estimates", lambda _: None)
    monkeypatch.setattr(up, "serve_metrics", nothing)
    fleet = local_fleet(None, UpOptions().policy, metrics_names="auto", state=tmp_path)
    model = up.LocalModel(
        "m", fleet, up.local_config(("x", "{port}"), tmp_path, standby=False), lambda _: None
    )
    async with AsyncExitStack() as stack:
        await model.start("", True, 1, stack)
        assert not closed
    assert closed == ["Source", "Part"]


@pytest.mark.anyio
async def test_a_fleet_that_ends_before_it_is_ready_leaves_nothing_unsaid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its reason is said, and no message follows about a future whose result nobody took."""
    told: list[object] = []

    async def broken(_: object) -> None:
        raise ValueError("no gateway")

    replicas = SimpleNamespace(config=SimpleNamespace(ready_timeout_s=1.0))
    model = SimpleNamespace(metrics_port=1, replicas=replicas, wait_ready=lambda *_: asyncio.sleep(60))
    fleet = SimpleNamespace(url="http://x", models=[model], run=broken)
    monkeypatch.setattr(up, "LocalFleet", lambda _: nullcontext(fleet))
    monkeypatch.setattr("farthing_fleet.run.stop_event", asyncio.Event)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
    with pytest.raises(ValueError, match="no gateway"):
        await _up(None)
    for _ in range(5):
        await asyncio.sleep(0)
    gc.collect()
    assert not told


@pytest.mark.anyio
async def test_up_serves_several_models(tmp_path: Path) -> None:
    port, state = free_port(), tmp_path / "state"
    (tmp_path / "fleet.yaml").write_text(
        "policy: {capacity: 1.0, interval_s: 1.0}\nmodels: {second: {min_replicas: 2, max_replicas: 2}}\n"
    )
    options = ("some/first", "second", "--config", str(tmp_path / "fleet.yaml"))
    process = await start(tmp_path, port, *options, replica="--model {served} --name {name}")
    assert process.stderr is not None
    said = b""
    while not said.endswith(b"ready\n"):
        line = await process.stderr.readline()
        assert line, said
        said += line
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        async with asyncio.timeout(60):
            while len((await (await session.get("/fleet/replicas")).json())["replicas"]) < 3:
                await asyncio.sleep(0.05)
        for model in ("first", "second"):
            request = {"model": model, "messages": []}
            async with session.post("/v1/chat/completions", json=request) as answer:
                assert answer.status == 200
                assert answer.headers["x-farthing-replica"].startswith(f"{model}-")
        async with session.post("/v1/chat/completions", json={"model": "x", "messages": []}) as answer:
            assert answer.status == 404
        async with asyncio.timeout(60):  # both controllers decide, and the dashboard shows both
            while True:
                shown = await (await session.get("/dashboard/data")).json()
                if {entry["reason"].partition(":")[0] for entry in shown["decisions"]} == {"first", "second"}:
                    break
                await asyncio.sleep(0.05)
    process.terminate()
    rest = await process.stderr.read()
    assert await process.wait() == 0, rest
    assert (state / "first" / "decisions.jsonl").exists() and (state / "second" / "decisions.jsonl").exists()
    assert children(state) == []


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("third: {capacity: 1}", "models: got 'third'; expected names of 'first', 'second'"),
        ("first: {capacity: -1}", "models.first: policy.capacity: got -1"),
        ("first: {interval_s: 0.01}", "models.first: policy.interval_s: got 0.01"),
        ("first: {speed: 1}", "models.first: "),
    ],
)
@pytest.mark.anyio
async def test_up_rejects_invalid_models(tmp_path: Path, models: str, message: str) -> None:
    (tmp_path / "fleet.yaml").write_text(f"policy: {{capacity: 1.0}}\nmodels: {{{models}}}\n")
    options = ("first", "second", "--config", str(tmp_path / "fleet.yaml"))
    process = await start(tmp_path, free_port(), *options)
    _, said = await process.communicate()
    assert process.returncode == 2
    assert message in said.decode()


@pytest.mark.anyio
async def test_a_gateway_returns_though_the_machine_had_no_room_for_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error of a restart is its last: without a gateway the fleet serves nobody, and says nothing."""
    launched: list[asyncio.subprocess.Process] = []
    refused = [False, True, True]

    async def launch(*_: Any, **__: Any) -> asyncio.subprocess.Process:
        if refused and refused.pop(0):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        launched.append(await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True))
        return launched[-1]

    monkeypatch.setattr(up, "launch", launch)
    monkeypatch.setattr(up, "_GATEWAY_PAUSE_S", 0.01)
    with up.listen("127.0.0.1", 0) as sock:
        gateway = up.GatewayProcess(sock, (), tmp_path / "gateway.log")
        await gateway.start()
        launched[0].kill()
        async with asyncio.timeout(10):
            while len(launched) < 2:
                await asyncio.sleep(0.01)
        assert launched[1].returncode is None and not gateway.failed.is_set()
        await gateway.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("raise ModuleNotFoundError('absent', name='aiohttp')", "'aiohttp' is not installed: pip install "),
        ("import os\nos.write(2, b'broken\\n')\nos._exit(7)", "exited with 7; last lines: broken"),
    ],
)
async def test_a_gateway_that_cannot_start_ends_the_command(tmp_path: Path, module: str, told: str) -> None:
    """It was restarted for ever, and the command looked as if it served."""
    (tmp_path / "modules" / "aiohttp").mkdir(parents=True)
    (tmp_path / "modules" / "aiohttp" / "__init__.py").write_text(module)
    options = ("--command", "sleep 60 {port}", "--port", str(free_port()), "--metrics", "127.0.0.1:0")
    words = ("-m", "farthing.cli.app", "fleet", "up", *options, "--state", str(tmp_path / "state"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "modules")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, stderr=asyncio.subprocess.PIPE, env=environment
    )
    _, said = await asyncio.wait_for(process.communicate(), 120)
    last = said.decode().strip().splitlines()[-1]
    assert process.returncode == 2
    assert last.startswith("farthing fleet: gateway exited with ") and told in last
    assert children(tmp_path / "state") == []
