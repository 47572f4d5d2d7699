"""What a gateway, or the server before several models, reads of a body takes time in proportion to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.prompts import read_prompt
from farthing.server.api.ollama import FOREVER, seconds
from farthing.server.bodies import check
from farthing.server.errors import ApiError
from farthing.server.front import _document
from farthing_fleet.gateway.guard import _CHUNK
from farthing_fleet.gateway.models import _field
from tests.growth import HARD, excess
from tests.server.test_growth import FIELDS

_NOTICED = 0.05  # seconds; at these sizes, quadratic time would be many
SIZES = {"string": 1 << 18, "array": 4096, "object": 4096}


def front(body: bytes) -> None:
    with suppress(ApiError):
        seconds(_document({"Content-Type": "application/json"}, body).get("keep_alive"))


def values(body: bytes) -> None:
    with suppress(ApiError):
        check(body)


READERS: dict[str, Callable[[bytes], object]] = {
    "prompt": lambda body: read_prompt(body, 1024),
    "model": lambda body: _field(body, ("a", "b")),
    "chunks": _CHUNK.findall,
    "values": values,
    "front": front,
}


# Bodies that are no JSON, or of which a search for a name begins again and again.
RAW: dict[str, Callable[[int], bytes]] = {
    **{
        f"open string of {text!r}": lambda size, text=text: b'{"a": "' + text.encode() * size for text in HARD
    },
    **{f"repeated {text!r}": lambda size, text=text: text.encode() * size for text in HARD},
    "open string before models": lambda size: b'{"a": "' + b'\\" "model": "c", ' * size,
    "models of no name": lambda size: b'{"model": ' * size,
    "models within": lambda size: b'{"x": {"model": "a"}, ' * size,
    "space after model": lambda size: b'"model"' + b" " * size + b'"model"',
    "digits": lambda size: b'{"keep_alive": ' + b"1" * size,
    "fraction": lambda size: b'{"keep_alive": 0.' + b"1" * size + b"}",
    "duration": lambda size: b'{"keep_alive": "' + b"1" * size + b'x"}',
    "chunk heads": lambda size: b"\r\n" + b"0" * size,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("body", RAW)
def test_raw_bodies(body: str, reader: str) -> None:
    sent = {size: RAW[body](size) for size in (1 << 16, 1 << 18)}
    assert excess(lambda size: READERS[reader](sent[size]), 1 << 16, _NOTICED) is None


@pytest.mark.parametrize("reader", READERS)
def test_every_field(reader: str) -> None:
    for path, field in FIELDS:
        size = SIZES[field.kind]
        sent = {each: json.dumps(field.make(each, '\\"')).encode() for each in (size // 4, size)}
        wrong = excess(lambda each, sent=sent: READERS[reader](sent[each]), size // 4, _NOTICED)
        assert wrong is None, f"{path} {field.path}: {wrong}"


def fields_of(body: bytes) -> Any:
    document = json.loads(body)
    name = document.get("model")
    return name if name in ("a", "b") else None


@given(
    st.dictionaries(
        st.sampled_from(["model", "x", 'y"', "\\"]),
        st.recursive(
            st.sampled_from(["a", "b", "c", '"model": "a"', '\\"', "\\", "{"]),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["model", "z\\"]), inner, max_size=3)
            ),
            max_leaves=8,
        ),
    ),
    st.sampled_from([None, 1]),
)
def test_model_is_that_of_the_object_itself(document: dict[str, Any], indent: int | None) -> None:
    body = json.dumps(document, indent=indent).encode()
    assert _field(body, ("a", "b")) == fields_of(body)


@given(st.text("0123456789.smh-nuµ", max_size=80) | st.integers() | st.floats(allow_nan=True))
def test_durations_are_none_or_within_a_century(given: Any) -> None:
    found = seconds(given)
    assert found is None or 0 <= found <= FOREVER.total_seconds()
