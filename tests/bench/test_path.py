"""A streamed chat without tools runs few functions in few files, so that its path can be read."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
MOST_FILES, MOST_FUNCTIONS = 41, 264


@pytest.fixture(scope="module")
def functions() -> set[tuple[str, str]]:
    """(file, function) of the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        path: Any = import_module("path")
    found: set[tuple[str, str]] = path.trace()
    return found


def test_chat_runs_few_functions_in_few_files(functions: set[tuple[str, str]]) -> None:
    files = {file for file, _ in functions}
    assert len(files) <= MOST_FILES, sorted(files)
    assert len(functions) <= MOST_FUNCTIONS, sorted(functions)


def test_chat_runs_nothing_of_what_it_does_not_use(functions: set[tuple[str, str]]) -> None:
    """Nothing of tools, grammars, the disk cache, the digest, log-probabilities, drafts or processes."""
    unused = {
        *("conversation/strict", "conversation/forced", "conversation/arguments", "conversation/base"),
        *("engine/structured", "engine/constraints", "engine/prefetch", "engine/speculation"),
        *("engine/disk_cache/files", "engine/disk_cache/store", "engine/sandbox/workers", "engine/drafters"),
        "server/cache_digest",
    }
    files = {file.removeprefix("farthing/").removesuffix(".py") for file, _ in functions}
    assert not files & unused
    assert not [name for _, name in functions if "logprobs" in name or name.startswith("Quotas")]
