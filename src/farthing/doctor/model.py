"""`farthing check`: is a model directory complete, and do its first layers agree with transformers?"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Container, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from farthing.checkpoint.compressed_tensors import is_static
from farthing.checkpoint.reader import Checkpoint, has_config, quantization_in, read_config
from farthing.conversation import ControlTokens, Conversation, Turn
from farthing.conversation.select import Checkpoint as ChatFacts
from farthing.conversation.select import Habits, choose
from farthing.engine.sandbox.sandbox import Sandbox
from farthing.engine.tokenizer import Tokenizer
from farthing.model import (
    DecoderModel,
    ModelConfig,
    config_of,
    model_of,
    names_in,
    parameter_shapes,
    source_of,
    stack_of,
)
from farthing.model.types import type_named, type_of
from farthing.ops import INTEGERS, Ops, make_batch

# The parts of `farthing check` that run no layer: names and shapes of tensors, tokenizer, chat format.

TEXT = "The quick brown fox: 17 × 3 = 51, naïve, 你好."
MOST_TOKENS = 32_768  # that a template may make of one turn
_FORMATS = {
    "F8_E4M3": "fp8",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "I8": "int8",
    "I4": "int4",
    "U8": "mxfp4",
    "I32": "int32",  # of tables of hashed experts
    "I64": "int64",
}
_MARK = re.compile(r"<[|｜][^<>]+[|｜]>")


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> str:
    """Compare all layers with the architecture, by the files' headers. Raises ValueError naming the first
    tensor that is missing or has another shape."""
    stored, count = names_in(checkpoint, config).stored, 0
    wrong: list[str] = []
    formats: dict[str, None] = {}
    for name, shape in parameter_shapes(config):
        count += 1
        if problem := _problem(checkpoint, config, stored, name, shape):
            wrong.append(problem)
        elif len(shape) == 2:
            formats[_format(checkpoint, stored, name)] = None
    checkpoint.release()
    if wrong:
        more = f"; {len(wrong) - 1:,} more of {count:,} are wrong" if len(wrong) > 1 else ""
        raise ValueError(wrong[0] + more)
    order = [*_FORMATS.values(), *INTEGERS]
    kinds = " and ".join(sorted(formats, key=order.index))
    return f"all {count:,} matrices and vectors of every layer are present, matrices in {kinds}"


def _format(checkpoint: Checkpoint, stored: Callable[[str], str], name: str) -> str:
    """The format of a matrix that `_problem` found nothing wrong with."""
    stack, name = stored(stack_of(name)), stored(name)
    module = name.removesuffix(".weight")
    if checkpoint.is_quantized(module):
        return checkpoint.stored_as(module)[0]
    return _FORMATS[checkpoint.dtype(next(filter(checkpoint.has, (name, stack, f"{stack}_blocks"))))]


def _problem(
    checkpoint: Checkpoint,
    config: ModelConfig,
    stored: Callable[[str], str],
    name: str,
    shape: tuple[int, ...],
) -> str:
    """What is wrong with a tensor, named as in V3; empty if nothing is."""
    down, expert = ".down_proj" in name, re.search(r"\.experts\.(\d+)\.", name)
    stack, name = stored(stack_of(name)), stored(name)
    module = name.removesuffix(".weight")
    if checkpoint.scheme(module):
        found = checkpoint.stored_as(module)[1]
        return "" if found == shape else f"{module} has shape {list(found)}; expected {list(shape)}"
    actual: tuple[int, ...] | None = None
    if checkpoint.has(name):
        actual = checkpoint.shape(name)
    elif expert and (whole := _stacked_shape(checkpoint, config, stack)):  # one for all experts of a layer
        name = stack
        shape = shape if down else (2 * shape[0], *shape[1:])
        if int(expert[1]) >= whole[0]:
            return f"{name} has {whole[0]} experts; expected more than {expert[1]}"
        actual = whole[1:]
    if actual is None:
        return f"{name} is missing; expected shape {list(shape)}"
    return "" if actual == shape else f"{name} has shape {list(actual)}; expected {list(shape)}"


def _stacked_shape(checkpoint: Checkpoint, config: ModelConfig, stack: str) -> tuple[int, ...] | None:
    """[E, N, K] of a stack of matrices, or [E, N] of one of biases; None if there is no such stack."""
    if checkpoint.has(f"{stack}_blocks"):
        experts, rows, groups, size = checkpoint.shape(f"{stack}_blocks")
        return experts, rows, groups * size * 2
    if not checkpoint.has(stack):
        return None
    experts, *inner = checkpoint.shape(stack)
    return (experts, *(reversed(inner) if config.experts and config.experts.biased else inner))


def check_tokenizer(path: Path, config: ModelConfig | None) -> tuple[Tokenizer, str]:
    """The tokenizer, which must return a text unchanged and have no ids beyond the model's vocabulary."""
    tokenizer = Tokenizer.from_directory(path)
    ids = tokenizer.backend.encode(TEXT, add_special_tokens=False).ids
    if (text := tokenizer.backend.decode(ids)) != TEXT:
        raise ValueError(f"{TEXT!r} comes back as {text!r}")
    last = max(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    if config is not None and last >= config.vocab_size:
        raise ValueError(
            f"tokenizer.json has token ids up to {last:,}; expected less than config.json's vocab_size = "
            f"{config.vocab_size:,}"
        )
    return tokenizer, f"{tokenizer.vocab_size:,} tokens"


def check_chat_format(tokenizer: Tokenizer, model_type: str) -> str:
    """Render a turn in the format that `farthing serve` would choose, and as it does: a checkpoint's own
    template is a program, which runs in a child process with limits. Raises ValueError if it exceeds them,
    or if the prompt lacks the turn's text or has marks that are no tokens."""
    own = None if tokenizer.trusted_template else tokenizer.chat_template
    with closing(Sandbox(tokenizer, tokenizer.vocab_size)) as sandbox:
        habits = Habits() if own is None else Habits.of_document(sandbox.habits().result())
        has = tokenizer.backend.token_to_id
        chosen = choose(ChatFacts(model_type, own, lambda token: has(token) is not None, habits))
        if chosen.template is not None:
            turns = [{"role": "user", "content": TEXT}]
            chat: dict[str, Any] = dict(messages=turns, tools=None, add_generation_prompt=True, options={})
            prompt = sandbox.chat(chat, MOST_TOKENS).result()
    if chosen.template is not None:
        tools = "" if chosen.tools is chosen.plain else f"; {chosen.tools.name} is used with tools"
        shown = f"its own template, which {habits.described}{tools}"
    else:
        control = ControlTokens(tokenizer.bos_token or "", tokenizer.eos_token or "")
        prompt = chosen.plain.render(Conversation((Turn("user", TEXT),)), control)
        shown = chosen.plain.name if tokenizer.chat_template else f"no template: {chosen.plain.name} is used"
    if TEXT not in prompt:
        raise ValueError(f"the prompt of a user's turn is {prompt[:200]!r}; expected the turn's text in it")
    unknown = [mark for mark in _MARK.findall(prompt) if tokenizer.backend.token_to_id(mark) is None]
    if unknown:
        raise ValueError(
            f"the chat format writes {unknown[0]!r}, which is no token of tokenizer.json; expected the "
            "tokenizer and the chat template of the same model"
        )
    return shown


State = Literal["ok", "failed", "skipped"]
CLOSE = 1e-3  # of the largest logit; float32 on both sides
DECODED = 1e-2  # with stacks of quantized experts, which transformers decodes to bfloat16
MOST_BYTES = 12 << 30  # of float32 weights that are read


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    state: State
    detail: str
    seconds: float


def check(path: Path, ops: Ops, layers: int | None = None, tokens: int = 16) -> Iterator[Finding]:
    """Check a model directory part by part; a part that fails ends what depends on it.

    layers: hidden layers that are run; by default the dense ones and one mixture of experts, or fewer if
    those exceed MOST_BYTES. Indexers select at most half of the tokens, so that the selection
    is compared too.

    Only the first layers are read, so that checking takes about a minute for a checkpoint of any size.
    """
    facts: dict[str, Any] = {}

    def configuration() -> str:
        if has_config(path):
            type_of(read_config(path))  # an unknown type is reported even without weights
        checkpoint = facts["checkpoint"] = Checkpoint.open(path)
        config = facts["config"] = config_of(checkpoint)
        shown = facts["shown"] = shortened(config, layers)
        if shown.index_topk is not None:
            facts["shown"] = shown.selecting(max(min(shown.index_topk, tokens // 2), 1))
        kind = type_named(config.model_type)
        return f"model_type {kind.name!r} ({kind.models}), {config.num_hidden_layers} layers"

    yield (first := _part("configuration", configuration))

    def tokenizer() -> str:
        facts["tokenizer"], detail = check_tokenizer(path, facts.get("config"))
        return detail

    yield _part("tokenizer", tokenizer)
    if first.state != "ok":
        return
    config, shown = facts["config"], facts["shown"]
    if "tokenizer" in facts:
        yield _part("chat format", lambda: check_chat_format(facts["tokenizer"], config.model_type))
    yield _part("tensors", lambda: check_tensors(facts["checkpoint"], config))
    ids = torch.arange(2, 2 + tokens) % config.vocab_size

    def run_layers() -> str:
        count, size = shown.num_hidden_layers, float32_bytes(shown)
        if layers is None and size > MOST_BYTES:
            raise _Skipped(
                f"{count} of {config.num_hidden_layers} layers take {size / 2**30:.1f} GiB in float32, more "
                f"than {MOST_BYTES >> 30}; --layers {count} runs them"
            )
        model = model_of(shown, ops, source_of(facts["checkpoint"], shown))
        facts["logits"] = {0: logits_of(model, ids)}
        if later := later_position(shown, tokens):
            facts["logits"][later] = logits_of(model, ids, later)
        facts["checkpoint"].release()
        if not all(bool(logits.isfinite().all()) for logits in facts["logits"].values()):
            raise ValueError(f"logits after {count} layers are not finite")
        return f"{count} of {config.num_hidden_layers} layers on {ops.name}, {_experts_in(shown, config)}"

    yield (second := _part("first layers", run_layers))
    if second.state == "ok":
        yield _part("transformers", lambda: _compared(path, shown, ids, facts["logits"]))


class _Skipped(Exception):
    """A part that cannot be checked here, and why."""


def _part(name: str, run: Callable[[], str]) -> Finding:
    """Run one part of a check; its result is the detail of an "ok"."""
    start = time.perf_counter()
    try:
        state: State = "ok"
        detail = run()
    except _Skipped as reason:
        state, detail = "skipped", str(reason)
    except Exception as error:  # report any error of a broken directory to the user
        state, detail = "failed", f"{type(error).__name__}: {error}"
    return Finding(name, state, detail, time.perf_counter() - start)


def shortened(config: ModelConfig, layers: int | None) -> ModelConfig:
    """The model's first layers, without MTP layers; by default up to the first with experts, and the first
    with attention if others have none."""
    attends = next((i for i in range(config.num_hidden_layers) if config.mixer(i).cache_rows), 0)
    unit = 2 if any(feed.delayed for feed in config.feeds) else 1  # layers that belong together
    wanted = -(-min(layers or max(config.dense_prefix, attends) + 1, config.num_hidden_layers) // unit) * unit
    while True:
        short = replace(config.part(range(wanted)), num_nextn_predict_layers=0)
        if layers is not None or wanted == unit or float32_bytes(short) <= MOST_BYTES:
            return short
        wanted -= unit


def float32_bytes(config: ModelConfig) -> int:
    """Bytes of all weights in float32."""
    return 4 * sum(prod(shape) for _, shape in parameter_shapes(config))


def _experts_in(shown: ModelConfig, config: ModelConfig) -> str:
    """How many of the layers that ran have experts and, if none, what the first of them takes."""
    if shown.moe_layers or not config.moe_layers:
        return f"{shown.moe_layers} with experts"
    count = config.dense_prefix + 1
    first, before = (float32_bytes(shortened(config, n)) for n in (count, count - 1))
    size = (first - before) / 2**30
    return f"0 with experts: such a layer takes {size:.1f} GiB in float32; --layers {count} runs one"


def later_position(config: ModelConfig, tokens: int) -> int:
    """A first position around which `tokens` straddle the original context length of a longer one; else 0.

    There query scales change. Models without them are compared as well: transformers could have them.
    """
    scaling, rope = config.attention.query_scaling, config.rope
    original = scaling.original_max_position if scaling else rope.original_max_position if rope.factor else 0
    fits = 0 < original <= config.max_position_embeddings - tokens
    return max(original - tokens // 2, 1) if fits else 0


def logits_of(model: DecoderModel, ids: Tensor, first: int = 0) -> Tensor:
    """ids [T] -> logits [T, V] float32 through the paged cache.

    first: position of the first token, without tokens before it. Rotation depends only on distances, so
    positions that start at 0 with the query scales of later ones give the same logits.
    """
    for layer, (attention, _) in enumerate(model.layers if first else []):
        if model.config.mixer(layer).query_scaling is not None:
            attention.query_scale = attention.query_scale[first:]
    size = -(-16 // model.config.block_tokens) * model.config.block_tokens
    blocks = list(range(-(-len(ids) // size)))
    with torch.inference_mode():
        cache = model.new_cache(len(blocks), size, "float32")
        return model.logits(model.forward(ids, make_batch([len(ids)], [0], [blocks], size), cache))


def _compared(path: Path, shown: ModelConfig, ids: Tensor, ours: dict[int, Tensor]) -> str:
    """Against the same first layers in transformers, where it has the type and reads the format.

    ours: logits by position of the first token.
    """
    try:
        import transformers
    except ImportError:
        raise _Skipped("not installed: pip install transformers") from None
    quantization = quantization_in(read_config(path))
    if quantization and (method := quantization.get("quant_method")) not in _methods():
        raise _Skipped(f"it takes weights of quant_method {method!r} for plain numbers")
    messages: Any = transformers.logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        config = _with_float_inputs(transformers.AutoConfig.from_pretrained(path))
        text = config.get_text_config()
        text.num_hidden_layers = shown.num_hidden_layers
        if shown.index_topk is not None:
            text.index_topk = shown.index_topk
        for name in ("mlp_layer_types", "indexer_types", "layer_types"):
            if getattr(text, name, None):
                setattr(text, name, getattr(text, name)[: shown.num_hidden_layers])
        auto: Any = transformers.AutoModelForCausalLM
        if text is not config:
            auto = transformers.AutoModelForImageTextToText
        own = getattr(transformers, (config.architectures or [""])[0], None)
        model: Any = getattr(own, "from_pretrained", auto.from_pretrained)(
            path, config=config, dtype=torch.float32
        )
    except _Skipped:
        raise
    except Exception as error:  # an unknown type, a format it cannot read, custom code
        raise _Skipped(f"cannot load this checkpoint ({_first_line(error)})") from error
    close = DECODED if shown.moe_layers and quantization else CLOSE
    shown_at = []
    for first, logits in ours.items():
        positions = torch.arange(first, first + len(ids))[None]
        inputs = {"input_ids": ids[None], "position_ids": positions, "use_cache": False}
        try:
            with torch.inference_mode():
                theirs = model.eval()(**inputs).logits[0].float()
        except (
            Exception
        ) as error:  # such as matrices that it decodes to another dtype than that of their input
            raise _Skipped(f"cannot run this checkpoint ({_first_line(error)})") from error
        off = float((logits - theirs).abs().max() / theirs.abs().max())
        where = f" at position {first:,}" if first else ""
        if not off < close:
            raise ValueError(
                f"logits{where} differ by {off:.1e} of the largest; expected less than {close:.0e}"
            )
        shown_at.append(f"{off:.1e} of the largest{where}")
    return f"logits of {len(ids)} tokens differ by {', by '.join(shown_at)}"


def _methods() -> Container[str]:
    """Each quant_method that transformers reads; it ignores others."""
    found: Container[str] = import_module("transformers.quantizers.auto").AUTO_QUANTIZATION_CONFIG_MAPPING
    return found


def _with_float_inputs(config: Any) -> Any:
    """A configuration of transformers whose matrices do not round their inputs, as the reference ops do not.
    Static ranges of 8 bits, which they do apply, stay."""
    quantization = getattr(config, "quantization_config", None)
    bits = quantization.get("act_bits") if isinstance(quantization, dict) else None
    if isinstance(bits, int) and bits < 16:
        raise _Skipped(f"AutoRound's kernels round inputs to {bits} bits, which the reference ops do not")
    groups = quantization.get("config_groups") if isinstance(quantization, dict) else None
    for group in (groups or {}).values():
        if isinstance(group, dict) and not is_static(group.get("input_activations") or {}):
            group["input_activations"] = None
    return config


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
