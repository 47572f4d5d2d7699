"""`farthing serve` as a process: from launch to SIGTERM, on the embedded model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

import farthing

EMBEDDED = Path(farthing.__file__).parent / "assets" / "mite" / "config.json"
needs_model = pytest.mark.skipif(not EMBEDDED.is_file(), reason="the embedded model is not in this tree")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "farthing.cli.app", "serve", *arguments]


@contextmanager
def launched(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(the process, its URL) once it listens."""
    process = subprocess.Popen(
        command("--port", "0", "--threads", "1", *arguments),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | environment,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"listening on (http://\S+)", line):
                yield process, found[1]
                break
        else:
            raise AssertionError("the server ended before it listened")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


def wait_ready(url: str) -> None:
    """Wait until the model is loaded; /health must answer at once."""
    assert httpx.get(f"{url}/health").status_code == 200
    deadline = time.monotonic() + 120
    while httpx.get(f"{url}/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@needs_model
def test_serve_answer_drain_and_exit() -> None:
    with launched("--drain-timeout", "20", "--served-model-name", "code", "--api-key", "me:sk-1") as (
        process,
        url,
    ):
        wait_ready(url)
        assert httpx.get(f"{url}/v1/models").status_code == 401
        client = OpenAI(base_url=f"{url}/v1", api_key="sk-1", max_retries=0)
        assert [model.id for model in client.models.list()] == ["code"]
        options = {"model": "code", "prompt": "import os\nimport ", "temperature": 0.0}
        first = client.completions.create(**options, max_tokens=8)
        assert first.choices[0].text
        again = client.completions.create(**options, max_tokens=8)
        assert again.choices[0].text == first.choices[0].text
        metrics = httpx.get(f"{url}/metrics").text
        launch = re.search(r'farthing:launch_to_ready_seconds\{model_name="code"\} (\S+)', metrics)
        assert launch and 0 < float(launch[1]) < 120

        stream = client.completions.create(
            **options, max_tokens=60, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"  # the drain let it finish
        assert process.wait(30) == 0
        assert process.stdout is not None and process.stdout.read() == ""


@needs_model
def test_start_up_ends_with_the_page_and_a_command_that_works() -> None:
    with launched("--api-key", "me:sk-1") as (process, url):
        assert process.stderr is not None
        said = [""]
        while not said[-1].startswith("curl "):
            said.append(process.stderr.readline().partition(" INFO ")[2].strip())
        page, curl = said[-2:]
        assert page == f"page: {url}/" and httpx.get(f"{url}/").status_code == 200
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        curl = curl.replace('"Hello"}]', '"Hello"}], "max_tokens": 3')
        environment = ENVIRONMENT | {"KEY": "sk-1"}
        done = subprocess.run(curl, shell=True, text=True, capture_output=True, env=environment)
        assert json.loads(done.stdout)["choices"][0]["finish_reason"] == "length", done


@needs_model
def test_drain_time_is_bounded() -> None:
    with launched("--drain-timeout", "0.3", "--max-model-len", "2000") as (process, url):
        wait_ready(url)
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="mite", prompt="x", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shut down before the answer ended"):
            list(stream)
        assert process.wait(30) == 0


@needs_model
def test_ctrl_c_exits_without_errors() -> None:
    with launched() as (process, url):
        wait_ready(url)
        body = {"model": "mite", "prompt": "a", "max_tokens": 4}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not out
    assert all(" INFO " in line for line in errors.splitlines()), errors


@needs_model
def test_every_way_of_sampling_without_torch(tmp_path: Path) -> None:
    """As installed by default. The first one is the plainest request for log probabilities."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    bodies = {
        "/v1/chat/completions": [chat | {"logprobs": True}, chat | {"logprobs": True, "top_logprobs": 3}],
        "/v1/completions": [
            {"prompt": "import ", "max_tokens": 3, "seed": 1} | more
            for more in (
                {"logprobs": 0, "temperature": 0}, {"logprobs": 0, "echo": True}, {"prompt_logprobs": 0},
                {"top_k": 5, "top_p": 0.5, "min_p": 0.1}, {"repetition_penalty": 1.5, "logprobs": 1},
                {"logit_bias": {"5": 100}}, {"allowed_token_ids": [5]}, {"bad_words": ["a"]}, {"n": 2},
            )
        ],
    }  # fmt: skip
    with launched(PYTHONPATH=str(tmp_path)) as (_, url):
        wait_ready(url)
        for path, each in bodies.items():
            for body in each:
                answer = httpx.post(url + path, json=body, timeout=60)
                assert answer.status_code == 200, (body, answer.text)
                assert answer.json()["choices"]
        assert httpx.get(f"{url}/ready").status_code == 200


def fails(*arguments: str) -> str:
    """The error output of a command that must fail."""
    result = subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert result.returncode != 0 and result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.replace("│", " ").split())


def test_missing_model() -> None:
    assert "'no-such-model'; expected 'mite'" in fails("no-such-model", "--port", "0")


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = fails("--port", str(port))
        assert f"cannot listen on 127.0.0.1:{port}" in said and "--port 0 takes a free one" in said


def test_what_is_no_packed_file_is_refused_before_the_port_opens(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Remember the milk. " * 100)
    said = fails("--port", "0", "--packed", str(tmp_path / "notes.txt"))
    assert "is not a packed file" in said and "listening" not in said


def test_other_hosts_require_a_key() -> None:
    assert "--insecure" in fails("--host", "0.0.0.0")
    assert "'int2' is not one of 'auto', 'float32'" in fails("--kv-cache-dtype", "int2")
    assert "'x' is not one of 'auto', 'none', 'deepseek_v3'" in fails("--reasoning-parser", "x")


def test_importing_the_server_loads_no_torch_or_transformers() -> None:
    """The HTTP server is up while the model is still loading."""
    code = (
        "import sys, farthing.server.run; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert result.stdout.strip() == "[]"
