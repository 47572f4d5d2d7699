"""The forms of a layer's first half, one file each (docs/design/adding-a-model.md)."""

from farthing.model.forms.base import Index, Mixer, Workspace
from farthing.model.forms.compressed import CompressedHeads
from farthing.model.forms.delta import DeltaHeads
from farthing.model.forms.grouped import GroupedHeads
from farthing.model.forms.latent import LatentHeads

__all__ = [
    "CompressedHeads",
    "DeltaHeads",
    "GroupedHeads",
    "Index",
    "LatentHeads",
    "Mixer",
    "Workspace",
]
