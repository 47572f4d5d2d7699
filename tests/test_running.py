"""Servers are listed while they run, and no longer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from farthing.cli import servers
from farthing.cli.app import app
from farthing.running import Running, announced, running

CHILD = """
import os, sys, time
from farthing.running import Running, announced
with announced(Running(os.getpid(), "http://127.0.0.1:1", "tiny", time.time(), int(sys.argv[1]))):
    print("listed", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def child(parent: int = 0) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "listed\n"
    return process


def test_a_server_is_listed_while_it_runs() -> None:
    server = Running(os.getpid(), "http://127.0.0.1:1", "tiny", time.time())
    assert running() == []
    with announced(server):
        assert running() == [server]
    assert running() == []


def test_a_killed_server_and_a_damaged_file_are_not_listed(cache: Path) -> None:
    process = child()
    assert [each.pid for each in running()] == [process.pid]
    process.kill()
    process.wait()
    (cache / "farthing" / "running" / "77").write_text("{")
    assert running() == [] and not list((cache / "farthing" / "running").iterdir())


def test_servers_that_another_one_started_are_not_listed() -> None:
    server = Running(os.getpid(), "http://127.0.0.1:2", "several", time.time())
    with announced(server):
        process = child(os.getpid())
        assert running() == [server]
        process.kill()
        process.wait()


def test_without_a_place_to_write_a_server_still_runs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    with announced(Running(1, "http://127.0.0.1:1", "tiny", 0.0)):
        assert running() == []


def test_ps_lists_and_stop_ends_servers() -> None:
    def said(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == code, done.output
        return done.output

    assert "no server runs here" in said("ps") and "no server runs here" in said("stop", code=2)
    first, second = child(), child()
    listed = json.loads(said("ps", "--json"))
    assert {each["pid"] for each in listed} == {first.pid, second.pid} and listed[0]["memory"] > 0
    assert "tiny" in said("ps") and "free: " in said("ps")
    for wrong in ((), ("other",), ("tiny",)):  # none, unknown, or two of that name
        assert f"{first.pid} (tiny, http://127.0.0.1:1)" in said("stop", *wrong, code=2)
    said("stop", str(first.pid))
    assert first.wait(5) == -signal.SIGTERM
    said("stop")
    assert second.wait(5) == -signal.SIGTERM and running() == []


def test_weights_and_cache_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """# HELP x y
farthing:kv_cache_bytes{model_name="tiny"} 1000.0
farthing:written_at_ready_bytes{model_name="tiny"} 4000.0
"""

    class Answer:
        def __enter__(self) -> Answer:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self) -> bytes:
            return text.encode()

    monkeypatch.setattr(servers.urllib.request, "urlopen", lambda url, timeout: Answer())
    monkeypatch.setattr(servers, "resident", lambda pid: 9000)
    monkeypatch.setattr(servers, "written", lambda pid: 4300)
    memory = servers._memory(Running(1, "http://127.0.0.1:1", "tiny", 0.0))
    assert memory == {"memory": 9000, "weights": 8700, "cache": 1000, "cache_used": 300}
