"""Size of JSON documents, without serializing them and without recursion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def json_size(document: Any, per_value: int = 1) -> int:
    """Characters of all strings in a document, keys included, plus `per_value` for each value."""
    size, stack = 0, [document]
    while stack:
        item = stack.pop()
        size += per_value
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, Mapping):
            size += sum(len(str(key)) for key in item)
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
    return size
