"""The student of quantization-aware training, rounded by GPTQ and pruned by blocks.

Shapes: B matrices, R rows, J columns.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from farthing.compress.quantize import Feedback, even_grid, sweep
from farthing_lab.compress.masks import cubic_sparsity
from farthing_lab.train.functional import Routing, dispatch, spans
from farthing_lab.train.loop import BaseHook, Trainer
from farthing_lab.train.lsq import Kind, Precision, QuantizedProduct, Tap
from farthing_lab.train.model import DeepSeekLM, MoE
from farthing_lab.train.need import information

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


# GPTQ of a training model: the rounding that needs no training, as a baseline and as a starting point.
#
# Layer by layer, the weights of every projection are rounded column by column so that the remaining
# columns compensate (`compress/quantize.py`). Their inputs come from the layers rounded so far and
# are themselves rounded. Drafting layers are rounded to nearest: nothing that they read is scored.
#
# Shapes: B matrices, R rows, J columns.

PART = 4  # windows per forward pass


@torch.no_grad()
def round_by_gptq(student: QatModel, tokens: Tensor, precision: Precision) -> None:
    """Round `student` to 4-bit weights from statistics on tokens [N, T]. Its weights move onto the grid.

    Raises ValueError for other weights, which no range search here covers.
    """
    if precision.weights != 4:
        raise ValueError(f"precision: got {precision}; expected 4-bit weights")
    net, training = student.net, student.training
    student.train(False)
    turn = net.turn[: tokens.shape[1]]
    hidden = nn.functional.embedding(tokens, net.embed_tokens)
    for i, layer in enumerate(net.layers):
        prefix = f"layers.{i}."
        student.start(dataclasses.replace(precision, weights=16), prefix)
        weights = {name: w for name, w in student.weights().items() if name.startswith(prefix)}
        with _second_moments(student, weights) as grams:
            for part in hidden.split(PART):
                layer(part, turn)
        for name, w in weights.items():
            _round(student.product_of(name), w, grams[name])
        hidden = torch.cat([layer(part, turn) for part in hidden.split(PART)])
    student.start(precision)
    student.train(training)


def _round(product: QuantizedProduct, w: Tensor, gram: Tensor) -> None:
    """Move w [B, R, J] onto the grid of least expected error, and set the product's scales to that grid."""
    quantizer = product.weight_quantizer
    own, gram = quantizer.pruned(w).float().cpu(), gram.cpu()
    keep = None if quantizer.keep is None else quantizer.pruned(torch.ones_like(w)).bool().cpu()
    grid = even_grid(own, quantizer.group, gram.diagonal(dim1=1, dim2=2))
    w.copy_(sweep(own, Feedback.of(gram), grid, keep)[0])
    quantizer.bits = 4
    quantizer.log_scale.copy_(grid.scale[..., None].log())


@contextmanager
def _second_moments(student: QatModel, weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Inside the context, every product adds x^T x of its rounded inputs to the yielded grams [B, J, J]."""
    found = {name: w.new_zeros(len(w), w.shape[2], w.shape[2]) for name, w in weights.items()}
    for name, gram in found.items():
        student.product_of(name).tap = _adder(gram)
    try:
        yield found
    finally:
        for name in found:
            student.product_of(name).tap = None


def _adder(gram: Tensor) -> Tap:
    def add(x: Tensor, sizes: list[int], routing: Routing | None) -> None:
        rows = (x if routing is None else dispatch(x, routing)).float()
        for e, s in spans(sizes):
            gram[e].addmm_(rows[s].T, rows[s])

    return add


# Progressive pruning of blocks: the share of zero blocks in the feed-forwards follows a cubic schedule
# while the model trains, and the kernels skip them (`ops/weights.py`).
#
# The loss of removing a block is estimated as the sum of w^2 F over its weights, F being the mean squared
# gradient of the smoothed model before rounding (the diagonal of the empirical Fisher matrix). Blocks of
# all layers compete; those of drafting layers among themselves. A removed block never returns.
#
# Shapes: B matrices, R rows, J columns, blocks of r x c.


def squared_gradients(model: DeepSeekLM, tokens: Tensor) -> dict[str, Tensor]:
    """Mean squared gradient of the text's loss, by parameter, over windows [N, T + 1], one at a time."""
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters() if "mlp." in name}
    parameters = dict(model.named_parameters())
    for i in range(len(tokens)):
        model.zero_grad(set_to_none=True)
        model.loss(tokens[i : i + 1], mtp_weight=0.3)["loss"].backward()  # type: ignore[no-untyped-call]
        for name, total in found.items():
            grad = parameters[name].grad
            if grad is not None:
                total.addcmul_(grad, grad, value=1 / len(tokens))
    model.zero_grad(set_to_none=True)
    return found


class BlockHook(BaseHook):
    """Removes blocks on the schedule. Their masks are in the model's state."""

    def __init__(self, fisher: dict[str, Tensor]) -> None:
        self.fisher = fisher

    def before_step(self, trainer: Trainer) -> None:
        """Prune to the current share, if an event is due."""
        student = trainer.model
        assert isinstance(student, QatModel)
        config = student.config
        if trainer.step % config.prune_every:
            return
        scale = 1_000_000  # the schedule counts whole steps
        begin, end = (int(x * scale) for x in config.prune_span)
        share = cubic_sparsity(int(trainer.progress * scale), begin, end, config.sparsity)
        prune_blocks(student, self.fisher, share)

    def after_step(self, trainer: Trainer) -> None:
        """Record the share of zero blocks."""
        assert isinstance(trainer.model, QatModel)
        trainer.metrics["zero_blocks"] = zero_share(trainer.model)


def masked(student: QatModel) -> dict[str, Tensor]:
    """Masks [B, R / r, J / c] of every prunable product: 1 keeps a block, 0 removes it."""
    found = {name: student.product_of(name).weight_quantizer.keep for name in student.weights()}
    return {name: keep for name, keep in found.items() if keep is not None}


def zero_share(student: QatModel) -> float:
    """Share of zero weights in the feed-forwards."""
    masks = masked(student)
    sizes = {name: student.weights()[name].numel() for name in masks}
    zero = sum((1 - float(keep.mean())) * sizes[name] for name, keep in masks.items())
    return zero / sum(sizes.values())


@torch.no_grad()
def prune_blocks(student: QatModel, fisher: dict[str, Tensor], share: float) -> None:
    """Remove the blocks of least estimated loss until `share` is zero, drafting layers apart."""
    weights, masks = student.weights(), masked(student)
    for drafting in (False, True):
        names = [name for name in masks if name.startswith("mtp.") == drafting]
        costs = {name: block_costs(weights[name], fisher[_parameter(name)], masks[name]) for name in names}
        total = sum(cost.numel() for cost in costs.values())
        drop = round(share * total)
        if not drop:
            continue
        limit = torch.cat([cost.flatten() for cost in costs.values()]).kthvalue(drop).values
        for name, cost in costs.items():
            masks[name].mul_(cost > limit)


def block_costs(w: Tensor, fisher: Tensor, keep: Tensor) -> Tensor:
    """Estimated loss of removing each block, [B, R / r, J / c]: zero for removed ones, infinite for those
    that a projection must keep.
    """
    fisher = fisher.reshape(w.shape)
    cost = _by_block(w.square() * fisher, keep)
    cost = cost * keep
    least = cost.flatten().kthvalue(max(1, round(MOST * cost.numel()))).values
    return cost.masked_fill(cost > least, torch.inf)


def _by_block(values: Tensor, keep: Tensor) -> Tensor:
    """Sums of values [B, R, J] over the blocks of keep [B, R / r, J / c]."""
    b, rows, columns = keep.shape
    return values.view(b, rows, values.shape[1] // rows, columns, values.shape[2] // columns).sum((2, 4))


def block_needs(student: QatModel, tokens: Tensor) -> Tensor:
    """Estimated loss of removing each remaining block outside drafting layers, from those windows [N, T + 1]
    on which the model has information (`need.py`): a bad loss has large gradients, but nothing to lose.
    """
    known = tokens[(information(student.net, tokens) > 0).to(tokens.device)]
    fisher, weights, found = squared_gradients(student.net, known), student.weights(), []
    with torch.no_grad():
        for name, keep in masked(student).items():
            if not name.startswith("mtp."):
                used = student.product_of(name).weight_quantizer(weights[name])
                squares = used.square() * fisher[_parameter(name)].reshape(used.shape)
                found.append(_by_block(squares, keep)[keep > 0])
    return torch.cat(found)


def needed_blocks(models: dict[str, QatModel], tokens: Tensor, typical: float = 0.7) -> dict[str, Any]:
    """Share of each model's remaining blocks whose removal costs at least what that of a share `typical` of
    the first model's blocks costs, and the deciles.
    """
    needs = {name: block_needs(model, tokens) for name, model in models.items()}
    least = next(iter(needs.values())).quantile(1 - typical)
    tenths = torch.linspace(0.1, 0.9, 9)
    return {
        "definition": "sum of w^2 F over the block, F the mean squared gradient of the text's loss over "
        "windows predicted better than by token frequencies",
        "threshold": float(least),
        "share": {
            name: float(((found >= least) & (found > 0)).float().mean()) for name, found in needs.items()
        },
        "deciles": {name: found.quantile(tenths).tolist() for name, found in needs.items()},
    }


def _parameter(product: str) -> str:
    """The parameter of a product: experts' tensors have the product's name."""
    return product if product.endswith(("mlp.gate_up", "mlp.down")) else f"{product}.weight"


def describe(student: QatModel) -> dict[str, Any]:
    """The share of zero weights, in all and by projection."""
    return {
        "zero_share": round(zero_share(student), 4),
        "by_projection": {name: round(1 - float(keep.mean()), 3) for name, keep in masked(student).items()},
    }
