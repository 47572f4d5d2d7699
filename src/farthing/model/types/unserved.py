"""Model types that transformers knows and this engine does not serve, by what they would need.

The lists are written by `python -m tests.model.unserved_types` from the installed transformers; tests compare
them, every week with its newest version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

FILE = Path(__file__).parents[2] / "assets" / "unserved.json"
_LATER = {  # released before transformers has them
    "deepseek_v41": "Engram memory, entries and indices shared between layers, two-level index and lagged "
    "hyper-connections are",
}


@cache
def unserved() -> Mapping[str, str]:
    """Model type -> what it needs, as the subject of "... not served yet"."""
    listed = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: needs for needs, names in listed.items() for name in names} | _LATER


def why_unserved(name: object) -> str | None:
    """What a type needs, as the subject of "... not served yet"; None for a type that is not listed."""
    return unserved().get(name) if isinstance(name, str) else None
