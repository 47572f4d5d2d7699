"""Bytes and near-valid JSON as bodies of every endpoint: an answer or a 4xx in OpenAI's format, never a 5xx.

Seeds are the requests of the audit and of the OpenAI clients; each example is one of them, mutated.
`-m slow` runs thousands.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.harness import Running, running, tiny_engine

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
    (
        "/v1/completions",
        {"prompt": [1], "n": 2, "logprobs": 2, "echo": True, "stream": True, "max_tokens": 1},
    ),
    ("/v1/completions", {"prompt": ["a", "b"], "logit_bias": {"5": -1.5}, "stop": ["z"], "max_tokens": 1}),
    ("/v1/completions", {"prompt": "x", "guided_json": {"type": "object"}, "top_p": 1e-46, "max_tokens": 1}),
    ("/v1/completions", {"prompt": "x", "guided_regex": "(x{1000}){1000}", "max_tokens": 1}),
    ("/v1/completions", {"prompt": "x", "guided_choice": ["<think>", "b"], "max_tokens": 1}),
    ("/v1/completions", {"prompt": "x", "guided_json": "[[[", "max_tokens": 1}),
    ("/v1/chat/completions", {"messages": [USER], "max_tokens": 1, "chat_template_kwargs": {"self": 1}}),
    (
        "/v1/chat/completions",
        {"messages": [USER], "tools": [TOOL], "tool_choice": "required"},
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "system", "content": [{"type": "text", "text": "s"}]}, USER],
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1]}}},
            "logprobs": True,
            "top_logprobs": 2,
            "max_tokens": 1,
        },
    ),
    ("/tokenize", {"prompt": "x", "return_token_strs": True}),
    ("/tokenize", {"messages": [USER], "tools": [TOOL]}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]
ODD = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            -1,
            0,
            2**31,
            2**63,
            2**64,
            1e308,
            -0.0,
            "",
            "\ud800",
            "\x00",
            "self",
            [],
            {},
            [[]],
            [{}],
        ]
    ).map(copy.deepcopy),  # a later mutation may write into it
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-2, 300), max_size=5),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all replaceable values."""
    yield path
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield from paths_of(inner, (*path, step))


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """A seed with values replaced, fields added, or bytes changed."""
    path, seed = draw(st.sampled_from(SEEDS))
    document = json.loads(json.dumps(seed))
    for _ in range(draw(st.integers(0, 3))):
        where = draw(st.sampled_from([p for p in paths_of(document) if p] or [("prompt",)]))
        holder = document
        for step in where[:-1]:
            holder = holder[step]
        holder[where[-1]] = draw(ODD)
    if draw(st.booleans()):
        document[draw(st.sampled_from(["n", "seed", "stop", "priority", "cache_salt", "min_p", "extra"]))] = (
            draw(ODD)
        )
    body = json.dumps(document).encode()
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=4)) + body[at + draw(st.integers(0, 3)) :]
    return path, body


@pytest.fixture(scope="module")
def target() -> Iterator[Running]:
    with running(tiny_engine(max_num_seqs=8)) as server:
        yield server


def fuzz(target: Running, examples: int) -> None:
    with httpx.Client(base_url=target.url, timeout=60) as client:

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
        @given(mutated())
        def run(case: tuple[str, bytes]) -> None:
            path, body = case
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code < 500, (body, answer.text)
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"} and error["message"]
                assert len(error["message"]) < 2000

        run()
    assert httpx.get(f"{target.url}/health").status_code == 200


def test_a_few_mutations(target: Running) -> None:
    fuzz(target, 150)


@pytest.mark.slow
def test_many_mutations(target: Running) -> None:
    fuzz(target, 5000)
