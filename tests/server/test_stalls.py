"""How long one hostile request blocks the event loop, in CPU time of its thread.

CPU time, because it does not depend on other load of the machine.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.harness import Running

USER = {"role": "user", "content": "x"}
LONG = "a b " * 1_975_000
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "a prompt of 7.9 MB": ("/v1/completions", {"prompt": LONG}),
    "a chat of 7.9 MB": ("/v1/chat/completions", {"messages": [USER | {"content": LONG}]}),
    "a text of 7.9 MB": ("/tokenize", {"prompt": LONG}),
    "2,000 messages": ("/v1/chat/completions", {"messages": [USER] * 2_000, "max_tokens": 1}),
    "200,000 messages": ("/v1/chat/completions", {"messages": [USER] * 200_000}),
    "200,000 ids": ("/v1/completions", {"prompt": [1, -1] * 100_000}),
    "300,000 biases": (
        "/v1/completions",
        {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(300_000)), 1)},
    ),
    "1,024 bad words for 32 prompts": (
        "/v1/completions",
        {"prompt": ["x"] * 32, "max_tokens": 1, "bad_words": [f"{i} ab c" * 24 for i in range(1024)]},
    ),
    "200,000 allowed ids for 64 prompts": (
        "/v1/completions",
        {"prompt": ["x"] * 64, "max_tokens": 1, "allowed_token_ids": [10, 11] * 100_000},
    ),
    "8,192 parts of messages": (
        "/v1/chat/completions",
        {"messages": [USER | {"content": [{"type": "text", "text": "x"}] * 4096}] * 2, "max_tokens": 1},
    ),
    "2,000 parts in 60 kB": (
        "/v1/chat/completions",
        {"messages": [USER | {"content": [{"type": "text", "text": "x"}] * 2000}], "max_tokens": 1},
    ),
    "260,000 ids to detokenize": ("/detokenize", {"tokens": [10] * 260_000}),
    "2,000 ids to detokenize": ("/detokenize", {"tokens": [10] * 2_000}),
    "log probabilities of 2,000 prompt tokens": (
        "/v1/completions",
        {"prompt": [[10] * 1_000] * 2, "max_tokens": 1, "prompt_logprobs": 20},
    ),
    "log probabilities of 64 answers": (
        "/v1/chat/completions",
        {"messages": [USER], "n": 64, "max_tokens": 8, "logprobs": True, "top_logprobs": 20},
    ),
    "16,000 choices": (
        "/v1/completions",
        {"prompt": "x", "max_tokens": 1, "guided_choice": [f"{i}" for i in range(16_000)]},
    ),
    "1,000 optional properties": (
        "/v1/completions",
        {
            "prompt": "x",
            "max_tokens": 1,
            "guided_json": {"type": "object", "properties": {f"p{i}": {} for i in range(1000)}},
        },
    ),
    "a regex of 260,000 brackets": (
        "/v1/completions",
        {"prompt": "x", "max_tokens": 1, "guided_regex": "(a)" * 87_000},
    ),
    "512 sequences": ("/v1/completions", {"prompt": ["x" * 200] * 8, "n": 64, "max_tokens": 1}),
}
BOUND = 0.25  # seconds


class Pulse:
    """Runs in the server's event loop and records the maximum CPU time between two of its iterations."""

    def __init__(self) -> None:
        self.worst = 0.0

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        last = time.thread_time()

        def beat() -> None:
            nonlocal last
            now = time.thread_time()
            self.worst, last = max(self.worst, now - last), now
            loop.call_later(0.001, beat)

        beat()


@pytest.fixture(scope="module", autouse=True)
def without_garbage_of_other_tests() -> None:
    """A full collection would visit every object of the process, including those of previous tests."""
    gc.collect()
    gc.freeze()


@pytest.mark.parametrize("name", BODIES)
def test_no_request_blocks_the_event_loop(tiny: Running, name: str) -> None:
    path, document = BODIES[name]
    body, headers = json.dumps(document).encode(), {"content-type": "application/json"}
    pulse = Pulse()

    def post(_: int) -> int:
        return httpx.post(tiny.url + path, content=body, headers=headers, timeout=120).status_code

    tiny.call(pulse.start)
    with ThreadPoolExecutor(4) as pool:
        statuses = set(pool.map(post, range(8)))
    assert statuses <= {200, 400, 429}
    assert pulse.worst < BOUND
