"""Every API says how many prompt tokens were computed, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from farthing.config import EngineConfig
from farthing.engine.build import build_engine
from tests.server.harness import Running, events, running

LONG = "Tell me how the header of a packed file is parsed, and where. " * 4
PATHS = ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/completions", "/api/chat"]
REASONS = ("new_tokens", "diverged_tokens", "evicted_tokens", "state_tokens")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(build_engine(EngineConfig(model="mite", threads=1, max_num_seqs=4))) as found:
        yield found


def ask(server: Running, path: str, text: str, **fields: Any) -> httpx.Response:
    message = [{"role": "user", "content": text}]
    body = {
        "/v1/chat/completions": {"messages": message, "max_tokens": 4},
        "/v1/responses": {"input": text, "max_output_tokens": 4},
        "/v1/messages": {"messages": message, "max_tokens": 4},
        "/v1/completions": {"prompt": text, "max_tokens": 4},
        "/api/chat": {"messages": message, "stream": False, "options": {"num_predict": 4}},
    }[path]
    answer = httpx.post(server.url + path, json={"model": "tiny", **body, **fields}, timeout=60)
    answer.raise_for_status()
    return answer


def header(answer: httpx.Response) -> dict[str, int]:
    pairs = (pair.split("=") for pair in answer.headers["x-farthing-prompt"].split(", "))
    return {name: int(count) for name, count in pairs}


def details(path: str, usage: dict[str, Any]) -> dict[str, int]:
    if path == "/v1/messages":
        return usage["input_tokens_details"] | {"cached_tokens": usage["cache_read_input_tokens"]}
    found: dict[str, int] = usage.get("input_tokens_details") or usage["prompt_tokens_details"]
    return {name: count for name, count in found.items() if name != "cache_write_tokens"}


@pytest.mark.parametrize("path", PATHS)
def test_reasons(server: Running, path: str) -> None:
    text = f"{path}: {LONG}"
    first, edited = ask(server, path, text), ask(server, path, text + "And why?")
    counts = [header(first), header(edited)]
    assert all(set(count) == {"cached_tokens", *REASONS} for count in counts)
    assert counts[1]["cached_tokens"] > 0.8 * sum(counts[0].values())
    assert counts[0]["evicted_tokens"] == counts[1]["state_tokens"] == 0
    if path != "/api/chat":  # Ollama's answers have no such object
        for answer, count in zip((first, edited), counts, strict=True):
            assert details(path, answer.json()["usage"]) == count


@pytest.mark.parametrize("path", PATHS[:4])
def test_streams(server: Running, path: str) -> None:
    extra = {"stream_options": {"include_usage": True}} if path.endswith("completions") else {}
    answer = ask(server, path, f"stream {path}: {LONG}", stream=True, **extra)
    documents = [each for each in events(answer.text) if each != "[DONE]"]
    usages = [each.get("usage") or (each.get("response") or {}).get("usage") for each in documents]
    assert details(path, next(filter(None, reversed(usages)))) == header(answer)


def test_several_prompts_are_summed(server: Running) -> None:
    answer = ask(server, "/v1/completions", "", prompt=[f"one {LONG}", f"two {LONG}"])
    usage = answer.json()["usage"]
    assert sum(usage["prompt_tokens_details"].values()) == usage["prompt_tokens"]


def test_a_prompt_that_does_not_read_the_cache_has_no_reasons(server: Running) -> None:
    answer = ask(server, "/v1/completions", LONG, prompt_logprobs=0)
    assert header(answer) == {"cached_tokens": 0}
