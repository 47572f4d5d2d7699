"""Every client of clients.toml against a scripted model, in the chat formats that the file pairs it with.

Set FARTHING_CLIENTS to the folder that `install.py FOLDER` filled; clients that it lacks are skipped. Each
client runs in its own environment (drivers/), once for all its formats.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.server.clients.drivers.common import THOUGHT
from tests.server.clients.install import CLIENTS, MARK
from tests.server.clients.model import FORMATS, engine
from tests.server.harness import running

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FOLDER = Path(os.environ.get("FARTHING_CLIENTS", "nowhere")).resolve()
BESIDE = ("agents.py", "measure.py", "mcp_.py", "shapes.py")  # drivers that run programs of their clients
PAIRS = [(name, check) for name, client in CLIENTS.items() for check in client["checks"]]

pytestmark = pytest.mark.slow


def need(name: str) -> Path:
    """The folder of an installed client; without it, the test is skipped."""
    packages = CLIENTS[name]["packages"]
    mark = FOLDER / name / MARK
    if packages and (not mark.is_file() or mark.read_text() != "\n".join(packages)):
        command = f"python {HERE.relative_to(ROOT)}/install.py FOLDER {name}"
        pytest.skip(f"{name} is not in FARTHING_CLIENTS; run `{command}`")
    if CLIENTS[name]["registry"] == "npm" and not shutil.which("node"):
        pytest.skip("needs Node.js")
    return FOLDER / name


def command(client: dict[str, Any], folder: Path, scratch: Path) -> list[str]:
    """How its driver runs. Node looks for packages next to the script, Python in its environment."""
    driver = HERE / "drivers" / client["driver"]
    if driver.suffix == ".mjs":
        for script in driver.parent.glob("*.mjs"):
            shutil.copy(script, scratch)
        (scratch / "node_modules").symlink_to(folder / "node_modules")
        return ["node", str(scratch / driver.name)]
    python = sys.executable if driver.name in BESIDE else str(folder / "bin" / "python")
    return [python, str(driver)]


def drive(name: str, servers: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """What each check of a client found on each server: its address, and the reasoning of its model."""
    with TemporaryDirectory() as home:
        environment = {
            "PATH": os.environ["PATH"], "HOME": home, "TERM": "dumb", "PYTHONPATH": str(ROOT),
            "CLIENT": str(FOLDER / name),
        }  # fmt: skip
        done = subprocess.run(
            [*command(CLIENTS[name], need(name), Path(home)), json.dumps(servers)],
            env=environment, cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # some clients print, too
    return list(map(json.loads, lines))


@cache
def found(name: str) -> dict[str, dict[str, str]]:
    """What each check of a client found in each format."""
    need(name)
    formats = list(FORMATS) if CLIENTS[name]["formats"] == "all" else CLIENTS[name]["formats"]
    with ExitStack() as stack:
        urls = [stack.enter_context(running(engine(each))).url for each in formats]
        thoughts = [THOUGHT if FORMATS[each].reasons else "" for each in formats]
        return dict(zip(formats, drive(name, list(zip(urls, thoughts, strict=True))), strict=True))


@pytest.mark.timeout(1860)
@pytest.mark.parametrize(("name", "check"), PAIRS, ids=[f"{name}-{check}" for name, check in PAIRS])
def test_client(name: str, check: str) -> None:
    results = [
        (f"{each}, {variant}", said)
        for each, checks in found(name).items()
        for variant, said in checks.items()
        if variant.split()[0] == check
    ]
    wrong = [f"{where}: {said}" for where, said in results if said != "ok"]
    assert results and not wrong, "\n".join(wrong)
