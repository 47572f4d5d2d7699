"""Gated DeltaNet (Yang et al. 2024): a recurrent state per sequence instead of cached keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from farthing.model import fields as checked
from farthing.model.fields import wrong
from farthing.model.forms.base import Mixer, Workspace, divided
from farthing.model.spec import Share, Tensor, Tensors
from farthing.ops.specs import DeltaSpec


@dataclass(frozen=True, slots=True)
class DeltaHeads(Mixer):
    """The sizes of one layer."""

    module: ClassVar[str] = "linear_attn"

    spec: DeltaSpec
    fused: bool = False  # projections are stored key head by key head, as in Qwen3-Next

    def tensors(self, p: str, d: int) -> Tensors:
        """The parameters; p: prefix of the module, d: hidden size."""
        s, by_head, reads = self.spec, Share(0, self.spec.key_heads), p + "qkvz"
        keys = s.key_heads * s.key_dim
        mixed = Share(0, s.key_heads, (keys, keys, s.values))  # queries, keys and values one after another
        if self.fused:
            yield Tensor(p + "in_proj_qkvz.weight", (s.channels + s.values, d), "matrix", by_head, reads)
            yield Tensor(p + "in_proj_ba.weight", (2 * s.value_heads, d), "linear", by_head)
        else:
            yield Tensor(p + "in_proj_qkv.weight", (s.channels, d), "matrix", mixed, reads)
            yield Tensor(p + "in_proj_z.weight", (s.values, d), "matrix", by_head, reads)
            yield Tensor(p + "in_proj_b.weight", (s.value_heads, d), "linear", by_head)
            yield Tensor(p + "in_proj_a.weight", (s.value_heads, d), "linear", by_head)
        yield Tensor(p + "conv1d.weight", (s.channels, 1, s.width), share=mixed)
        yield Tensor(p + "dt_bias", (s.value_heads,), "bias", by_head)
        yield Tensor(p + "A_log", (s.value_heads,), "bias", by_head)
        yield Tensor(p + "norm.weight", (s.value_dim,), "scale")
        yield Tensor(p + "out_proj.weight", (d, s.values), "matrix", Share(1, s.value_heads))

    def per_rank(self, tp: int) -> DeltaHeads:
        """The heads of one of `tp` ranks. Raises ValueError."""
        keys = divided("linear_num_key_heads", self.spec.key_heads, tp)
        return replace(self, spec=replace(self.spec, key_heads=keys, value_heads=self.spec.value_heads // tp))

    def apart(self) -> DeltaHeads:
        return replace(self, fused=False)

    @property
    def states(self) -> tuple[tuple[int, ...], ...]:
        """Of the state, and of the convolution's tail."""
        return self.spec.state

    @property
    def output_width(self) -> int:
        return self.spec.values

    def keys_read(self, context: int, dense: bool = False) -> int:
        return 0

    def passed(self, keys: int) -> int:
        return self.spec.channels + 2 * self.spec.values

    def reference(self, tokens: int, keys: int, hidden: int, streams: int) -> tuple[int, int]:
        return 0, 0  # less than attention's, which every model has

    def workspace(self, w: Workspace) -> None:
        w.linear(self.spec.channels + self.spec.values, 0)
        w.output(self.spec.values, self.spec.value_heads)

    def gguf(self) -> dict[str, Any]:
        s = self.spec
        return {
            "ssm.conv_kernel": s.width,
            "ssm.state_size": s.key_dim,
            "ssm.group_count": s.key_heads,
            "ssm.time_step_rank": s.value_heads,
            "ssm.inner_size": s.values,
        }


_DELTA_SIZES = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
MOST_WIDTH = 8  # tokens under a convolution


def read_delta(raw: Mapping[str, Any]) -> DeltaHeads:
    """From a config.json with Qwen3-Next's fields, and `fused` as the type sets it.

    Raises ValueError naming the field.
    """
    keys, values, key_dim, value_dim, width = (checked.integer(raw, name) for name in _DELTA_SIZES)
    if values % keys:
        raise wrong("linear_num_value_heads", values, f"a multiple of linear_num_key_heads = {keys}")
    checked.in_range("linear_conv_kernel_dim", width, 2, MOST_WIDTH)
    eps = checked.number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6), above=0.0)
    return DeltaHeads(DeltaSpec(keys, values, key_dim, value_dim, width, eps), raw["fused"])
