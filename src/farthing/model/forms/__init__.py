"""The forms of a layer's first half, and which of them each layer of a config.json has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from farthing.model.fields import RopeConfig, read_rope
from farthing.model.forms.base import Index, Mixer, Workspace
from farthing.model.forms.compressed import CompressedHeads, read_compressed
from farthing.model.forms.delta import DeltaHeads, read_delta
from farthing.model.forms.grouped import GroupedHeads, read_grouped
from farthing.model.forms.latent import LatentHeads, read_latent

__all__ = [
    "CompressedHeads",
    "DeltaHeads",
    "GroupedHeads",
    "Index",
    "LatentHeads",
    "Mixer",
    "Workspace",
    "read_mixers",
]

Attention = Literal["latent", "grouped", "compressed"]


def read_mixers(raw: Mapping[str, Any], attention: Attention, hidden: int) -> tuple[Mixer, ...]:
    """The first half of every hidden layer, and of MTP layers, which have the same one, from a config.json
    with fields as the type sets them. Raises ValueError naming the field.

    attention: the form of most layers. `windows`, `unrotated`, `indexer_types` and `rates` tell layers apart;
    `windowed` has what is different with a window; `recurrent_layers` have none.
    """
    rope, layers = read_rope(raw), hidden + 1
    if attention == "compressed":
        return _compressed(raw, rope, layers)
    if attention == "latent":
        return _latent(read_latent(raw), raw, rope, layers)
    common = replace(read_grouped(raw), rope=rope)
    if windowed := raw.get("windowed"):
        own = {**raw, **windowed}
        narrow = replace(read_grouped(own), rope=read_rope(own))
    else:
        narrow = common
    windows, still = tuple(raw.get("windows") or ()), tuple(raw.get("unrotated") or ())
    recurrent = tuple(raw.get("recurrent_layers") or ())
    delta = read_delta(raw) if recurrent else None

    def at(layer: int) -> Mixer:
        if delta is not None and layer in recurrent:
            return delta
        window = (windows[layer] if layer < len(windows) else 0) or None
        return replace(narrow if window else common, window=window, rotated=layer not in still)

    return tuple(map(at, range(layers)))


def _latent(common: LatentHeads, raw: Mapping[str, Any], rope: RopeConfig, layers: int) -> tuple[Mixer, ...]:
    common, kinds = replace(common, rope=rope), tuple(raw.get("indexer_types") or ())
    if unknown := {*kinds} - {"full", "shared"}:
        raise ValueError(f"indexer_types has {sorted(unknown)[0]!r}; expected 'full' or 'shared'")
    if common.index is not None and kinds and kinds[0] != "full":
        raise ValueError(
            "indexer_types[0]: got 'shared'; expected 'full': no earlier layer selects keys to share"
        )
    if common.index is None:
        return (common,) * layers
    sharing = replace(common, index=replace(common.index, shared=True))
    return tuple(sharing if kinds[i : i + 1] == ("shared",) else common for i in range(layers))


def _compressed(raw: Mapping[str, Any], rope: RopeConfig, layers: int) -> tuple[Mixer, ...]:
    common, alone = read_compressed(raw), raw["window_rope"]

    def at(rate: int) -> Mixer:
        index = common.index if rate == common.rate else None
        return replace(common, rate=rate, index=index, rope=rope if rate else alone)

    return tuple(map(at, [*raw["rates"][: layers - 1], 0]))
