"""Progressive pruning of blocks: the share of zero blocks in the feed-forwards follows a cubic schedule while
the model trains, and the kernels skip them (`ops/blocks.py`).

The loss of removing a block is estimated as the sum of w^2 F over its weights, F being the mean squared
gradient of the smoothed model before rounding (the diagonal of the empirical Fisher matrix). Blocks of all
layers compete; those of drafting layers among themselves. A removed block never returns.

Shapes: B matrices, R rows, J columns, blocks of r x c.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farthing.compress.prune.schedule import cubic_sparsity
from farthing.train.loop import BaseHook, Trainer
from farthing.train.model import DeepSeekLM
from farthing.train.need import information
from farthing.train.qat_model import MOST, QatModel


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
