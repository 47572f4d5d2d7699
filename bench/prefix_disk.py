"""The prefix cache on disk: time to first token after a restart, its cost when unused, and file sizes.

    python bench/prefix_disk.py restart --model L576 --prompt 8192 --rounds 3
    python bench/prefix_disk.py cost --model S576 --rounds 40
    python bench/prefix_disk.py files

restart: each round starts three processes: with an empty directory, with the first one's files, and after
those files were dropped from the page cache. A process loads the packed model, computes a short prompt once,
and is timed from the submission of the long prompt to its first token. With `--deterministic` the tokens must
be the same in all three; without it a cold prompt's last chunk is rounded differently from the few tokens
that a cached prompt computes, and each round says whether the tokens are the same. cost: two engines in one
process, with and without the directory, alternate on the same new prompts; ratios are paired, for wall time
and for the process's CPU time, which other work on the machine affects less. files: writes and reads 8,192
tokens of L576's cache in files of several sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from decode import packed
from farthing import LLM, SamplingParams
from farthing.engine.disk_cache import store as disk_store
from farthing.engine.disk_cache.files import Format, Index
from farthing.engine.disk_cache.store import BlockMemory, DiskStore, Shelf
from farthing.engine.prefetch import Load
from farthing.engine.sequence import PrefixCache
from farthing.engine.stats import DiskStats
from farthing.ops.api import LatentCache
from random_model import make_model

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


def engine(a: argparse.Namespace, **options: Any) -> LLM:
    """The packed model on the CPU."""
    model = make_model(a.model, a.cache)
    return LLM(
        model, backend="cpu", threads=a.threads, packed=packed(model, a.weights, a.threads),
        skip_tokenizer_init=True, max_model_len=a.prompt + 512, max_num_seqs=8, max_num_batched_tokens=512,
        kv_cache_dtype="bfloat16", num_blocks=(a.prompt + 512) // 16 * 2, deterministic=a.deterministic,
        **options,
    )  # fmt: skip


def prompt(length: int, seed: int) -> list[int]:
    """Tokens whose prefix is unique to the seed."""
    numbers = random.Random(seed)
    return [numbers.randrange(3, 32000) for _ in range(length)]


def one_start(a: argparse.Namespace) -> None:
    """One process of `restart`; prints its times and tokens."""
    with engine(a, prefix_cache_dir=a.directory, prefix_cache_disk_bytes=20 << 30) as llm:
        llm.generate([prompt(64, 1)], GREEDY, use_tqdm=False)
        began = time.perf_counter()
        tokens: list[int] = []
        first = 0.0
        for output in llm.stream(prompt(a.prompt, 2), GREEDY):
            first = first or time.perf_counter() - began
            tokens += output.outputs[0].token_ids
            cached = output.num_cached_tokens
    disk = llm.engine.stats.disk
    print(json.dumps({"first": first, "tokens": tokens, "cached": cached, "read_s": disk.read_seconds,
                      "read_mb": disk.read_bytes / 1e6, "write_s": disk.write_seconds,
                      "written_mb": disk.written_bytes / 1e6}))  # fmt: skip


def restart(a: argparse.Namespace) -> None:
    """Measure cold, warm, and from disk."""
    rounds = []
    for _ in range(a.rounds):
        with tempfile.TemporaryDirectory(dir=a.cache) as directory:
            found = [started(a, directory), started(a, directory)]
            for path in Path(directory).rglob("*.kv"):
                forget(path)
            found.append(started(a, directory))
        assert found[0]["cached"] == 0
        same = found[0]["tokens"] == found[1]["tokens"] == found[2]["tokens"]
        assert same or not a.deterministic
        rounds.append(found)
        cold, warm, disk = (f["first"] for f in found)
        print(f"cold {cold:.2f} s, again {warm:.3f} s ({warm / cold:.1%}), "
              f"not in the page cache {disk:.3f} s ({disk / cold:.1%}), "
              f"tokens {'the same' if same else 'differ'}; {found[2]}")  # fmt: skip
    for name, place in (("again", 1), ("not in the page cache", 2)):
        shares = [found[place]["first"] / found[0]["first"] for found in rounds]
        print(f"{name}: {statistics.median(shares):.2%} of the cold time (median of {a.rounds})")


def started(a: argparse.Namespace, directory: str) -> dict[str, Any]:
    """Run one process and return its report."""
    command = [sys.executable, __file__, "start", "--directory", directory, "--model", a.model,
               "--prompt", str(a.prompt), "--weights", a.weights, "--threads", str(a.threads),
               "--cache", str(a.cache), *(["--deterministic"] if a.deterministic else [])]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def cost(a: argparse.Namespace) -> None:
    """Alternate with and without the directory."""
    walls, cpus = [], []
    with tempfile.TemporaryDirectory(dir=a.cache) as directory, engine(a) as without, \
            engine(a, prefix_cache_dir=directory, prefix_cache_disk_bytes=1 << 30) as using:  # fmt: skip
        for turn in range(a.rounds):
            batch = [prompt(a.length, 1000 * turn + i) for i in range(4)]
            took = {}
            for llm in (without, using) if turn % 2 else (using, without):
                wall, cpu = time.perf_counter(), time.process_time()
                llm.generate(batch, replace(GREEDY, max_tokens=a.new), use_tqdm=False)
                time.sleep(a.settle)  # so that the pair includes the writer's work
                took[llm] = time.perf_counter() - wall - a.settle, time.process_time() - cpu
            walls.append(took[using][0] / took[without][0])
            cpus.append(took[using][1] / took[without][1])
        print(using.engine.stats.disk)
    for name, ratios in (("wall time", walls), ("CPU time", cpus)):
        low, high = interval(ratios)
        print(f"{name}: {statistics.median(ratios) - 1:+.2%} ({low - 1:+.2%} ... {high - 1:+.2%}), "
              f"{a.rounds} pairs")  # fmt: skip


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % interval of the median, by resampling."""
    numbers = random.Random(0)
    medians = sorted(statistics.median(numbers.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


def files(a: argparse.Namespace) -> None:
    """Measure 8,192 tokens of L576: 512 blocks of 295 kB."""
    data = torch.randint(-100, 100, (16, 512, 16, 576), dtype=torch.int16).view(torch.bfloat16)
    for size in (1, 1 << 20, 1 << 22, 1 << 23, 1 << 25, 1 << 27):
        writes, reads = [], []
        for _ in range(a.rounds):
            with tempfile.TemporaryDirectory(dir=a.cache) as directory, sizes(size):
                count, stats = written_and_read(Path(directory), LatentCache(data, None))
            writes.append(stats.written_bytes / stats.write_seconds / 1e9)
            reads.append(stats.read_bytes / stats.read_seconds / 1e9)
        print(f"{count} files: written at {statistics.median(writes):.2f} GB/s, read from disk at "
              f"{statistics.median(reads):.2f} GB/s (medians of {a.rounds})")  # fmt: skip


def written_and_read(directory: Path, cache: LatentCache) -> tuple[int, DiskStats]:
    """Store every block of a cache and read it again. Returns the number of files."""
    memory, stats, prefix = BlockMemory(cache.tensors()), DiskStats(), PrefixCache(cache.block_size)
    index = Index(directory, Format(b"0" * 16, memory.block_bytes), 1 << 34)
    index.folder.mkdir()
    hashes = [number.to_bytes(16, "big") for number in range(cache.num_blocks)]
    ended: list[int] = []

    def store() -> DiskStore:
        return DiskStore(
            [Shelf(index, memory)], cache.block_size, stats, lambda load, good: ended.append(good)
        )

    writer = store()
    writer.attach([prefix])
    for block, digest in enumerate(hashes):
        prefix.register(digest, block)
    writer.computed(b"", hashes)
    writer.close()
    paths = list(index.folder.iterdir())
    for path in paths:
        forget(path)
    reader = store()
    reader.read(Load(hashes, list(range(cache.num_blocks)), [], []))
    reader.close()
    assert ended == [cache.num_blocks]
    return len(paths), stats


@contextmanager
def sizes(most: int) -> Iterator[None]:
    """Limit files to `most` bytes."""
    before = disk_store.SEGMENT_BYTES
    disk_store.SEGMENT_BYTES = most
    try:
        yield
    finally:
        disk_store.SEGMENT_BYTES = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("restart", "cost", "files", "start"))
    parser.add_argument("--model", default="L576")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the long prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=256, help="cost: tokens of each prompt")
    parser.add_argument("--new", type=int, default=32, help="cost: tokens of each answer")
    parser.add_argument("--settle", type=float, default=0.0, help="cost: seconds for the writer after each")
    parser.add_argument("--cache", type=Path, default=Path("build/bench"), help="models and directories")
    parser.add_argument("--deterministic", action="store_true", help="batch-invariant attention")
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.cache.mkdir(parents=True, exist_ok=True)
    {"restart": restart, "cost": cost, "files": files, "start": one_start}[a.what](a)


if __name__ == "__main__":
    main()
