"""A base installation, which has no torch: what it runs, and what it says where torch is needed.

Torch is installed here, so the commands run in a process that cannot import it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest
from openai import OpenAI

from farthing import extras

ENVIRONMENT = os.environ | {"NO_COLOR": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
BLOCK = "import sys; sys.modules['torch'] = None; from farthing.cli.app import main; "
RUN = """
import contextlib, io, json
for sys.argv[1:] in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code or 0
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""

WORKS = [
    "plan deepseek-v2-lite --quantization int4 --memory 24GB",
    "inspect mite --json",
    "inspect deepseek-v3 --json",
    "replay --policy farthing --seeds 1",
    "fleet --help",
    "bench serve --help",
    "chat --help",
    "list --json",
    "show mite --json",
    "pack mite --out packed.bin",
    "generate --prompt x --max-tokens 4",
    "doctor --no-measure --json",
]
NEEDS_TORCH = [
    "serve mite --port 0 --speculate mtp",
    "check mite",
    "eval mite",
    "compress mite --recipe int4 --out out",
    "train mite",
    "inspect mite --prompts prompts.txt",
]


@dataclass(frozen=True)
class Result:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Every command above, one after the other in one process, with an empty cache."""
    here = tmp_path_factory.mktemp("commands")
    (here / "prompts.txt").write_text("def f\n")
    lines = WORKS + NEEDS_TORCH
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + RUN, json.dumps([shlex.split(line) for line in lines])],
        capture_output=True, text=True, env=ENVIRONMENT | {"XDG_CACHE_HOME": str(here)}, cwd=here,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = map(json.loads, done.stdout.splitlines())
    return {line: Result(*result) for line, result in zip(lines, said, strict=True)}


@pytest.mark.parametrize("line", WORKS)
def test_commands_that_need_no_torch(results: dict[str, Result], line: str) -> None:
    assert results[line].status == 0, results[line].err
    assert results[line].out


def test_doctor_is_content_without_torch(results: dict[str, Result]) -> None:
    pytest.importorskip("farthing._native")
    report = json.loads(results[WORKS[-1]].out)
    backend = next(check for check in report["checks"] if check["name"] == "backend")
    assert report["healthy"] and "auto resolves to cpu/" in backend["detail"]


@pytest.mark.parametrize("line", NEEDS_TORCH)
def test_one_line_names_the_extra_and_the_index_of_wheels_without_cuda(
    results: dict[str, Result], line: str
) -> None:
    assert results[line].status == 2 and "listening" not in results[line].err
    (said,) = [text for text in results[line].err.splitlines() if " INFO " not in text]
    assert re.match(r"error: needs PyTorch: pip install .*'torch>=2\.9'", said)
    assert said.endswith(f"(without CUDA: add --extra-index-url {extras.CPU_WHEELS})")


@contextmanager
def served(begin: str, environment: Mapping[str, str]) -> Iterator[str]:
    """The URL of `farthing serve` once it is ready. begin: Python in front of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{begin}from farthing.cli.app import main; main()", "serve", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "ready after" in said and "listening on" in said:
            break
    try:
        found = re.search(r"listening on (http://\S+)", said)
        assert found, said
        yield found[1]
    finally:
        process.kill()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the embedded model on its first start, which packs it."""
    pytest.importorskip("farthing._native")
    environment = ENVIRONMENT | {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    with served("import sys; sys.modules['torch'] = None; ", environment) as first:
        yield first


def test_the_first_start_packs_and_serves(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    plain = client.completions.create(model="mite", prompt="def f(", max_tokens=8, temperature=0, logprobs=2)
    assert plain.usage and plain.usage.completion_tokens == 8
    stream = client.completions.create(
        model="mite", prompt="def f(", max_tokens=8, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == plain.choices[0].text
    messages = [{"role": "user", "content": "def f("}]
    chat = client.chat.completions.create(model="mite", messages=messages, max_tokens=8)  # type: ignore[arg-type]
    assert chat.choices[0].message.content
    assert "farthing:generation_tokens_total" in httpx.get(f"{url}/metrics").text
