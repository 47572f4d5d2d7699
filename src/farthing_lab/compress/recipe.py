"""Recipes with methods that another one dominates: calibrated ranges, scaling, rotation and pruning.

They are found by `farthing compress --recipe NAME` through the entry point `farthing.recipes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from farthing.compress.calibrate import Recorder, Wanted
from farthing.compress.layer import Layer, TracedOps
from farthing.compress.recipe import Recipe
from farthing.compress.transform import layer_stats
from farthing.compress.work import LayerResult, LayerWork
from farthing.model.config import ModelConfig
from farthing.model.forms import LatentHeads
from farthing_lab.compress import prune as pruning
from farthing_lab.compress.ranges import StudyRecorder, choose_ranges
from farthing_lab.compress.rotate import rotate
from farthing_lab.compress.settings import Prune, Settings
from farthing_lab.compress.smooth import scale_inputs


@dataclass(frozen=True, slots=True)
class Study(Settings):
    """A recipe that rotates, cuts, scales and prunes a layer, in this order, or calibrates input ranges."""

    @property
    def needs_gram(self) -> bool:
        """Whether second moments of the inputs are needed."""
        p = self.prune
        pruned = p is not None and (p.compensation != "none" or p.score == "obs")
        return self.algorithm == "gptq" or self.scaling == "awq" or pruned

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is needed."""
        p = self.prune
        energy = p is not None and (p.heal_steps > 0 or p.score != "magnitude")
        structure = self.experts > 0 or self.neurons > 0 or self.adaptive
        return (
            self.needs_gram or self.static or energy or structure
            or self.scaling != "none" or self.scheme in ("int8", "int4", "auto")
        )  # fmt: skip

    @property
    def coarse(self) -> bool:
        """Whether later layers calibrate on this layer's result."""
        return self.scheme in ("int4", "auto") or self.prune is not None

    @property
    def resizes(self) -> bool:
        """Whether the size of the result depends on what calibration shows."""
        structure = self.prune is not None or self.experts > 0 or self.neurons > 0
        return self.scheme == "auto" or self.adaptive or structure

    @property
    def clips_outputs(self) -> bool:
        """Whether the ranges of 4-bit groups minimize the output error by second moments."""
        return self.scaling == "awq"

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for a model whose structure does not admit the rotation or the cuts."""
        if self.rotate and not (isinstance(config.attention, LatentHeads) and config.is_plain):
            raise ValueError(
                f"rotate: got true for model_type {config.model_type!r}; expected false: only latent "
                "attention is rotated"
            )
        recurrent = any(mixer.states for mixer in config.mixers)
        special = any(f.experts.shared_gate or f.experts.biased for f in config.feeds if f.experts)
        plain = not (recurrent or special or config.norm_offset)
        for name in ("scaling", "experts", "neurons"):
            if not plain and getattr(self, name) not in ("none", 0):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} for model_type {config.model_type!r}; expected a "
                    "recipe without it: it does not know biases of experts, gates and recurrent layers"
                )
        for name in ("experts", "neurons"):
            share = getattr(self, name)
            if share and config.uneven:
                raise ValueError(
                    f"{name}: got {share}, but the layers of this model already differ in size (layer_sizes "
                    "in config.json); expected 0, or a model with equal layers"
                )

    def streams(self) -> tuple[str, ...]:
        """The unpruned model's hidden states, if layers are healed."""
        return ("unpruned",) if self.prune is not None and self.prune.heal_steps > 0 else ()

    def begin(self, layers: Iterable[Layer]) -> Recipe:
        """A global threshold becomes one share per family."""
        if self.prune is None or self.prune.scope != "global":
            return self
        return replace(self, prune=pruning.spread(layers, self.prune))

    def recorder(self) -> Recorder:
        """A recorder of ranges, too, and of experts' saliency."""
        return StudyRecorder(Wanted(self.needs_gram), self.static)

    def prepare(self, work: LayerWork) -> None:
        """Rotate, cut, scale and prune the layer, and record its inputs after each change that moves them."""
        layer, stream = work.layer, work.stream
        heals = stream is not None and "unpruned" in stream.others and not layer.is_mtp
        if stream is not None and heals:
            stream.others["unpruned"] = work.forward(TracedOps(), stream.others["unpruned"])
        if self.rotate:
            rotate(layer, seed=layer.index)
        if stream is not None and self.needs_data:
            work.record()
            if layer.is_moe and (self.experts or self.neurons):
                work.changes |= pruning.prune_structure(work, self)
                work.record()
            if self.scaling != "none":
                assert work.recorder is not None
                scale_inputs(layer, work.recorder.inputs, self)
                work.record()
        if self.prune is not None:
            work.originals = {m: layer.weight(m) for m in layer.modules()}
            work.masks = pruning.prune_layer(layer, layer_stats(layer, work.recorder)[0], self)
            if work.masks and stream is not None and heals:
                x = pruning.feed_forward_input(work)
                healed = pruning.heal(layer, work.masks, x, stream.others["unpruned"], self.prune.heal_steps)
                work.healed = asdict(healed)
            if work.recorder is not None and self.scheme not in ("keep", "fp8"):
                work.record()
        if work.originals is None and self.static:
            work.originals = {m: layer.weight(m) for m in layer.modules()}

    def finish(self, work: LayerWork, result: LayerResult) -> None:
        """Choose the input range of every integer matrix."""
        if self.static:
            choose_ranges(work, layer_stats(work.layer, work.recorder)[0], self, result)


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Study(
            "int8-kl",
            "int8",
            scaling="smoothquant",
            rotate=True,
            activations="tensor",
            calibration_tokens=16384,
        ),
        Study("int8-auto", "int8", activations="best", observer="auto", calibration_tokens=4096),
        Study("smoothquant", "int8", scaling="smoothquant", activations="token"),
        Study("int4-awq", "int4", scaling="awq", calibration_tokens=16384),
        Study(
            "prune30-magnitude",
            "keep",
            prune=Prune("unstructured", 0.3, "magnitude", "layer", "none", "all"),
        ),
        Study("prune-wanda", "keep", prune=Prune("unstructured", 0.3, "wanda", "matrix", "none", "all")),
        Study(
            "prune-2of4",
            "keep",
            prune=Prune("2:4", 0.5, scope="matrix", heal_steps=120),
            calibration_tokens=32768,
        ),
        Study("prune30-block16", "keep", prune=Prune("16x16", 0.3, heal_steps=120), calibration_tokens=32768),
        Study(
            "int4-block16-40",
            "int4",
            algorithm="gptq",
            prune=Prune("16x16", 0.4, heal_steps=120),
            calibration_tokens=32768,
        ),
        Study(
            "int4-block64-40",
            "int4",
            algorithm="gptq",
            prune=Prune("16x64", 0.4, heal_steps=120),
            calibration_tokens=32768,
        ),
        Study("experts-reap", "keep", experts=0.25),
    )
}
