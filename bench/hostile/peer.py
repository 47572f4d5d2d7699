"""Other servers of OpenAI's API under the same attacks: what starts them, and how they spell a grammar."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
from bench.hostile.attacks import url
from bench.hostile.processes import free_port, resident

Document = dict[str, Any]
DIALECTS = ("farthing", "vllm", "llama.cpp")


def spoken(document: Any, dialect: str) -> Any:
    """A request body whose `guided_…` fields are spelt as the server expects them."""
    guided = [name for name in document if name.startswith("guided_")] if isinstance(document, dict) else []
    if dialect == "farthing" or not guided:
        return document
    rest = {name: value for name, value in document.items() if name not in guided}
    kind, value = guided[0].removeprefix("guided_"), document[guided[0]]
    if dialect == "vllm":
        return rest | {"structured_outputs": {kind: value}}
    match kind:
        case "json":
            return rest | {"json_schema": value}
        case "regex":
            return rest | {"json_schema": {"type": "string", "pattern": f"^{value}$"}}
        case "choice":
            return rest | {"grammar": "root ::= " + " | ".join(map(json.dumps, value))}
        case _:  # rules of Lark, whose names and strings GBNF shares
            return rest | {
                "grammar": re.sub(r"^(\w+):", r"\1 ::=", value, flags=re.M).replace("start", "root", 1)
            }


class Peer:
    """A server that is started by a command with `{port}` in it, again if an attack ended it."""

    def __init__(self, command: str, log: Path) -> None:
        self.port = self.entry = free_port()
        self._command, self._log = shlex.split(command.replace("{port}", str(self.port))), log
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        """Wait until it answers. Raises SystemExit."""
        deadline = time.monotonic() + 600
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError, OSError):
                if httpx.get(f"{url(self.port)}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.2)
        raise SystemExit(f"{self._command[0]} did not start; see {self._log}")

    def revive(self) -> bool:
        """Whether it had ended, or no longer answered within a minute; it is then started again."""
        deadline = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError, OSError):
                if httpx.get(f"{url(self.port)}/health", timeout=60).status_code == 200:
                    return False
            time.sleep(0.2)
        self.stop()
        self._process = self._start()
        self.wait()
        return True

    def holds(self) -> dict[str, float]:
        """Nothing: only our own server measures itself."""
        return {}

    def memory(self) -> int:
        """Resident bytes, with children."""
        return resident(self._process.pid)

    def stop(self) -> None:
        """End it and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 15)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait(30)
