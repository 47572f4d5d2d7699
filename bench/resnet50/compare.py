"""Latency of one picture in one interleaved run: ours, torch, ONNX Runtime, OpenVINO, where installed."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench.resnet50.engine import Engine
from torch import Tensor, nn

from farthing.compress.export.onnx import export_qdq
from farthing.compress.module import fold_batch_norms, quantize_int8

Run = Callable[[Tensor], object]


def contestants(
    net: nn.Module, student: nn.Module, size: int, threads: int, out: Path
) -> tuple[dict[str, Run], list[str]]:
    """(name -> one picture [1, 3, S, S], what is missing)."""
    torch.set_num_threads(threads)
    example = torch.randn(1, 3, size, size)
    engine = Engine(student, threads)
    compiled = torch.compile(fold_batch_norms(net, example))
    runs: dict[str, Run] = {
        "farthing W4A4 block-sparse": lambda x: engine(x[0]),
        "torch eager FP32": net,
        "torch compiled FP32": compiled,
    }
    missing = []
    files = onnx_files(net, example, out)
    if importlib.util.find_spec("onnxruntime"):
        for name, file in files.items():
            runs[f"ONNX Runtime {name}"] = _onnxruntime(file, threads)
    else:
        missing.append("ONNX Runtime")
    if importlib.util.find_spec("openvino"):
        for name, file in files.items():
            runs[f"OpenVINO {name}"] = _openvino(file, threads)
    else:
        missing.append("OpenVINO")
    return runs, missing


def onnx_files(net: nn.Module, example: Tensor, out: Path) -> dict[str, Path]:
    """The dense net in FP32 and in INT8 (Q/DQ), as ONNX."""
    folded = fold_batch_norms(net, example)
    files = {"FP32": out / "fp32.onnx", "INT8": out / "int8.onnx"}
    torch.onnx.export(folded, (example,), str(files["FP32"]), dynamo=False)
    quantized, _ = quantize_int8(folded, [torch.randn_like(example) for _ in range(4)], observer="minmax")
    export_qdq(quantized, example, files["INT8"])
    return files


def _onnxruntime(file: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def _openvino(file: Path, threads: int) -> Run:
    import openvino

    core = openvino.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(str(file), "CPU", settings)
    return lambda x: compiled(x.numpy())


def race(runs: dict[str, Run], size: int, rounds: int) -> dict[str, float]:
    """Median milliseconds; all take turns, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        for i in range(rounds + 2):
            for name, run in runs.items():
                start = time.perf_counter()
                run(image)
                if i >= 2:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}
