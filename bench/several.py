"""Several models in one server under random requests: answers lost or wrong, models unloaded in use, memory.

    python bench/several.py --limit 10.5GB --minutes 10

Writes three random models (gpt-oss's shape, ten layers, experts in MXFP4: 4.8 GB packed each), which together
exceed the limit, and serves them with `farthing serve --models`. Clients send streamed and whole completions
to models at random; some leave early. First every prompt is answered once by every model, one after the
other: later answers must be the same. A stream that yields text after its model was reported as unloading was
unloaded in use. Memory is the sum over the server's processes of their proportional set sizes, every second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

import random_model
from farthing.config import parse_bytes

SHAPE, LAYERS = "gpt-oss-20b", 10
NAMES = ("a", "b", "c")
PROMPTS = [" ".join(f"w{i * 37 + k:x}" for k in range(4 + 3 * i)) for i in range(6)]
TAIL = 1 << 16  # bytes at the end of a file, by which a packed file knows its checkpoint
GRACE = 0.5  # seconds in which text that was sent before an unload may still arrive
MOST_WAIT = 600.0  # seconds of a request, as the server waits for its model
MOST_END = 60.0  # seconds in which the server ends


def write_models(work: Path) -> Path:
    """Random models in packed files, and the list of them that `--models` takes."""
    random_model.SLICES["several"] = (SHAPE, LAYERS, "GptOssForCausalLM")
    tables = []
    for seed, name in enumerate(NAMES):
        packed = work / f"{name}.packed"
        model = work / name / "several"
        if not packed.exists():
            random_model.make_model("several", work / name, seed)
            farthing = [sys.executable, "-m", "farthing"]
            subprocess.run([*farthing, "pack", str(model), "-o", str(packed)], check=True)
            for file in model.glob("*.safetensors"):
                drop_values(file)
        tables.append(
            f'[{name}]\nmodel = "{model}"\npacked = "{packed}"\nmax_model_len = 1024\n'
            'kv_cache_memory = "200MB"\nmax_num_seqs = 8\n'
        )
    listed = work / "models.toml"
    listed.write_text("\n".join(tables))
    return listed


def drop_values(file: Path) -> None:
    """Free a checkpoint's blocks on disk: its packed file has the values. Header and end stay."""
    size = file.stat().st_size
    with file.open("r+b") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(size - TAIL)
        tail = stream.read()
        stream.truncate(header)
        stream.truncate(size)
        stream.seek(size - TAIL)
        stream.write(tail)


@dataclass
class Stream:
    """The arrival of an answer's text."""

    model: str
    arrivals: list[float] = field(default_factory=list)


@dataclass
class Run:
    """What happened."""

    url: str
    known: dict[tuple[str, int], str] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    streams: list[Stream] = field(default_factory=list)
    unloads: list[tuple[float, str]] = field(default_factory=list)
    loads: int = 0
    log: list[str] = field(default_factory=list)
    peak: int = 0

    async def ask(
        self, http: aiohttp.ClientSession, model: str, number: int, leave: bool, stream: bool
    ) -> str:
        """The text of an answer, or how it was lost."""
        body = {"model": model, "prompt": PROMPTS[number], "max_tokens": 24, "temperature": 0.0}
        body |= {"ignore_eos": True, "stream": stream}
        arrived = Stream(model)
        self.streams.append(arrived)
        text = ""
        async with http.post(f"{self.url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise ConnectionError(f"{answer.status}: {await answer.text()}")
            if not stream:
                return str((await answer.json())["choices"][0]["text"])
            async for line in answer.content:
                data = line.decode().strip().removeprefix("data: ")
                if data == "[DONE]":
                    return text
                if data.startswith("{"):
                    arrived.arrivals.append(time.monotonic())
                    text += json.loads(data)["choices"][0]["text"]
                    if leave and len(arrived.arrivals) > 4:
                        return ""
        raise ConnectionError("the stream ended early")

    async def send(self, minutes: float, clients: int, seed: int) -> None:
        """All requests, once the server listens."""
        while not (found := [line.split()[-1] for line in self.log if "listening on " in line]):
            await asyncio.sleep(0.05)
        self.url = found[0]
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=MOST_WAIT)) as http:
            for model in NAMES:
                for number in range(len(PROMPTS)):
                    self.known[model, number] = await self.ask(http, model, number, False, False)
            print("all answers are known; random requests begin", flush=True)
            until = time.monotonic() + 60 * minutes
            rngs = [random.Random(seed * 1000 + i) for i in range(clients)]
            await asyncio.gather(*(self.client(http, rng, until) for rng in rngs))

    async def client(self, http: aiohttp.ClientSession, rng: random.Random, until: float) -> None:
        """Random requests, one after the other."""
        favourite = rng.choice(NAMES)
        while time.monotonic() < until:
            model = favourite if rng.random() < 0.6 else rng.choice(NAMES)
            number, leave, stream = rng.randrange(len(PROMPTS)), rng.random() < 0.1, rng.random() < 0.7
            try:
                text = await self.ask(http, model, number, leave and stream, stream)
            except (OSError, aiohttp.ClientError, TimeoutError) as error:
                self.ended["lost"] += 1
                print(f"lost: {model}: {error}", flush=True)
            else:
                right = text == self.known[model, number]
                self.ended["left" if leave and stream else "right" if right else "wrong"] += 1
            await asyncio.sleep(rng.expovariate(1 / 2.0))
            if rng.random() < 0.05:
                favourite = rng.choice(NAMES)

    async def read(self, output: asyncio.StreamReader) -> None:
        """The server's log: loads and unloads as they are reported."""
        async for line in output:
            text = line.decode(errors="replace").rstrip()
            self.log.append(text)
            self.loads += ": loading; " in text
            if found := re.search(r"(\w+): unloading", text):
                self.unloads.append((time.monotonic(), found[1]))

    async def watch(self, pid: int) -> None:
        """The memory of the server's processes."""
        while True:
            self.peak = max(self.peak, await asyncio.to_thread(tree_memory, pid))
            await asyncio.sleep(1.0)

    def in_use(self) -> int:
        """Unloads of a model that was answering."""
        return sum(
            any(
                s.model == model and s.arrivals and s.arrivals[0] < at < s.arrivals[-1] - GRACE
                for s in self.streams
            )
            for at, model in self.unloads
        )


def tree_memory(root: int) -> int:
    """Proportional set size of a process and its descendants, in bytes."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    total = 0
    for process in parents:
        above = process
        while above not in (root, 0, 1):
            above = parents.get(above, 0)
        if above == root:
            with suppress(OSError):
                lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


async def measure(listed: Path, limit: str, minutes: float, clients: int, seed: int) -> Run:
    """Serve, and send requests."""
    command = [sys.executable, "-m", "farthing", "serve", "--models", str(listed), "--models-memory", limit]
    process = await asyncio.create_subprocess_exec(
        *command, "--port", "0", stderr=asyncio.subprocess.PIPE, env=os.environ | {"COLUMNS": "200"}
    )
    assert process.stderr is not None
    run = Run("")
    reading = asyncio.create_task(run.read(process.stderr))
    watching = asyncio.create_task(run.watch(process.pid))
    ended = asyncio.create_task(process.wait())
    sending = asyncio.create_task(run.send(minutes, clients, seed))
    try:
        await asyncio.wait({sending, reading, watching, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            raise SystemExit("\n".join([*run.log[-40:], "the server has ended, or could not be watched"]))
        await sending
    finally:
        sending.cancel()
        with suppress(ProcessLookupError):
            process.terminate()
        if not (await asyncio.wait({ended}, timeout=MOST_END))[0]:
            process.kill()
        for task in (reading, watching):
            task.cancel()
    return run


@contextmanager
def workplace(given: Path | None) -> Iterator[Path]:
    """A directory: the one given, which stays, or one that is removed."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    made = Path(tempfile.mkdtemp(prefix="several-"))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def main() -> None:
    """Print what happened as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", default="10.5GB", help="--models-memory")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="directory for the models, kept; default: a temporary one")
    a = parser.parse_args()
    with workplace(a.work) as work:
        listed = write_models(work)
        sizes = {name: (work / f"{name}.packed").stat().st_size for name in NAMES}
        run = asyncio.run(measure(listed, a.limit, a.minutes, a.clients, a.seed))
    found: dict[str, Any] = {
        "packed bytes": sizes, "limit": parse_bytes("limit", a.limit), "minutes": a.minutes,
        "answers": dict(run.ended), "loads": run.loads, "unloads": len(run.unloads),
        "unloads in use": run.in_use(), "peak memory": run.peak,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if run.ended["lost"] or run.ended["wrong"] or run.in_use() or run.peak > found["limit"]:
        print("\n".join(run.log[-40:]), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
