"""The peers of bench/decode.py. Each is a `Measure`: a point of the table -> tokens/s, or None.

llama.cpp and ik_llama.cpp run their own llama-bench and llama-batched-bench, or their Python bindings in a
separate process (bench/peer), which answers "BATCH PROMPT NEW" with seconds, is measured like Farthing, and
is paused between its turns.

llama-batched-bench uses token 0 for every sequence and position, so all sequences select the same experts
and its batch rows read fewer weights than ours, whose sequences differ. To give it random tokens, replace the
0 in `common_batch_add(batch, 0, …)` of its source by `rand() % llama_n_vocab(llama_get_model(ctx))`.

`--gguf Q4_0+Q8_0` has feed-forwards in 4 bits and the rest in 8, the bytes of our int4; `--gguf MXFP4` keeps
the experts of a gpt-oss checkpoint.

Where memory does not hold two copies of a large model, repack it in a file beforehand and run that alone:
`llama-quantize --repack MODEL-NAME-Q4_0.gguf MODEL-NAME-Q4_0_R8.gguf Q4_0_R8`, then `--gguf Q4_0_R8
--no-repack`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limits import Point

PROMPT, NEW = 128, 64
WARM_UP = 512  # tokens of an untimed prompt, which use every expert
GGUF_TYPES = {"bf16": ["BF16"], "int8": ["Q8_0"], "int4": ["Q4_0"]}
FEED_FORWARD = r"ffn_(gate|up|down)(_exps|_shexp)?\.weight=q4_0"
Measure = Callable[[Point], float | None]
Seconds = Callable[[int, int, int], float]


def by_generating(seconds: Seconds, new: int = NEW) -> Measure:
    """Rates of a system that generates; the decode rate is measured over `new` additional tokens.

    An untimed prompt runs first, because another system may have evicted the weights from memory.
    """

    def measure(point: Point) -> float:
        seconds(1, WARM_UP, 1)
        if point.kind == "prefill":
            return point.context / seconds(1, point.context, 1)
        before = min(seconds(point.batch, point.context, 1) for _ in range(2))
        return point.batch * new / (seconds(point.batch, point.context, new + 1) - before)

    return measure


@dataclass(frozen=True)
class LlamaCpp:
    """A build of llama.cpp or ik_llama.cpp inside its source tree."""

    name: str
    binaries: Path
    new: int = NEW
    """Tokens per sequence of a decode rate."""

    @property
    def sources(self) -> Path:
        """The directory above the binaries that holds the converter."""
        for directory in self.binaries.parents:
            if (directory / "convert_hf_to_gguf.py").is_file():
                return directory
        raise SystemExit(
            f"no convert_hf_to_gguf.py above {self.binaries}; expected a build inside its source tree"
        )

    @property
    def repacks(self) -> bool:
        """Whether a flag repacks weights at load: ik_llama.cpp has one, llama.cpp always repacks."""
        return (self.sources / "examples/llama-bench").is_dir()

    def gguf(self, model: Path, kind: str) -> Path:
        """The model in the peer's format, converted with the peer's tools."""
        whole = model.resolve().with_name(f"{model.name}-{self.name}.gguf")
        out = whole if kind == "BF16" else whole.with_name(f"{model.name}-{self.name}-{kind}.gguf")
        if out.exists():
            return out
        if kind == "MXFP4":  # experts as gpt-oss stores them
            return self._convert(model, "q8_0", out)
        if not whole.exists():
            self._convert(model, "bf16", whole)
        if out != whole:
            base, _, rest = kind.partition("+")
            flag = "--custom-q" if self.repacks else "--tensor-type"
            command = [self.binaries / "llama-quantize", *([flag, FEED_FORWARD] if rest else [])]
            _run(*command, whole, out, rest or base, "2")
        return out

    def _convert(self, model: Path, kind: str, out: Path) -> Path:
        convert = Path(__file__).with_name("convert_gguf.py")
        script = self.sources / "convert_hf_to_gguf.py"
        flags = ["--no-mtp"] if "Qwen3_5" in (model / "config.json").read_text(encoding="utf-8") else []
        _run(sys.executable, convert, script, model, "--outtype", kind, "--outfile", out, *flags)
        return out

    def measure(self, model: Path, kind: str, threads: int, repack: bool = True) -> Measure:
        """Measure with the peer's own benchmarks, with weights as stored and, unless `repack` is False,
        repacked at load if the build can; the faster counts: it depends on the format and the batch."""
        common = ["-m", self.gguf(model, kind), "-t", threads]
        ways = (False, True) if repack and self.repacks else (False,)

        def measure(point: Point) -> float:
            return max(self._rate(point, common, repack) for repack in ways)

        return measure

    def _rate(self, point: Point, common: list[Any], repack: bool) -> float:
        batch, prompt = point.batch, point.context
        if point.kind == "prefill" or batch == 1:
            new = self.new
            after = ["-n", 0, "-gp", f"{prompt},{new}"] if self.repacks else ["-n", new, "-d", prompt]
            shape = ["-p", prompt, "-n", 0] if point.kind == "prefill" else ["-p", 0, *after]
            flags = ["-rtr", 1] if repack else []
            text = _output(self.binaries / "llama-bench", *common, "-r", 2, *flags, "-o", "json", *shape)
            rows = json.loads(text[text.index("[\n") : text.rindex("]") + 1])
            return float(rows[-1]["avg_ts"])
        context = batch * (prompt + self.new) + 256
        text = _output(
            self.binaries / "llama-batched-bench", *common, *(["-rtr"] if repack else []),
            "-c", context, "-b", 2048, "-ub", 512, "-npp", prompt, "-ntg", self.new, "-npl", batch,
        )  # fmt: skip
        row = [line for line in text.splitlines() if re.match(rf"\|\s*{prompt} \|", line)][-1]
        return float(row.split("|")[8])  # S_TG


class Child:
    """A peer in its own process, stopped while others are measured."""

    def __init__(self, command: list[str | int | Path]) -> None:
        self._process = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        atexit.register(self._end)  # a stopped process would outlive this one
        self._read("ready")
        self._signal(signal.SIGSTOP)

    def measure(self, point: Point, new: int = NEW) -> float | None:
        """Measure by generating; long cached contexts, which it would recompute every time, are skipped."""
        cached = point.kind == "decode" and point.context > PROMPT
        return None if cached else by_generating(self._seconds, new)(point)

    def _seconds(self, batch: int, prompt: int, new: int) -> float:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(f"{batch} {prompt} {new}\n")
        self._process.stdin.flush()
        seconds = float(self._read("seconds").split()[1])
        self._signal(signal.SIGSTOP)
        return seconds

    def _read(self, word: str) -> str:
        """The next line that starts with `word`; other output of the peer goes to stderr."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line
            sys.stderr.write(line)
        raise SystemExit(f"{self._process.args!r} ended with status {self._process.wait()}")

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has already exited
            self._signal(signal.SIGKILL)
        self._process.wait()


def _run(*command: object) -> None:
    subprocess.run([str(c) for c in command], check=True, stdout=sys.stderr)


def _output(*command: Any) -> str:
    with tempfile.TemporaryDirectory() as where:  # some leave a log where they run
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, errors="replace", cwd=where
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr
