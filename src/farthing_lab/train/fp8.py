"""FP8 training (DeepSeek-V3 section 3.3): the three matrix products of every projection run in FP8.

Weights are rounded in blocks of 128 x 128, activations and gradients in groups of 128 along the dimension
that the product sums over. Scales are powers of two, so every rounded value is exact in bfloat16, and a
bfloat16 product with float32 accumulation equals the FP8 product, and is what runs here. Master weights,
optimizer state, norms, router, embedding, head, softmax and residual stream keep their precision.

Shapes: R rows (tokens), J and L columns, E experts (1 for a plain projection).
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from farthing_lab.train.functional import Routing, spans, sum_slots
from farthing_lab.train.loop import BaseHook, Trainer
from farthing_lab.train.model import DeepSeekLM, MoE

log = logging.getLogger(__name__)

GROUP = 128
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


@dataclasses.dataclass(frozen=True)
class Fp8Config:
    """How scales are chosen.

    scaling "current": from the values themselves, so nothing overflows. "delayed": from the largest amax of
    the last `history` steps, which saves a pass over memory on a GPU. It leaves headroom of 2^`margin`, at
    the cost of range at the small end. A value beyond the headroom overflows: it saturates, the step is
    skipped, and the operand's scale is lowered by `backoff` for `history` steps.
    """

    scaling: Literal["current", "delayed"] = "current"
    gradients: Literal["e4m3", "e5m2"] = "e4m3"
    history: int = 16
    margin: int = 3
    backoff: float = 2.0

    def __post_init__(self) -> None:
        if self.scaling not in ("current", "delayed"):
            raise ValueError(f"fp8 scaling: got {self.scaling!r}; expected 'current' or 'delayed'")
        if self.gradients not in FORMATS:
            raise ValueError(f"fp8 gradients: got {self.gradients!r}; expected 'e4m3' or 'e5m2'")
        if self.history < 1 or self.backoff < 1:
            raise ValueError(
                f"fp8 history and backoff: got {self.history} and {self.backoff}; expected at least 1"
            )
        if not 0 <= self.margin <= 8:
            raise ValueError(f"fp8 margin: got {self.margin}; expected 0 to 8 powers of two")


@dataclasses.dataclass(frozen=True)
class Fp8Tensor:
    """A matrix [..., R, J] in FP8: each tile of `data` times its `scale`."""

    data: Tensor  # float8
    scale: Tensor  # float32 [..., R / r, J / c], powers of two
    tile: tuple[int, int]  # (r, c)
    value: Tensor  # dequantized in bfloat16, exact: what a product multiplies

    def rows(self, s: slice) -> Fp8Tensor:
        """Rows s of [R, J]; s must fall on tile boundaries unless one tile covers all rows."""
        r = self.tile[0]
        scale = self.scale if len(self.scale) == 1 else self.scale[s.start // r : -(-s.stop // r)]
        return Fp8Tensor(self.data[s], scale, self.tile, self.value[s])

    def take(self, index: Tensor) -> Fp8Tensor:
        """Rows of [R, J] by index; tiles must be one row or all rows high."""
        scale = self.scale if len(self.scale) == 1 else self.scale[index]
        return Fp8Tensor(self.data[index], scale, self.tile, self.value[index])

    def matrix(self, e: int) -> Fp8Tensor:
        """Matrix e of [E, R, J]."""
        return Fp8Tensor(self.data[e], self.scale[e], self.tile, self.value[e])

    @property
    def mT(self) -> Fp8Tensor:
        """The transpose."""
        return Fp8Tensor(self.data.mT, self.scale.mT, (self.tile[1], self.tile[0]), self.value.mT)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads: one per element, four per scale."""
        return self.data.numel() + 4 * self.scale.numel()


def power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two >= x for x > 0; 1 for 0; non-finite where x is."""
    mantissa, exponent = torch.frexp(x)
    up = torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(x == 0, torch.ones_like(x), torch.where(x.isfinite(), up, x))


def decode(data: Tensor) -> Tensor:
    """FP8 -> bfloat16, exact, by shifting bits: several times faster than torch's conversion on a CPU."""
    bits = data.view(torch.int8).to(torch.int16)
    if data.dtype == torch.float8_e5m2:  # the upper byte of a float16
        return (bits << 8).view(torch.float16).to(torch.bfloat16)
    shifted = ((bits & 0x7F) << 4) | (bits & -0x8000)
    return shifted.view(torch.bfloat16) * 2.0**120  # exponent bias 127 - 7


def tiles_of(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """[..., R, J] -> [..., R / r, r, J / c, c], zero-padded to whole tiles; r and c are capped at R and J."""
    rows, columns = x.shape[-2:]
    r, c = min(tile[0], rows), min(tile[1], columns)
    if rows % r or columns % c:
        x = nn.functional.pad(x, (0, -columns % c, 0, -rows % r))
    tiles: Tensor = x.unflatten(-1, (-1, c)).unflatten(-3, (-1, r))
    return tiles


def quantize(x: Tensor, scale: Tensor, tile: tuple[int, int], dtype: torch.dtype) -> Fp8Tensor:
    """Round x [..., R, J] to `dtype` with scales [..., R / r, J / c], saturating."""
    rows, columns = x.shape[-2:]
    spread = scale[..., :, None, :, None]
    largest = LARGEST[dtype]
    data = (tiles_of(x, tile) / spread.to(x.dtype)).clamp_(-largest, largest).to(dtype)
    value = _untile(decode(data) * spread.to(torch.bfloat16), rows, columns)
    return Fp8Tensor(_untile(data, rows, columns), scale, tile, value)


def _untile(tiles: Tensor, rows: int, columns: int) -> Tensor:
    return tiles.flatten(-4, -3).flatten(-2)[..., :rows, :columns]


class Operand:
    """One role (input, weight or gradient) of one projection: its scale history and its rounding.

    Delayed scaling tracks groups that have the same meaning in every step: 128 columns of activations and
    gradients over all tokens, or a block of weights. Such a scale is valid along both dimensions.
    """

    def __init__(self, config: Fp8Config, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.history: list[Tensor] = []  # amax per step, newest last
        self.step_amax: Tensor | None = None
        self.lowered = 0  # steps for which the scale stays lowered
        self.overflow = False

    def rows(self, x: Tensor) -> Fp8Tensor:
        """x [R, J] in groups of 128 columns, for a product that sums over columns."""
        return self._round(x, (1, GROUP), (len(x), GROUP))

    def columns(self, x: Tensor) -> Fp8Tensor:
        """x [R, J] in groups of 128 rows, for a product that sums over rows."""
        return self._round(x, (GROUP, 1), (len(x), GROUP))

    def blocks(self, w: Tensor) -> Fp8Tensor:
        """w [E, L, J] in blocks of 128 x 128."""
        return self._round(w, (GROUP, GROUP), (GROUP, GROUP))

    def _round(self, x: Tensor, tile: tuple[int, int], lasting: tuple[int, int]) -> Fp8Tensor:
        delayed = self.config.scaling == "delayed"
        tile = lasting if delayed else tile
        amax = tiles_of(x.detach(), tile).abs().amax((-3, -1)).float()
        range_ = self._expected(amax) if delayed else amax
        self.overflow |= not bool((amax <= range_).all() and amax.isfinite().all())
        scale = power_of_two(range_ / LARGEST[self.dtype])
        return quantize(x, scale, tile, self.dtype)

    def _expected(self, amax: Tensor) -> Tensor:
        """The range predicted from earlier steps; also records this step's amax."""
        seen = self.step_amax
        self.step_amax = amax if seen is None or seen.shape != amax.shape else torch.maximum(seen, amax)
        if not self.history or self.history[-1].shape != amax.shape:
            return amax  # the first step
        past = torch.stack(self.history).amax(0)
        factor = 2.0**self.config.margin * (self.config.backoff if self.lowered else 1.0)
        room = power_of_two(past / LARGEST[self.dtype]) * LARGEST[self.dtype]
        return torch.where(past > 0, room * factor, torch.ones_like(room))

    def end_step(self) -> bool:
        """End a step. Returns whether it overflowed; if so, the scale is lowered from the next step on."""
        overflow, self.overflow = self.overflow, False
        self.lowered = self.config.history if overflow else max(0, self.lowered - 1)
        amax, self.step_amax = self.step_amax, None
        if amax is not None and bool(amax.isfinite().all()):
            self.history = [*self.history, amax][-self.config.history :]
        return overflow


class Fp8Projection:
    """The three products of one projection (or of all experts of a layer): forward, grad x, grad W."""

    def __init__(self, config: Fp8Config) -> None:
        self.x, self.w = Operand(config, torch.float8_e4m3fn), Operand(config, torch.float8_e4m3fn)
        self.dy = Operand(config, FORMATS[config.gradients])
        self.weight_bytes = 0  # read by one forward pass

    @property
    def operands(self) -> dict[str, Operand]:
        """Operands by role, for logging and saved state."""
        return {"input": self.x, "weight": self.w, "gradient": self.dy}

    def __call__(self, x: Tensor, w: Tensor, sizes: list[int], routing: Routing | None = None) -> Tensor:
        """As `farthing_lab.train.grouped.Product`."""
        out: Tensor = _Fp8Product.apply(x, w, sizes, routing, self)  # type: ignore[no-untyped-call]
        return out


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, sizes: list[int], routing: Routing | None, layer: Fp8Projection
    ) -> Tensor:
        xq, wq = layer.x.rows(x), layer.w.blocks(w)
        layer.weight_bytes = wq.nbytes
        if routing is not None:
            xq = xq.take(routing.token)
        out = x.new_empty(sum(sizes), w.shape[1])
        for e, s in spans(sizes):
            out[s] = product(xq.rows(s), wq.matrix(e))
        ctx.xq, ctx.wq, ctx.sizes, ctx.routing, ctx.layer = xq, wq, sizes, routing, layer
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, wq, sizes = ctx.layer, ctx.wq, ctx.sizes
        x, grad = ctx.xq.value, grad.contiguous()
        dy = layer.dy.rows(grad)
        # This product sums over tokens: round again in groups of 128 tokens, as DeepSeek-V3 does.
        dy_tokens, x_tokens = layer.dy.columns(grad), layer.x.columns(x)
        dx = torch.empty_like(x)
        dw = grad.new_zeros(wq.data.shape, dtype=torch.float32)
        for e, s in spans(sizes):
            dx[s] = product(dy.rows(s), wq.matrix(e).mT)
            dw[e] = product(dy_tokens.rows(s).mT, x_tokens.rows(s).mT)
        dx = dx if ctx.routing is None else sum_slots(dx, ctx.routing.row)
        return dx, dw, None, None, None


def product(a: Fp8Tensor, b: Fp8Tensor) -> Tensor:
    """a [M, K] b^T, b [N, K] -> [M, N] bfloat16, float32 sums: what FP8 units compute, exactly."""
    return a.value @ b.value.mT


def use_fp8(model: DeepSeekLM, config: Fp8Config) -> dict[str, Fp8Projection]:
    """Set FP8 products on every projection of the model; returns them by name."""
    found: dict[str, Fp8Projection] = {}
    for name, module in model.projections():
        if isinstance(module, MoE):
            first, second = Fp8Projection(config), Fp8Projection(config)
            module.products = (first, second)
            found |= {f"{name}.gate_up": first, f"{name}.down": second}
        else:
            module.product = found[name] = Fp8Projection(config)
    return found


class Fp8Hook(BaseHook):
    """On an operand's overflow, skips the step, lowers that operand's scale and logs it."""

    def __init__(self, projections: dict[str, Fp8Projection]) -> None:
        self.projections = projections
        self.skipped = 0

    def before_update(self, trainer: Trainer) -> None:
        """End the step of every operand."""
        hit = [
            f"{name}.{role}"
            for name, projection in self.projections.items()
            for role, operand in projection.operands.items()
            if operand.end_step()
        ]
        if hit:
            trainer.skip_update = True
            self.skipped += 1
            shown = ", ".join(hit[:3]) + (f" and {len(hit) - 3} more" if len(hit) > 3 else "")
            log.warning("step %d skipped: FP8 overflow in %s; scale lowered", trainer.step, shown)
        trainer.metrics["fp8_skipped"] = float(self.skipped)

    def state_dict(self) -> dict[str, Any]:
        """Amax histories and back-offs."""
        operands = {
            f"{name}.{role}": {"history": o.history, "lowered": o.lowered}
            for name, p in self.projections.items()
            for role, o in p.operands.items()
        }
        return {"skipped": self.skipped, "operands": operands}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.skipped = state["skipped"]
        for name, p in self.projections.items():
            for role, o in p.operands.items():
                saved = state["operands"][f"{name}.{role}"]
                o.history, o.lowered = list(saved["history"]), saved["lowered"]
