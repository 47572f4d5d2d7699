"""Time from process launch to the first token, and peak memory; ours and the peers interleaved.

    python bench/startup.py --model L576 --weights int4 --llama-bench ik_llama.cpp=PATH/llama-bench

Ours maps a packed file; llama.cpp maps its GGUF and, where its name says so, repacks it as in
bench/decode.py. Files are in the page cache beforehand (one uncounted round). Timing ends when the line that
follows the first token (prompt: 8 tokens) is read. Memory is the kernel's high-water mark of resident pages,
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
from pathlib import Path
from typing import Any

from decode import GGUF_TYPES, keep_section, log, packed
from peers import NEW, PROMPT, LlamaCpp
from random_model import SIZES, make_model

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


def systems(a: argparse.Namespace, model: Path) -> dict[str, tuple[Any, Path]]:
    """name -> (a function of prompt, new and batch that returns command and awaited line, weights)."""
    file = packed(model, a.weights, a.threads)

    def ours(prompt: int, new: int, batch: int) -> tuple[list[Any], str]:
        return [sys.executable, "-c", OURS, model, file, a.threads, prompt, new, batch], r"\| first"

    found: dict[str, tuple[Any, Path]] = {"ours": (ours, file)}
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
            ) -> tuple[list[Any], str]:
                command = [build.binaries / "llama-batched-bench", "-m", gguf, "-t", a.threads, "-c", 4096]
                shape = ["-npp", prompt, "-ntg", new, "-npl", batch, "-b", 2048, "-ub", 512]
                return command + shape + (["-rtr"] if repack else []), rf"\|\s*{prompt} \|"

            found[f"{build.name} {kind}{', repacked' if repack else ''}"] = (peer, gguf)
    return found


def main() -> None:
    """Parse, run, print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=SIZES, default="L576")
    p.add_argument("--weights", choices=GGUF_TYPES, default="int4")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--llama-bench", action="append", default=[], metavar="NAME=PATH")
    p.add_argument("--cache", type=lambda d: Path(d).resolve(), default=Path.home() / ".cache/farthing/bench")
    p.add_argument("--into", type=Path, metavar="FILE", help="file to add the figures to, for bench/page.py")
    a = p.parse_args()
    model = make_model(a.model, a.cache)
    rows = []
    found = systems(a, model)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(a.rounds + 1):
        for name, (command, _) in found.items():
            taken, _ = launch(*command(8, 1, 1))
            if turn:
                seconds[name].append(taken)
    for name, (command, weights) in found.items():
        _, peak = launch(*command(PROMPT, NEW, 16))
        rows.append({
            "system": name, "first_token_s": statistics.median(seconds[name]), "peak_bytes": peak,
            "weights_bytes": weights.stat().st_size,
        })  # fmt: skip
        log.print(rows[-1])
    result = {"model": a.model, "weights": a.weights, "rows": rows}
    if a.into:
        keep_section(a.into, "start", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
