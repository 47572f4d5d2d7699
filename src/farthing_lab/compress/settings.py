"""The settings of the laboratory's recipes."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from farthing.compress.recipe import Recipe
from farthing_lab.compress.masks import BLOCKS, Pattern, Score, check_sparsity

Observer = Literal["kl", "mse", "percentile", "minmax"]
Scaling = Literal["none", "awq", "smoothquant"]
Compensation = Literal["none", "sweep", "exact"]
Scope = Literal["matrix", "family", "layer", "global"]
Targets = Literal["experts", "all"]
_PRUNE_CHOICES: dict[str, Any] = {
    "pattern": Pattern,
    "score": Score,
    "scope": Scope,
    "compensation": Compensation,
    "targets": Targets,
}


@dataclass(frozen=True, slots=True)
class Prune:
    """Weights to zero inside matrices."""

    pattern: Pattern = "16x16"
    sparsity: float = 0.3
    score: Score = "obs"
    # What shares a threshold: each matrix alone, the experts of a layer, a layer, or the model.
    scope: Scope = "family"
    # How the remaining weights compensate: not at all; column by column (SparseGPT); or by the least-squares
    # solution, which is exact and needs a factorization for every strip of rows.
    compensation: Compensation = "exact"
    targets: Targets = "experts"  # feed-forwards, or attention as well
    heal_steps: int = 0  # gradient steps per layer on the calibration text (`prune.py`)
    shares: tuple[
        tuple[str, float], ...
    ] = ()  # (fnmatch pattern of modules, sparsity) overrides; first match wins

    def share(self, module: str) -> float:
        """The requested sparsity of one matrix."""
        return next((s for pattern, s in self.shares if fnmatchcase(module, pattern)), self.sparsity)

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, "prune.sparsity")
        for pattern, share in self.shares:
            check_sparsity(share, f"prune.shares[{pattern!r}]")
        if self.heal_steps < 0:
            raise ValueError(f"prune.heal_steps: got {self.heal_steps}; expected 0 or more")
        for name, kind in _PRUNE_CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"prune.{name}: got {getattr(self, name)!r}; expected one of {get_args(kind)}"
                )
        if self.scope == "global":
            for name, accepted in (("score", ("magnitude",)), ("pattern", tuple(BLOCKS))):
                if getattr(self, name) not in accepted:
                    given = getattr(self, name)
                    raise ValueError(
                        f"prune.{name}: got {given!r} with prune.scope 'global'; expected one of {accepted}: "
                        "the threshold for all layers must be known before the first is written"
                    )


@dataclass(frozen=True, slots=True)
class Settings(Recipe):
    """Order of work in a layer: rotation, experts, neurons, scaling, mask, rounding.

    activations also takes one calibrated scale ("tensor"), or whichever of it and a dynamic scale per token
    has less error ("best").
    """

    scaling: Scaling = "none"
    smooth_alpha: float = 0.5
    rotate: bool = False
    observer: Literal["auto", "kl", "mse", "percentile", "minmax"] = "auto"
    prune: Prune | None = None
    experts: float = 0.0  # share of routed experts to drop
    neurons: float = 0.0  # share of neurons of every routed expert to drop

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is another class than the one in which this was defined.
        Recipe.__post_init__(self)
        for name in ("experts", "neurons"):
            check_sparsity(getattr(self, name), name)

    @classmethod
    def choices(cls) -> dict[str, tuple[Any, ...]]:
        """The accepted values of every field that has a fixed set of them."""
        return Recipe.choices() | {
            "scaling": get_args(Scaling),
            "activations": ("none", "token", "tensor", "best"),
            "observer": ("auto", *get_args(Observer)),
        }

    @property
    def static(self) -> bool:
        """Whether activation ranges are calibrated."""
        return self.activations in ("tensor", "best")
