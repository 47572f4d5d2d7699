"""The engine's configuration, and how options are declared: once, as dataclass fields with help and bounds.

Each field generates an option of `farthing serve` and a keyword of `farthing.LLM` (see farthing.config).
Every error names the field, the value and what is accepted.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

# Options declared once: a dataclass field carries its help, bounds and flags.
#
# `farthing serve --help`, `LLM(**options)` and the checks in `__post_init__` are all derived from the
# fields:
#
#     max_num_seqs: int = option(64, "Maximum number of sequences per step", group="Engine", minimum=1)
#
# The accepted values of a `Literal` field come from its type. `farthing.cli.errors` builds the command
# line.

_KEY = "option"
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_WORDS = {bool: "True or False", int: "an integer", float: "a number", str: "a string", Path: "a Path"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Metadata of one field."""

    help: str  # a noun phrase
    group: str  # heading on the command line
    flags: tuple[str, ...] = ()  # short forms besides --field-name
    minimum: float | None = None  # smallest accepted number
    maximum: float | None = None  # largest accepted number
    above: float | None = None  # numbers must exceed this
    argument: bool = False  # a positional argument instead of an option
    environment: str | None = None  # variable with the default
    size: bool = False  # bytes: the command line takes 1.5GB too


@dataclass(frozen=True, slots=True)
class Declared:
    """One option of a dataclass, with its type resolved."""

    name: str
    default: Any
    kind: type  # bool, int, float, str or Path; of the items if `repeated`
    choices: tuple[str, ...]  # of a Literal; empty: any value
    optional: bool  # None is accepted
    repeated: bool  # a tuple of values
    option: Option


def option(
    default: Any,
    help: str,
    *,
    group: str,
    flags: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    argument: bool = False,
    environment: str | None = None,
    size: bool = False,
) -> Any:
    """A dataclass field that is also a command-line option."""
    declared = Option(
        help=help,
        group=group,
        flags=flags,
        minimum=minimum,
        maximum=maximum,
        above=above,
        argument=argument,
        environment=environment,
        size=size,
    )
    return field(default=default, metadata={_KEY: declared})


def inherited(config: type, name: str, *, group: str, **changes: Any) -> Any:
    """An option that another dataclass declares, under this group; `changes`: its default or metadata."""
    (source,) = (f for f in fields(config) if f.name == name)
    default = changes.pop("default", source.default)
    return field(default=default, metadata={_KEY: replace(source.metadata[_KEY], group=group, **changes)})


@lru_cache
def declared(config: Any) -> tuple[Declared, ...]:
    """The options of a dataclass, in order; fields without metadata are left out."""
    hints = get_type_hints(config)
    return tuple(_declared(f, hints[f.name]) for f in fields(config) if _KEY in f.metadata)


def check(config: Any) -> None:
    """Raise ValueError for the first option with a value that its type, choices or bounds exclude."""
    kind: Any = type(config)
    for each in declared(kind):
        value = getattr(config, each.name)
        if value is None and each.optional:
            continue
        values = value if each.repeated and isinstance(value, tuple) else (value,)
        if not all(_accepted(each, v) for v in values):
            raise ValueError(f"{each.name}: got {value!r}; expected {expected(each)}")


def expected(each: Declared) -> str:
    """The accepted values in words, for error messages."""
    if each.choices:
        words = "one of " + ", ".join(each.choices)
    else:
        words = _WORDS[each.kind]
        bounds = {">=": each.option.minimum, ">": each.option.above, "<=": each.option.maximum}
        words += " and".join(f" {sign} {bound:g}" for sign, bound in bounds.items() if bound is not None)
    if each.repeated:
        words = f"a tuple of values, each {words}"
    return words + (", or None" if each.optional else "")


def as_arguments(config: Any) -> list[str]:
    """The command line of the options that differ from their defaults, the positional one first."""
    kind: Any = type(config)
    positional, words = [], []
    for each in declared(kind):
        value, flag = getattr(config, each.name), f"--{each.name.replace('_', '-')}"
        if each.option.argument:
            positional.append(str(value))
        elif each.repeated:
            words += [word for item in value for word in (flag, str(item))]
        elif value == each.default:
            continue
        elif each.kind is bool:
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, str(value)]
    return positional + words


def _accepted(each: Declared, value: Any) -> bool:
    if each.choices:
        return value in each.choices
    kinds: tuple[type, ...] = (int, float) if each.kind is float else (each.kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and each.kind is not bool):
        return False
    if isinstance(value, str | Path):
        return True
    assert isinstance(value, int | float)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    low, high, above = each.option.minimum, each.option.maximum, each.option.above
    return (
        (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
    )


def _declared(f: Field[Any], hint: Any) -> Declared:
    parts = list(_union(hint))
    optional = type(None) in parts
    (kind,) = (part for part in parts if part is not type(None))
    repeated = get_origin(kind) is tuple
    if repeated:
        kind = get_args(kind)[0]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    assert f.default is not MISSING, f"option {f.name} has no default"
    return Declared(
        f.name, f.default, str if choices else kind, choices, optional, repeated, f.metadata[_KEY]
    )


def _union(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        yield from get_args(hint)
    else:
        yield hint


def parse_bytes(name: str, value: Any) -> int:
    """1500000, '1.5MB' or '1.5 gib' -> bytes. Raises ValueError naming the field."""
    number, unit = str(value).strip(), ""
    while number and number[-1].isalpha():
        number, unit = number[:-1], number[-1] + unit
    try:
        size = float(number) * _UNITS[unit.upper()]
        if 1 <= size < float("inf"):
            return round(size)
    except (KeyError, ValueError):
        pass
    raise ValueError(f"{name}: got {value!r}; expected bytes such as 1500000, 1.5MB or 1.5GiB")


KvCacheDtype = Literal["auto", "float32", "bfloat16", "fp8", "int8"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Compute = Literal["auto", "int8", "exact"]
Quantization = Literal["int8", "int4"]
Transport = Literal["auto", "shared", "gloo"]
ExpertsOn = Literal["cpu"]

DEFAULT_DISK_BYTES = 10 << 30
AUTO = "auto"  # of `packed`: a file in the user's cache directory
_GPU = Path("/dev/nvidiactl")
CPU_STEP_TOKENS, GPU_STEP_TOKENS = 1024, 8192  # defaults of max_num_batched_tokens

_engine = partial(option, group="Engine")
_cache = partial(option, group="Cache")
_limit = partial(option, group="Limits")
_ranks = partial(option, group="Parallelism")


C = TypeVar("C")


def suggesting(cls: type[C]) -> type[C]:
    """A dataclass whose unknown keyword arguments raise a TypeError that names the nearest field."""
    create: Callable[..., None] = cls.__init__

    @wraps(create)
    def init(self: C, *values: Any, **named: Any) -> None:
        try:
            create(self, *values, **named)
        except TypeError:
            known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
            unknown = next((name for name in named if name not in known), None)
            if unknown is None:
                raise
            close = get_close_matches(unknown, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
            raise TypeError(f"{cls.__name__}: got an unknown option {unknown!r}; {hint}") from None

    cls.__init__ = init  # type: ignore[method-assign, assignment]
    return cls


@suggesting
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine is built from. None: chosen when the engine is built."""

    model: str = _engine(
        "mite", "The embedded model, a directory, a GGUF file, a hub id, or a short name", argument=True
    )
    dtype: Dtype = _engine("auto", "Activation dtype")
    compute: Compute = _engine(
        "auto",
        "Inputs of integer matrices on a CPU: int8, or exact, as two integers; auto: exact with float32",
    )
    backend: str = _engine(
        "auto", "Backend: auto, reference, cpu[/ISA], gpu, torch[/DEVICE], or a farthing.ops entry point"
    )
    device: str | None = _engine(
        None,
        "Device of backend torch, such as cpu, cuda, xpu, mps, npu; default: the accelerator, if any",
    )
    threads: int | None = _engine(None, "CPU threads; default: all cores", minimum=1)
    quantization: Quantization | None = _engine(None, "Format to round dense weights to while loading")
    packed: str | None = _engine(
        None, "Packed file; ranks write one each. `serve`: auto, in the cache, as of the embedded model"
    )
    verify: bool = _engine(False, "Compare the checksums of the packed file before serving")
    speculate: str | None = _engine(None, "Drafts: mtp[:k], ngram[:k] or mtp+ngram[:k], at most k per step")
    experts: str = _engine("auto", "Experts per token: auto (config.json), all, adaptive:p[,min=2,max=8]")
    seed: int = _engine(0, "Default sampling seed")
    deterministic: bool = _engine(
        False, "Same tokens for any chunking of long prompts, and with --tp 2 as with one rank (CPU)"
    )
    chat_template: str | None = _engine(
        None, "Jinja file or name of a packaged chat format; default: the checkpoint's"
    )
    trust_special_tokens: bool = _engine(
        False, "Text in chats that equals a control token, such as <｜User｜>, becomes that token"
    )
    check_memory: bool = _engine(True, "Refuse a model or cache larger than the available memory (CPU)")
    skip_tokenizer_init: bool = _engine(False, "Token ids in and out, without a tokenizer")

    max_model_len: int | None = _cache(
        None, "Maximum tokens of prompt and output; default: the model's, within the cache", minimum=1
    )
    max_num_seqs: int = _cache(64, "Maximum number of sequences per step", minimum=1)
    max_num_batched_tokens: int | None = _cache(
        None,
        f"Maximum tokens per step; default: {CPU_STEP_TOKENS} on a CPU, {GPU_STEP_TOKENS} on a GPU",
        minimum=1,
    )
    block_size: int = _cache(16, "Tokens per cache block", minimum=1)
    num_blocks: int | None = _cache(None, "Number of cache blocks; default: by free memory", minimum=1)
    kv_cache_memory: int | None = _cache(
        None, "Cache size in bytes (20GB), unless num_blocks is set", minimum=1, size=True
    )
    kv_cache_dtype: KvCacheDtype = _cache("auto", "Cache dtype")
    enable_prefix_caching: bool = _cache(True, "Reuse of cached blocks by prompts with the same prefix")
    prefix_cache_dir: str | None = _cache(None, "Directory for cached blocks that outlive the process")
    prefix_cache_disk_bytes: int = _cache(
        DEFAULT_DISK_BYTES, "Maximum bytes in that directory", minimum=1, size=True
    )

    max_queue: int | None = _limit(1024, "Maximum number of waiting sequences before 429", minimum=1)
    max_queue_tokens: int | None = _limit(
        None, "Maximum number of prompt tokens in flight before 429; default: 16 caches", minimum=1
    )
    max_step_ms: float = _limit(
        150.0, "Target milliseconds of a step with prompts while others decode; 0: no limit", minimum=0,
        maximum=3_600_000,
    )  # fmt: skip
    step_timeout: float = _limit(120.0, "Seconds that a step may take before /health answers 503", above=0)
    priority_step: float = _limit(10.0, "Seconds of waiting that outweigh one level of priority", above=0)

    tensor_parallel_size: int = _ranks(
        1, "Number of ranks that share heads, dense and shared experts", flags=("--tp",), minimum=1
    )
    pipeline_parallel_size: int = _ranks(1, "Number of pipeline stages", flags=("--pp",), minimum=1)
    expert_parallel_size: int = _ranks(
        1, "Number of ranks that share the routed experts: 1 or a multiple of tp", flags=("--ep",), minimum=1
    )
    dp_attention: bool = _ranks(False, "Data-parallel attention over ep / tp groups of ranks")
    transport: Transport = _ranks("auto", "Transport between ranks: shared memory if available, else gloo")
    redundant_experts: int = _ranks(0, "Copies of each layer's busiest experts", minimum=0)
    rebalance_steps: int | None = _ranks(
        None, "Steps between placements of experts by measured tokens", minimum=1
    )
    nodes: int = _ranks(1, "Number of Ray cluster nodes to spread the ranks over", minimum=1)
    ray_address: str | None = _ranks(None, "Ray cluster address; default: this host's cluster")
    experts_on: ExpertsOn | None = _ranks(None, "Device of the routed experts, if not the backend's")
    hot_experts: int = _ranks(0, "Experts per layer copied to the device by measured use", minimum=0)
    disaggregate: bool = _ranks(False, "Prefill in a separate process, with as many threads")

    def __post_init__(self) -> None:
        check(self)
        if self.packed is not None and self.rebalance_steps is not None:
            raise ValueError(
                f"packed: got {self.packed!r}; expected None with rebalance_steps: a rank's file "
                "has only its initial experts"
            )
        if self.dp_attention and (self.enable_prefix_caching or self.rebalance_steps is not None):
            raise ValueError(
                "dp_attention: got True; expected enable_prefix_caching False and rebalance_steps None: "
                "cached blocks stay on the rank that computed them, experts on the rank that loaded them"
            )
        if self.disaggregate and self.num_ranks > 1:
            raise ValueError(
                f"disaggregate: got True with {self.num_ranks} ranks; expected False: each side is one rank"
            )
        if self.disaggregate and not self.enable_prefix_caching:
            raise ValueError(
                "enable_prefix_caching: got False; expected True with disaggregate: blocks arrive by prefix"
            )
        if self.redundant_experts and (self.expert_parallel_size == 1 or self.rebalance_steps is None):
            raise ValueError(
                f"redundant_experts: got {self.redundant_experts}; expected 0 without "
                "expert_parallel_size > 1 and rebalance_steps: copies are placed by measured tokens"
            )
        self._check_device()
        self._check_nodes()
        self._check_experts_on()
        self._check_deterministic()
        self._check_prefix_cache_dir()
        parse_speculate(self.speculate)
        if self.experts not in ("auto", "all") and not self.experts.startswith("adaptive:"):
            raise ValueError(
                f"experts: got {self.experts!r}; expected 'auto', 'all' or 'adaptive:p[,min=2,max=8]'"
            )

    def _check_device(self) -> None:
        if self.device is not None and self.backend != "torch":
            raise ValueError(
                f"device: got {self.device!r} with backend {self.backend!r}; expected None or backend 'torch'"
            )
        if self.device not in (None, "cpu") and self.num_ranks > 1:
            raise ValueError(
                f"device: got {self.device!r} with {self.num_ranks} ranks; expected 'cpu': ranks of backend "
                "'torch' exchange activations in host memory"
            )

    def _check_experts_on(self) -> None:
        if self.experts_on is not None and self.num_ranks > 1:
            raise ValueError(
                f"experts_on: got {self.experts_on!r} with {self.num_ranks} ranks; expected None: "
                "the ranks share the experts"
            )
        if self.hot_experts and self.experts_on is None:
            raise ValueError(
                f"hot_experts: got {self.hot_experts}; expected 0 without experts_on: hot experts are copies "
                "of experts on another device"
            )

    def _check_prefix_cache_dir(self) -> None:
        if self.prefix_cache_dir is None:
            if self.prefix_cache_disk_bytes != DEFAULT_DISK_BYTES:
                raise ValueError(
                    f"prefix_cache_disk_bytes: got {self.prefix_cache_disk_bytes}; expected no value without "
                    "prefix_cache_dir: it limits that directory"
                )
            return
        if not self.prefix_cache_dir:
            raise ValueError("prefix_cache_dir: got ''; expected the path of a directory")
        if not self.enable_prefix_caching:
            raise ValueError(
                f"prefix_cache_dir: got {self.prefix_cache_dir!r} without enable_prefix_caching; expected "
                "both: the directory stores blocks of the prefix cache"
            )
        if self.num_ranks > 1:
            raise ValueError(
                f"prefix_cache_dir: got {self.prefix_cache_dir!r} with {self.num_ranks} ranks; expected one "
                "rank: the directory stores the blocks of one process"
            )

    def _check_nodes(self) -> None:
        if self.nodes > self.num_ranks:
            raise ValueError(
                f"nodes: got {self.nodes} with {self.num_ranks} ranks; expected at most one node per rank: "
                "raise tensor_parallel_size, pipeline_parallel_size or expert_parallel_size"
            )
        if self.nodes == 1 and self.ray_address is not None:
            raise ValueError(f"ray_address: got {self.ray_address!r} with nodes 1; expected nodes > 1")

    def _check_deterministic(self) -> None:
        if not self.deterministic:
            return
        halves_of_rank(self.tensor_parallel_size, self.expert_parallel_size)
        if self.experts_on is not None:
            raise ValueError(
                f"deterministic: got True with experts_on {self.experts_on!r}; expected experts_on None"
            )

    @property
    def ops(self) -> str:
        """The backend with its device, as `farthing.ops.select` takes it."""
        if self.backend != "torch":
            return self.backend
        device = "cpu" if self.num_ranks > 1 else self.device
        return f"torch/{device}" if device else "torch"

    @property
    def halves(self) -> int | None:
        """`halves_of_rank`, 1 with a packed file, whose matrices are undivided; None unless deterministic."""
        if not self.deterministic:
            return None
        undivided = self.packed is not None
        return 1 if undivided else halves_of_rank(self.tensor_parallel_size, self.expert_parallel_size)

    @property
    def num_ranks(self) -> int:
        """Number of processes that each hold a part of the model."""
        tp, pp, ep = self.sizes
        return max(tp, ep) * pp

    @property
    def on_this_cpu(self) -> bool:
        """Whether weights and cache are in this machine's memory."""
        if self.nodes > 1 or self.experts_on is not None or self.device not in (None, "cpu"):
            return False
        kind = self.backend.partition("/")[0]
        return kind in ("cpu", "reference") or (kind == "auto" and not _GPU.exists())

    @property
    def exact(self) -> bool:
        """`is_exact` of the CPU kernels."""
        return is_exact(self.compute, self.dtype)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Ranks by tensor, pipeline and expert parallelism."""
        return self.tensor_parallel_size, self.pipeline_parallel_size, self.expert_parallel_size


def is_exact(compute: Compute, dtype: str | None) -> bool:
    """Whether CPU kernels take inputs of integer matrices as two integers, not one of 8 bits."""
    return compute == "exact" or (compute == "auto" and dtype == "float32")


DEFAULT_DRAFTS = 4  # maximum drafts per step; the MTP layer stops earlier where it is unsure
MAX_DRAFTS = 16


def halves_of_rank(tp: int, ep: int) -> int:
    """Halves of a row-parallel product that a rank sums apart with `deterministic`: two on one rank, as
    `--tp 2` would. Raises ValueError for a layout that sums in another order.
    """
    if tp > 2 or (tp == 2 and ep > 1):
        raise ValueError(
            f"deterministic: got True with tp {tp} and ep {ep}; expected tp 1, or tp 2 with ep 1"
        )
    return 1 if ep > 1 else 2 // tp


def parse_speculate(value: str | None) -> tuple[tuple[str, ...], int] | None:
    """'mtp[:k]' | 'ngram[:k]' | 'mtp+ngram[:k]' -> (methods, maximum drafts per step)."""
    if value is None:
        return None
    name, _, count = value.partition(":")
    methods = tuple(sorted(name.split("+")))
    valid = methods in (("mtp",), ("ngram",), ("mtp", "ngram"))
    drafts = int(count) if count.isdecimal() else DEFAULT_DRAFTS if not count else 0
    if not valid or not 1 <= drafts <= MAX_DRAFTS:
        raise ValueError(
            f"speculate: got {value!r}; expected 'mtp[:k]', 'ngram[:k]' or 'mtp+ngram[:k]' "
            f"with k in 1…{MAX_DRAFTS}"
        )
    return methods, drafts


def check_drafts(value: str | None, layers: int) -> None:
    """Raises ValueError if drafts of MTP layers are wanted of a model that has none."""
    if "mtp" in (value or "") and not layers:
        raise ValueError(
            f"speculate: got {value!r}, but the model has no MTP layer; expected 'ngram' or None"
        )


def check_length(value: int | None, limit: int) -> None:
    """Raises ValueError for a max_model_len beyond a model's max_position_embeddings."""
    if value is not None and value > limit:
        raise ValueError(
            f"max_model_len: got {value}; expected at most {limit}, the model's max_position_embeddings"
        )
