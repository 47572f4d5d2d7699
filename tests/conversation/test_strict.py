"""Strict tools with tool_choice auto: grammars enforce schemas in every format."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest

from farthing.conversation.base import CallFormat, ChatFormat
from farthing.conversation.formats.deepseek_v3 import V3
from farthing.conversation.formats.deepseek_v4 import V4
from farthing.conversation.formats.deepseek_v31 import V31
from farthing.conversation.formats.deepseek_v32 import V32
from farthing.conversation.formats.delimited import DEEPSEEK, KIMI
from farthing.conversation.formats.gemma import GEMMA4
from farthing.conversation.formats.glm import GLM45, GLM47
from farthing.conversation.formats.harmony import HARMONY
from farthing.conversation.formats.hermes import HERMES
from farthing.conversation.formats.kimi_k2 import KIMI_K2
from farthing.conversation.formats.minimax_m2 import MINIMAX_M2
from farthing.conversation.formats.mistral import MISTRAL
from farthing.conversation.formats.qwen3_coder import QWEN3_CODER
from farthing.conversation.select import Checkpoint, choose
from farthing.conversation.strict import CallGrammar, TaggedCalls, call_grammar
from farthing.conversation.types import Conversation, Tool, ToolChoice
from farthing.engine.request import StructuredOutputsParams
from farthing.engine.structured import GrammarCompiler
from farthing.engine.tokenizer import Tokenizer
from tests.conversation.test_parse import (
    Calls,
    dsml,
    gemma4,
    glm,
    glm47,
    hermes,
    kimi,
    minimax,
    mistral,
    qwen3_coder,
    read,
    v3,
    v31,
)
from tests.conversation.test_token_ids import byte_tokenizer

pytestmark = pytest.mark.pairs

pytest.importorskip("llguidance")


def harmony(calls: Calls) -> str:
    """After a prompt, which begins the first message."""
    return "<|call|><|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{json.dumps(arguments)}"
        for name, arguments in calls
    )


FORMATS: list[tuple[ChatFormat | CallFormat, Callable[[Calls], str]]] = [
    (V3, v3),
    (V31, v31),
    (KIMI_K2, kimi),
    (V32, dsml("function_calls")),
    (V4, dsml("tool_calls")),
    (GLM45, glm),
    (GLM47, glm47),
    (HERMES, hermes),
    (QWEN3_CODER, qwen3_coder),
    (MINIMAX_M2, minimax),
    (MISTRAL, mistral),
    (HARMONY, harmony),
    (GEMMA4, gemma4),
]

by_format = pytest.mark.parametrize(("form", "write"), FORMATS, ids=[form.name for form, _ in FORMATS])
GLM_TAGS = [*("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")]
OTHERS = ("<minimax:tool_call>", "</minimax:tool_call>", "[TOOL_CALLS]", "[ARGS]")
MARKS = [*DEEPSEEK.all, *KIMI.all, *HARMONY.markup, *GEMMA4.markup, "｜DSML｜", *GLM_TAGS, *OTHERS]
VOCABULARIES: dict[str, tuple[list[str], list[str]]] = {  # special tokens, others
    "special": (["<s>", "</s>", *MARKS], []),
    "added": (["<s>", "</s>"], MARKS),  # as DeepSeek's own tokenizers declare them
    "spelled": (["<s>", "</s>"], []),
}


def vocabulary(kind: str) -> Tokenizer:
    backend = byte_tokenizer(*VOCABULARIES[kind]).backend
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


TOKENIZERS = {kind: vocabulary(kind) for kind in VOCABULARIES}
COMPILERS = {kind: GrammarCompiler(tok, tok.vocab_size) for kind, tok in TOKENIZERS.items()}
by_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES)


def grammar_of(
    form: ChatFormat | CallFormat, tools: tuple[Tool, ...], kind: str, **options: Any
) -> CallGrammar | None:
    tokenizer = TOKENIZERS[kind]

    def special(text: str) -> int | None:
        token: int | None = tokenizer.backend.token_to_id(text)
        return token if token in tokenizer.control_ids else None

    return call_grammar(Conversation((), tools, **options), form.syntax, special)


def obey(grammar: CallGrammar, kind: str, wish: str, then: str = "", seed: int = 0) -> str:
    """Generate from a model that wants to write `wish` and then repeats `then`.

    A rejected token is skipped, or another is drawn.
    """
    tokenizer, rng = TOKENIZERS[kind], random.Random(seed)
    matcher = COMPILERS[kind].compile(StructuredOutputsParams(grammar=grammar.grammar))
    wanted = tokenizer.encode(wish, add_special_tokens=False)
    text: list[int] = []
    while not matcher.stopped:
        (allowed,) = matcher.masks([], tokenizer.vocab_size)
        wanted = wanted or tokenizer.encode(then, add_special_tokens=False)
        at = next((at for at, token in enumerate(wanted[:60]) if allowed[token]), None)
        if (
            at is None and len(wanted) == 1 and len(then) > len("</s>")
        ):  # amid a value, which no drawn text would end
            wanted = []
            continue
        token = rng.choice(np.flatnonzero(allowed).tolist()) if at is None else wanted[at]
        wanted = wanted if at is None else wanted[at + 1 :]
        matcher.consume(token)
        text.append(token)
        assert len(text) < 5_000
    return tokenizer.decode(text, skip_special_tokens=False)


def split_call(form: ChatFormat | CallFormat, text: str) -> tuple[str, str]:
    """The format's text up to the opener of a call, and the rest."""
    assert form.syntax is not None
    opener = form.syntax.openers[0]
    at = text.rindex(opener + "invoke") if opener == "<｜DSML｜" else text.rindex(opener)
    return text[: at + len(opener)], text[at + len(opener) :]


def strict(parameters: dict[str, Any], name: str = "get_weather") -> Tool:
    return Tool(name, None, {"type": "object", "additionalProperties": False} | parameters, strict=True)


WEATHER = strict(
    {
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 0, "maximum": 9},
            "unit": {"enum": ["C", "F"]},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "code": {"type": "string", "pattern": "^[A-Z]{3}$"},
        },
        "required": ["city", "days", "unit", "tags", "note", "code"],
        "$defs": {"tag": {"type": "boolean"}},
    }
)
GOOD = {"city": "a</b> {x} &c", "days": 3, "unit": "F", "tags": [True, False], "note": None, "code": "ROM"}
OTHER = Tool("other-2", None, {"properties": {"x": {"type": "integer"}}})


@by_vocabulary
@by_format
def test_valid_call_is_not_changed(
    form: ChatFormat | CallFormat, write: Callable[[Calls], str], vocabulary: str
) -> None:
    grammar = grammar_of(form, (WEATHER, OTHER), vocabulary)
    assert grammar is not None
    for call in (("get_weather", GOOD), ("other-2", {"x": "any", "y": [1]})):
        before, wish = split_call(form, write([call]))
        said = obey(grammar, vocabulary, wish)
        assert wish.startswith(said)
        text, calls = read(form.calls((WEATHER, OTHER)), [before + said])
        assert (text, calls) == ("", [call])


@by_vocabulary
@by_format
@pytest.mark.parametrize(
    "wrong",
    [
        {"city": 5, "days": "many", "unit": "K", "tags": ["x", 1], "note": [1], "code": "rome"},
        {"days": 55, "extra": {"a": 1}},
        {},
        {"code": "ROMA", "note": "why", "tags": [True, True, True], "unit": "", "days": None, "city": ""},
    ],
)
def test_invalid_call_is_forced_to_the_schema(
    form: ChatFormat | CallFormat, write: Callable[[Calls], str], vocabulary: str, wrong: dict[str, Any]
) -> None:
    grammar = grammar_of(form, (WEATHER, OTHER), vocabulary)
    assert grammar is not None
    if vocabulary == "spelled" and form in (V32, V4):
        pytest.skip("a JSON string may then hold the tag that ends the value")
    before, wish = split_call(form, write([("get_weather", wrong)]))
    for seed in range(3):
        said = obey(grammar, vocabulary, wish, '"]}' + write([("get_weather", GOOD)]), seed)
        ((name, arguments),) = read(form.calls((WEATHER, OTHER)), [before + said])[1]
        assert name == "get_weather"
        jsonschema.validate(arguments, dict(WEATHER.parameters or {}))


@by_format
def test_a_schema_with_a_union_at_its_root(
    form: ChatFormat | CallFormat, write: Callable[[Calls], str]
) -> None:
    tool = Tool("get_weather", None, {"anyOf": [{"$ref": "#/$defs/a"}]} | ANY, strict=True)
    grammar = grammar_of(form, (tool,), "special")
    assert grammar is not None
    before, wish = split_call(form, write([("get_weather", {"a": "x"})]))
    ((_, arguments),) = read(form.calls((tool,)), [before + obey(grammar, "special", wish, wish)])[1]
    jsonschema.validate(arguments, dict(tool.parameters or {}))


ANY = {
    "type": "object",
    "$defs": {
        "a": {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        }
    },
}


@by_format
def test_only_allowed_tools_may_be_called(
    form: ChatFormat | CallFormat, write: Callable[[Calls], str]
) -> None:
    tools = (Tool("get_weather", None, {}), OTHER)
    assert grammar_of(form, tools, "special") is None
    grammar = grammar_of(form, tools, "special", choice=ToolChoice("auto", ("other-2",)))
    assert grammar is not None
    before, wish = split_call(form, write([("get_weather", {"x": 1})]))
    ((name, _),) = read(form.calls(tools), [before + obey(grammar, "special", wish, wish)])[1]
    assert name == "other-2"


def test_limit_that_a_format_cannot_express_is_rejected() -> None:
    tool = strict({"properties": {"when": {"type": "string", "format": "date"}}})
    with pytest.raises(ValueError, match="'when' by format"):
        grammar_of(GLM45, (tool,), "special")
    assert grammar_of(V4, (tool,), "special") is not None


@pytest.mark.parametrize("form", [V32, V4, GLM45], ids=lambda form: form.name)
@pytest.mark.parametrize("required", [3, True, None, [{}], [3]])
def test_damaged_list_of_required_parameters_is_an_error(
    form: ChatFormat | CallFormat, required: object
) -> None:
    grammar = grammar_of(form, (strict({"properties": {"x": {}}, "required": required}),), "special")
    assert grammar is not None
    with pytest.raises(ValueError):
        COMPILERS["special"].compile(StructuredOutputsParams(grammar=grammar.grammar))


@pytest.mark.parametrize("form", [V32, V4, GLM45], ids=lambda form: form.name)
def test_required_parameter_without_a_schema_is_not_left_out(form: ChatFormat | CallFormat) -> None:
    tool = Tool("f", None, {"properties": {"x": {"type": "integer"}}, "required": ["q"]}, strict=True)
    grammar = grammar_of(form, (tool,), "special")
    assert grammar is not None and isinstance(form.syntax, TaggedCalls)
    begin = form.syntax.begin.format(name="f")
    assert '"q"' in obey(grammar, "special", f'{begin}{{"q": 1}}', "}")


def test_no_grammar_without_a_restriction() -> None:
    assert grammar_of(V4, (OTHER,), "special") is None
    assert grammar_of(V4, (WEATHER,), "special", choice=ToolChoice("none")) is None
    assert grammar_of(V4, (WEATHER,), "special", choice=ToolChoice("required")) is None
    assert json.dumps(WEATHER.document())


def test_a_template_of_the_models_own_may_teach_either_way_of_calling() -> None:
    own = choose(Checkpoint("deepseek_v3", "{{ tools }}{{ messages }}", DEEPSEEK.all.__contains__)).tools
    for write in (v3, v31):
        grammar = grammar_of(own, (WEATHER,), "special")
        assert grammar is not None
        before, wish = split_call(own, write([("get_weather", GOOD)]))
        said = obey(grammar, "special", wish)
        assert wish.startswith(said) and read(V3.calls((WEATHER,)), [before + said])[1] == [
            ("get_weather", GOOD)
        ]
