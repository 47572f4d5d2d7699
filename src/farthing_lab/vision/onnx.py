"""Export a quantized module as ONNX with explicit QuantizeLinear / DequantizeLinear.

TensorRT 11 has no calibrator and needs this form. ONNX Runtime and Optimum run the same file. Weights are
stored as int8 with a DequantizeLinear, so the file is a quarter of the float one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from farthing_lab.vision.module import QuantizedLayer, replace_module

OPSET = 17


OPTIMUM_IMAGES = ("pixel_values", "logits")  # input and output of Optimum's ORTModelForImageClassification


def export_qdq(
    model: nn.Module, example: Tensor, path: Path, names: tuple[str, str] = ("input", "output")
) -> Path:
    """Write `model`, quantized by `module.quantize_int8`, for inputs like `example`.

    The first dimension is dynamic. names: of input and output. Raises ValueError if the exported graph lacks
    a layer's weight.
    """
    import copy

    plain = copy.deepcopy(model).eval()
    scales: dict[str, tuple[float, np.ndarray[Any, Any]]] = {}
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantizedLayer):
            input_scale, weight_scale = module.input_scale, module.weight_scale
            assert isinstance(input_scale, Tensor) and isinstance(weight_scale, Tensor)
            replace_module(plain, name, module.layer)
            scales[name] = (float(input_scale), weight_scale.numpy())
    torch.onnx.export(
        plain,
        (example,),
        str(path),
        input_names=names[:1],
        output_names=names[1:],
        dynamic_axes={name: {0: "batch"} for name in names},
        opset_version=OPSET,
        dynamo=False,
        do_constant_folding=False,
        keep_initializers_as_inputs=False,
    )
    graph = onnx.load(str(path))
    insert_qdq(graph, scales)
    onnx.checker.check_model(graph)
    onnx.save(graph, str(path))
    return path


def insert_qdq(model: onnx.ModelProto, scales: dict[str, tuple[float, np.ndarray[Any, Any]]]) -> None:
    """Insert Q/DQ before the input and DQ after the int8 weight of every layer in `scales`."""
    graph = model.graph
    weights = {t.name: t for t in graph.initializer}
    left = set(scales)
    nodes = []
    for node in graph.node:
        layer = next(
            (n.removesuffix(".weight") for n in node.input if n.removesuffix(".weight") in left), None
        )
        if layer is None or node.op_type not in ("Conv", "Gemm", "MatMul"):
            nodes.append(node)
            continue
        left.discard(layer)
        scale, channels = scales[layer]
        nodes += _input_nodes(graph, node, layer, scale)
        nodes.append(_weight_node(graph, node, layer, weights[f"{layer}.weight"], channels))
        nodes.append(node)
    if left:
        raise ValueError(
            f"the exported graph has no layer {sorted(left)[0]!r}; the example does not reach it"
        )
    del graph.node[:]
    graph.node.extend(nodes)


def _input_nodes(graph: onnx.GraphProto, node: Any, layer: str, scale: float) -> list[Any]:
    names = {k: f"{layer}.input_{k}" for k in ("scale", "zero", "quantized", "dequantized")}
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(scale, np.float32), names["scale"]),
            numpy_helper.from_array(np.array(0, np.int8), names["zero"]),
        ]
    )
    parameters = [names["scale"], names["zero"]]
    pair = [
        helper.make_node("QuantizeLinear", [node.input[0], *parameters], [names["quantized"]]),
        helper.make_node("DequantizeLinear", [names["quantized"], *parameters], [names["dequantized"]]),
    ]
    node.input[0] = names["dequantized"]
    return pair


def _weight_node(
    graph: onnx.GraphProto, node: Any, layer: str, weight: Any, channels: np.ndarray[Any, Any]
) -> Any:
    values = numpy_helper.to_array(weight)
    shape = (-1,) + (1,) * (values.ndim - 1)
    q = np.clip(np.rint(values / channels.reshape(shape)), -128, 127).astype(np.int8)
    graph.initializer.remove(weight)
    graph.initializer.extend(
        [
            numpy_helper.from_array(q, f"{layer}.weight_int8"),
            numpy_helper.from_array(channels.astype(np.float32), f"{layer}.weight_scale"),
            numpy_helper.from_array(np.zeros(len(channels), np.int8), f"{layer}.weight_zero"),
        ]
    )
    inputs = [f"{layer}.weight_int8", f"{layer}.weight_scale", f"{layer}.weight_zero"]
    node.input[1] = f"{layer}.weight_dequantized"
    return helper.make_node("DequantizeLinear", inputs, [node.input[1]], axis=0)
