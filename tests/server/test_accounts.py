"""Costs in responses, totals in /metrics, and dashboard data, over real sockets."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from farthing.engine.generation import Generation
from farthing.server.accounts import Accounts, machine_of
from farthing.server.auth import KeyRing
from tests.server.harness import Running, events, running, tiny_engine, until

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


def test_failed_request_is_charged_and_leaves_nothing_pending(priced: Running) -> None:
    core, real = priced.service.engine._core, Generation.push
    pushed = 0

    def push(self: Generation, token: int, logprobs: Any) -> bool:
        nonlocal pushed
        pushed += 1
        if pushed == 3:
            raise ValueError("refused")
        return real(self, token, logprobs)

    before = costs(priced, "device_seconds").get(("alice", "decode"), 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generation, "push", push)
        assert post(priced).status_code == 400
    assert costs(priced, "device_seconds")[("alice", "decode")] > before
    assert core.scheduler.idle
    accounts = priced.service.accounts
    assert accounts is not None and accounts.report().pending.seconds == pytest.approx(0.0, abs=1e-6)
