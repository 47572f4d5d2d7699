"""The external-metrics API over real TLS: answers to an HPA, and rejected clients."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing_fleet.actuators.base import METRICS, LastDecision
from farthing_fleet.actuators.external_metrics import ROOT, ExternalMetrics, FrontProxy, matches, quantity
from farthing_fleet.actuators.kubernetes import Access, authentication_config, connect
from tests.fleet.actuators.decided import decision
from tests.fleet.doubles.aggregator import Aggregator, issue
from tests.fleet.doubles.kubernetes import FakeKubernetes

PATH = ROOT + "/namespaces/prod/desired_replicas?labelSelector=model%3Ddeepseek-v3"


@asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[tuple[int, LastDecision, Aggregator, FakeKubernetes]]:
    aggregator, last_decision = Aggregator(tmp_path), LastDecision()
    async with FakeKubernetes() as api:
        api.front_proxy = aggregator.config_map()
        client = connect(api.url)
        server = ExternalMetrics(
            last_decision,
            Access(client, keep_s=0.0),
            FrontProxy.from_config_map(await authentication_config(client)),
            certificate=aggregator.serving.certificate_file,
            key=aggregator.serving.key_file,
            labels={"model": "deepseek-v3"},
            namespace="prod",
        )
        port = await server.start("127.0.0.1", 0)
        try:
            yield port, last_decision, aggregator, api
        finally:
            await server.close()


@pytest.mark.anyio
async def test_hpa_gets_every_metric(tmp_path: Path) -> None:
    async with serving(tmp_path) as (port, last_decision, aggregator, api):
        last_decision.post(decision(7, backlog=12.0, ttft_s=0.2345))
        status, listed = await aggregator.get(port, ROOT)
        assert status == 200
        assert listed["kind"] == "APIResourceList"
        assert listed["groupVersion"] == "external.metrics.k8s.io/v1beta1"
        assert {r["name"] for r in listed["resources"]} == set(METRICS)
        values = {}
        for metric in METRICS:
            status, answer = await aggregator.get(port, PATH.replace("desired_replicas", metric))
            assert (status, answer["kind"]) == (200, "ExternalMetricValueList")
            (item,) = answer["items"]
            assert item["metricName"] == metric
            assert item["metricLabels"] == {"model": "deepseek-v3"}
            assert datetime.fromisoformat(item["timestamp"]).tzinfo is not None
            values[metric] = item["value"]
        assert values == {"desired_replicas": "7", "queue_backlog": "12", "average_response_time": "235m"}
        attributes = [r["resourceAttributes"] for r in api.reviews if "resourceAttributes" in r]
        assert attributes[0] == {
            "group": "external.metrics.k8s.io",
            "version": "v1beta1",
            "resource": "desired_replicas",
            "namespace": "prod",
            "verb": "list",
        }
        assert api.reviews[-1]["user"] == "hpa"
        assert api.reviews[-1]["groups"] == ["system:serviceaccounts", "system:authenticated"]
        assert api.reviews[-1]["extra"] == {"scopes": ["metrics"]}


@pytest.mark.anyio
async def test_only_the_front_proxy_is_accepted(tmp_path: Path) -> None:
    async with serving(tmp_path) as (port, last_decision, aggregator, api):
        last_decision.post(decision())
        other_name = issue(tmp_path, "somebody-else", aggregator.front_proxy_ca)
        assert (await aggregator.get(port, PATH, pair=None))[0] == 401
        assert (await aggregator.get(port, PATH, pair=other_name))[0] == 401
        assert (await aggregator.get(port, PATH, user=None))[0] == 401
        (tmp_path / "rogue").mkdir()
        rogue_ca = issue(tmp_path / "rogue", "front-proxy-ca")
        rogue = issue(tmp_path / "rogue", "front-proxy-client", rogue_ca)
        with pytest.raises(aiohttp.ClientError):  # rejected in the handshake
            await aggregator.get(port, PATH, pair=rogue)
        assert api.reviews == []
        for probe in ("/livez", "/readyz", "/healthz"):
            assert (await aggregator.get(port, probe, pair=None, user=None))[0] == 200


@pytest.mark.anyio
async def test_access_review_decides_and_its_failure_is_an_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as (port, last_decision, aggregator, api):
        last_decision.post(decision())
        api.allow = lambda spec: spec["user"] == "hpa"
        assert (await aggregator.get(port, PATH))[0] == 200
        assert (await aggregator.get(port, PATH, user="eve"))[0] == 403
        api.down = True
        assert (await aggregator.get(port, PATH))[0] == 500


@pytest.mark.anyio
async def test_missing_or_outdated_decisions_and_signals_are_errors_not_zeros(tmp_path: Path) -> None:
    async with serving(tmp_path) as (port, last_decision, aggregator, _):
        assert (await aggregator.get(port, PATH))[0] == 503
        last_decision.post(decision())
        assert (await aggregator.get(port, PATH))[0] == 200
        assert (await aggregator.get(port, PATH.replace("desired_replicas", "queue_backlog")))[0] == 503
        last_decision.max_age_s = 0.0
        assert (await aggregator.get(port, PATH))[0] == 503


@pytest.mark.anyio
async def test_namespaces_and_selectors_filter_the_items(tmp_path: Path) -> None:
    async with serving(tmp_path) as (port, last_decision, aggregator, _):
        last_decision.post(decision())
        for path, count in (
            (PATH, 1),
            (ROOT + "/namespaces/prod/desired_replicas", 1),
            (PATH.replace("deepseek-v3", "other"), 0),
            (PATH.replace("/prod/", "/test/"), 0),
        ):
            status, answer = await aggregator.get(port, path)
            assert (status, len(answer["items"])) == (200, count), path
        assert (await aggregator.get(port, PATH.replace("desired_replicas", "cpu")))[0] == 404


@pytest.mark.parametrize(
    ("selector", "met"),
    [
        ("", True),
        ("model=a", True),
        ("model==a,tier!=gold", True),
        ("model!=a", False),
        ("model in (a, b),!other", True),
        ("model notin (a,b)", False),
        ("model", True),
        ("other", False),
    ],
)
def test_label_selectors(selector: str, met: bool) -> None:
    assert matches(selector, {"model": "a", "tier": "silver"}) is met


@given(st.floats(0, 1e6))
def test_quantities_never_round_down(value: float) -> None:
    text = quantity(value)
    read = int(text[:-1]) / 1000 if text.endswith("m") else float(text)
    assert value - 1e-6 <= read <= value + 0.001 + 1e-6


def test_front_proxy_configuration_errors_name_the_key() -> None:
    with pytest.raises(ValueError, match="requestheader-allowed-names"):
        FrontProxy.from_config_map({"requestheader-client-ca-file": "x"})


def test_invalid_selector_is_an_error() -> None:
    with pytest.raises(ValueError, match="invalid label selector"):
        matches("model is a", {"model": "a"})
