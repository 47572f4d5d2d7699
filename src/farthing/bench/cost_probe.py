"""One row of `farthing bench cost`, in its own process: a request on stdin, a measurement on stdout.

The workload is warmed up once, then measured. Memory is the peak resident set while serving minus the
resident set before loading but after a tiny model has run the same code, so that neither side is charged for
lazily imported libraries. Energy is read from RAPL if possible, otherwise CPU time × declared watts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from farthing.bench.cost import Probe
from farthing.cost import RaplMeter

Generate = Callable[[], list[float]]  # decodes the workload; returns the time of every token in seconds
Served = AbstractContextManager[Generate]


def main() -> None:
    """Read a request, print a `Probe`."""
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
    from farthing.config import EngineConfig
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
