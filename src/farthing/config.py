"""The engine's configuration. Every error names the field, the value and what is accepted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Backend = Literal["auto", "reference", "cpu", "gpu"]
KvCacheDtype = Literal["auto", "float32", "bfloat16", "fp8", "int8"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4"]
Transport = Literal["auto", "shared", "gloo"]
ExpertsOn = Literal["cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine is built from. None: chosen when the engine is built."""

    model: str = "mite"  # the embedded model, a directory, or a hub id
    dtype: Dtype = "auto"  # of the activations
    backend: str = "auto"  # auto, reference, cpu, gpu, or an entry point of farthing.ops
    threads: int | None = None
    quantization: Quantization | None = None  # round dense weights to nearest while loading
    packed: str | None = None  # a file written by `farthing compress --pack`; ranks write one each
    max_model_len: int | None = None  # prompt + output; None: the model's, as far as the cache holds it
    max_num_seqs: int = 64  # sequences in one step
    max_num_batched_tokens: int | None = None  # tokens in one step; None: 512 on a CPU, 8192 on a GPU
    max_queue: int | None = 1024  # waiting requests before QueueFull; None: unbounded
    block_size: int = 16  # tokens in a cache block
    num_blocks: int | None = None
    kv_cache_memory: int | None = None  # bytes; ignored when num_blocks is given
    kv_cache_dtype: KvCacheDtype = "auto"
    enable_prefix_caching: bool = True
    priority_step: float = 10.0  # seconds of waiting that outweigh one level of priority
    speculate: str | None = None  # "mtp", "ngram", "mtp+ngram", or with the most drafts a step: "mtp:2"
    experts: str = "auto"  # as config.json says; "all"; "adaptive:p[,min=2,max=8]"
    seed: int = 0
    skip_tokenizer_init: bool = False
    tensor_parallel_size: int = 1  # ranks that share heads, dense and shared experts
    pipeline_parallel_size: int = 1  # ranges of layers
    expert_parallel_size: int = 1  # ranks that share the routed experts: 1, or a multiple of the first
    dp_attention: bool = False  # ep / tp groups of ranks attend to sequences of their own
    transport: Transport = "auto"  # between ranks: shared memory where it can be had, else gloo
    redundant_experts: int = 0  # copies of the busiest experts of every layer
    rebalance_steps: int | None = None  # place experts by measured tokens every so many steps
    nodes: int = 1  # of a Ray cluster that the ranks are spread over; 1: this host, without Ray
    ray_address: str | None = None  # of the cluster; None: the one this host belongs to
    experts_on: ExpertsOn | None = None  # "cpu": routed experts there, the rest on the backend's device
    hot_experts: int = 0  # of every layer, copied to the device by measured use; with experts_on
    disaggregate: bool = False  # compute prompts in a process of its own, of as many threads

    def __post_init__(self) -> None:
        _one_of(self, "dtype", get_args(Dtype))
        _one_of(self, "kv_cache_dtype", get_args(KvCacheDtype))
        _one_of(self, "quantization", (None, *get_args(Quantization)))
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a positive integer")
        if not self.priority_step > 0:
            raise ValueError(f"priority_step is {self.priority_step!r}; expected seconds > 0")
        _one_of(self, "transport", get_args(Transport))
        if self.packed is not None and self.rebalance_steps is not None:
            raise ValueError(
                f"packed is {self.packed!r}; expected None with rebalance_steps: a rank's file holds the "
                "experts it started with"
            )
        if self.dp_attention and (self.enable_prefix_caching or self.rebalance_steps is not None):
            raise ValueError(
                "dp_attention is True; expected enable_prefix_caching False and rebalance_steps None: "
                "cached blocks are where their sequence was computed, experts where they were loaded"
            )
        if self.disaggregate and self.num_ranks > 1:
            raise ValueError(
                f"disaggregate is True with {self.num_ranks} ranks; expected False: each side is one rank"
            )
        if self.redundant_experts and (self.expert_parallel_size == 1 or self.rebalance_steps is None):
            raise ValueError(
                f"redundant_experts is {self.redundant_experts}; expected 0 without expert_parallel_size > 1 "
                "and rebalance_steps: copies are placed by measured tokens"
            )
        self._check_nodes()
        self._check_experts_on()
        parse_speculate(self.speculate)
        _check_experts(self.experts)

    def _check_experts_on(self) -> None:
        _one_of(self, "experts_on", (None, *get_args(ExpertsOn)))
        if self.experts_on is not None and self.num_ranks > 1:
            raise ValueError(
                f"experts_on is {self.experts_on!r} with {self.num_ranks} ranks; expected None: ranks share "
                "the experts among themselves"
            )
        if self.hot_experts < 0 or (self.hot_experts and self.experts_on is None):
            raise ValueError(
                f"hot_experts is {self.hot_experts}; expected 0 or more with experts_on, 0 without: "
                "they are copies of experts that are elsewhere"
            )

    def _check_nodes(self) -> None:
        if self.nodes > self.num_ranks:
            raise ValueError(
                f"nodes is {self.nodes} with {self.num_ranks} ranks; expected at most one node a rank: "
                "tensor_parallel_size, pipeline_parallel_size or expert_parallel_size is what spreads a model"
            )
        if self.nodes == 1 and self.ray_address is not None:
            raise ValueError(f"ray_address is {self.ray_address!r} with nodes 1; expected nodes > 1")

    @property
    def num_ranks(self) -> int:
        """Processes that hold a part of the model."""
        return max(self.tensor_parallel_size, self.expert_parallel_size) * self.pipeline_parallel_size


_POSITIVE = (
    "threads",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_queue",
    "block_size",
    "num_blocks",
    "kv_cache_memory",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "expert_parallel_size",
    "rebalance_steps",
    "nodes",
)
DEFAULT_DRAFTS = 4  # at most; the MTP layer stops earlier where it is unsure
MAX_DRAFTS = 16


def parse_speculate(value: str | None) -> tuple[tuple[str, ...], int] | None:
    """'mtp[:k]' | 'ngram[:k]' | 'mtp+ngram[:k]' -> (methods, drafts a step)."""
    if value is None:
        return None
    name, _, count = value.partition(":")
    methods = tuple(sorted(name.split("+")))
    known = methods in (("mtp",), ("ngram",), ("mtp", "ngram"))
    drafts = int(count) if count.isdecimal() else DEFAULT_DRAFTS if not count else 0
    if not known or not 1 <= drafts <= MAX_DRAFTS:
        raise ValueError(
            f"speculate is {value!r}; expected 'mtp[:k]', 'ngram[:k]' or 'mtp+ngram[:k]' "
            f"with k in 1…{MAX_DRAFTS}"
        )
    return methods, drafts


def _one_of(config: EngineConfig, name: str, accepted: tuple[object, ...]) -> None:
    value = getattr(config, name)
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; expected one of {accepted}")


def _check_experts(value: str) -> None:
    if value not in ("auto", "all") and not value.startswith("adaptive:"):
        raise ValueError(f"experts is {value!r}; expected 'auto', 'all' or 'adaptive:p[,min=2,max=8]'")
