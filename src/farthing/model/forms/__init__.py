"""The forms of a layer's two halves, one file each (docs/design/adding-a-model.md)."""

from farthing.model.forms.base import Index, Mixer, Workspace
from farthing.model.forms.compressed import CompressedHeads
from farthing.model.forms.delta import DeltaHeads
from farthing.model.forms.feed import SIZES, Experts, Feed, feed_layers
from farthing.model.forms.grouped import GroupedHeads
from farthing.model.forms.latent import LatentHeads

__all__ = [
    "SIZES",
    "CompressedHeads",
    "DeltaHeads",
    "Experts",
    "Feed",
    "GroupedHeads",
    "Index",
    "LatentHeads",
    "Mixer",
    "Workspace",
    "feed_layers",
]
