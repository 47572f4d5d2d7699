"""A rank's view of a checkpoint: the model reads local layers and shapes and receives its slices."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from farthing.model.config import ModelConfig
from farthing.model.decoder import routers_of
from farthing.model.source import WeightSource
from farthing.ops import RouterSpec, Weight
from farthing.ops.cutting import Cut, bounds, cut_weight
from farthing.parallel.experts import Placements
from farthing.parallel.plan import Place, ShardPlan, layer_of


class ShardedSource:
    """Maps local layers to the checkpoint's and slices tensors for tensor parallelism.

    Slices are read from a mapped safetensors file, so only their bytes are read.
    """

    def __init__(
        self, source: WeightSource, plan: ShardPlan, place: Place, placements: Placements | None = None
    ) -> None:
        """placements: local experts by checkpoint layer; missing layers use contiguous ranges."""
        self._source, self._plan, self._place = source, plan, place
        self._placements = placements if placements is not None else {}
        self._first = plan.stages[place.stage].start
        self._local = len(plan.stages[place.stage])

    def has(self, name: str) -> bool:
        """Whether the tensor is in the checkpoint and read by this rank."""
        name = self._global(name)
        return (
            self._source.has(name)
            and name in self._plan.shapes
            and self._plan.cut(name, self._place) is not None
        )

    def holds(self, module: str) -> bool:
        """Whether this rank computes an expert; a shared one belongs to one group of tp ranks."""
        if module.endswith("shared_experts"):
            return self._place.copy == 0 or self._plan.layout.dp_attention
        module = self._global(module)
        placement = self._placements.get(layer_of(module) or 0)
        if placement is not None:
            return int(module.rpartition(".")[2]) in placement.ranks[self._place.local]
        return self._plan.cut(f"{module}.gate_proj.weight", self._place) is not None

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A plain parameter, or its slice. The plan's shape is checked; `shape` is the local shape."""
        name, cut = self._cut(name)
        value = self._source.tensor(name, self._plan.shapes[name])
        return value if cut.dim is None else value.narrow(cut.dim, cut.start, cut.stop - cut.start)

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """A matrix, or its slice, in its stored format if the slice allows it."""
        name, cut = self._cut(f"{module}.weight")
        rows, columns = self._plan.shapes[name]
        weight = self._source.weight(name.removesuffix(".weight"), (rows, columns))
        return weight if cut.dim is None else cut_weight(weight, cut)

    def _cut(self, name: str) -> tuple[str, Cut]:
        name = self._global(name)
        if ".experts." in name and self._plan.layout.ep > 1:
            return name, Cut(None)  # experts are never sliced, and only read by ranks that hold them
        cut = self._plan.cut(name, self._place)
        assert cut is not None, f"rank {self._place.rank} does not hold {name}"
        return name, cut

    def layer(self, local: int) -> int:
        """The checkpoint's index of a layer of this rank's model; MTP layers follow the others."""
        if local < self._local:
            return local + self._first
        return self._plan.config.num_hidden_layers + local - self._local

    def _global(self, name: str) -> str:
        if not name.startswith("model.layers."):
            return name
        parts = name.split(".")
        parts[2] = str(self.layer(int(parts[2])))
        return ".".join(parts)


def local_config(plan: ShardPlan, place: Place) -> ModelConfig:
    """The config of a rank's model: its layers, heads, and slice of dense and shared experts."""
    c, tp = plan.config, plan.layout.tp
    last = place.stage == plan.layout.pp - 1
    start, stop = bounds(c.intermediate_size, tp, place.tp)
    vocabulary = plan.vocabulary(place)
    return replace(
        c.part(plan.stages[place.stage]),
        num_nextn_predict_layers=c.num_nextn_predict_layers if last else 0,
        attention=c.attention.per_rank(tp),
        intermediate_size=stop - start,
        vocab_size=vocabulary.stop - vocabulary.start,
    )


def local_routers(
    plan: ShardPlan, place: Place, routers: list[RouterSpec | None] | None
) -> list[RouterSpec | None]:
    """The routers of a rank's layers, out of those of the whole model."""
    routers = routers or routers_of(plan.config)
    mtp = routers[plan.config.num_hidden_layers :] if place.stage == plan.layout.pp - 1 else []
    return [routers[i] for i in plan.stages[place.stage]] + mtp
