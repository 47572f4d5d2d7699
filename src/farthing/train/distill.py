"""Knowledge distillation: the student learns the teacher's next-token distribution.

Shapes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from farthing.train.functional import fused_cross_entropy
from farthing.train.model import DeepSeekLM


class _FusedDistillation(torch.autograd.Function):
    """Computes the gradient in the forward pass, chunk by chunk, to never materialize [N, V]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, teacher: Tensor, targets: Tensor, hard: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        x = hidden.to(head.dtype)
        d_hidden = torch.empty_like(x)
        total, rise = torch.zeros((), device=hidden.device), torch.zeros((), device=hidden.device)
        for start in range(0, len(x), chunk):
            s = slice(start, start + chunk)
            wanted = F.linear(teacher[s].to(head.dtype), head).float().log_softmax(-1)
            found = F.linear(x[s], head).float().log_softmax(-1)
            share = wanted.exp().mul_(1 - hard)
            total += (share * (wanted - found)).sum()
            picked = found.gather(1, targets[s, None])
            total -= hard * picked.sum()
            rise += (wanted.gather(1, targets[s, None]) - picked).sum()
            d_logits = found.exp_().sub_(share)
            d_logits.scatter_add_(
                1, targets[s, None], torch.full_like(targets[s, None], -hard, dtype=torch.float32)
            )
            d_hidden[s] = d_logits.to(head.dtype) @ head
        ctx.save_for_backward(d_hidden)
        ctx.scale, ctx.dtype = 1.0 / len(x), hidden.dtype
        rise /= len(x)
        ctx.mark_non_differentiable(rise)
        return total / len(x), rise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden,) = ctx.saved_tensors
        return d_hidden.to(ctx.dtype) * (float(grad) * ctx.scale), None, None, None, None, None


def fused_distillation(
    hidden: Tensor, head: Tensor, teacher: Tensor, targets: Tensor, hard: float = 0.0, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """((1 - hard) KL(teacher || student) + hard cross entropy of the text, rise), nats per token.

    rise: the student's cross entropy on the text minus the teacher's, without gradient. Being a paired
    difference, it is free of the batch's noise. hidden (student) and teacher [N, D] share the head [V, D],
    which gets no gradient; targets [N] int64.
    """
    loss, rise = _FusedDistillation.apply(  # type: ignore[no-untyped-call]
        hidden, head.detach(), teacher, targets, hard, chunk
    )
    return loss, rise


def distillation(
    net: DeepSeekLM,
    teacher: DeepSeekLM,
    tokens: Tensor,
    hard: float = 0.0,
    mtp_weight: float = 0.3,
    mtp_share: float = 0.25,
) -> dict[str, Tensor]:
    """Losses on tokens [B, T + 1]: the trunk learns the teacher's trunk, the MTP layer its greedy tokens."""
    head = net.head_weight.detach().to(net.compute_dtype)
    with torch.no_grad():
        wanted = teacher(tokens[:, :-1])
    hidden = net(tokens[:, :-1])
    targets = tokens[:, 1:].flatten()
    main, rise = fused_distillation(hidden.flatten(0, 1), head, wanted.flatten(0, 1), targets, hard)
    if net.mtp is None or mtp_weight <= 0:
        return {"loss": main, "main": main.detach(), "rise": rise}
    rows = max(1, round(len(tokens) * mtp_share))
    greedy = F.linear(wanted[:rows, 1:], head).argmax(-1)
    guess = net.draft(hidden[:rows, :-1].detach(), tokens[:rows, 1:-1])
    mtp = fused_cross_entropy(guess.flatten(0, 1), head, greedy.flatten())
    return {"loss": main + mtp_weight * mtp, "main": main.detach(), "mtp": mtp.detach(), "rise": rise}
