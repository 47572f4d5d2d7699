"""Latency per picture in one interleaved run: ours, torch, ONNX Runtime, and OpenVINO if installed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench.resnet50.engine import Engine
from bench.resnet50.model import ResNet50
from bench.resnet50.quantize import QuantResNet50
from torch import Tensor, nn

from farthing import _native
from farthing_lab.vision.module import fold_batch_norms

Run = Callable[[Tensor], Any]
OURS = "farthing W4A4, block-sparse"


def contestants(
    net: ResNet50, student: QuantResNet50, size: int, threads: int, out: Path
) -> tuple[dict[str, Run], list[str]]:
    """(name -> a function of one picture [1, 3, S, S], names of missing runtimes)."""
    torch.set_num_threads(threads)
    example = torch.randn(1, 3, size, size)
    engine = Engine(student, size, threads)
    folded = fold_batch_norms(net, example)
    # Compilation lays out constant weights for the kernels.
    torch._inductor.config.freezing = True
    compiled = torch.compile(folded.to(memory_format=torch.channels_last))
    runs: dict[str, Run] = {
        OURS: lambda x: engine(x[0]),
        "torch eager FP32": net,
        "torch compiled FP32": lambda x: compiled(x.contiguous(memory_format=torch.channels_last)),
    }
    missing = []
    if importlib.util.find_spec("onnxruntime"):
        for name, file in onnx_files(net, example, out).items():
            runs[f"ONNX Runtime {name}"] = _onnxruntime(file, threads)
    else:
        missing.append("ONNX Runtime")
    if importlib.util.find_spec("openvino") and importlib.util.find_spec("nncf"):
        for name, file in openvino_files(net, example, out).items():
            runs[f"OpenVINO {name}"] = _openvino(file, threads)
    else:
        missing.append("OpenVINO (with NNCF)")
    return runs, missing


def onnx_files(net: nn.Module, example: Tensor, out: Path) -> dict[str, Path]:
    """The dense net in FP32 and, by ONNX Runtime's own static quantization, in INT8; kept in `out`."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter([torch.randn_like(example) for _ in range(4)])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch.numpy()}

    files = {"FP32": out / f"fp32-{example.shape[-1]}.onnx", "INT8": out / f"int8-{example.shape[-1]}.onnx"}
    if all(f.is_file() for f in files.values()):
        return files
    out.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(net, (example,), str(files["FP32"]), input_names=["input"], dynamo=False)
    ready = out / "ready.onnx"
    quant_pre_process(str(files["FP32"]), str(ready))
    quantize_static(
        str(ready), str(files["INT8"]), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return files


def _onnxruntime(file: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"input": x.numpy()})


def openvino_files(net: nn.Module, example: Tensor, out: Path) -> dict[str, Path]:
    """The dense net in FP32 and, by NNCF's own static quantization, in INT8; kept in `out`."""
    files = {name: out / f"openvino-{name}-{example.shape[-1]}.xml" for name in ("FP32", "INT8")}
    if all(f.is_file() for f in files.values()):
        return files
    import nncf
    import openvino

    model = openvino.convert_model(net, example_input=example, input=list(example.shape))
    pictures = nncf.Dataset([torch.randn_like(example).numpy() for _ in range(4)])
    openvino.save_model(model, files["FP32"], compress_to_fp16=False)
    openvino.save_model(nncf.quantize(model, pictures, subset_size=4), files["INT8"], compress_to_fp16=False)
    return files


def _openvino(file: Path, threads: int) -> Run:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # otherwise FP32 models run in bfloat16
    }
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    return lambda x: compiled(x.numpy())


@torch.no_grad()
def race(runs: dict[str, Run], size: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round, interleaved, after three warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    image = torch.randn(1, 3, size, size)
    for i in range(rounds + 3):
        for name, run in runs.items():
            time.sleep(0.02)  # until the previous runtime's threads stop spinning
            run(image)
            start = time.perf_counter()
            run(image)
            if i >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def limit(engine: Engine, threads: int) -> float:
    """Milliseconds of the remaining products at the machine's measured INT8 peak; 0 if unknown."""
    peak = _native.peak_ops("vnni_int8", threads)  # GOP/s
    return 2 * engine.program.multiplications / peak / 1e6 if peak else 0.0
