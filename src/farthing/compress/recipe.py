"""What to do to a checkpoint: named recipes, and the same fields in a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from farthing.compress.calibrate.observers import Observer
from farthing.compress.prune.masks import Pattern, Score, check_sparsity

Scheme = Literal["keep", "int8", "int4", "fp8", "auto"]
Algorithm = Literal["rtn", "gptq"]
Scaling = Literal["none", "awq", "smoothquant"]
Activations = Literal["none", "token", "tensor", "best"]
Compensation = Literal["none", "sweep", "exact"]
Scope = Literal["matrix", "family", "global"]
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
    # Who shares one threshold: nobody, the experts of a layer, or all matrices of a layer.
    scope: Scope = "family"
    # How the weights that stay make up for what was cut: not at all; column by column (SparseGPT); by the
    # least-squares solution, which is exact and takes a factorization for every strip of rows.
    compensation: Compensation = "exact"
    targets: Targets = "experts"  # every feed-forward, or attention as well
    heal_steps: int = 0  # of gradient descent a layer on the calibration text (`prune/heal.py`)
    shares: tuple[tuple[str, float], ...] = ()  # (fnmatch pattern of modules, sparsity) instead, first match

    def share(self, module: str) -> float:
        """The sparsity asked of one matrix."""
        return next((s for pattern, s in self.shares if fnmatchcase(module, pattern)), self.sparsity)

    def __post_init__(self) -> None:
        for sparsity in (self.sparsity, *(s for _, s in self.shares)):
            check_sparsity(sparsity)
        if self.heal_steps < 0:
            raise ValueError(f"heal_steps is {self.heal_steps}; expected 0 or more")
        for name, kind in _PRUNE_CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"prune.{name} is {getattr(self, name)!r}; expected one of {get_args(kind)}")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe. Order of work in a layer: experts, neurons, rotation, scaling, mask, rounding.

    scheme: storage of every linear matrix; "keep" = as the source has it; "auto" = planned per layer.
    activations (int8 and int4): rounded when served, per token, with one calibrated scale ("tensor"), by
    whichever errs less ("best"), or not at all.
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
    adaptive: bool = False  # calibrate how many experts each token needs (`adaptive.py`), within max_drop
    ignore: tuple[str, ...] = ()  # fnmatch patterns of modules that stay dense
    max_drop: float = 0.01  # "auto": relative increase of perplexity it may spend
    budget_bytes: int | None = None  # "auto": size of the matrices, the least loss within it
    # "auto": shares of zero 16x16 blocks to try in every feed-forward
    sparsities: tuple[float, ...] = ()
    calibration_tokens: int = 8192
    window: int = 512

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {get_args(kind)}")
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size is {self.group_size}; expected 32, 64 or 128")
        for sparsity in (self.experts, self.neurons, *self.sparsities):
            check_sparsity(sparsity)
        for name in ("calibration_tokens", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")

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
        """Whether text is run through the model at all."""
        energy = self.heals or (self.prune is not None and self.prune.score != "magnitude")
        structure = self.experts > 0 or self.neurons > 0 or self.adaptive
        return (
            self.needs_gram or self.static or energy or structure
            or self.scaling != "none" or self.scheme in ("int8", "int4", "auto")
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """For the report and the fingerprint of a resumable run."""
        return asdict(self)


_CHOICES: dict[str, Any] = {
    "scheme": Scheme,
    "algorithm": Algorithm,
    "scaling": Scaling,
    "activations": Activations,
    "observer": Literal["auto", "kl", "mse", "percentile", "minmax"],
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
            prune=Prune("unstructured", 0.3, "magnitude", "global", "none", "all"),
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
        Recipe("experts-reap", "keep", experts=0.25),
        Recipe("adaptive-experts", "keep", adaptive=True, max_drop=0.005, calibration_tokens=16384),
        Recipe("auto", "auto", algorithm="gptq", sparsities=(0.25, 0.5), calibration_tokens=32768),
    )
}
DEFAULT = "int8"


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a YAML file. Raises ValueError saying what would be accepted."""
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"recipe is {name!r}; expected one of {', '.join(RECIPES)}, or a .yaml file")
    if not path.is_file():
        raise ValueError(f"recipe is {name!r}, no such file")
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return from_json(raw, path.stem, str(path))


def from_json(raw: Any, name: str, where: str) -> Recipe:
    """Fields of a recipe; `base` names the recipe whose values hold where the file is silent."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}: expected a mapping of recipe fields, found {type(raw).__name__}")
    values = dict(raw)
    base = values.pop("base", None)
    if base is not None and base not in RECIPES:
        raise ValueError(f"{where}: base is {base!r}; expected one of {', '.join(RECIPES)}")
    start = RECIPES[base] if base else Recipe(name)
    _refuse_unknown(values, Recipe, where)
    if values.get("prune") is not None:
        if not isinstance(values["prune"], Mapping):
            raise ValueError(f"{where}: prune is {values['prune']!r}; expected a mapping")
        _refuse_unknown(values["prune"], Prune, f"{where}: prune")
        values["prune"] = _prune(values["prune"], where)
    for name in ("ignore", "sparsities"):
        if name in values:
            values[name] = tuple(values[name])
    try:
        return replace(start, **({"name": name} | values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _prune(raw: Mapping[str, Any], where: str) -> Prune:
    shares = raw.get("shares", {})
    if not isinstance(shares, Mapping):
        raise ValueError(f"{where}: prune.shares is {shares!r}; expected a mapping of pattern to sparsity")
    return Prune(**(dict(raw) | {"shares": tuple((str(k), float(v)) for k, v in shares.items())}))


def _refuse_unknown(values: Mapping[str, Any], kind: Any, where: str) -> None:
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; expected some of {', '.join(known)}")
