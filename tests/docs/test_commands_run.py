"""Every `farthing` command of the README, the guides and the design pages runs, in page order.

Checkpoints are stand-ins: tiny random models of the type named by the page, or the embedded model if the
page measures quality. `SHORTER` shortens long jobs; everything else runs as written.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

import farthing
from tests.compress.conftest import write_model
from tests.docs.pages import ROOT, Command, commands, pages

EMBEDDED = Path(farthing.__file__).parent / "assets" / "mite"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "COLUMNS": "200",
    "TRITON_INTERPRET": "0",
    "HF_HUB_OFFLINE": "1",
    "PIP_NO_INDEX": "1",
}

# Commands that run until they are stopped.
SERVERS = {("serve",), ("fleet", "up"), ("fleet", "run"), ("fleet", "gateway")}

# The log line with a server's port, and the path that answers 200 once it is up.
UP = {"run": (r"metrics on port (\d+)", "/metrics"), "gateway": (r"gateway on port (\d+)", "/live")}
READY = (r"(?:listening on|gateway:) http://127.0.0.1:(\d+)", "/ready")

V2_LITE = dict(
    architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", q_lora_rank=None, n_group=1,
    topk_group=1, topk_method="greedy", scoring_func="softmax", norm_topk_prob=False,
    routed_scaling_factor=1.0, num_nextn_predict_layers=0,
)  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
RECIPE = "{}"
FLEET = """
policy: {capacity: 2.0, max_replicas: 2}
signals: {replicas: ["http://127.0.0.1:9"]}
state: state
metrics: 127.0.0.1:0
"""

# Arguments appended to a command to reduce its work.
SHORTER: dict[tuple[str, ...], tuple[str, ...]] = {
    ("serve",): ("--host", "127.0.0.1", "--port", "0", "--threads", "1"),
    ("bench", "serve"): ("--requests", "8", "--input-tokens", "16", "--output-tokens", "4"),
    ("compress",): ("--max-tokens", "512", "--max-drop", "100%", "--no-timing"),
    ("eval",): ("--max-tokens", "512", "--max-drop", "100%"),
    ("fleet", "up"): ("--port", "0", "--metrics", "127.0.0.1:0", "--no-standby"),
    ("fleet", "gateway"): ("--port", "0"),
    ("train", "mite"): ("--data", "sources", "--threads", "1", "--set", "eval_tokens=2000"),
    ("replay",): ("--seeds", "1"),
}

# Replaced values, so that a training run takes seconds.
SHORT_VALUES = {"--minutes": "0.05", "--tokens": "8192"}

# Commands that this machine cannot run: part of the command, and its expected error.
ELSEWHERE = {
    "--backend gpu": "gpu",
    "--nodes 2": "ray",
    "--address auto": "ray",
    "vllm serve": "vllm",
    **{f"{verb} qwen3-8b": "hub" for verb in ("run", "--fit", "pull", "rm")},
    "run smollm2-135m": "hub",
    "stop": "no server runs here",
    "compress deepseek-ai/": "hub",
    "ollama:": "ollama",
}


@pytest.fixture(scope="module")
def standins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and files with the names used by pages."""
    path = tmp_path_factory.mktemp("standins")
    write_model(path / "model")
    write_model(path / "DeepSeek-V2-Lite", **V2_LITE)
    # The tokenizer of bytes does not have the tokens that DeepSeek's own chat format writes.
    (path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    for name in ("DeepSeek-V3", "DeepSeek-V3.2", "Qwen3-30B-A3B", "Qwen3-8B", "gpt-oss-20b"):
        (path / name).symlink_to(path / "model")
    (path / "models").mkdir()
    (path / "models/one").symlink_to(path / "model")
    (path / "keys.txt").write_text("someone:sk-1\n")
    (path / "mine.yaml").write_text(RECIPE)
    (path / "text.jsonl").write_text((EMBEDDED / "heldout.jsonl").read_text())
    (path / "rates.csv").write_text(rates(hours=30, step_s=60))
    with gzip.open(path / "taxi.csv.gz", "wt") as file:
        file.write(rates(hours=24 * 21, step_s=1800))
    with gzip.open(path / "mooncake.jsonl.gz", "wt") as file:
        file.write(requests(hours=1, gap_s=2))
    (path / "sources").mkdir()
    for module in sorted(Path(os.__file__).parent.glob("[a-c]*.py"))[:26]:
        shutil.copy(module, path / "sources")
    (path / "replicas.json").write_text('{"replicas": [{"name": "r1", "url": "http://127.0.0.1:9"}]}')
    (path / "fleet.yaml").write_text(FLEET)
    return path


def rates(hours: int, step_s: int) -> str:
    """A trace with a daily rhythm."""
    rows = (f"{t},{20 + 10 * math.sin(t / 13751):.3f}" for t in range(0, hours * 3600, step_s))
    return "\n".join(["t_s,total_rate_rps", *rows]) + "\n"


def requests(hours: int, gap_s: int) -> str:
    """A trace of equal requests with a common prefix."""
    common = '"input_length": 2048, "output_length": 100'
    rows = (
        f'{{"timestamp": {1000 * t}, {common}, "hash_ids": [0, 1, {t + 2}, {t + 3}]}}'
        for t in range(0, hours * 3600, gap_s)
    )
    return "\n".join(rows) + "\n"


@pytest.fixture
def workspace(standins: Path, tmp_path: Path) -> Path:
    """A directory with the files that a page's commands use."""
    for entry in standins.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


PAGES = [p for p in pages() if p.parent.name in (ROOT.name, "guide", "design") and any(commands(p))]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_of_a_page_run(page: Path, workspace: Path) -> None:
    for command in commands(page):
        run(command, workspace)


def run(command: Command, workspace: Path) -> None:
    """Run one command of a page to its end, or a server until it answers."""
    words = ["./model" if word in ("MODEL", "./MODEL") else word for word in command.words]
    words = [word.replace("/tmp/", f"{workspace}/") for word in words]
    kind = next(k for n in (2, 1) if (k := tuple(words[:n])) in SERVERS | set(SHORTER) or n == 1)
    for at, option in enumerate(words[:-1]):
        words[at + 1] = SHORT_VALUES.get(option, words[at + 1])
    reason = next((why for part, why in ELSEWHERE.items() if part in " ".join(words)), None)
    words += SHORTER.get(kind, ())
    if reason is not None:
        assert reason in finish(words, workspace, command, fails=True).lower(), command
    elif kind in SERVERS:
        with serving(words, workspace, command):
            pass
    elif kind == ("bench", "serve"):
        with serving(["serve", *SHORTER["serve",]], workspace, command) as url:
            finish([*words, "--url", url], workspace, command)
    else:
        finish(words, workspace, command)


def process(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "farthing.cli.app", *words]


def own(workspace: Path) -> dict[str, str]:
    """Variables with a cache of this test, so that no server of the user is listed, or stopped."""
    return ENVIRONMENT | {"XDG_CACHE_HOME": str(workspace / "cache")}


def finish(words: list[str], workspace: Path, command: Command, fails: bool = False) -> str:
    """Run a command. Returns its stderr."""
    done = subprocess.run(process(words), cwd=workspace, env=own(workspace), text=True, capture_output=True)
    assert (done.returncode != 0) == fails, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, f"{command}\n{done.stderr[-3000:]}"
    return done.stderr


@contextmanager
def serving(words: list[str], workspace: Path, command: Command) -> Iterator[str]:
    """The command's URL once it is up; afterwards SIGTERM must end it with exit code 0."""
    log = workspace / "stderr.txt"
    with log.open("w") as stderr:
        server = subprocess.Popen(process(words), cwd=workspace, env=own(workspace), stderr=stderr)
    try:
        yield ready(server, log, command)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, f"{command}\n{log.read_text()[-3000:]}"
    finally:
        server.kill()
        server.wait()


def ready(server: subprocess.Popen[bytes], log: Path, command: Command) -> str:
    """Wait for the address in the log, then for readiness if there are replicas."""
    pattern, path = UP.get(command.words[1] if len(command.words) > 1 else "", READY)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        text = log.read_text()
        assert server.poll() is None and "Traceback" not in text, f"{command}\n{text[-3000:]}"
        if found := re.search(pattern, text):
            url = f"http://127.0.0.1:{found[1]}"
            path = (
                "/live" if "gateway" in command.words else "/metrics" if "run" in command.words else "/ready"
            )
            with suppress(httpx.HTTPError):
                if httpx.get(url + path).status_code == 200:
                    return url
        time.sleep(0.2)
    raise AssertionError(f"{command} did not get ready\n{log.read_text()[-3000:]}")
