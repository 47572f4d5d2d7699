"""Access control: host names, keys, spending, cached prompts."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from farthing.cost.prices import Hardware, Machine
from farthing.server.access import _host_name, allowed_hosts, is_near
from farthing.server.config import KeyRing, ServerConfig
from farthing.server.jobs import Accounts
from tests.server.harness import Running, ScriptedEngine, running, tiny_engine, until

KEYS = KeyRing(["alice:sk-a", "bob:sk-b"])
ADMIN, SCRAPER = KeyRing(["root:sk-root"]), KeyRing(["prom:sk-prom"])
PROXIED = {"X-Forwarded-For": "203.0.113.9"}  # as sent by a proxy on this machine


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def complete(server: Running, key: str, prompt: str = "the same long prompt twice", **fields: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": 4, "ignore_eos": True} | fields
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=bearer(key))
    assert answer.status_code == 200, answer.text
    return answer.json()


def cached(document: Any) -> int:
    return int(document["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_cached_prompts_are_private_to_their_key() -> None:
    with running(tiny_engine(), keys=KEYS) as server:
        assert cached(complete(server, "sk-a")) == 0
        assert cached(complete(server, "sk-b")) == 0
        assert cached(complete(server, "sk-a")) > 0
        for salt in ("5:alice", "alice", "a"):  # no salt gives access to another key's prompts
            assert cached(complete(server, "sk-b", cache_salt=salt)) == 0


def test_the_prefix_cache_can_be_shared() -> None:
    with running(tiny_engine(), keys=KEYS, share_prefix_cache=True) as server:
        assert cached(complete(server, "sk-a")) == 0
        assert cached(complete(server, "sk-b")) > 0
        assert cached(complete(server, "sk-b", cache_salt="mine")) == 0


@given(st.text(), st.text(), st.text(), st.text())
def test_salts_of_two_keys_are_never_equal(a: str, b: str, mine: str, yours: str) -> None:
    def salt(client: str, own: str) -> str:
        return f"{len(client)}:{client}{own}"

    assert a == b or salt(a, mine) != salt(b, yours)


def priced(server: Running) -> None:
    hardware = Hardware(name="box", kind="cpu", usd_per_hour=1, watts=10, idle_watts=5)
    machine = Machine(hardware, 2, declared="2026-01-01")
    assert server.service.engine is not None
    server.service.accounts = Accounts(server.service.engine, machine, "tiny")


def test_spending_is_visible_to_its_key_and_admins() -> None:
    with running(tiny_engine(), keys=KEYS, admin_keys=ADMIN) as server:
        priced(server)
        for key in ("sk-a", "sk-b"):
            complete(server, key)
        until(lambda: len(server.service.accounts.report().accounts) == 2)
        data = f"{server.url}/dashboard/data"
        assert httpx.get(data).status_code == 401

        def document(key: str) -> Any:
            root = bearer("sk-root")
            until(lambda: len(httpx.get(data, headers=root).json().get("cost", {}).get("accounts", ())) == 2)
            return httpx.get(data, headers=bearer(key)).json()

        own = document("sk-a")
        assert [account["api_key"] for account in own["cost"]["accounts"]] == ["alice"]
        assert "bob" not in str(own) and "usd" not in own["counters"] and own["cost"]["idle_usd"] is None
        (spent,) = own["cost"]["accounts"]
        assert own["cost"]["usd"] == pytest.approx(spent["prefill_usd"] + spent["decode_usd"])
        everyone = document("sk-root")
        assert {account["api_key"] for account in everyone["cost"]["accounts"]} == {"alice", "bob"}
        assert everyone["cost"]["usd"] > own["cost"]["usd"]


def test_metrics_show_keys_only_to_this_machine_and_scrapers() -> None:
    with running(tiny_engine(), keys=KEYS, admin_keys=ADMIN) as server:
        priced(server)
        complete(server, "sk-a")
        until(lambda: server.service.accounts.report().accounts)
        url = f"{server.url}/metrics"
        assert 'api_key="alice"' in httpx.get(url).text  # loopback
        far = httpx.get(url, headers=PROXIED)
        assert far.status_code == 200 and "alice" not in far.text
        assert "farthing:generation_tokens_total" in far.text
        assert "alice" not in httpx.get(url, headers=PROXIED | bearer("sk-b")).text
        assert "alice" in httpx.get(url, headers=PROXIED | bearer("sk-root")).text


def test_remote_scrapes_require_the_metrics_key() -> None:
    with running(ScriptedEngine(), keys=KEYS, metrics_keys=SCRAPER) as server:
        url = f"{server.url}/metrics"
        assert httpx.get(url).status_code == 200
        assert httpx.get(url, headers=PROXIED).status_code == 401
        assert httpx.get(url, headers=PROXIED | bearer("sk-a")).status_code == 401
        assert httpx.get(url, headers=PROXIED | bearer("sk-prom")).status_code == 200
        assert httpx.get(f"{server.url}/v1/models", headers=bearer("sk-prom")).status_code == 401


def test_admin_key_may_use_the_api() -> None:
    with running(ScriptedEngine(), keys=KEYS, admin_keys=ADMIN) as server:
        assert server.client("sk-root").models.list().data


def test_keyless_server_requires_a_loopback_host_name() -> None:
    with running(ScriptedEngine()) as server:
        for host in (
            "evil.example",
            f"evil.example:{server.port}",
            "127.0.0.1.evil.example",
            "[2001:db8::1]",
        ):
            answer = httpx.get(f"{server.url}/v1/models", headers={"Host": host})
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"
        for host in (
            "localhost",
            f"localhost:{server.port}",
            "127.0.0.1",
            "LOCALHOST",
            "[::1]:80",
            "a.localhost",
        ):
            assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == 200


def test_allowed_hosts() -> None:
    with running(ScriptedEngine(), allowed_hosts=("*.example.org",)) as server:
        for host, status in (("api.example.org", 200), ("localhost", 403), ("example.org", 403)):
            assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == status
    assert allowed_hosts(ServerConfig(allowed_hosts=("*",))) is None
    assert allowed_hosts(ServerConfig(keys=KEYS)) is None
    assert allowed_hosts(ServerConfig(host="0.0.0.0", insecure=True)) is None


@given(st.binary(max_size=40))
def test_any_host_header_is_parsed(host: bytes) -> None:
    assert isinstance(_host_name(host.decode("latin-1")), str)


@pytest.mark.parametrize(
    ("client", "headers", "near"),
    [
        (("127.0.0.1", 1), {}, True),
        (("::1", 1), {}, True),
        (("10.0.0.1", 1), {}, False),
        (("127.0.0.1", 1), {b"x-forwarded-for": b"127.0.0.1"}, False),
        (("127.0.0.1", 1), {b"via": b"1.1 proxy"}, False),
        (None, {}, False),
        (("testclient", 1), {}, False),
    ],
)
def test_local_requests_are_recognized(client: Any, headers: dict[bytes, bytes], near: bool) -> None:
    assert is_near({"client": client}, headers) is near


def test_web_pages_need_cors_permission() -> None:
    origin = {"Origin": "https://page.example"}
    ask = origin | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    with running(ScriptedEngine()) as server:
        answer = httpx.get(f"{server.url}/v1/models", headers=origin)
        assert "access-control-allow-origin" not in answer.headers
        assert httpx.options(f"{server.url}/v1/models", headers=ask).status_code == 405
    with running(ScriptedEngine(), keys=KEYS, allowed_origins=("https://page.example",)) as server:
        preflight = httpx.options(f"{server.url}/v1/completions", headers=ask)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        other = httpx.get(
            f"{server.url}/v1/models", headers={"Origin": "https://other.example"} | bearer("sk-a")
        )
        assert "access-control-allow-origin" not in other.headers


# As browsers write them (sorted, in lower case) for requests of openai 6.49 and @anthropic-ai/sdk 1.14.
STAINLESS = (
    "x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
    "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version"
)
OPENAI = f"authorization,content-type,openai-organization,openai-project,user-agent,{STAINLESS}"
ANTHROPIC = (
    "anthropic-beta,anthropic-dangerous-direct-browser-access,anthropic-version,content-type,user-agent,"
    f"x-api-key,x-stainless-helper-method,{STAINLESS},x-stainless-timeout"
)


@pytest.mark.parametrize(
    ("method", "path", "names"),
    [
        ("POST", "/v1/chat/completions", OPENAI),
        ("DELETE", "/v1/responses/resp_1", OPENAI.replace("content-type,", "")),
        ("GET", "/v1/models", OPENAI.replace("content-type,", "")),
        ("POST", "/v1/messages", ANTHROPIC),
    ],
)
def test_preflights_of_the_official_sdks_are_granted(method: str, path: str, names: str) -> None:
    ask = {
        "Origin": "https://page.example",
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": names,
    }
    with running(ScriptedEngine(), keys=KEYS, allowed_origins=("https://page.example",)) as server:
        granted = httpx.options(f"{server.url}{path}", headers=ask)
        assert granted.status_code == 200, granted.text
        assert granted.headers["access-control-allow-origin"] == "https://page.example"
        allowed = {
            name.strip().lower() for name in granted.headers["access-control-allow-headers"].split(",")
        }
        assert set(names.split(",")) <= allowed
        assert method in granted.headers["access-control-allow-methods"].split(", ")
        other = httpx.options(f"{server.url}{path}", headers=ask | {"Origin": "https://other.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


def test_pages_read_errors_and_their_headers() -> None:
    """SDKs read the request's id, and when to retry."""
    origin = {"Origin": "https://page.example"}
    with running(
        ScriptedEngine(), keys=KEYS, requests_per_minute=1, allowed_origins=("https://page.example",)
    ) as server:
        refused = httpx.get(f"{server.url}/v1/models", headers=origin)
        body = {"prompt": "x"}
        url = f"{server.url}/v1/completions"
        answers = [httpx.post(url, json=body, headers=origin | bearer("sk-a")) for _ in range(2)]
        assert [refused.status_code, *(answer.status_code for answer in answers)] == [401, 200, 429]
        for answer in (refused, *answers):
            assert answer.headers["access-control-allow-origin"] == "https://page.example"
            assert answer.headers["access-control-expose-headers"] == "*" and "x-request-id" in answer.headers
        assert "retry-after" in answers[1].headers


@pytest.mark.parametrize("path", ["/", "/health", "/ready"])
def test_head_is_get_without_a_body(path: str) -> None:
    with running(ScriptedEngine()) as server:
        head, get = httpx.head(server.url + path), httpx.get(server.url + path)
        assert head.status_code == get.status_code == 200
        assert head.headers["content-length"] == get.headers["content-length"] and not head.content


def test_document_is_written_once_and_not_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    write = FastAPI.openapi

    def openapi(self: FastAPI) -> dict[str, Any]:
        threads.append(threading.current_thread().name)
        return write(self)

    monkeypatch.setattr(FastAPI, "openapi", openapi)
    with running(ScriptedEngine(), root_path="/llm") as server:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: httpx.get(f"{server.url}/openapi.json"), range(16)))
        assert len({answer.content for answer in answers}) == 1
        document = answers[0].json()
        assert document["servers"] == [{"url": "/llm"}] and "/v1/chat/completions" in document["paths"]
        assert len(threads) == 1 and threads[0] != server.thread.name
