"""Move quantization difficulty between a matrix and its input: y = W x = (W diag(s)) (diag(1/s) x).

1/s is folded into the preceding norm (or up projection), so it costs nothing at run time. AWQ (Lin et al.
2023) chooses s to protect weights with large inputs; SmoothQuant (Xiao et al. 2022) chooses it so that
activations are easier to round. Legend: N rows; K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farthing.compress.calibrate import InputStats
from farthing.compress.layer import Layer
from farthing.compress.transform import Stats, grid_of
from farthing_lab.compress.settings import Settings

ALPHAS = tuple(i / 10 for i in range(11))
Round = Callable[[Tensor, Tensor], Tensor]  # (w [N, K], gram [K, K]) -> its rounded value


def scale_inputs(layer: Layer, stats: Stats, recipe: Settings) -> dict[str, float]:
    """Move input scales across norms and up projections, keeping the function. Returns norm -> alpha."""
    chosen: dict[str, float] = {}
    for mlp in layer.mlps():
        down = stats.get(f"{mlp}.down_proj")
        if down is None:
            continue
        s, alpha = _factor(layer, [f"{mlp}.down_proj"], [down], down, recipe)
        layer.set(f"{mlp}.down_proj", layer.weight(f"{mlp}.down_proj") * s)
        layer.set(f"{mlp}.up_proj", layer.weight(f"{mlp}.up_proj") / s.unsqueeze(1))
        chosen[f"{mlp}.down_proj"] = alpha
    for norm, modules, plain in norm_groups(layer):
        known = [(m, stats[layer.reads(m)]) for m in modules if layer.reads(m) in stats]
        if not known:
            continue
        whole = max((st for _, st in known), key=lambda st: st.tokens)
        s, alpha = _factor(layer, [m for m, _ in known], [st for _, st in known], whole, recipe)
        for module in modules:
            layer.set(module, layer.weight(module) * s)
        for name in plain:
            layer.tensors[name] = layer.tensors[name] * s
        layer.tensors[norm] = layer.tensors[norm] / s
        chosen[norm] = alpha
    return chosen


def _factor(
    layer: Layer, modules: list[str], stats: list[InputStats], whole: InputStats, recipe: Settings
) -> tuple[Tensor, float]:
    weights = [layer.weight(m) for m in modules]
    if recipe.scaling == "smoothquant":
        absmax = torch.stack([st.absmax for st in stats]).amax(0)
        return smooth_scale(weights, absmax, recipe.smooth_alpha), recipe.smooth_alpha

    columns = layer.group_columns(modules[0])

    def round_to(w: Tensor, gram: Tensor) -> Tensor:
        energy = gram.diagonal()[None] / max(whole.tokens, 1)
        value: Tensor = grid_of(w[None], energy, recipe.scheme, recipe, columns, gram[None]).round(w[None])[0]
        return value

    grams = [st.gram if st.gram is not None else torch.diag(st.energy) for st in stats]
    best = awq_scale(weights, grams, whole.magnitude / max(whole.tokens, 1), round_to)
    return best.factor, best.alpha


def norm_groups(layer: Layer) -> list[tuple[str, list[str], list[str]]]:
    """(norm, matrices and plain tensors that read it): scales can move across the norm."""
    p, have = layer.prefix, set(layer.modules())
    attention = [
        f"{p}self_attn.{a}" for a in ("q_a_proj", "q_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa")
    ]
    mlps = [f"{m}.{part}" for m in layer.mlps() for part in ("gate_proj", "up_proj")]
    router = [f"{p}mlp.gate.weight"] if layer.is_moe else []
    groups = [
        (f"{p}input_layernorm.weight", [m for m in attention if m in have], []),
        (f"{p}post_attention_layernorm.weight", [m for m in mlps if m in have], router),
    ]
    for norm, fed in (("q_a_layernorm", "q_b_proj"), ("kv_a_layernorm", "kv_b_proj")):
        if f"{p}self_attn.{norm}.weight" in layer.tensors and f"{p}self_attn.{fed}" in have:
            groups.append((f"{p}self_attn.{norm}.weight", [f"{p}self_attn.{fed}"], []))
    return groups


@dataclass(frozen=True, slots=True)
class AwqScale:
    """The factor of the weights' columns, and the candidate that it comes from."""

    factor: Tensor  # [K]
    alpha: float
    duo: bool  # also divided by the weights' size
    error: float  # relative to factor 1


def awq_scale(
    weights: Sequence[Tensor], grams: Sequence[Tensor], magnitude: Tensor, round_to: Round
) -> AwqScale:
    """The factor with the least output error over the matrices that share the input.

    weights [N_i, K] with their grams [K, K] = sum of x x^T; magnitude [K] = mean |x|. Candidates:
    magnitude^alpha, and magnitude^alpha / size^(1 - alpha), where size is the mean |w| of a column relative
    to its row's largest. alpha = 0 changes nothing and is a candidate, so the error never grows.
    """
    x = magnitude.clamp_min(1e-8)
    size = torch.cat([w.abs() / w.abs().amax(1, keepdim=True).clamp_min(1e-20) for w in weights]).mean(0)
    trials = {(a, False): x.pow(a) for a in ALPHAS}
    trials |= {(a, True): x.pow(a) / (size.pow(1 - a) + 1e-4) for a in ALPHAS[:-1]}
    errors: dict[tuple[float, bool], float] = {}
    for key, trial in trials.items():
        s = trials[key] = normalized(trial)
        error = 0.0
        for w, gram in zip(weights, grams, strict=True):
            delta = round_to(w * s, gram / s.unsqueeze(1) / s) / s - w
            error += float(((delta @ gram) * delta).sum())
        errors[key] = error
    best = min(errors, key=errors.__getitem__)
    return AwqScale(trials[best], *best, errors[best] / max(errors[0.0, False], 1e-30))


def smooth_scale(weights: Sequence[Tensor], absmax: Tensor, alpha: float) -> Tensor:
    """SmoothQuant equation 4, as the factor on the weights: s_k = max|x_k|^alpha / max|W_k|^(1 - alpha)."""
    column = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    s = absmax.clamp_min(1e-5).pow(alpha) / column.clamp_min(1e-5).pow(1 - alpha)
    return s.clamp(1e-4, 1e4)


def normalized(s: Tensor) -> Tensor:
    """Normalize s to a geometric middle of 1, within 10^-4 to 10^4, so that both sides keep their range."""
    return (s / (s.max() * s.min()).sqrt()).clamp(1e-4, 1e4)
