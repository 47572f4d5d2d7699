"""The prefix cache on disk survives any end of the server."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from .test_serve_command import ENVIRONMENT, launched, needs_model, wait_ready

PROMPT = "import os\n\n\ndef walk(top):\n    for name in os.listdir(top):\n        print(name)\n" * 5


def metric(url: str, name: str) -> float:
    found = re.search(rf"^farthing:{name}\{{\S+ (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def ask(url: str, key: str) -> tuple[str, int]:
    """(text, cached tokens)"""
    client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    answer = client.completions.create(model="mite", prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens or 0


@needs_model
def test_prefixes_of_a_killed_server_are_reused(tmp_path: Path) -> None:
    options = ("--prefix-cache-dir", str(tmp_path), "--prefix-cache-disk-bytes", "100000000")
    keys = ("--api-key", "me:sk-1", "--api-key", "you:sk-2")
    with launched(*options, *keys) as (process, url):
        wait_ready(url)
        text, cached = ask(url, "sk-1")
        assert cached == 0
        deadline = time.monotonic() + 30
        while not (written := metric(url, "prefix_disk_written_bytes_total")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    with launched(*options, *keys) as (process, url):
        wait_ready(url)
        again, cached = ask(url, "sk-1")
        assert again == text
        assert cached > 90
        assert metric(url, "prefix_disk_hits_total") == cached
        assert 0 < metric(url, "prefix_disk_read_bytes_total") <= written
        assert metric(url, "prefix_disk_bytes") > 0
        assert ask(url, "sk-2") == (text, 0), "another key's prompts stay its own"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@needs_model
def test_a_conversation_goes_on_after_a_restart(tmp_path: Path) -> None:
    """Its answers keep their sampled tokens, which the tokenizer often splits otherwise, for their key."""
    options = ("--prefix-cache-dir", str(tmp_path), "--api-key", "me:sk-1", "--api-key", "you:sk-2")
    turns: list[Any] = []

    def talk(url: str, text: str, key: str = "sk-1") -> tuple[int, int, int]:
        """Tokens of the prompt, how many were cached, and tokens of the answer, which has whole characters
        and no blanks around it: the text that comes back says nothing else."""
        asked = {"role": "user", "content": text}
        client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        for seed in range(100 * len(turns), 100 * len(turns) + 20):
            answer = client.chat.completions.create(
                model="mite", messages=[*turns, asked], max_tokens=40, temperature=1.5, seed=seed
            )
            said = answer.choices[0].message.content or ""
            if "\ufffd" not in said and said == said.strip():
                break
        found = answer.usage
        assert found is not None and found.prompt_tokens_details is not None
        if key == "sk-1":
            turns.extend([asked, {"role": "assistant", "content": answer.choices[0].message.content}])
        return found.prompt_tokens, found.prompt_tokens_details.cached_tokens or 0, found.completion_tokens

    with launched(*options) as (process, url):
        wait_ready(url)
        for number in range(4):
            prompt, _, said = talk(url, f"x = {number}")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    with launched(*options) as (process, url):
        wait_ready(url)
        _, cached, _ = talk(url, "y = 1")
        assert cached > prompt + said - 32  # two blocks
        counted = httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer sk-1"}).text
        assert re.search(r'continued_answers_total\{tokens="sampled"\} [1-9]', counted)
        assert 'continued_answers_total{tokens="changed"} 0.0' in counted
        assert talk(url, "y = 2", "sk-2")[1] == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.slow
@needs_model
def test_full_disk_logs_one_warning(tmp_path: Path) -> None:
    """A file size limit of 4 KiB acts like a full disk."""
    code = f"""
import logging, resource, time
logging.basicConfig(level=logging.WARNING)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from farthing import LLM, SamplingParams
with LLM("mite", backend="reference", threads=1, prefix_cache_dir={str(tmp_path)!r}) as llm:
    for start in range(2):
        prompt = list(range(10 + start, 210 + start))
        greedy = SamplingParams(max_tokens=4, temperature=0)
        said = [llm.generate([prompt], greedy, use_tqdm=False)[0].outputs[0].token_ids for _ in range(2)]
        assert said[0] == said[1]
        time.sleep(1.6)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "disk_cache" in line]
    assert len(warnings) == 1 and "File too large" in warnings[0], done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
