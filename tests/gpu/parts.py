"""Device and tolerances of the kernel tests."""

from __future__ import annotations

import torch
from torch import Tensor

from farthing_gpu.launch import INTERPRETED
from tests.ops.parts import GROUPS, SCALED, UNITS

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
EPS = 1e-6
# The measure is about half the squared relative error. Integer weights are multiplied exactly; FP8 inputs
# have 4 significant bits, which is 3 % of a value and about 2.7 % of a sum.
BOUNDS = {"f32": 1e-10, "bf16": 1e-9, "fp8": 1e-3, "int8": 1e-9, "int4": 1e-9, "int4_zero": 1e-9}
BOUNDS |= dict.fromkeys((*GROUPS, *UNITS, *SCALED), 1e-9)
FORMATS = [name for name in BOUNDS if name not in (*UNITS, *SCALED) and name != "q5_1"]


def norm(k: int) -> Tensor:
    """A norm's weight."""
    return torch.rand(k) + 0.5


def on_device(x: Tensor) -> Tensor:
    """Move x to the kernels' device."""
    return x.to(DEVICE)
