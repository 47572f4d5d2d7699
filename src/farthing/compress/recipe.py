"""Compression recipes, by name or from a YAML file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_args

from farthing.checkpoint.reader import is_quantized
from farthing.compress.calibrate import Recorder, Wanted
from farthing.compress.layer import Layer
from farthing.compress.size import Measure
from farthing.compress.work import LayerResult, LayerWork
from farthing.config import parse_bytes
from farthing.files import read
from farthing.model.config import ModelConfig

Scheme = Literal["keep", "int8", "int5", "int4", "fp8", "auto"]
Values = Literal["even", "fitted"]
Algorithm = Literal["rtn", "gptq"]
DEFAULT_DROP = 0.01


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe: how the matrices of every layer are rounded.

    scheme: storage of every linear matrix; "keep" = as in the source; "auto" = planned per layer. values: of
    4 bits, evenly spaced, or fitted to weights, which only Farthing reads exactly. activations (int8 and
    int4): rounded at serving time with one dynamic scale per token ("token"), or not at all.
    Packages with recipes of their own (entry points `farthing.recipes`) derive from this class and add to its
    methods what happens to a layer before and after rounding.
    """

    name: str
    scheme: Scheme = "int8"
    values: Values = "even"
    head: Literal["keep", "int8"] = "keep"  # int8: rounded while loading, because files share it
    algorithm: Algorithm = "rtn"
    group_size: int = 64
    symmetric: bool = True
    act_order: bool = True
    damp: float = 0.01
    activations: str = "none"
    adaptive: bool = False  # calibrate the number of experts per token (`adaptive.py`), within max_drop
    ignore: tuple[str, ...] = ()  # fnmatch patterns of modules that stay dense
    wide: tuple[str, ...] = ()  # fnmatch patterns of modules that get 8 bits instead of 4 or 5
    # "auto" and "adaptive": maximum relative increase of perplexity; see `allowed_drop`
    max_drop: float | None = None
    budget_bytes: int | None = None  # "auto": size limit by `measure`, with the least loss within it
    measure: Measure = "memory"  # "auto": bytes in the kernels' layout, in files, or read per token
    calibration_tokens: int = 8192
    window: int = 512

    def __post_init__(self) -> None:
        for name, accepted in self.choices().items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected one of {accepted}")
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size: got {self.group_size}; expected 32, 64 or 128")
        if self.values == "fitted" and not self.symmetric:
            raise ValueError("symmetric: got false with values 'fitted'; expected values 'even'")
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

    @classmethod
    def choices(cls) -> dict[str, tuple[Any, ...]]:
        """The accepted values of every field that has a fixed set of them."""
        return {
            "scheme": get_args(Scheme),
            "values": get_args(Values),
            "head": ("keep", "int8"),
            "algorithm": get_args(Algorithm),
            "activations": ("none", "token"),
            "measure": get_args(Measure),
        }

    @property
    def needs_gram(self) -> bool:
        """Whether second moments of the inputs are needed."""
        return self.algorithm == "gptq"

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is needed."""
        return self.needs_gram or self.adaptive or self.scheme in ("int8", "int5", "int4", "auto")

    @property
    def coarse(self) -> bool:
        """Whether later layers calibrate on this layer's result, to compensate for it. int8 and FP8 are too
        close to the original to be worth a second pass."""
        return self.scheme in ("int5", "int4", "auto")

    @property
    def resizes(self) -> bool:
        """Whether the size of the result depends on what calibration shows."""
        return self.scheme == "auto" or self.adaptive

    @property
    def clips_outputs(self) -> bool:
        """Whether the ranges of 4-bit groups minimize the output error by second moments, not the energy."""
        return False

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for a model that this recipe cannot compress."""

    def streams(self) -> tuple[str, ...]:
        """Names of further hidden states that go from layer to layer beside the compressed model's."""
        return ()

    def begin(self, layers: Iterable[Layer]) -> Recipe:
        """The recipe to apply, after a look at every layer where it needs one."""
        return self

    def recorder(self) -> Recorder:
        """A new recorder of what calibration needs."""
        return Recorder(Wanted(self.needs_gram))

    def prepare(self, work: LayerWork) -> None:
        """Record a layer's inputs, and change the layer before its matrices are rounded."""
        if self.needs_data and work.stream is not None:
            work.record()

    def finish(self, work: LayerWork, result: LayerResult) -> None:
        """Complete what is written of a layer after its matrices are rounded."""

    def to_json(self) -> dict[str, Any]:
        """As JSON-serializable values, for the report and the fingerprint of a resumable run."""
        return asdict(self)


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("int8", "int8", activations="token", calibration_tokens=4096),
        Recipe("fp8-block", "fp8"),
        Recipe("int4-rtn", "int4"),
        Recipe(
            "int4",
            "int4",
            "fitted",
            "int8",
            algorithm="gptq",
            wide=("*.self_attn.*", "*.linear_attn.*"),
            calibration_tokens=32768,
        ),
        Recipe(
            "int5",
            "int5",
            head="int8",
            algorithm="gptq",
            wide=("*.v_proj", "*.kv_a_proj_with_mqa", "*.kv_b_proj"),
            calibration_tokens=32768,
        ),
        Recipe("w4a8", "int4", algorithm="gptq", activations="token", calibration_tokens=32768),
        Recipe("adaptive-experts", "keep", adaptive=True, max_drop=0.005, calibration_tokens=16384),
        Recipe("auto", "auto", "fitted", "int8", algorithm="gptq", calibration_tokens=32768),
    )
}


def known_recipes() -> dict[str, Recipe]:
    """The recipes of this package and of those that declare some (entry points `farthing.recipes`)."""
    known = dict(RECIPES)
    for point in entry_points(group="farthing.recipes"):
        known |= point.load()
    return known


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a YAML file. Raises ValueError with the accepted values."""
    if name in RECIPES:
        return RECIPES[name]
    known = known_recipes()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"recipe: got {name!r}; expected one of {', '.join(known)}, or a .yaml file")
    if not path.is_file():
        raise ValueError(f"recipe: got {name!r}, which does not exist")
    try:
        raw = _load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return from_json(raw, path.stem, str(path))


def default_recipe(path: Path) -> str:
    """The recipe for a model whose user names none: the one that makes it smaller and loses least."""
    return "int4" if is_quantized(path) else "int8"


def from_json(raw: Any, name: str, where: str) -> Recipe:
    """A recipe from its fields; `base` names the recipe with the defaults."""
    try:
        if not isinstance(raw, Mapping):
            raise ValueError(f"expected a mapping of recipe fields, found {type(raw).__name__}")
        values: dict[str, Any] = {"name": name} | dict(raw)
        base = values.pop("base", None)
        known = known_recipes()
        if base is not None and not (isinstance(base, str) and base in known):
            raise ValueError(f"base: got {base!r}; expected one of {', '.join(known)}")
        if values.get("budget_bytes") is not None:
            values["budget_bytes"] = parse_bytes("budget_bytes", values["budget_bytes"])
        start = known[base] if base else None
        kind = _kind(values, start, known)
        if start is not None and not isinstance(start, kind):
            start = kind(**asdict(start))
        return read(kind, values, base=start)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _kind(values: Mapping[str, Any], base: Recipe | None, known: Mapping[str, Recipe]) -> type[Recipe]:
    """The class of recipes that refuses fewest of these values; among equals the base's, or the first."""

    def refused(kind: type[Recipe]) -> int:
        names, choices = {field.name for field in fields(kind)}, kind.choices()
        return sum(
            name not in names or value not in choices.get(name, (value,)) for name, value in values.items()
        )

    return min([Recipe if base is None else type(base), *map(type, known.values())], key=refused)


def _load_yaml(text: str) -> Any:
    """The value of a YAML document, in which 2:4 is text and not a number in base 60."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Without the integers of YAML 1.1; those of YAML 1.2 are added below."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in pairs if tag != "tag:yaml.org,2002:int"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    integer = re.compile(r"[-+]?[0-9][0-9_]*$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", integer, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
