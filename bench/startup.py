"""Time from process launch to the first token, and peak memory; ours and the peers interleaved.

    python bench/startup.py --model L576 --weights int4 --llama-bench ik_llama.cpp=PATH/llama-bench

Ours maps a packed file; llama.cpp maps its GGUF and, where its name says so, repacks it as in
bench/decode.py. Files are in the page cache beforehand (one uncounted round); with --cold, every launch is
repeated after the model, the packed file and Python's files were dropped from it. Timing ends when the line
that follows the first token (prompt: 8 tokens) is read; over HTTP, with the first byte of the answer's body.
The client polls every 2 ms. Memory is the kernel's high-water mark of resident pages,
including mapped files, after 16 sequences of 128 + 64 tokens, shown next to the size of the weights' file.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decode import GGUF_TYPES, log, packed
from page_cache import evict, files_of_python, resident
from peers import NEW, PROMPT, LlamaCpp
from random_model import MODELS, make_model

OURS = """
import sys
from farthing import LLM, SamplingParams
model, packed, threads, prompt, new, batch = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
llm = LLM(model, backend="cpu", packed=packed, threads=threads, skip_tokenizer_init=True, max_model_len=1024,
          max_num_seqs=16, num_blocks=512, kv_cache_dtype="bfloat16")
greedy = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
llm.generate([[3 + i] * prompt for i in range(batch)], greedy, use_tqdm=False)
print("| first token", flush=True)
"""


HOST = "127.0.0.1"


@dataclass(frozen=True)
class System:
    """A program. start: (prompt tokens, new tokens, sequences) -> (seconds, peak resident bytes)."""

    start: Callable[[int, int, int], tuple[float, int]]
    weights: Path
    in_batches: bool = True  # whether `start` can run several sequences


def launch(command: list[Any], starts: str) -> tuple[float, int]:
    """(seconds until a line of the output matches `starts`, peak resident bytes of the process)."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(c) for c in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=tempfile.gettempdir(),  # some write a log to their working directory
    )
    assert process.stdout is not None
    seconds = 0.0
    for line in process.stdout:
        if not seconds and re.match(starts, line):
            seconds = time.perf_counter() - began
    _, status, used = os.wait4(process.pid, 0)
    if status or not seconds:
        raise SystemExit(f"{' '.join(map(str, command))} failed with status {status}")
    return seconds, used.ru_maxrss * 1024


def _answers(request: urllib.request.Request) -> bool:
    """Whether the server is up and answers with a first byte; 503 while it loads the model."""
    try:
        with urllib.request.urlopen(request) as answer:
            return bool(answer.read(1))
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise
    except (ConnectionError, urllib.error.URLError):
        pass
    return False


def over_http(model: Path, file: Path, threads: int) -> tuple[float, int]:
    """Like `launch`: (seconds until `farthing serve` answers with a token, peak resident bytes)."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    body = json.dumps({"prompt": [3] * 8, "max_tokens": 1, "temperature": 0, "stream": True}).encode()
    url, headers = f"http://{HOST}:{port}/v1/completions", {"Content-Type": "application/json"}
    command = [sys.executable, "-m", "farthing", "serve", model, "--packed", file, "--port", port]
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(c) for c in [*command, "--threads", threads, "--max-model-len", 1024]],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not _answers(urllib.request.Request(url, body, headers)):
        if process.poll() is not None:
            raise SystemExit(f"{' '.join(map(str, command))} failed with status {process.returncode}")
        time.sleep(0.002)
    seconds = time.perf_counter() - began
    process.terminate()
    return seconds, os.wait4(process.pid, 0)[2].ru_maxrss * 1024


def systems(a: argparse.Namespace, model: Path) -> dict[str, System]:
    """By name."""
    file = packed(model, a.weights, a.threads)

    def ours(prompt: int, new: int, batch: int) -> tuple[float, int]:
        return launch([sys.executable, "-c", OURS, model, file, a.threads, prompt, new, batch], r"\| first")

    found = {
        "ours": System(ours, file),
        "ours, over HTTP": System(lambda *_: over_http(model, file, a.threads), file, in_batches=False),
    }
    for given in a.llama_bench:
        name, _, binary = given.rpartition("=")
        build = LlamaCpp(name or "llama.cpp", Path(binary).resolve().parent)
        kind = GGUF_TYPES[a.weights][0]
        gguf = build.gguf(model, kind)
        for repack in (False, True) if build.repacks else (False,):

            def peer(
                prompt: int,
                new: int,
                batch: int,
                build: LlamaCpp = build,
                repack: bool = repack,
                gguf: Path = gguf,
            ) -> tuple[float, int]:
                command = [build.binaries / "llama-batched-bench", "-m", gguf, "-t", a.threads, "-c", 4096]
                shape = ["-npp", prompt, "-ntg", new, "-npl", batch, "-b", 2048, "-ub", 512]
                return launch(command + shape + (["-rtr"] if repack else []), rf"\|\s*{prompt} \|")

            found[f"{build.name} {kind}{', repacked' if repack else ''}"] = System(peer, gguf)
    return found


def measure(a: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Warm and cold launches in alternating rounds, then memory."""
    found = systems(a, model)
    warm, cold, kept = (collections.defaultdict[str, list[float]](list) for _ in range(3))
    files = [*model.iterdir(), *(s.weights for s in found.values()), *(files_of_python() if a.cold else ())]
    for turn in range(a.rounds + 1):
        for name, system in found.items():
            seconds, _ = system.start(8, 1, 1)
            if turn:
                warm[name].append(seconds)
    for _ in range(a.rounds if a.cold else 0):
        for name, system in found.items():
            evict(files)
            kept[name].append(resident(system.weights))
            cold[name].append(system.start(8, 1, 1)[0])
    rows = []
    for name, system in found.items():
        row: dict[str, Any] = {"system": name, "first_token_s": statistics.median(warm[name])}
        if a.cold:
            row |= {"cold_first_token_s": statistics.median(cold[name]), "cold_s": cold[name],
                    "cold_resident": max(kept[name])}  # fmt: skip
        if system.in_batches:
            row |= {
                "peak_bytes": system.start(PROMPT, NEW, 16)[1],
                "weights_bytes": system.weights.stat().st_size,
            }
        rows.append(row | {"warm_s": warm[name]})
        log.print(rows[-1])
    return rows


def main() -> None:
    """Parse, run, print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=MODELS, default="L576")
    p.add_argument("--weights", choices=GGUF_TYPES, default="int4")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--cold", action="store_true", help="also launch with nothing in the page cache")
    p.add_argument("--llama-bench", action="append", default=[], metavar="NAME=PATH")
    p.add_argument("--cache", type=lambda d: Path(d).resolve(), default=Path.home() / ".cache/farthing/bench")
    a = p.parse_args()
    model = make_model(a.model, a.cache)
    rows = measure(a, model)
    result = {"model": a.model, "weights": a.weights, "rows": rows}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
