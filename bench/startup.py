"""Time from process launch to the first token, and peak memory; ours and the peers interleaved.

    python bench/startup.py --model L576 --weights int4 --llama-bench ik_llama.cpp=PATH/llama-bench

Ours maps a packed file; llama.cpp maps its GGUF and, where its name says so, repacks it as in
bench/decode.py. Files are in the page cache beforehand (one uncounted round). Timing ends when the line
that follows the first token (prompt: 8 tokens) is read; over HTTP, with the first byte of the answer's body.
The client polls every 2 ms. Memory is the kernel's high-water mark of resident pages,
including mapped files, after 16 sequences of 128 + 64 tokens, shown next to the size of the weights' file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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

from decode import GGUF_TYPES, packed
from harness import CACHE, FARTHING, HOST, free_port, in_turns, log, parser, report
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


@dataclass(frozen=True)
class System:
    """A program. start: (prompt tokens, new tokens, sequences) -> (seconds, peak resident bytes)."""

    start: Callable[[int, int, int], tuple[float, int]]
    weights: Path
    in_batches: bool = True  # whether `start` can run several sequences


def launch(command: list[Any], starts: str) -> tuple[float, int]:
    """(seconds until a line of the output matches `starts`, peak resident bytes of the process)."""
    words, where = [str(c) for c in command], tempfile.gettempdir()  # some write a log to where they run
    began = time.perf_counter()
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=where
    )
    assert process.stdout is not None
    seconds = 0.0
    for line in process.stdout:
        if not seconds and re.match(starts, line):
            seconds = time.perf_counter() - began
    _, status, used = os.wait4(process.pid, 0)
    if status or not seconds:
        raise SystemExit(f"{' '.join(words)} failed with status {status}")
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
    port = free_port()
    body = json.dumps({"prompt": [3] * 8, "max_tokens": 1, "temperature": 0, "stream": True}).encode()
    url, headers = f"http://{HOST}:{port}/v1/completions", {"Content-Type": "application/json"}
    command = [*FARTHING, "serve", str(model), "--packed", str(file), "--port", str(port)]
    command += ["--threads", str(threads), "--max-model-len", "1024"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not _answers(urllib.request.Request(url, body, headers)):
        if process.poll() is not None:
            raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
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
        for flags in ([], ["-rtr"]) if build.repacks else ([],):
            command = [build.binaries / "llama-batched-bench", "-m", gguf, *flags]

            def peer(prompt: int, new: int, batch: int, command: list[Any] = command) -> tuple[float, int]:
                shape = ["-npp", prompt, "-ntg", new, "-npl", batch, "-b", 2048, "-ub", 512]
                shape += ["-t", a.threads, "-c", 4096]
                return launch(command + shape, rf"\|\s*{prompt} \|")

            found[f"{build.name} {kind}{', repacked' if flags else ''}"] = System(peer, gguf)
    return found


def measure(a: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Launches in alternating rounds, then memory."""
    found, rows = systems(a, model), []
    launches = in_turns({name: lambda s=s: s.start(8, 1, 1)[0] for name, s in found.items()}, a.rounds)
    for name, system in found.items():
        row: dict[str, Any] = {"system": name, "first_token_s": statistics.median(launches[name])}
        if system.in_batches:
            row["peak_bytes"] = system.start(PROMPT, NEW, 16)[1]
        rows.append(row | {"weights_bytes": system.weights.stat().st_size, "all_s": launches[name]})
        log.print(rows[-1])
    return rows


def main() -> None:
    """Parse, run, print."""
    p = parser(__doc__)
    p.add_argument("--model", choices=MODELS, default="L576")
    p.add_argument("--weights", choices=GGUF_TYPES, default="int4")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--llama-bench", action="append", default=[], metavar="NAME=PATH")
    p.add_argument("--cache", type=lambda d: Path(d).resolve(), default=CACHE)
    a = p.parse_args()
    rows = measure(a, make_model(a.model, a.cache))
    cells = [(r["system"], r["first_token_s"], r.get("peak_bytes", "–"), r["weights_bytes"]) for r in rows]
    headings = ("system", "first token, s", "peak, bytes", "weights, bytes")
    document = {"model": a.model, "weights": a.weights, "rows": rows}
    report(document, a.json, f"{a.model} {a.weights}", headings, cells)


if __name__ == "__main__":
    main()
