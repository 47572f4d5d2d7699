"""Where this user's caches are."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Farthing's directory below XDG_CACHE_HOME, or below ~/.cache.

    Raises RuntimeError if that variable is not set and there is no home directory.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "farthing"
