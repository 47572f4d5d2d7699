"""Hadamard rotation where it is exact and free (QuaRot, Ashkboos et al. 2024; SpinQuant).

An RMS norm without weights commutes with a rotation. After folding the norm's weight into the consumer, a
latent can be rotated by its producer (rows) and rotated back by its consumer (columns). The values of each
head can be rotated by kv_b and rotated back by o_proj. Nothing is added at inference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farthing.compress.layer import Layer


def rotate(layer: Layer, seed: int) -> None:
    """Rotate both latents and the values of every head; the layer's function is unchanged."""
    a, c = f"{layer.prefix}self_attn.", layer.config
    have = set(layer.modules())
    pairs = [("kv_a_layernorm", "kv_a_proj_with_mqa", "kv_b_proj", c.latent.kv_lora_rank)]
    if c.latent.q_lora_rank:
        pairs.append(("q_a_layernorm", "q_a_proj", "q_b_proj", c.latent.q_lora_rank))
    for norm, producer, consumer, width in pairs:
        if a + producer not in have:
            continue
        whole = layer.weight(a + producer)
        rows, norm_weight, columns = rotate_latent(
            whole[:width],
            layer.tensors[f"{a}{norm}.weight"],
            layer.weight(a + consumer),
            random_hadamard(width, seed),
        )
        layer.set(a + producer, torch.cat((rows, whole[width:])))
        layer.set(a + consumer, columns)
        layer.tensors[f"{a}{norm}.weight"] = norm_weight
    kv_b, o = rotate_values(
        layer.weight(f"{a}kv_b_proj"),
        layer.weight(f"{a}o_proj"),
        c.num_attention_heads,
        c.latent.qk_nope_head_dim,
        c.latent.v_head_dim,
        random_hadamard(c.latent.v_head_dim, seed + 1),
    )
    layer.set(f"{a}kv_b_proj", kv_b)
    layer.set(f"{a}o_proj", o)


def hadamard(n: int) -> Tensor:
    """An orthogonal n x n matrix with entries of equal magnitude (Sylvester) if n is a power of two. For
    n = 2^a * m it is H(2^a) repeated m times along the diagonal."""
    power = n & -n
    h = torch.ones(1, 1)
    while h.shape[0] < power:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    whole: Tensor = torch.block_diag(*[h / power**0.5] * (n // power))
    return whole


def random_hadamard(n: int, seed: int) -> Tensor:
    """`hadamard` with random column signs, to break up structured directions."""
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return hadamard(n) * signs


def rotate_latent(
    producer: Tensor, norm: Tensor, consumer: Tensor, rotation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(producer [c, D], norm [c], consumer [N, c]) with the latent rotated; the norm's weight becomes 1."""
    return rotation.t() @ producer, torch.ones_like(norm), (consumer * norm) @ rotation


def rotate_values(
    kv_b: Tensor, o: Tensor, heads: int, nope: int, value: int, rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """kv_b [H (n + v), c] and o [D, H v] with every head's values rotated by rotation [v, v]."""
    rows = kv_b.view(heads, nope + value, -1).clone()
    rows[:, nope:] = torch.einsum("vw,hvc->hwc", rotation, rows[:, nope:])
    columns = torch.einsum("dhv,vw->dhw", o.view(-1, heads, value), rotation)
    return rows.reshape(kv_b.shape), columns.reshape(o.shape)
