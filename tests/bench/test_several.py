"""The measurement of several models ends when its server does."""

from __future__ import annotations

import asyncio
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def test_a_dead_server_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    several: Any = import_module("several")
    program = tmp_path / "server"
    program.write_text("#!/bin/sh\necho listening on http://127.0.0.1:9 >&2\nread forever\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(several.sys, "executable", str(program))

    async def ask(*_: Any) -> str:
        return await asyncio.Future()  # an answer that never comes

    monkeypatch.setattr(several.Run, "ask", ask)
    with pytest.raises(SystemExit, match=r"listening on .*\n.*the server has ended"):
        asyncio.run(asyncio.wait_for(several.measure(tmp_path, "1GB", 1.0, 1, 0), 120))
