"""Gated DeltaNet in torch, on any device (Yang et al. 2024, with the chunked form of its section 3.2).

Legend: T tokens of the step; N sequences that advance together, by t tokens each; Hk key heads; Hv value
heads; dk, dv their sizes; C channels of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.ops.api import Place
from farthing.ops.specs import DeltaParts, DeltaSpec

NORM_EPS = 1e-6  # of the L2 norm of queries and keys
CHUNK = 64  # tokens whose corrections of the state are solved for together


@dataclass(frozen=True, slots=True)
class Delta:
    """A layer's parameters, on one device."""

    spec: DeltaSpec
    parts: DeltaParts


def pack_delta(spec: DeltaSpec, parts: DeltaParts, here: Callable[[Tensor], Tensor]) -> Delta:
    """here: copies a tensor to the device."""
    return Delta(spec, DeltaParts(here(parts.conv), here(parts.rate), here(parts.shift), here(parts.norm)))


def delta(x: Tensor, gates: Tensor, d: Delta, place: Place, chunk: int) -> Tensor:
    """`Ops.delta`; a chunk of 1 is the recurrence as it is defined."""
    batch, state, layer = place.batch, place.cache.state, place.row
    assert batch.state_slots is not None and state is not None
    s, slots = d.spec, batch.state_slots.long()
    starts = batch.query_start.tolist()
    out = torch.empty(x.shape[0], s.values, dtype=x.dtype, device=x.device)
    for first, last in together(starts):
        rows = slice(starts[first], starts[last])
        n = last - first
        part, gate = (each[rows].unflatten(0, (n, -1)) for each in (x, gates))
        positions, here = batch.positions[rows].view(n, -1).long(), slots[first:last]
        qkv = convolved(part[..., : s.channels], d, state.tail[layer], here, positions)
        z = part[..., s.channels :]
        out[rows] = advance(qkv, gate, z, d, state.data[layer], here, positions, chunk).flatten(0, 1)
    return out


def together(starts: list[int]) -> list[tuple[int, int]]:
    """Sequences first … last - 1 that advance together: adjacent ones of one token, or one of several."""
    found: list[tuple[int, int]] = []
    single = [stop - start == 1 for start, stop in pairwise(starts)]
    for b, alone in enumerate(single):
        if alone and b and single[b - 1]:
            found[-1] = found[-1][0], b + 1
        else:
            found.append((b, b + 1))
    return found


def convolved(x: Tensor, d: Delta, tail: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """x [N, t, C] at positions [N, t] -> SiLU of the convolution, float32; the tail [slots, width - 1, C] is
    read and written."""
    length, before = x.shape[1], d.spec.width - 1
    x = x.to(tail.dtype)
    at = positions[:, :1] - torch.arange(before, 0, -1, device=x.device)  # [N, width - 1]
    earlier = tail[slots[:, None], at % before].masked_fill((at < 0).unsqueeze(-1), 0.0)
    padded = torch.cat((earlier, x), 1)
    last = slice(-min(length, before), None)
    tail[slots[:, None], positions[:, last] % before] = x[:, last]
    seen = torch.stack([padded[:, i : i + length] for i in range(d.spec.width)], -1)  # [N, t, C, width]
    return F.silu((seen * d.parts.conv.T).sum(-1))


def advance(
    qkv: Tensor, gates: Tensor, z: Tensor, d: Delta, states: Tensor, slots: Tensor, positions: Tensor,
    chunk: int,
) -> Tensor:  # fmt: skip
    """qkv [N, t, C], gates [N, t, 2 Hv], z [N, t, Hv dv] -> [N, t, Hv dv] in z's dtype; changes the states
    [slots, Hv, dk, dv]."""
    s = d.spec
    q, k, v = qkv.split((s.key_heads * s.key_dim,) * 2 + (s.values,), -1)

    def heads(x: Tensor, count: int) -> Tensor:  # [N, Hv, t, …]
        each: Tensor = x.unflatten(-1, (count, -1)).transpose(1, 2)
        return each.repeat_interleave(s.value_heads // count, 1)

    def unit(x: Tensor) -> Tensor:
        inverse: Tensor = torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)
        return x * inverse

    q, k = unit(heads(q, s.key_heads)) * s.key_dim**-0.5, unit(heads(k, s.key_heads))
    b, a = gates.to(q.dtype).transpose(1, 2).chunk(2, 1)  # [N, Hv, t]
    decay = d.parts.rate[:, None] * F.softplus(a + d.parts.shift[:, None])
    state = states[slots].masked_fill((positions[:, 0] == 0)[:, None, None, None], 0.0)
    out = []
    whole = q, k, heads(v, s.value_heads), decay, b.sigmoid()
    for part in zip(*(each.split(chunk, 2) for each in whole), strict=True):
        o, state = through(state, *part)
        out.append(o)
    states[slots] = state
    o = torch.cat(out, 2).transpose(1, 2)  # [N, t, Hv, dv]
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + s.norm_eps) * d.parts.norm
    result: Tensor = o.flatten(2) * F.silu(z.to(o.dtype))
    return result.to(z.dtype)


def through(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """t tokens through the states [N, Hv, dk, dv]: q and k [N, Hv, t, dk], v [N, Hv, t, dv], log decay and
    beta [N, Hv, t] -> (outputs [N, Hv, t, dv], the states after them).

    Token i corrects the state by c_i, so that S_i = e^(g_i) S_(i-1) + k_i c_i^T with
    c_i = beta_i (v_i - e^(g_i) S_(i-1)^T k_i). Written with the state before all of them, the corrections
    solve a triangular system: each depends on those before it.
    """
    total = decay.cumsum(-1)
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~seen, float("-inf")).exp()
    grown = total.exp().unsqueeze(-1)
    system = (k @ k.transpose(-1, -2)) * between * beta.unsqueeze(-1)
    wanted = beta.unsqueeze(-1) * (v - grown * (k @ state))
    correction = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    out = grown * (q @ state) + ((q @ k.transpose(-1, -2)) * between) @ correction
    left = (total[..., -1:] - total).exp().unsqueeze(-1)
    return out, grown[..., -1:, :] * state + (k * left).transpose(-1, -2) @ correction
