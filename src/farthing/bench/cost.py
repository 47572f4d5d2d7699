"""`farthing bench cost`: what each lever saves on one checkpoint, and what it costs in quality.

Every row is one way to serve the same checkpoint on this machine's CPU, measured in its own process (see
`cost_probe`): the original (Hugging Face, eager, bfloat16), then Farthing with one more lever per row
(`levers`). Rows are interleaved in rounds, so a change in the machine's speed affects all of them;
figures are medians over rounds. Every row runs with one thread and with all, and the faster run counts: on a
small model or a busy machine threads may cost more than they gain, especially for the original.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from farthing.checkpoint import Checkpoint, CheckpointWriter
from farthing.compress.api import Options, compress, held_out_sample, load_for
from farthing.compress.evaluate import Comparison, Corpus, compare_with, halves, load_corpus, remember
from farthing.compress.layerwise import baseline
from farthing.compress.recipe import load_recipe
from farthing.config import EngineConfig
from farthing.cost import Machine, RaplMeter
from farthing.files import replace_json
from farthing.model.config import ModelConfig
from farthing.tokenizer_file import read_tokenizer

# The rows of `farthing bench cost`: the original, then one more lever per row, calibrated within a budget.
#
# Weights are rounded by `int8` and `int4`, with the head rounded to
# INT8 while loading. The calibrated adaptive experts may then use the rest of the budget. Every row's quality
# is measured against the original on held-out text not used for calibration. Speculation changes no
# token, so its row has the quality of the previous one.

WINDOW = 1024
HEAD: dict[str, Any] = {"quantization": "int8"}  # of what a calibrated checkpoint left dense
ORIGINAL = "Hugging Face eager, bf16"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Lever:
    """A row. options: fields of EngineConfig; None: the original. model: a directory; None: the source."""

    name: str
    options: dict[str, Any] | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Quality:
    """Relative change of perplexity from the original, with its paired 95 % confidence interval."""

    change: float
    low: float
    high: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.change:+.2%} ({self.low:+.2%} … {self.high:+.2%})"


@dataclass(frozen=True, slots=True)
class Texts:
    """Held-out text, split by document: one half for calibration, the other only for evaluation."""

    calibration: Corpus
    judged: Corpus

    @classmethod
    def of(cls, source: Path, max_tokens: int | None = None) -> Texts:
        """Split the held-out text of `source`. Raises ValueError without a tokenizer."""
        if not (source / "tokenizer.json").exists():
            raise ValueError(f"{source} has no tokenizer.json; expected one to measure quality on text")
        config = ModelConfig.from_directory(source)
        return cls(*halves(load_corpus(held_out_sample(), source, config, WINDOW, max_tokens)))


def levers(source: Path, work: Path, budget: float, texts: Texts, say: Say = lambda _: None) -> list[Lever]:
    """All rows of a dense checkpoint, each adding a lever to the previous row.

    budget: maximum relative perplexity increase of all levers together. work: directory of the calibrated
    checkpoints; finished ones are reused.

    Weights are rounded by `int8` and `int4`, with the head rounded to INT8
    while loading. The calibrated adaptive experts may then use the rest of the budget. Every row's quality is
    measured against the original on held-out text not used for calibration. Speculation changes no token, so
    its row has the quality of the previous one.
    """
    config = ModelConfig.from_directory(source)
    rows = [Lever(ORIGINAL), Lever("Farthing kernels and engine", {})]
    for recipe in ("int8", "int4"):
        served = _calibrated(source, work / recipe, recipe, budget, say)
        rows.append(Lever(f"+ {recipe} weights", HEAD, str(served)))
    if config.n_routed_experts:
        spent = quality(source, served, texts.calibration).change
        rest = (1 + budget) / (1 + max(0.0, spent)) - 1
        if rest <= 0:
            say(f"{served.name} costs {spent:+.2%} on the calibration text: no budget for adaptive experts")
        else:
            served = _calibrated(served, work / "adaptive", "adaptive-experts", rest, say)
            rows.append(Lever("+ adaptive experts", HEAD, str(served)))
    drafts = "mtp+ngram" if config.num_nextn_predict_layers else "ngram"
    return [*rows, Lever("+ speculation: all together", HEAD | {"speculate": drafts}, str(served))]


def quality(source: Path, model: Path, corpus: Corpus) -> Quality:
    """Quality of a checkpoint on the serving kernels relative to `source` in reference arithmetic."""
    served = load_for(model, **HEAD)
    original = baseline(source, corpus, "reference")
    return _quality(compare_with(original, remember(served, corpus), corpus))


def qualities(source: Path, rows: Sequence[Lever], corpus: Corpus) -> Iterator[tuple[str, Quality | None]]:
    """(row name, quality); None for the original, the baseline of the others."""
    base = baseline(source, corpus, "reference")
    by_name: dict[str, Quality] = {}
    for row in rows:
        if row.options is None:
            yield row.name, None
            continue
        model = row.model or str(source)
        if model not in by_name:
            served = load_for(Path(model), quantization=row.options.get("quantization"))
            by_name[model] = _quality(compare_with(base, remember(served, corpus), corpus))
        yield row.name, by_name[model]


def _quality(comparison: Comparison) -> Quality:
    return Quality(comparison.relative_increase, *comparison.interval, comparison.tokens)


def _calibrated(source: Path, out: Path, recipe: str, budget: float, say: Say) -> Path:
    """Compress `source` by a recipe with its gate off; quality is measured per row instead."""
    if (out / "report.json").exists():
        return out
    say(f"calibrating {recipe}")
    chosen = load_recipe(recipe)
    if chosen.adaptive:
        chosen = replace(chosen, max_drop=budget)
    compress(source, out, chosen, Options(window=WINDOW, gate=False))
    return out


@contextmanager
def bf16_checkpoint(path: Path) -> Iterator[Path]:
    """Yield `path` itself if its weights are dense, otherwise a temporary bfloat16 copy.

    transformers needs the copy because its DeepSeek FP8 format runs on GPUs only.
    """
    checkpoint = Checkpoint.open(path)
    if not any(checkpoint.is_quantized(name.removesuffix(".weight")) for name in _matrices(checkpoint)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="farthing-bf16-") as directory:
        _write(checkpoint, Path(directory))
        yield Path(directory)


def tiny_checkpoint(path: Path) -> Path:
    """A random two-layer DeepSeek-V3, saved by transformers."""
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.DeepseekV3ForCausalLM(config).bfloat16().save_pretrained(path)
    return path


def _matrices(checkpoint: Checkpoint) -> list[str]:
    """Weight names, one per module, in any storage format."""
    ends = (".weight", ".weight_packed")
    return sorted({f"{n.rpartition('.')[0]}.weight" for n in checkpoint.names() if n.endswith(ends)})


def _write(checkpoint: Checkpoint, path: Path) -> None:
    writer = CheckpointWriter(path)
    quantized = {name for name in _matrices(checkpoint) if checkpoint.is_quantized(name[: -len(".weight")])}
    for name in quantized:
        writer.add(name, checkpoint.weight(name[: -len(".weight")]).dequantize(torch.bfloat16))
    for name in checkpoint.names():
        if f"{name.rpartition('.')[0]}.weight" not in quantized:
            writer.add(name, checkpoint.tensor(name))
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    writer.close(config, copy_from=checkpoint.path)


# Published for this class of system: share saved relative to the original.
CLAIMS = {"latency": 0.62, "memory": 0.40, "power": 0.58}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The same for every row: greedy decoding of `concurrency` prompts at once."""

    model: str  # a directory
    prompts: tuple[tuple[int, ...], ...]  # token ids
    output_tokens: int = 64
    tiny: str = ""  # tiny checkpoint, run to import everything before memory is measured

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise ValueError("prompts: expected at least one, none of them empty")
        if self.output_tokens < 2:
            raise ValueError(f"output_tokens: got {self.output_tokens}; expected at least 2")


@dataclass(frozen=True, slots=True)
class Probe:
    """One measurement of one row."""

    latency_ms: float  # mean time between two tokens of a request, after the first
    seconds: float  # wall time of the whole workload
    cpu_seconds: float
    joules: float
    joules_source: str
    memory_bytes: int  # peak resident set while serving, minus the libraries' share
    tokens: int  # generated


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the rounds; the schema of `--json`."""

    name: str
    latency_ms_per_token: float
    memory_bytes: int
    joules_per_token: float
    joules_source: str
    usd_per_million_tokens: float
    quality: Quality | None = None  # relative to the first row, which has none


@dataclass(frozen=True, slots=True)
class LeverComparison:
    """All rows, and the published claims next to what was measured."""

    rows: Sequence[Row]
    machine: Machine
    rounds: int
    concurrency: int
    claims: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """{"rows": […], "claims": {…}, and the hardware with its price}."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "claims": self.claims,
            "hardware": f"{self.machine.count} x {self.machine.hardware.name}",
            "usd_per_hour": self.machine.usd_per_hour,
            "prices_declared": self.machine.declared,
            "rounds": self.rounds,
            "concurrency": self.concurrency,
        }


def prompts_for(model: Path, vocabulary: int, count: int, length: int) -> tuple[tuple[int, ...], ...]:
    """`count` prompts of `length` token ids: from the checkpoint's held-out text if it has one (so that
    speculation sees realistic text), otherwise fixed random ids."""
    if (model / "heldout.jsonl").exists() and (model / "tokenizer.json").exists():
        tokenizer = read_tokenizer(model / "tokenizer.json")
        texts = (json.loads(line)["text"] for line in (model / "heldout.jsonl").open(encoding="utf-8"))
        prompts = [ids[:length] for text in texts if len(ids := tokenizer.encode(text).ids) >= length]
        if len(prompts) >= count:
            return tuple(tuple(ids) for ids in prompts[:count])
    rng = random.Random(0)
    return tuple(tuple(rng.randrange(3, vocabulary) for _ in range(length)) for _ in range(count))


def compare(
    workload: Workload,
    rows: Sequence[Lever],
    machine: Machine,
    rounds: int = 3,
    on_probe: Callable[[str], None] = lambda name: None,
    record: Path | None = None,
    qualities: Mapping[str, Quality | None] | None = None,
    budget: float = 0.01,
) -> LeverComparison:
    """Measure every row `rounds` times, interleaved. Raises RuntimeError naming the row that failed.

    record: a file that stores every measurement, so that an interrupted run resumes. Raises ValueError if it
    belongs to other rows or another workload. qualities: by row name. budget: maximum perplexity increase of
    all levers together.
    """
    book = _Record(record, workload, rows)
    for turn in range(rounds):
        # The two rows needed for the claims run first, in case the run is interrupted.
        for lever in (rows[0], *reversed(rows[1:])):
            if len(book.probes[lever.name]) <= turn:
                tries = [_probe(lever, workload, machine, n) for n in sorted({1, machine.count})]
                book.add(lever.name, min(tries, key=lambda probe: probe.latency_ms))
            on_probe(lever.name)
    by_name = qualities or {}
    table = [_row(name, probes, machine, by_name.get(name)) for name, probes in book.probes.items()]
    return LeverComparison(table, machine, rounds, len(workload.prompts), claims(table[0], table[-1], budget))


class _Record:
    """The measurements so far, in memory and (if there is a path) in a JSON file."""

    def __init__(self, path: Path | None, workload: Workload, rows: Sequence[Lever]) -> None:
        self._path = path
        self._asked = {
            "prompts": [len(ids) for ids in workload.prompts],
            "output_tokens": workload.output_tokens,
            "rows": [[lever.name, lever.options] for lever in rows],
        }
        self.probes: dict[str, list[Probe]] = {lever.name: [] for lever in rows}
        if path is None or not path.exists():
            return
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] != self._asked:
            raise ValueError(
                f"record: got {str(path)!r}, from other rows or another workload; expected a new file"
            )
        self.probes |= {name: [Probe(**p) for p in probes] for name, probes in kept["probes"].items()}

    def add(self, name: str, probe: Probe) -> None:
        self.probes[name].append(probe)
        if self._path is not None:
            probes = {name: [asdict(p) for p in found] for name, found in self.probes.items()}
            replace_json(self._path, {"asked": self._asked, "probes": probes})


def claims(original: Row, final: Row, budget: float = 0.01) -> dict[str, dict[str, Any]]:
    """The share saved compared with the published one (power: energy per token), and quality vs its budget.

    Quality is met when the upper end of the interval is within the budget.
    """
    pairs = {
        "latency": (original.latency_ms_per_token, final.latency_ms_per_token),
        "memory": (original.memory_bytes, final.memory_bytes),
        "power": (original.joules_per_token, final.joules_per_token),
    }
    saved = {name: 1 - after / before if before else 0.0 for name, (before, after) in pairs.items()}
    rows: dict[str, dict[str, Any]] = {
        name: {"published": CLAIMS[name], "measured": saved[name], "met": saved[name] >= CLAIMS[name]}
        for name in CLAIMS
    }
    if (q := final.quality) is not None:
        interval = [q.low, q.high]
        rows["quality"] = {
            "budget": budget, "measured": q.change, "interval": interval, "met": q.high <= budget,
        }  # fmt: skip
    return rows


def _probe(lever: Lever, workload: Workload, machine: Machine, threads: int) -> Probe:
    """One row in its own process, so that memory and threads are not shared."""
    request = {
        **asdict(workload),
        "model": lever.model or workload.model,
        "options": lever.options,
        "watts": machine.watts / machine.count,
        "idle_watts": machine.idle_watts / machine.count,
        "count": machine.count,
        "threads": threads,
    }
    command = [sys.executable, "-m", "farthing.bench.cost"]
    run = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or ["no output"]
        raise RuntimeError(f"{lever.name}: exit status {run.returncode}: {last[0]}")
    return Probe(**json.loads(run.stdout.splitlines()[-1]))


def _row(name: str, probes: Sequence[Probe], machine: Machine, quality: Quality | None) -> Row:
    def median(value: Callable[[Probe], float]) -> float:
        return statistics.median(value(probe) for probe in probes)

    return Row(
        name=name,
        latency_ms_per_token=median(lambda p: p.latency_ms),
        memory_bytes=int(median(lambda p: p.memory_bytes)),
        joules_per_token=median(lambda p: p.joules / p.tokens),
        joules_source=probes[0].joules_source,
        usd_per_million_tokens=median(
            lambda p: (p.seconds * machine.usd_per_second + p.joules * machine.usd_per_joule) / p.tokens * 1e6
        ),
        quality=quality,
    )


Generate = Callable[[], list[float]]  # decodes the workload; returns the time of every token in seconds
Served = AbstractContextManager[Generate]


def main() -> None:
    """Read a request, print a `Probe`.

    The workload is warmed up once, then measured. Memory is the peak resident set while serving minus the
    resident set before loading but after a tiny model has run the same code, so that neither side is charged
    for lazily imported libraries. Energy is read from RAPL if possible, otherwise CPU time × declared watts.
    """
    request = json.load(sys.stdin)
    make = original if request["options"] is None else ours
    base = _after_imports(make, request)
    with make(request) as generate:
        generate()
        print(json.dumps(measure(generate, base, request)))


def _after_imports(make: Callable[[dict[str, Any]], Served], request: dict[str, Any]) -> int:
    """Resident bytes once everything is imported, after a tiny model has run and been freed."""
    tiny = {"model": request["tiny"], "prompts": [[3, 4, 5]] * len(request["prompts"]), "output_tokens": 2}
    if request["options"] is not None:  # the tiny model has no MTP layer to draft with
        tiny["options"] = request["options"] | (
            {"speculate": "ngram"} if "speculate" in request["options"] else {}
        )
    with make(request | tiny) as generate:
        generate()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


@contextmanager
def original(request: dict[str, Any]) -> Iterator[Generate]:
    """Hugging Face transformers, eager attention and experts, bfloat16, one static batch."""
    import torch
    import transformers

    torch.set_num_threads(request["threads"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.bfloat16, attn_implementation="eager"
    )
    model.eval()
    ids = torch.tensor(request["prompts"])

    @torch.inference_mode()
    def generate() -> list[float]:
        cache, tokens, times = transformers.DynamicCache(config=model.config), ids, []
        for _ in range(request["output_tokens"]):
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            times += [time.perf_counter()] * len(ids)
        return times

    yield generate


@contextmanager
def ours(request: dict[str, Any]) -> Iterator[Generate]:
    """Farthing's engine with the row's levers."""
    from farthing.engine.build import build_engine
    from farthing.engine.request import SamplingParams

    prompts, length = request["prompts"], request["output_tokens"]
    engine = build_engine(
        EngineConfig(
            model=request["model"],
            max_num_seqs=len(prompts),
            max_model_len=max(map(len, prompts)) + length,
            enable_prefix_caching=False,  # the second run must repeat the first run's work
            skip_tokenizer_init=True,
            threads=request["threads"],
            **request["options"],
        )
    )
    params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)

    def generate() -> list[float]:
        streams = [engine.submit(prompt, params, kind="delta") for prompt in prompts]
        times = []
        for stream in streams:
            for output in stream:
                seen = time.perf_counter()
                times += [seen] * sum(len(part.token_ids) for part in output.outputs)
        return times

    with engine:
        yield generate


def measure(generate: Generate, base: int, request: dict[str, Any]) -> dict[str, Any]:
    """Run the workload again and measure it."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    meter = _rapl()
    cpu, began = _cpu(), time.perf_counter()
    times = generate()
    seconds, cpu = time.perf_counter() - began, _cpu() - cpu
    joules = meter.joules(seconds, seconds) if meter else _estimated(cpu, seconds, request)
    batch = len(request["prompts"])
    probe = Probe(
        latency_ms=_latency(times, batch) * 1e3,
        seconds=seconds,
        cpu_seconds=cpu,
        joules=joules,
        joules_source="rapl" if meter else "estimated",
        memory_bytes=max(0, resident("VmHWM") - base),
        tokens=len(times),
    )
    return {name: getattr(probe, name) for name in Probe.__dataclass_fields__}


def _latency(times: list[float], batch: int) -> float:
    """Mean time between tokens of a request after the first (a step may yield several tokens)."""
    times = sorted(times)
    return (times[-1] - statistics.median(times[:batch])) / (len(times) / batch - 1)


def _estimated(cpu: float, seconds: float, request: dict[str, Any]) -> float:
    """Energy from declared watts: busy power for CPU time, idle power for the rest."""
    idle = max(0.0, seconds * request["count"] - cpu)
    return float(cpu * request["watts"] + idle * request["idle_watts"])


def _rapl() -> RaplMeter | None:
    try:
        return RaplMeter()
    except OSError:
        return None


def _cpu() -> float:
    return time.process_time()  # in nanoseconds; os.times counts hundredths of a second, a whole small row


def resident(field: str) -> int:
    """Bytes of VmRSS (current) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
