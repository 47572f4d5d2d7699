"""The time since launch, of a process and of a standby that became a replica."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest

from farthing import launch
from farthing.cli import app
from farthing.fleet import standby


def test_counts_from_the_start_of_the_process() -> None:
    script = "import time; time.sleep(0.4); from farthing import launch; print(launch.seconds())"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.4 <= float(done.stdout) <= time.monotonic() - started + 0.02  # the kernel counts in ticks


def test_a_standbys_wait_is_not_part_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[float]()
    monkeypatch.setattr(launch, "_begun", None)
    monkeypatch.setattr(standby, "PRELOAD", ())
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "stdin", io.StringIO('["serve"]\n'))
    monkeypatch.setattr(app, "main", lambda: seen.append(launch.seconds()))
    waited = launch.seconds()
    standby.main()
    assert seen[0] < waited
