"""llama.cpp on files that `farthing export` writes: it loads them and computes what they say.

FARTHING_LLAMA_SERVER names its llama-server; without it the tests are skipped.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from farthing.compress.gguf import export_gguf
from farthing.model.fields import ConfigError
from farthing.upstream import free_port
from tests.compress.test_gguf import FAMILIES, logits, with_tokenizer
from tests.parity.families import build

SERVER = os.environ.get("FARTHING_LLAMA_SERVER")
pytestmark = pytest.mark.skipif(not SERVER, reason="FARTHING_LLAMA_SERVER is not set")


@contextmanager
def llama_server(model: Path) -> Iterator[httpx.Client]:
    port, log = free_port("127.0.0.1"), model.with_suffix(".log")
    command = [str(SERVER), "-m", str(model), "--port", str(port), "-c", "256", "-np", "1", "-t", "1"]
    command += ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-warmup"]
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        try:
            while True:
                assert process.poll() is None, log.read_text()[-2000:]
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.05)
            yield client
        finally:
            process.kill()


def theirs(client: httpx.Client, ids: list[int], size: int) -> torch.Tensor:
    """Log probabilities of the token after `ids`."""
    body: dict[str, Any] = {"prompt": ids, "n_predict": 1, "n_probs": size, "temperature": 0, "seed": 0}
    reply = client.post("/completion", json=body).raise_for_status().json()
    found = torch.full((size,), float("nan"), dtype=torch.float64)
    for token in reply["completion_probabilities"][0]["top_logprobs"]:
        found[token["id"]] = token["logprob"]
    assert not found.isnan().any()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_the_same_model(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every architecture, on the first random model of which GGUF can say all and we warn of nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.WARNING, "farthing")
    for seed in range(200):
        folder, out = tmp_path / str(seed), tmp_path / f"{seed}.gguf"
        size = build(family, seed, folder).config.get_text_config().vocab_size
        caplog.clear()
        try:
            export_gguf(with_tokenizer(folder, size), out)
        except ConfigError:
            continue
        if "llama.cpp" not in caplog.text:
            break
    ids = torch.arange(24) * 7 % (size - 4)
    expected = logits(folder, ids).double().log_softmax(-1)
    with llama_server(out) as client:
        for count in (1, 5, 24):
            p = expected[count - 1]
            divergence = (p.exp() * (p - theirs(client, ids[:count].tolist(), size))).sum()
            assert divergence < 1e-5, (seed, count)
