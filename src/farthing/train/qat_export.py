"""Export a quantization-aware training run to a compressed-tensors checkpoint that the engine serves.

Weights are written as the integers that training rounded to. Below 8 bits the rounding of inputs is written
too (`input_activations` of 4 bits in the weights' groups, and each module's `input_clip`), and the CPU
kernels apply it: 4-bit integers in int8 registers. Other servers apply their own rounding.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from farthing.checkpoint import CheckpointWriter
from farthing.checkpoint import compressed_tensors_writer as ct
from farthing.ops.weights import Weight, pack_int4
from farthing.train.export import config_json, pack, to_tensors
from farthing.train.lsq import Kind, Precision, QuantizedProduct
from farthing.train.qat_model import QatModel

# Projections that read the same tensor are served as one matrix, so their input is rounded once.
SIBLINGS = (("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"))


def is_exportable(precision: Precision, inputs: Kind) -> bool:
    """Whether a checkpoint can hold the format: the kernels have 4-bit weights and input ranges by group."""
    return precision.weights == 4 and precision.activations != 16 and inputs == "group"


@torch.no_grad()
def tie_inputs(student: QatModel) -> None:
    """Set one clip for projections that read the same tensor: the geometric mean of the learned ones."""
    for name in student.weights():
        parent, _, last = name.rpartition(".")
        for first, second in SIBLINGS:
            if last != first:
                continue
            pair = [student.product_of(f"{parent}.{part}").input_quantizer for part in (first, second)]
            mean = torch.stack([q.log_scale for q in pair]).mean()
            for quantizer in pair:
                quantizer.log_scale.copy_(mean)


def save_quantized(student: QatModel, source: Path, out: Path) -> int:
    """Write the student with 4-bit weights; returns the size of the weight files in bytes.

    Raises ValueError if a product has another format (see `is_exportable`).
    """
    tie_inputs(student)
    tensors = pack(to_tensors(student.net), fp8=False)
    keys: dict[str, ct.GroupKey | None] = {"lm_head": None}
    writer = CheckpointWriter(out)
    done: set[str] = set()
    for name, weight in student.weights().items():
        product = student.product_of(name)
        for module, matrix, clip in _matrices(student, name, weight, product):
            activations = "group4" if clip is not None else "token"
            keys[module] = ct.GroupKey("int4", matrix.group_size, True, activations)
            for key, tensor in ct.encode(module, matrix).items():
                writer.add(key, tensor)
            if clip is not None:
                writer.add(f"{module}.input_clip", torch.tensor(clip))
            done.add(f"{module}.weight")
    for key, tensor in tensors.items():
        if key not in done:
            writer.add(key, tensor)
    config = config_json(student.net.cfg, fp8=False)
    writer.close(config | {"quantization_config": ct.quantization_config(keys)}, copy_from=source)
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def _matrices(
    student: QatModel, name: str, weight: Tensor, product: QuantizedProduct
) -> list[tuple[str, Weight, float | None]]:
    """(checkpoint module, its matrix, clip of its input or None) for one product."""
    inputs = product.input_quantizer
    precision = Precision(product.weight_quantizer.bits, inputs.bits)
    if not is_exportable(precision, inputs.kind):
        raise ValueError(f"{name}: got {precision} by {inputs.kind}; expected W4A4 or W4A8 by group")
    clip = float(inputs.log_scale.detach().exp()) if inputs.bits == 4 else None
    q, scale = product.weight_quantizer.integers(weight)
    matrices = [Weight("int4", pack_int4(q[b]), scale[b].float().contiguous()) for b in range(len(q))]
    module = module_name(name, student.net.cfg.num_hidden_layers)
    if name.endswith(".gate_up"):
        mlp, half = module.removesuffix(".gate_up"), q.shape[1] // 2
        found = []
        for b, matrix in enumerate(matrices):
            assert matrix.scale is not None
            for part, rows in (("gate_proj", slice(0, half)), ("up_proj", slice(half, None))):
                own = dataclasses.replace(matrix, data=matrix.data[rows], scale=matrix.scale[rows])
                found.append((f"{mlp}.experts.{b}.{part}", own, clip))
        return found
    if name.endswith("mlp.down"):
        mlp = module.removesuffix(".down")
        return [(f"{mlp}.experts.{b}.down_proj", m, clip) for b, m in enumerate(matrices)]
    return [(module, matrices[0], clip)]


def module_name(name: str, hidden_layers: int) -> str:
    """Map the training model's name of a projection to the checkpoint's module."""
    if name.startswith("mtp."):
        return f"model.layers.{hidden_layers}." + name.removeprefix("mtp.").removeprefix("block.")
    return f"model.{name}"
