"""/metrics parses, has vLLM's names, and counts requests and tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from farthing.server.config import KeyRing
from farthing.server.metrics import COUNTERS, GAUGES, HISTOGRAMS, _is_refusal
from tests.server.harness import Running, ScriptedEngine, running, tiny_engine


def scrape(server: Running) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """{sample name: {labels: value}}; fails on text that is not in Prometheus's format."""
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


ROOT = Path(__file__).parents[2]
LABEL = (("model_name", "tiny"),)


def test_request_is_counted() -> None:
    with running(tiny_engine()) as server:
        create = server.client().completions.create
        create(model="tiny", prompt="the same prompt twice", max_tokens=8, extra_body={"ignore_eos": True})
        create(model="tiny", prompt="the same prompt twice", max_tokens=8, extra_body={"ignore_eos": True})
        found = scrape(server)
        assert all(f"farthing:{name}" in found for name in GAUGES)
        assert all(f"farthing:{name}_total" in found for name in COUNTERS)
        assert found["farthing:generation_tokens_total"][LABEL] == 16
        assert found["farthing:prompt_tokens_total"][LABEL] == 44 - 20  # the rest was cached
        assert found["farthing:prefix_cache_hits_total"][LABEL] == 20
        assert found["farthing:num_requests_running"][LABEL] == 0
        assert found["farthing:ready"][LABEL] == 1
        assert found["farthing:work_seconds_total"][(("api_key", "anonymous"),)] > 0
        finished = found["farthing:request_success_total"]
        assert finished[(("finished_reason", "length"), *LABEL)] == 2
        for name in HISTOGRAMS:
            buckets = {dict(labels)["le"]: v for labels, v in found[f"farthing:{name}_bucket"].items()}
            assert float(min(buckets, key=float)) == 0.001
            assert list(buckets.values()) == sorted(buckets.values())
            assert buckets["+Inf"] == found[f"farthing:{name}_count"][LABEL] > 0
            assert found[f"farthing:{name}_sum"][LABEL] >= 0
        answered = found["farthing:http_requests_total"]
        assert answered[(("path", "/v1/completions"), ("status", "200"))] == 2


def test_endpoint_picker_finds_what_it_is_configured_to_read() -> None:
    text = (ROOT / "deploy/examples/inference-gateway/picker.yaml").read_text()
    names = dict(re.findall(r"--([a-z-]+)-metric=(\S+)", text))
    assert names.keys() == {
        "total-queued-requests",
        "total-running-requests",
        "kv-cache-usage-percentage",
        "cache-info",
    }
    with running(tiny_engine(num_blocks=300, block_size=16)) as server:
        found = scrape(server)
    assert all(LABEL in found[name] for role, name in names.items() if role != "cache-info")
    ((labels, value),) = found[names["cache-info"]].items()
    assert dict(labels) == {"model_name": "tiny", "block_size": "16", "num_gpu_blocks": "300"} and value == 1


def test_tokens_of_each_expert_add_up() -> None:
    with running(tiny_engine(enable_prefix_caching=False)) as server:
        ignore = {"ignore_eos": True}
        server.client().completions.create(model="tiny", prompt="abcdef", max_tokens=5, extra_body=ignore)
        experts = scrape(server)["farthing:expert_tokens_total"]
        assert {dict(labels)["expert"] for labels in experts} == {"0", "1", "2", "3"}
        assert {dict(labels)["layer"] for labels in experts} == {"1"}
        assert sum(experts.values()) == 2 * (
            7 + 5 - 1
        )  # two experts per token; the last token is not computed


def test_how_much_of_a_prompt_is_read_is_told_to_its_client_alone() -> None:
    with running(tiny_engine(), keys=KeyRing(["a:first", "b:second"])) as server:

        def reading(key: str, chat: str) -> Any:
            parameters = {"since": "1e12", "reading": chat}
            headers = {"Authorization": f"Bearer {key}"}
            found = httpx.get(f"{server.url}/dashboard/data", params=parameters, headers=headers)
            return found.json()["reading"]

        stream = server.client("first").chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "word " * 100}],
            stream=True,
            max_tokens=1000,
            extra_body={"request_id": "mine", "ignore_eos": True},
        )
        assert next(iter(stream)).id == "chatcmpl-mine"
        known = reading("first", "mine")
        assert known["read"] == known["total"] > 500
        assert reading("second", "mine") == reading("first", "other") == reading("first", "") == {}
        stream.close()


def test_before_the_model_is_loaded() -> None:
    with running(None) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        ready = httpx.get(f"{server.url}/ready")
        assert ready.status_code == 503 and "being loaded" in ready.json()["error"]["message"]
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "tiny"
        assert scrape(server)["farthing:ready"][LABEL] == 0


@pytest.mark.parametrize(
    ("path", "status", "refused"),
    [
        ("/v1/completions", "429", True),
        ("/v1/completions", "500", True),
        ("/v1/completions", "200", False),
        ("/v1/completions", "499", False),  # the client has left
        ("/metrics", "403", False),
    ],
)
def test_requests_to_the_api_that_got_an_error_are_refused(path: str, status: str, refused: bool) -> None:
    assert _is_refusal({"path": path, "status": status}) == refused


def test_unknown_paths_share_one_series() -> None:
    with running(ScriptedEngine()) as server:
        for path in ("/a", "/b", "/v1/nothing"):
            answer = httpx.get(server.url + path)
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_url"
        assert httpx.get(f"{server.url}/v1/completions").status_code == 405
        answered = scrape(server)["farthing:http_requests_total"]
        assert answered[(("path", "other"), ("status", "404"))] == 3
