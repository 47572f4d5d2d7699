"""Bodies are bounded before they are parsed, and large ones leave room for others."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.server.api.openai_protocol import CompletionRequest
from farthing.server.bodies import (
    _MANY,
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_NUMBERS,
    MAX_VALUES,
    Bodies,
    _is_light,
    check,
)
from farthing.server.errors import ApiError
from farthing.server.schema import HEAVY, UnknownFields
from tests.server.harness import Running

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=30,
)


def values_and_depth(value: Any, level: int = 0) -> tuple[int, int]:
    """Counted by walking: every list, object and comma counts as one."""
    if not isinstance(value, list | dict):
        return 0, level
    inner = list(value.values()) if isinstance(value, dict) else value
    counted = [values_and_depth(each, level + 1) for each in inner]
    total = sum(count for count, _ in counted) + 1 + max(0, len(inner) - 1)
    return total, max((depth for _, depth in counted), default=level + 1)


@settings(max_examples=300, deadline=None)
@given(JSON, st.booleans(), st.sampled_from([(", ", ": "), (",", ":")]))
def test_counts_equal_those_of_a_parser(value: Any, ascii_only: bool, separators: tuple[str, str]) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only, separators=separators).encode()
    values, depth = values_and_depth(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("farthing.server.bodies._between_numbers", lambda data, commas: 0)
        for limit, fails in ((values, False), (values - 1, True)):
            patch.setattr("farthing.server.bodies.MAX_VALUES", limit)
            assert refuses(body) == fails
        patch.setattr("farthing.server.bodies.MAX_VALUES", values)
        for limit, fails in ((depth, False), (depth - 1, True)):
            patch.setattr("farthing.server.bodies.MAX_DEPTH", limit)
            assert refuses(body) == fails


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_counted(body: bytes) -> None:
    check(body.replace(b"\0", b""))


@given(st.binary(max_size=200) | st.text("[{,\0a", max_size=80).map(str.encode))
def test_bodies_that_are_not_counted_would_pass(body: bytes) -> None:
    assert not _is_light(body) or check(body) <= _MANY


@pytest.mark.parametrize("number", ["{}", "-{}", "{}.5", "0.{}", "1e{}", "[{}]", '{{"a": {}}}', "1, {}"])
def test_a_number_has_at_most_so_many_digits_and_a_text_any_number(number: str) -> None:
    for digits, fails in ((MAX_DIGITS, False), (MAX_DIGITS + 1, True)):
        written = number.format("1" * digits)
        assert refuses(written.encode()) == fails
        assert not refuses(json.dumps(written).encode())


def test_short_bodies_are_not_counted() -> None:
    assert _is_light(b'{"prompt": "hello", "stop": ["."]}') and not _is_light('{"a": 1}'.encode("utf-16-be"))


def test_other_encodings_do_not_evade_the_limits() -> None:
    """The first byte of U+2200 is that of a quotation mark."""
    body = '{"∀": 1, "x": [' + "[]," * MAX_VALUES + "1]}"
    json.loads(body.encode("utf-16-be"))
    assert refuses(body.encode("utf-16-be"))


def refuses(body: bytes) -> bool:
    try:
        check(body)
    except ApiError as error:
        assert error.status == 400
        return True
    return False


def test_token_ids_are_counted_separately() -> None:
    for separators in ((", ", ": "), (",", ":")):
        assert not refuses(json.dumps({"prompt": [7] * MAX_NUMBERS}, separators=separators).encode())
        assert refuses(json.dumps({"prompt": [7] * (MAX_NUMBERS + 2)}, separators=separators).encode())
        assert refuses(json.dumps({str(i): 7 for i in range(MAX_VALUES + 2)}, separators=separators).encode())
    assert refuses(b"[" * (MAX_DEPTH + 1)) and not refuses(b"[" * MAX_DEPTH)


USER = {"role": "user", "content": "x"}
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "200,000 messages": ("/v1/chat/completions", {"messages": [USER] * 200_000}),
    "300,000 biases": (
        "/v1/completions",
        {"prompt": "x", "logit_bias": {str(i): 1 for i in range(300_000)}},
    ),
    "800,000 bad ids": ("/v1/completions", {"prompt": [1, -1] * 400_000}),
    "200,000 bad ids": ("/v1/completions", {"prompt": [1, -1] * 100_000}),
    "a prompt of 7.9 MB": ("/v1/completions", {"prompt": "a b " * 1_975_000}),
    "a text of 7.9 MB": ("/tokenize", {"prompt": "a b " * 1_975_000}),
    "a chat of 7.9 MB": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a b " * 1_975_000}]},
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_bodies_are_rejected_while_others_are_answered(tiny: Running, name: str) -> None:
    path, document = LARGE[name]
    body = json.dumps(document).encode()
    waits: list[float] = []
    done = threading.Event()

    def watch() -> None:
        with httpx.Client() as client:
            while not waits or not done.is_set():
                began = time.monotonic()
                assert client.get(f"{tiny.url}/health").status_code == 200
                waits.append(time.monotonic() - began)

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.monotonic()
    answer = httpx.post(
        tiny.url + path, content=body, headers={"content-type": "application/json"}, timeout=60
    )
    took = time.monotonic() - began
    done.set()
    watching.join()
    assert answer.status_code == 400, answer.text[:300]
    assert took < 10 and max(waits) < 2.0


def test_heavy_bodies_of_any_size_are_parsed_one_at_a_time_and_clients_take_turns() -> None:
    parsing: list[str] = []
    at_once: list[int] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        assert scope[HEAVY]
        parsing.append(scope["client_name"])
        at_once.append(not app._lock._left)
        await asyncio.sleep(0.05)  # the engine's work, not under the lock

    app = Bodies(application, 1 << 20, 10.0)
    heavy = json.dumps({"a": [{}] * 2_000}).encode()
    assert len(heavy) < 65_536

    async def post(client: str) -> None:
        sent = False

        async def receive() -> Any:
            nonlocal sent
            assert not sent
            sent = True
            return {"type": "http.request", "body": heavy, "more_body": False}

        scope = {"type": "http", "method": "POST", "headers": [], "path": "/", "client_name": client}
        await app(scope, receive, receive)

    async def run() -> None:
        await asyncio.gather(*(post("bad") for _ in range(8)), post("good"))

    asyncio.run(run())
    assert all(at_once) and parsing.index("good") <= 2


@pytest.mark.parametrize("heavy", [False, True])
def test_heavy_body_is_checked_in_a_separate_iteration(heavy: bool) -> None:
    fields, turns = UnknownFields(strict=False), 0

    async def run() -> int:
        nonlocal turns
        work = asyncio.ensure_future(fields.check(CompletionRequest(prompt="x"), {HEAVY: heavy}))
        while not work.done():
            turns += 1
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(run()) == (3 if heavy else 1)
