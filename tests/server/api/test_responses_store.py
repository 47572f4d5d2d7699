"""The store of /v1/responses: size accounting, and access by key."""

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
def test_stored_document_counts_toward_the_bound(large: dict[str, Any]) -> None:
    store = ResponseStore(characters=16_000)
    for number in range(4):
        store.put("a", (), {"id": str(number)} | large)
    kept = [number for number in range(4) if store.get("a", str(number))]
    assert kept == [2, 3]


def test_response_larger_than_the_store_is_not_kept() -> None:
    store = ResponseStore(characters=1_000)
    store.put("a", (Turn("user", "x"),), {"id": "small"})
    store.put("a", (Turn("user", "x"),), {"id": "large", "metadata": {"a": "x" * 2_000}})
    assert store.get("a", "small") is not None
    assert store.get("a", "large") is None


def test_space_is_released() -> None:
    store = ResponseStore(characters=8_000)
    for number in range(8):
        store.put("a", (), {"id": str(number), "metadata": {"a": "x" * 6_000}})
        assert not store.delete("b", str(number))
        assert store.delete("a", str(number))


def test_keys_cannot_read_replace_or_evict_responses_of_others() -> None:
    store = ResponseStore(keys=2, responses=16, characters=32_000)
    store.put("a", (), {"id": "mine", "text": "a's"})
    store.put("b", (), {"id": "mine", "text": "b's"})
    for number in range(100):
        store.put("b", (), {"id": f"b{number}", "text": "x" * 4_000})
    kept = store.get("a", "mine")
    assert kept is not None and kept.document["text"] == "a's"
    assert store.get("b", "mine") is None  # evicted by its own key
    assert store.get("a", "b99") is None and store.get("b", "b99") is not None
    assert not store.delete("a", "b99")


def test_many_keys_have_a_useful_share_each() -> None:
    store = ResponseStore(keys=100_000)
    store.put("a", (), {"id": "large", "text": "x" * 500_000})
    assert store.get("a", "large") is not None


def test_same_id_replaces_and_is_counted_once() -> None:
    store = ResponseStore(characters=10_000)
    for _ in range(20):
        store.put("a", (), {"id": "same", "text": "x" * 4_000})
        store.put("a", (), {"id": "other", "text": "y" * 4_000})
    assert store.get("a", "same") is not None and store.get("a", "other") is not None
