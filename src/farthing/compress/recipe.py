"""Compression recipes, by name or from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from farthing.checkpoint.reader import quantization_in
from farthing.compress.calibrate import Observer
from farthing.compress.masks import BLOCKS, Pattern, Score, check_sparsity
from farthing.compress.size import Measure
from farthing.config import parse_bytes
from farthing.files import read

Scheme = Literal["keep", "int8", "int4", "fp8", "auto"]
Algorithm = Literal["rtn", "gptq"]
Scaling = Literal["none", "awq", "smoothquant"]
Activations = Literal["none", "token", "tensor", "best"]
Compensation = Literal["none", "sweep", "exact"]
Scope = Literal["matrix", "family", "layer", "global"]
Targets = Literal["experts", "all"]
DEFAULT_DROP = 0.01
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
                    value = getattr(self, name)
                    raise ValueError(
                        f"prune.{name}: got {value!r} with prune.scope 'global'; expected one of {accepted}: "
                        "the threshold for all layers must be known before the first is written"
                    )


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe. Order of work in a layer: experts, neurons, rotation, scaling, mask, rounding.

    scheme: storage of every linear matrix; "keep" = as in the source; "auto" = planned per layer.
    activations (int8 and int4): rounded at serving time with one dynamic scale per token ("token"), one
    calibrated scale ("tensor"), whichever has less error ("best"), or not at all.
    """

    name: str
    scheme: Scheme = "int8"
    algorithm: Algorithm = "rtn"
    scaling: Scaling = "none"
    smooth_alpha: float = 0.5
    rotate: bool = False
    group_size: int = 64
    symmetric: bool = True
    act_order: bool = True
    damp: float = 0.01
    activations: Activations = "none"
    observer: Literal["auto", "kl", "mse", "percentile", "minmax"] = "auto"
    prune: Prune | None = None
    experts: float = 0.0  # share of routed experts to drop
    neurons: float = 0.0  # share of neurons of every routed expert to drop
    adaptive: bool = False  # calibrate the number of experts per token (`adaptive.py`), within max_drop
    ignore: tuple[str, ...] = ()  # fnmatch patterns of modules that stay dense
    # "auto" and "adaptive": maximum relative increase of perplexity; see `allowed_drop`
    max_drop: float | None = None
    budget_bytes: int | None = None  # "auto": size limit by `measure`, with the least loss within it
    measure: Measure = "memory"  # "auto": bytes in the kernels' layout, in files, or read per token
    # "auto": shares of zero blocks to try in every feed-forward, and their shapes, of which it takes one
    sparsities: tuple[float, ...] = ()
    patterns: tuple[Literal["16x16", "16x64"], ...] = ("16x16", "16x64")
    calibration_tokens: int = 8192
    window: int = 512

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected one of {get_args(kind)}")
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size: got {self.group_size}; expected 32, 64 or 128")
        for name in ("experts", "neurons"):
            check_sparsity(getattr(self, name), name)
        for sparsity in self.sparsities:
            check_sparsity(sparsity, "sparsities")
        if not set(self.patterns) <= {"16x16", "16x64"} or not self.patterns:
            raise ValueError(f"patterns: got {self.patterns!r}; expected some of ('16x16', '16x64')")
        if self.max_drop is not None and not 0 <= self.max_drop < 10:
            raise ValueError(f"max_drop: got {self.max_drop}; expected a share such as 0.01")
        for name in ("budget_bytes", "measure"):
            if self.scheme != "auto" and getattr(self, name) not in (None, "memory"):
                value = getattr(self, name)
                raise ValueError(
                    f"{name}: got {value!r}, but scheme is {self.scheme!r}; expected scheme 'auto'"
                )
        for name in ("calibration_tokens", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a positive number")

    @property
    def allowed_drop(self) -> float | None:
        """max_drop, or a default if there is no budget either; None if only the budget limits."""
        if self.max_drop is None and self.budget_bytes is None:
            return DEFAULT_DROP
        return self.max_drop

    @property
    def static(self) -> bool:
        """Whether activation ranges are calibrated."""
        return self.activations in ("tensor", "best")

    @property
    def needs_gram(self) -> bool:
        """Whether second moments of the inputs are needed."""
        p = self.prune
        pruned = p is not None and (p.compensation != "none" or p.score == "obs")
        return self.algorithm == "gptq" or self.scaling == "awq" or pruned

    @property
    def heals(self) -> bool:
        """Whether pruned layers are trained towards the unpruned model's hidden states."""
        return self.prune is not None and self.prune.heal_steps > 0

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is needed."""
        energy = self.heals or (self.prune is not None and self.prune.score != "magnitude")
        structure = self.experts > 0 or self.neurons > 0 or self.adaptive
        return (
            self.needs_gram or self.static or energy or structure
            or self.scaling != "none" or self.scheme in ("int8", "int4", "auto")
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """As JSON-serializable values, for the report and the fingerprint of a resumable run."""
        return asdict(self)


_CHOICES: dict[str, Any] = {
    "scheme": Scheme,
    "algorithm": Algorithm,
    "scaling": Scaling,
    "activations": Activations,
    "observer": Literal["auto", "kl", "mse", "percentile", "minmax"],
    "measure": Measure,
}
OBSERVER_NAMES: tuple[Observer, ...] = ("kl", "mse", "percentile", "minmax")

RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe(
            "int8-kl",
            "int8",
            scaling="smoothquant",
            rotate=True,
            activations="tensor",
            calibration_tokens=16384,
        ),
        Recipe("int8-auto", "int8", activations="best", observer="auto", calibration_tokens=4096),
        Recipe("int8", "int8", activations="token", calibration_tokens=4096),
        Recipe("fp8-block", "fp8"),
        Recipe("int4-rtn", "int4"),
        Recipe("int4-gptq", "int4", algorithm="gptq", calibration_tokens=32768),
        Recipe("int4-awq", "int4", scaling="awq", calibration_tokens=16384),
        Recipe("w4a8", "int4", algorithm="gptq", activations="token", calibration_tokens=32768),
        Recipe("smoothquant", "int8", scaling="smoothquant", activations="token"),
        Recipe(
            "prune30-magnitude",
            "keep",
            prune=Prune("unstructured", 0.3, "magnitude", "layer", "none", "all"),
        ),
        Recipe("prune-wanda", "keep", prune=Prune("unstructured", 0.3, "wanda", "matrix", "none", "all")),
        Recipe(
            "prune-2of4",
            "keep",
            prune=Prune("2:4", 0.5, scope="matrix", heal_steps=120),
            calibration_tokens=32768,
        ),
        Recipe(
            "prune30-block16", "keep", prune=Prune("16x16", 0.3, heal_steps=120), calibration_tokens=32768
        ),
        Recipe(
            "int4-block16-40",
            "int4",
            algorithm="gptq",
            prune=Prune("16x16", 0.4, heal_steps=120),
            calibration_tokens=32768,
        ),
        Recipe(
            "int4-block64-40",
            "int4",
            algorithm="gptq",
            prune=Prune("16x64", 0.4, heal_steps=120),
            calibration_tokens=32768,
        ),
        Recipe("experts-reap", "keep", experts=0.25),
        Recipe("adaptive-experts", "keep", adaptive=True, max_drop=0.005, calibration_tokens=16384),
        Recipe("auto", "auto", algorithm="gptq", sparsities=(0.25, 0.5), calibration_tokens=32768),
    )
}


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a YAML file. Raises ValueError with the accepted values."""
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"recipe: got {name!r}; expected one of {', '.join(RECIPES)}, or a .yaml file")
    if not path.is_file():
        raise ValueError(f"recipe: got {name!r}, which does not exist")
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return from_json(raw, path.stem, str(path))


def default_recipe(config: Mapping[str, Any]) -> str:
    """The recipe for a checkpoint whose user names none: the one that makes it smaller and loses least."""
    return "int4-gptq" if quantization_in(config) else "int8"


def from_json(raw: Any, name: str, where: str) -> Recipe:
    """A recipe from its fields; `base` names the recipe with the defaults."""
    try:
        if not isinstance(raw, Mapping):
            raise ValueError(f"expected a mapping of recipe fields, found {type(raw).__name__}")
        values: dict[str, Any] = {"name": name} | dict(raw)
        base = values.pop("base", None)
        if base is not None and not (isinstance(base, str) and base in RECIPES):
            raise ValueError(f"base: got {base!r}; expected one of {', '.join(RECIPES)}")
        if values.get("budget_bytes") is not None:
            values["budget_bytes"] = parse_bytes("budget_bytes", values["budget_bytes"])
        return read(Recipe, values, base=RECIPES[base] if base else None)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
