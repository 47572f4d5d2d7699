"""The student of quantization-aware training, a model with quantizers in every projection, and its settings.

Shapes: B matrices, R rows, J columns.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import Tensor, nn

from farthing.train.lsq import Kind, Precision, QuantizedProduct
from farthing.train.model import DeepSeekLM, MoE

MOST = 0.9  # share of its blocks that a projection can lose
GROUPS = (32, 64)  # columns per scale that the CPU kernels of 4-bit inputs have


@dataclasses.dataclass(frozen=True)
class QatConfig:
    """Stages are (progress from which they apply, bits)."""

    stages: tuple[tuple[float, Precision], ...] = ((0.0, Precision(4, 4)),)
    group: int = 64  # columns per weight scale, and per input range if inputs is "group"
    inputs: Kind = "group"
    smoothing: float = 0.5  # of inputs, before rounding; 0 is off
    gptq: bool = True  # weights reach 4 bits by GPTQ instead of rounding to nearest
    block: tuple[int, int] | None = None  # rows and columns of zero blocks in the feed-forwards
    sparsity: float = 0.4  # share of zero blocks at the end
    prune_span: tuple[float, float] = (0.02, 0.5)  # progress at which pruning begins and ends
    prune_every: int = 4  # steps between events
    fisher_windows: int = 32  # on which the loss of removing blocks is estimated
    weight_lr: float = 4e-4
    norm_lr: float = 1e-3
    scale_lr: float = 3e-3
    block_steps: int = 8  # per layer at each change of bits
    block_windows: int = 16
    block_tokens: int = 2048  # per step
    hard: float = 0.0  # weight of the text's cross entropy in the loss; the rest is distillation
    mtp_weight: float = 0.3
    mtp_share: float = 0.25

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0][0] != 0.0:
            raise ValueError(f"stages: got {self.stages}; expected the first to start at 0.0")
        starts = [start for start, _ in self.stages]
        if starts != sorted(set(starts)) or starts[-1] >= 1:
            raise ValueError(f"stages: got starts {starts}; expected rising shares of the run below 1")
        if self.group not in GROUPS:
            known = " or ".join(map(str, GROUPS))
            raise ValueError(f"group: got {self.group}; expected {known}, which the CPU kernels have")
        if not 0 <= self.sparsity < MOST:
            raise ValueError(f"sparsity: got {self.sparsity}; expected a share in [0, {MOST})")
        for name in ("hard", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a share in [0, 1]")

    def recorded(self) -> dict[str, Any]:
        """The settings for a run's record: those of zero blocks only if there are any."""
        values = dataclasses.asdict(self)
        if self.block is None:
            for name in ("sparsity", "prune_span", "prune_every", "fisher_windows"):
                del values[name]
        return values

    def stage(self, progress: float) -> int:
        """Index of the current stage."""
        return max(i for i, (start, _) in enumerate(self.stages) if progress >= start)


def parse_stages(text: str) -> tuple[tuple[float, Precision], ...]:
    """'0:W8A8,0.2:W4A4' -> stages. Raises ValueError."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+):W(\d+)A(\d+)\s*", part)
        if match is None:
            raise ValueError(f"stage {part!r}: expected START:W<bits>A<bits>, for example 0.2:W4A4")
        found.append((float(match[1]), Precision(int(match[2]), int(match[3]))))
    return tuple(found)


class QatModel(nn.Module):
    """The student and its quantizers in one state dict."""

    def __init__(self, net: DeepSeekLM, config: QatConfig) -> None:
        super().__init__()
        self.net, self.config = net, config
        self.products = nn.ModuleDict()
        for name, module in net.projections():
            if isinstance(module, MoE):
                first = self._add(f"{name}.gate_up", module.gate_up.flatten(1, 2))
                second = self._add(f"{name}.down", module.down)
                module.products = (first.forward, second.forward)
            else:
                module.product = self._add(name, module.weight[None]).forward

    def _add(self, name: str, weight: Tensor) -> QuantizedProduct:
        # Inputs of down projections are one-sided after SiLU: LSQ+ gives them an offset.
        offset = name.endswith(("down", "down_proj"))
        block = self.config.block if "mlp." in name else None
        made = QuantizedProduct(weight, self.config.group, self.config.inputs, offset, block)
        self.products[name.replace(".", "/")] = made
        return made

    def weights(self) -> dict[str, Tensor]:
        """Weights [B, R, J] of every product, by name."""
        found: dict[str, Tensor] = {}
        for name, module in self.net.projections():
            if isinstance(module, MoE):
                found |= {f"{name}.gate_up": module.gate_up.flatten(1, 2), f"{name}.down": module.down}
            else:
                found[name] = module.weight[None]
        return found

    def product_of(self, name: str) -> QuantizedProduct:
        """The quantized product with that name."""
        found = self.products[name.replace(".", "/")]
        assert isinstance(found, QuantizedProduct)
        return found

    def start(self, precision: Precision, prefix: str = "") -> None:
        """Start a stage for every product under `prefix`."""
        for name, weight in self.weights().items():
            if name.startswith(prefix):
                self.product_of(name).start(weight.detach(), _bits_of(name, precision))

    def resume(self, precision: Precision) -> None:
        """Resume a stage whose ranges were loaded."""
        for name in self.weights():
            self.product_of(name).resume(_bits_of(name, precision))


def _bits_of(name: str, precision: Precision) -> Precision:
    """The input of the latent's up-projection keeps 8 bits: it is the cache, which is never 4-bit."""
    if name.endswith("kv_b_proj"):
        return Precision(precision.weights, max(8, precision.activations))
    return precision
