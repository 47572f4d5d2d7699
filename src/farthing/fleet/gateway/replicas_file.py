"""The file that names the replicas: `{"replicas": [{"name": …, "url": …}]}`, watched for changes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

_POLL_S = 0.05


class ReplicasFile:
    """Follows a file. A version that is missing or broken leaves the set of replicas as it is."""

    def __init__(self, path: Path, on_change: Callable[[dict[str, str]], None]) -> None:
        self._path, self._on_change = path, on_change
        self._stamp: tuple[int, int] | None = None

    async def follow(self) -> None:
        """Read the file whenever it has changed, without end."""
        while True:
            await asyncio.sleep(_POLL_S)
            self.read()

    def read(self) -> None:
        """Hand the file on if it has changed."""
        try:
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._on_change(read_replicas(self._path))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as problem:
            log.warning("replicas file %s ignored: %s", self._path, problem)


def read_replicas(path: Path) -> dict[str, str]:
    """{name: url} of a replicas file. Raises ValueError naming what is wrong."""
    try:
        data = json.loads(path.read_text())
        replicas = data["replicas"]
        return {str(item["name"]): str(item["url"]) for item in replicas}
    except (json.JSONDecodeError, KeyError, TypeError) as problem:
        raise ValueError(
            f'{path}: expected {{"replicas": [{{"name": …, "url": …}}]}} ({problem!r})'
        ) from problem


def write_replicas(path: Path, replicas: dict[str, str]) -> None:
    """Replace a replicas file in one step, so that no reader sees half of it."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(
        json.dumps({"replicas": [{"name": name, "url": url} for name, url in replicas.items()]})
    )
    scratch.replace(path)
