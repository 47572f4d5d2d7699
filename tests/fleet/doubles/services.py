"""Real programs from Debian, started on loopback for a test: Prometheus, Alertmanager, promtool, kubectl."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml


def require(program: str) -> str:
    """The program's path. If it is missing, the test is skipped locally and fails in CI."""
    path = shutil.which(program)
    if path is None:
        reason = f"{program} is not installed; `.ci/services` installs it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the program ended with {process.returncode} before {url} answered")
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"{url} did not answer within {seconds:g} s")


@contextmanager
def running(command: Sequence[str], ready_url: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_for(ready_url, process)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def prometheus(
    tmp: Path,
    targets: Sequence[str],
    *,
    scrape_s: float = 0.25,
    rules: Mapping[str, object] | None = None,
    alertmanager: str | None = None,
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A Prometheus that scrapes `targets` ("127.0.0.1:8001"). Yields its URL and process."""
    program, port = require("prometheus"), free_port()
    interval = f"{round(scrape_s * 1000)}ms"
    config: dict[str, object] = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "scrape_configs": [{"job_name": "replicas", "static_configs": [{"targets": list(targets)}]}],
    }
    if rules is not None:
        (tmp / "rules.yml").write_text(yaml.safe_dump(dict(rules)))
        config["rule_files"] = [str(tmp / "rules.yml")]
    if alertmanager is not None:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    (tmp / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        program,
        f"--config.file={tmp / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/-/ready", tmp / "prometheus.log") as process:
        yield url, process


@contextmanager
def alertmanager(tmp: Path) -> Iterator[str]:
    """An Alertmanager that keeps received alerts. Yields "127.0.0.1:PORT"."""
    program, port = require("prometheus-alertmanager"), free_port()
    (tmp / "alertmanager.yml").write_text(
        yaml.safe_dump({"route": {"receiver": "none"}, "receivers": [{"name": "none"}]})
    )
    command = [
        program,
        f"--config.file={tmp / 'alertmanager.yml'}",
        f"--storage.path={tmp / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with running(command, f"http://127.0.0.1:{port}/-/ready", tmp / "alertmanager.log"):
        yield f"127.0.0.1:{port}"
