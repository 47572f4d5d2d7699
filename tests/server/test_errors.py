"""What a client reads of an answer that a proxy could not pass on completely."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from farthing.server.errors import Passage

EVENTS, LINES = "text/event-stream", "application/x-ndjson"
NAMED = ("/v1/messages", "/v1/messages?beta=true", "/v1/responses")


@pytest.mark.parametrize("target", [*NAMED, "/v1/chat/completions", "/api/chat"])
@given(cut=st.integers(0, 60), sizes=st.lists(st.integers(1, 9), min_size=60, max_size=60))
def test_a_stream_cut_anywhere_ends_with_an_error_that_its_client_reads(
    target: str, cut: int, sizes: list[int]
) -> None:
    lines = target.startswith("/api/")
    whole = b'{"text": "a"}\n{"text": "b"}\n' if lines else b'data: {"text": "a"}\n\ndata: {"text": "b"}\n\n'
    received = whole[:cut]
    passage = Passage(CIMultiDict({"content-type": f"{LINES if lines else EVENTS} ; charset=utf-8"}), target)
    rest = received
    for size in sizes:
        passage.passed(rest[:size])
        rest = rest[size:]
    ending = passage.ending("lost")
    assert ending is not None
    *_, last = (received + ending).decode().strip().split("\n" if lines else "\n\n")
    last = last.lstrip()
    assert len(last.splitlines()) == 1 + (target in NAMED)
    error = json.loads(last.rpartition("data: ")[2])["error"]
    assert (error if lines else error["message"]) == "lost"
    assert last.startswith("event: error\n") == (target in NAMED)


def test_other_bodies_have_no_place_for_an_error() -> None:
    assert Passage(CIMultiDict({"Content-Type": "application/json"}), "/api/chat").ending("lost") is None
    assert Passage({}, "/v1/messages").ending("lost") is None
