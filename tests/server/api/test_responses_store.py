"""The store of /v1/responses: what counts toward its bound, and whose responses it gives out."""

from __future__ import annotations

from typing import Any

import pytest

from farthing.conversation.types import Turn
from farthing.server.api.responses_store import ResponseStore


@pytest.mark.parametrize(
    "large",
    [
        {"metadata": {"a": "x" * 6_000}},
        {"metadata": {"x" * 6_000: "a"}},
        {"instructions": "x" * 6_000},
        {"tools": [{"type": "mcp", "note": ["x" * 3_000, "x" * 3_000]}]},
        {"metadata": {"a": [0] * 100}},
    ],
)
def test_the_document_counts(large: dict[str, Any]) -> None:
    store = ResponseStore(characters=16_000)
    for number in range(4):
        store.put("a", (), {"id": str(number)} | large)
    kept = [number for number in range(4) if store.get("a", str(number))]
    assert kept == [2, 3]


def test_a_response_larger_than_the_store_is_not_kept() -> None:
    store = ResponseStore(characters=1_000)
    store.put("a", (Turn("user", "x"),), {"id": "small"})
    store.put("a", (Turn("user", "x"),), {"id": "large", "metadata": {"a": "x" * 2_000}})
    assert store.get("a", "small") is not None
    assert store.get("a", "large") is None


def test_room_is_given_back() -> None:
    store = ResponseStore(characters=8_000)
    for number in range(8):
        store.put("a", (), {"id": str(number), "metadata": {"a": "x" * 6_000}})
        assert not store.delete("b", str(number))
        assert store.delete("a", str(number))
