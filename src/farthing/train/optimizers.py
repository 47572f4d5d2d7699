"""Muon for matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Newton-Schulz coefficients that push every singular value in (0, 1] to about 1 (Jordan et al., 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def orthogonalize(m: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix of each [rows, cols] in m [..., rows, cols].

    Newton-Schulz iteration leaves singular values between about 0.7 and 1.2, which is enough for Muon.
    """
    a, b, c = QUINTIC
    x = m.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = x.mT if tall else x
    return out


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al., 2024), for parameters whose last two dimensions are matrices.

    The update of a [rows, cols] matrix has spectral norm about lr * sqrt(max(1, rows / cols)). Weight decay
    is decoupled. Parameters of equal matrix shape are orthogonalized in one batch.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        params = list(params)
        for p in params:
            if p.ndim < 2:
                raise ValueError(
                    f"params: got shape {tuple(p.shape)}; expected matrices (use AdamW for others)"
                )
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape[-2], p.shape[-1]), []).append(p)
            for (rows, cols), params in by_shape.items():
                update = orthogonalize(
                    torch.cat([self._momentum(p, group["momentum"]).reshape(-1, rows, cols) for p in params]),
                    group["steps"],
                )
                scale = group["lr"] * max(1.0, rows / cols) ** 0.5
                parts = update.split([p.numel() // (rows * cols) for p in params])
                for p, part in zip(params, parts, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(part.reshape(p.shape).to(p.dtype), alpha=-scale)

    def _momentum(self, p: Tensor, beta: float) -> Tensor:
        """Nesterov momentum of the gradient, float32."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(buffer, beta)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(parameters for Muon, parameters for AdamW): AdamW gets embeddings, heads, routers and vectors."""
    muon: list[nn.Parameter] = []
    adam: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        plain = p.ndim < 2 or any(part in name for part in ("embed_tokens", "lm_head", ".gate.weight"))
        (adam if plain else muon).append(p)
    return muon, adam
