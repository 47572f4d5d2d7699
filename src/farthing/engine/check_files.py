"""The parts of `farthing check` that run no layer: names and shapes of tensors, tokenizer, chat format."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from farthing.checkpoint import Checkpoint
from farthing.conversation.formats.base import ControlTokens
from farthing.conversation.habits import Habits
from farthing.conversation.select import Checkpoint as ChatFacts
from farthing.conversation.select import choose
from farthing.conversation.types import Conversation, Turn
from farthing.engine.tokenizer import Tokenizer
from farthing.model import ModelConfig
from farthing.model.load import names_in, parameter_shapes

TEXT = "The quick brown fox: 17 × 3 = 51, naïve, 你好."
_EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj\.weight")
_FORMATS = {
    "F8_E4M3": "fp8",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "I8": "int8",
    "I4": "int4",
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
        if problem := _problem(checkpoint, stored, name, shape):
            wrong.append(problem)
        elif len(shape) == 2:
            formats[_format(checkpoint, stored, name)] = None
    checkpoint.release()
    if wrong:
        more = f"; {len(wrong) - 1:,} more of {count:,} are wrong" if len(wrong) > 1 else ""
        raise ValueError(wrong[0] + more)
    kinds = " and ".join(sorted(formats, key=list(_FORMATS.values()).index))
    return f"all {count:,} matrices and vectors of every layer are present, matrices in {kinds}"


def _format(checkpoint: Checkpoint, stored: Callable[[str], str], name: str) -> str:
    """The format of a matrix that `_problem` found nothing wrong with."""
    stack, name = stored(_stack(name)), stored(name)
    if checkpoint.has(f"{name}_packed"):
        return checkpoint.stored_as(name.removesuffix(".weight"))[0]
    return _FORMATS[checkpoint.dtype(name if checkpoint.has(name) else stack)]


def _problem(checkpoint: Checkpoint, stored: Callable[[str], str], name: str, shape: tuple[int, ...]) -> str:
    """What is wrong with a tensor, named as in V3; empty if nothing is."""
    expert, stack, name = _EXPERT.fullmatch(name), stored(_stack(name)), stored(name)
    if checkpoint.has(f"{name}_packed"):  # several columns in one number
        return ""
    found: tuple[int, ...] | None = None
    if checkpoint.has(name):
        found = checkpoint.shape(name)
    elif expert and checkpoint.has(stack):  # one tensor for all experts of a layer
        name, whole = stack, checkpoint.shape(stack)
        shape = shape if expert["part"] == "down" else (2 * shape[0], shape[1])
        if int(expert["index"]) >= whole[0]:
            return f"{name} has {whole[0]} experts; expected more than {expert['index']}"
        found = whole[1:]
    if found is None:
        return f"{name} is missing; expected shape {list(shape)}"
    return "" if found == shape else f"{name} has shape {list(found)}; expected {list(shape)}"


def _stack(name: str) -> str:
    """The tensor that holds an expert's matrix and those of all other experts of its layer."""
    return _EXPERT.sub(lambda m: f"{m['stack']}.{'down' if m['part'] == 'down' else 'gate_up'}_proj", name)


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
    """Render a turn in the format that `farthing serve` would choose. Raises ValueError if the prompt lacks
    the turn's text, or has marks that are no tokens."""
    own = None if tokenizer.trusted_template else tokenizer.chat_template
    habits = Habits() if own is None else tokenizer.habits()
    facts = ChatFacts(model_type, own, lambda token: tokenizer.backend.token_to_id(token) is not None, habits)
    chosen = choose(facts)
    if chosen.template is not None:
        prompt = tokenizer.render_chat([{"role": "user", "content": TEXT}])
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
