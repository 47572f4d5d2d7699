"""Costs in responses, totals in /metrics, and dashboard data, over real sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from farthing.engine.constraints import Refused
from farthing.engine.generation import Generation
from farthing.engine.request import EngineStopped, QueueFull
from farthing.engine.sandbox import workers
from farthing.server import jobs
from farthing.server.config import KeyRing
from farthing.server.errors import ApiError
from farthing.server.jobs import Accounts, machine_of
from farthing.server.quotas import Quotas
from tests.server.harness import Running, ScriptedEngine, events, running, tiny_engine, until

BODY = {"prompt": "def f(", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def priced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    prices = tmp_path_factory.mktemp("prices") / "prices.toml"
    prices.write_text(
        '[hardware.box]\nkind = "cpu"\nunits = "machine"\nusd_per_hour = 36\nwatts = 9\nidle_watts = 3\n'
    )
    engine = tiny_engine()
    with running(engine, keys=KeyRing(["alice:a", "bob:b"]), admin_keys=KeyRing(["root:r"])) as server:
        machine = machine_of(engine.device, str(prices), "box")
        server.service.accounts = Accounts(engine, machine, "tiny")
        yield server


def post(server: Running, key: str = "a", **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/completions", json=BODY | body, headers=headers, timeout=30)


def costs(server: Running, name: str) -> dict[tuple[str, str], float]:
    """(API key, phase) -> value."""
    text = httpx.get(f"{server.url}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    found = families[f"farthing:cost_{name}"].samples
    return {(s.labels["api_key"], s.labels["phase"]): s.value for s in found if s.name.endswith("_total")}


def test_response_includes_cost_only_on_request(priced: Running) -> None:
    assert "x_farthing" not in post(priced).json()["usage"]
    usage = post(priced, x_farthing=True).json()["usage"]
    cost = usage["x_farthing"]
    assert cost["hardware"] == "box" and cost["usd"] > 0 and cost["cpu_seconds"] > 0
    assert cost["usd"] == pytest.approx(cost["prefill"]["usd"] + cost["decode"]["usd"])
    assert cost["decode"]["tokens"] == 8
    assert cost["prefill"]["tokens"] + cost["cached"]["tokens"] == usage["prompt_tokens"]
    assert cost["usd_with_idle"] >= cost["usd"]


def test_stream_includes_cost_in_its_last_chunk(priced: Running) -> None:
    options = {"include_usage": True}
    chunks = events(post(priced, stream=True, stream_options=options, x_farthing=True).text)
    assert chunks[-1] == "[DONE]" and chunks[-2]["usage"]["x_farthing"]["usd"] > 0


def test_several_prompts_are_added_up(priced: Running) -> None:
    cost = post(priced, prompt=["a b c", "d e f", "g h i"], x_farthing=True).json()["usage"]["x_farthing"]
    assert cost["decode"]["tokens"] == 24


def test_keys_have_separate_accounts_that_add_up(priced: Running) -> None:
    before = costs(priced, "tokens")
    post(priced, key="b")
    after = costs(priced, "tokens")
    assert after["bob", "decode"] - before.get(("bob", "decode"), 0) == 8
    assert after["alice", "decode"] == before["alice", "decode"]
    accounts = priced.service.accounts
    assert accounts is not None
    report = accounts.report()
    parts = report.requests.spend.usd + report.idle.usd + report.pending.usd
    assert parts == pytest.approx(report.total.usd)
    assert report.total.usd == pytest.approx(report.total.seconds * 0.01)
    assert costs(priced, "usd")["", "idle"] > 0


def test_disconnected_client_is_charged_for_generated_tokens(priced: Running) -> None:
    def charged() -> float:
        return costs(priced, "tokens").get(("bob", "decode"), 0)

    before, headers = charged(), {"Authorization": "Bearer b"}
    body = BODY | {"stream": True, "max_tokens": 1500}
    with httpx.stream("POST", f"{priced.url}/v1/completions", json=body, headers=headers) as answer:
        next(answer.iter_lines())
    until(lambda: charged() > before)


def test_dashboard_shows_the_same_costs(priced: Running) -> None:
    assert httpx.get(f"{priced.url}/").status_code == 200
    url = f"{priced.url}/dashboard/data"
    assert httpx.get(url).status_code == 401
    post(priced)
    time.sleep(1.2)
    data = httpx.get(url, headers={"Authorization": "Bearer r"}).json()
    assert data["title"] == "tiny" and data["cost"]["hardware"].endswith("box")
    assert {account["api_key"] for account in data["cost"]["accounts"]} >= {"alice"}
    assert data["counters"]["usd"] > 0 and "1" in data["experts"]


def test_loading_server_is_shown_as_loading() -> None:
    with running(None) as server:
        data = httpx.get(f"{server.url}/dashboard/data").json()
    assert data["facts"]["state"] == "the model is being loaded" and data["counters"] == {}


def test_error_for_unknown_hardware_names_it(tmp_path: Path) -> None:
    import torch

    with pytest.raises(ValueError, match="hardware: got 'abacus'"):
        machine_of(torch.device("cpu"), None, "abacus")


@pytest.mark.parametrize(("error", "status"), [(Refused, 400), (ValueError, 500)])
def test_failed_request_is_charged_and_leaves_nothing_pending(
    priced: Running, error: type[Exception], status: int
) -> None:
    core, real = priced.service.engine._core, Generation.push
    pushed = 0

    def push(self: Generation, token: int, logprobs: Any) -> bool:
        nonlocal pushed
        pushed += 1
        if pushed == 3:
            raise error("refused")
        return real(self, token, logprobs)

    before = costs(priced, "device_seconds").get(("alice", "decode"), 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generation, "push", push)
        assert post(priced).status_code == status
    assert costs(priced, "device_seconds")[("alice", "decode")] > before
    accounts = priced.service.accounts
    assert accounts is not None
    until(lambda: core.scheduler.idle and accounts.report().pending.seconds < 1e-6)  # the answer comes first


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_refill_evenly() -> None:
    clock = Clock()
    quotas = Quotas(requests_per_minute=2, clock=clock)
    quotas.admit("a", 1)
    quotas.admit("a", 1)
    with pytest.raises(ApiError, match="quota of 2 requests") as refused:
        quotas.admit("a", 1)
    assert (refused.value.status, refused.value.retry_after) == (429, 30)
    quotas.admit("b", 1)  # another client's quota is separate
    clock.now = 30
    quotas.admit("a", 1)


def test_generated_tokens_leave_a_debt() -> None:
    clock = Clock()
    quotas = Quotas(tokens_per_minute=60, clock=clock)
    quotas.admit("a", 10)
    quotas.charge("a", 80)  # 30 in debt
    with pytest.raises(ApiError) as refused:
        quotas.admit("a", 10)
    assert refused.value.retry_after == 40
    clock.now = 40
    quotas.admit("a", 10)


def test_prompt_beyond_the_quota_is_an_error() -> None:
    with pytest.raises(ApiError, match="61 tokens; expected at most the quota of 60") as refused:
        Quotas(tokens_per_minute=60).admit("a", 61)
    assert refused.value.retry_after is None


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 40)), max_size=30),
)
def test_no_client_gets_more_than_its_share(per_minute: int, steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    quotas = Quotas(requests_per_minute=per_minute, tokens_per_minute=1000, clock=clock)
    admitted = 0
    for wait, tokens in steps:
        clock.now += wait
        try:
            quotas.admit("a", tokens)
            admitted += 1
        except ApiError as refused:
            assert refused.retry_after is not None and 1 <= refused.retry_after <= 61
    assert admitted <= per_minute + clock.now * per_minute / 60 + 1e-6


def test_missing_and_wrong_keys() -> None:
    with running(ScriptedEngine(), keys=KeyRing(["alice:sk-1"])) as server:
        for headers in ({}, {"Authorization": "Bearer nope"}):
            answer = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client("nope").models.list()
        assert server.client("sk-1").models.list().data[0].id == "tiny"


def test_quotas_are_per_key() -> None:
    keys = KeyRing(["alice:sk-1", "bob:sk-2"])
    with running(ScriptedEngine(), keys=keys, requests_per_minute=1) as server:
        alice, bob = server.client("sk-1"), server.client("sk-2")
        alice.completions.create(model="tiny", prompt="x")
        with pytest.raises(openai.RateLimitError) as refused:
            alice.completions.create(model="tiny", prompt="x")
        assert refused.value.response.headers["x-error-code"] == "requests_quota_exceeded"
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        bob.completions.create(model="tiny", prompt="x")


def test_token_quota_counts_generated_tokens() -> None:
    with running(ScriptedEngine(["x" * 50]), tokens_per_minute=60) as server:
        client = server.client()
        client.completions.create(model="tiny", prompt="y" * 20)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="tiny", prompt="y" * 20)
        assert refused.value.type == "tokens"


def test_too_large_bodies_declared_or_chunked() -> None:
    with running(ScriptedEngine(), max_body_bytes=1000) as server:
        url = f"{server.url}/v1/completions"
        body = b'{"prompt": "' + b"x" * 2000 + b'"}'
        headers = {"content-type": "application/json"}
        declared = httpx.post(url, content=body, headers=headers)
        chunked = httpx.post(url, content=iter([body[:600], body[600:]]), headers=headers)
        for answer in (declared, chunked):
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"
        assert httpx.post(url, content=b'{"prompt": "x"}', headers=headers).status_code == 200


def test_body_that_never_arrives() -> None:
    with (
        running(ScriptedEngine(), body_timeout=0.2) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
    ):
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        )
        assert b"408" in connection.recv(1000)


def test_queue_full_and_stopped_engine() -> None:
    engine = ScriptedEngine()
    with running(engine) as server:
        engine.error = QueueFull("8 requests wait")
        with pytest.raises(openai.RateLimitError) as full:
            server.client().completions.create(model="tiny", prompt="x")
        assert full.value.response.headers["x-error-code"] == "queue_full"
        assert int(full.value.response.headers["retry-after"]) >= 1
        engine.error = EngineStopped("draining")
        with pytest.raises(openai.InternalServerError) as stopped:
            server.client().completions.create(model="tiny", prompt="x")
        assert stopped.value.status_code == 503
        assert not server.service.jobs


def test_the_real_queue_bound() -> None:
    with running(tiny_engine(max_num_seqs=1, max_queue=1)) as server:
        client = server.client()
        options = {"model": "tiny", "max_tokens": 400, "extra_body": {"ignore_eos": True}, "stream": True}
        running_one = client.completions.create(prompt="x", **options)
        with ThreadPoolExecutor(1) as pool:  # a waiting stream answers with its first token
            waiting = pool.submit(client.completions.create, prompt="x", **options)
            until(lambda: server.service.engine.num_live == 2)
            with pytest.raises(openai.RateLimitError):
                client.completions.create(prompt="x", **options)
            running_one.close()
            waiting.result().close()
        until(lambda: not server.service.jobs and not server.service.engine.num_live)
        assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices


def test_work_is_limited_without_a_running_request() -> None:
    with running(tiny_engine(), work_seconds_per_minute=1) as server:
        sandbox = server.service.engine.sandbox
        assert sandbox is not None
        tokenize = {"prompt": "x"}
        assert httpx.post(f"{server.url}/tokenize", json=tokenize).status_code == 200
        sandbox.here(lambda: burn(1.2), "anonymous").result(30)
        answer = httpx.post(f"{server.url}/tokenize", json=tokenize)
        assert answer.status_code == 429 and answer.headers["x-error-code"] == "work_quota_exceeded"
        assert int(answer.headers["retry-after"]) >= 1


def burn(seconds: float) -> None:
    """Use CPU time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.parametrize("constraint", [{"guided_regex": "[a-z ]*"}, {"bad_words": ["a b c"] * 1000}])
def test_client_that_disconnects_before_its_request_runs_leaves_no_job(
    tiny: Running, constraint: dict[str, Any]
) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1900, "ignore_eos": True, "n": 4} | constraint).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    for _ in range(8):
        with socket.create_connection(("127.0.0.1", int(tiny.url.rsplit(":")[-1])), timeout=10) as connection:
            connection.sendall(head + body)
    assert (
        httpx.post(f"{tiny.url}/tokenize", json={"prompt": "x"}).status_code == 200
    )  # the earlier requests have arrived
    until(
        lambda: not tiny.service.jobs and not tiny.service.engine.num_live and not tiny.service.held.present
    )


def test_grammars_of_clients_that_left_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait are dropped at once; those that run are charged as a debt."""
    monkeypatch.setattr(workers, "_only_idle", lambda pid: None)  # or they end when other tests leave a core
    with running(tiny_engine()) as server:
        assert httpx.post(
            f"{server.url}/v1/completions", json={"prompt": "x", "guided_regex": "a"}, timeout=60
        )
        sandbox = server.service.engine.sandbox  # type: ignore[union-attr]
        assert sandbox is not None
        turns, callers = sandbox._pool.turns, sandbox._in_flight._callers
        with contextlib.ExitStack() as stack:
            for number in range(12):
                pattern = "(x{900}){1000}" + "y" * number  # takes the whole limit of two seconds
                body = json.dumps({"prompt": "x", "max_tokens": 4, "guided_regex": pattern}).encode()
                head = (
                    f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n"
                ).encode()
                connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
                stack.enter_context(connection).sendall(head + body)
            until(lambda: callers.used("anonymous") == 12)
        until(lambda: not callers.used("anonymous"))
        debt = turns._debts
        until(lambda: debt.used("anonymous") > 0 and not turns._running["anonymous"], timeout=60)
        assert all(job.future.cancelled() for job in turns._waiting.get("anonymous", ()))
        assert debt.used("anonymous") < 6  # of at most two jobs
        assert not server.service.jobs


def test_queue_counts_sequences() -> None:
    with running(tiny_engine(max_num_seqs=4, max_queue=12)) as server:
        url = f"{server.url}/v1/completions"
        many = {"prompt": ["x"] * 9, "n": 2}
        refused = httpx.post(url, json=many)
        assert refused.status_code == 400 and "18 sequences; expected at most 16" in refused.text
        client = server.client()
        options = {"model": "tiny", "max_tokens": 400, "extra_body": {"ignore_eos": True}}
        busy = client.completions.create(prompt="x", n=10, stream=True, **options)
        next(iter(busy))
        refused = httpx.post(url, json={"prompt": "x", "n": 7})
        assert refused.status_code == 429 and refused.headers["x-error-code"] == "queue_full"
        assert server.service.engine.queue_room == 6
        busy.close()
        until(lambda: not server.service.held.present and server.service.engine.queue_room == 16)


def test_single_key_cannot_fill_the_queue() -> None:
    keys = KeyRing(["crowd:sk-1", "other:sk-2"])
    with running(tiny_engine(max_num_seqs=2, max_queue=18), keys=keys) as server:
        crowd, other = server.client("sk-1"), server.client("sk-2")
        options = {"model": "tiny", "max_tokens": 400, "extra_body": {"ignore_eos": True}, "stream": True}
        busy = crowd.completions.create(prompt="x", n=10, **options)
        with pytest.raises(openai.RateLimitError, match="free for other keys"):
            crowd.completions.create(prompt="x", n=1, **options)
        answer = other.completions.create(prompt="x", n=5, **(options | {"stream": False, "max_tokens": 2}))
        assert len(answer.choices) == 5
        busy.close()


def test_requests_of_one_key_do_not_delay_another() -> None:
    keys = KeyRing(["crowd:sk-1", "other:sk-2"])
    with running(tiny_engine(max_num_seqs=4, max_queue=1000), keys=keys) as server:
        crowd, other = server.client("sk-1"), server.client("sk-2")
        ignore = {"ignore_eos": True}
        busy = crowd.completions.create(
            model="tiny", prompt="x" * 40, n=32, max_tokens=400, extra_body=ignore, stream=True
        )
        next(iter(busy))
        for _ in range(3):
            before = server.service.engine.stats.steps
            other.completions.create(model="tiny", prompt="y", max_tokens=4, extra_body=ignore)
            # The crowd's answers take 32 x 400 / 4 = 3,200 steps; HTTP itself takes dozens of steps, and
            # tests/engine/test_shares.py counts the engine's own steps.
            assert server.service.engine.stats.steps - before < 320
        busy.close()


@pytest.mark.parametrize("stream", [False, True])
def test_timeout(stream: bool) -> None:
    engine = ScriptedEngine(["x"], step=0.02, forever=True)
    with running(engine, request_timeout=0.3) as server:
        create = server.client().completions.create
        if stream:
            with pytest.raises(openai.APIError, match=r"0\.3 s") as failed:
                for _ in create(model="tiny", prompt="x", stream=True):
                    pass
        else:
            with pytest.raises(openai.APIStatusError, match=r"0\.3 s") as failed:
                create(model="tiny", prompt="x")
            assert failed.value.status_code == 504
        assert failed.value.code == "timeout"
        until(lambda: engine.cancelled and not engine.running)
        assert not server.service.jobs


def test_client_that_reads_nothing_ends_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer would be computed to the end, and held in memory for ten minutes."""
    monkeypatch.setattr(jobs, "UNREAD", 1 << 20)
    engine = ScriptedEngine(["a" * 2000], forever=True)
    body = b'{"prompt": "x", "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(engine) as server, socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        until(lambda: engine.cancelled and not server.service.jobs)
        server.service.engine.script = ["ok"]  # type: ignore[union-attr]
        engine.forever = False
        assert server.client().completions.create(model="tiny", prompt="x").choices[0].text == "ok"


def test_client_that_reads_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "UNREAD", 1 << 20)
    with running(ScriptedEngine(["a" * 2000] * 50, step=0.005)) as server:  # 25 MB by this measure
        stream = server.client().completions.create(model="tiny", prompt="x", stream=True)
        assert sum(len(chunk.choices[0].text) for chunk in stream) == 100_000


def test_client_that_stops_reading_is_closed_at_the_deadline() -> None:
    engine = ScriptedEngine(["x" * 10_000], step=0.0005, forever=True)
    with (
        running(engine, request_timeout=1.0) as server,
        socket.create_connection(("127.0.0.1", server.port)) as connection,
    ):
        body = b'{"prompt": "x", "stream": true}'
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: engine.running)
        until(lambda: engine.cancelled and not server.service.jobs)


def test_context_length() -> None:
    with running(ScriptedEngine(max_model_len=20)) as server:
        for tokens, text in ((30, "x"), (5, "x" * 30)):
            with pytest.raises(openai.BadRequestError, match="at most 20") as refused:
                server.client().completions.create(model="tiny", prompt=text, max_tokens=tokens)
            assert refused.value.code == "context_length_exceeded"


def test_slow_stream_does_not_delay_other_requests() -> None:
    """One slow reader delays no other request."""
    with running(ScriptedEngine(lambda prompt: ["x"] * (40 if "slow" in prompt else 1), step=0.05)) as server:
        client = server.client()
        slow = client.completions.create(model="tiny", prompt="slow", stream=True)
        next(iter(slow))
        client.completions.create(model="tiny", prompt="fast")
        assert server.service.jobs  # the slow one still runs
        slow.close()


def test_work_before_a_request_is_charged_by_cpu_time() -> None:
    clock = Clock()
    quotas = Quotas(work_seconds_per_minute=6, clock=clock)
    quotas.admit_work("a", 4.0)
    quotas.admit_work("a", 6.0)
    with pytest.raises(ApiError, match="quota of 6 CPU seconds") as refused:
        quotas.admit_work("a", 9.0)
    assert (refused.value.status, refused.value.retry_after) == (429, 30)
    quotas.admit_work("b", 1.0)
    clock.now = 30.0
    quotas.admit_work("a", 9.0)
