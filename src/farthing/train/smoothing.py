"""Smoothing before 4-bit activations: moves the scale differences between input channels into the weights.

A group of inputs shares one range, so its largest channel determines how coarsely the others are rounded.
Dividing channel j by s_j = rms_j ** strength and multiplying column j of the weights by s_j changes no output
(as SmoothQuant, Xiao et al. 2023). The division is free: it is folded into the preceding norm or, for the
inputs of a down projection, into the rows of the up projection.

Shapes: D channels, E experts, I neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from farthing.train.activity import Activity, measure, mlps
from farthing.train.model import MLP, Block, DeepSeekLM, MoE, RMSNorm

LEAST = 0.05  # of the median: floor, so that a nearly silent channel is not amplified further


@torch.no_grad()
def smooth(net: DeepSeekLM, tokens: Tensor, strength: float = 0.5) -> None:
    """Fold the smoothing of every 4-bit input into `net`, from statistics on tokens [B, T + 1].

    The net computes the same function afterwards. The latent's up-projection is left alone: its input keeps 8
    bits. Raises ValueError for a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"smoothing: got {strength}; expected 0 (off) to 1 (all channels alike)")
    if strength == 0:
        return
    seen: dict[RMSNorm, Tensor] = {}
    watching = [norm.register_forward_hook(_sum_squares(seen)) for norm, _ in _norms(net)]
    try:
        activities = measure(net, tokens, tau=0.0)
    finally:
        for handle in watching:
            handle.remove()
    for norm, columns in _norms(net):
        s = _scales(seen[norm].sqrt(), strength)
        norm.weight.div_(s)
        for column in columns:
            column.mul_(s)
    for name, mlp in mlps(net):
        _fold_neurons(mlp, activities[name], strength)


def _sum_squares(seen: dict[RMSNorm, Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(norm: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(norm, RMSNorm)
        square = out.detach().flatten(0, -2).float().square().sum(0)
        seen[norm] = seen.get(norm, torch.zeros_like(square)) + square

    return hook


def _scales(rms: Tensor, strength: float) -> Tensor:
    """s [..., D] with geometric mean 1, from values proportional to the rms [..., D]."""
    floor = rms.median(-1, keepdim=True).values * LEAST
    s = torch.where(floor > 0, rms.maximum(floor), torch.ones_like(rms)) ** strength
    scales: Tensor = s / s.log().mean(-1, keepdim=True).exp()
    return scales


def _norms(net: DeepSeekLM) -> Iterator[tuple[RMSNorm, Sequence[Tensor]]]:
    """(norm, the weights [..., D] that read only its output)."""
    blocks: list[Block] = [*net.layers, *([net.mtp.block] if net.mtp is not None else [])]  # type: ignore[list-item]
    for block in blocks:
        attention, mlp = block.self_attn, block.mlp
        yield block.input_layernorm, [attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight]
        yield attention.q_a_layernorm, [attention.q_b_proj.weight]
        if isinstance(mlp, MoE):
            shared = mlp.shared_experts
            readers = [mlp.gate.weight, mlp.gate_up, shared.gate_proj.weight, shared.up_proj.weight]
        else:
            readers = [mlp.gate_proj.weight, mlp.up_proj.weight]
        yield block.post_attention_layernorm, readers
    if net.mtp is not None:
        own, next_ = net.mtp.eh_proj.weight.chunk(2, 1)
        yield net.mtp.enorm, [own]
        yield net.mtp.hnorm, [next_]


def _fold_neurons(mlp: MLP | MoE, activity: Activity, strength: float) -> None:
    """Fold by the rms of neuron j: energies are of |h_j| ||W_down[:, j]||, so divide by the column norm."""
    if isinstance(mlp, MoE):
        size = activity.energy.sqrt() / mlp.down.norm(dim=1).clamp_min(1e-12)
        s = _scales(size, strength)
        mlp.gate_up[:, 1].div_(s[..., None])
        mlp.down.mul_(s[:, None])
    else:
        down = mlp.down_proj.weight
        s = _scales(activity.energy[0].sqrt() / down.norm(dim=0).clamp_min(1e-12), strength)
        mlp.up_proj.weight.div_(s[:, None])
        down.mul_(s)
