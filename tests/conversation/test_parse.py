"""Every format's calls are parsed however the stream is chunked, and no markup reaches the text."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from farthing.conversation.base import MAX_HEAD, THINK, CallParser, NoCalls
from farthing.conversation.formats.deepseek_v3 import V3
from farthing.conversation.formats.deepseek_v4 import V4
from farthing.conversation.formats.deepseek_v31 import V31
from farthing.conversation.formats.deepseek_v32 import V32
from farthing.conversation.formats.delimited import DEEPSEEK, KIMI, DelimitedCalls
from farthing.conversation.formats.dsml import DsmlCalls, write_calls
from farthing.conversation.formats.gemma import GEMMA4
from farthing.conversation.formats.gemma import MARKS as GEMMA_MARKS
from farthing.conversation.formats.glm import GLM45, GLM47, GlmCalls
from farthing.conversation.formats.harmony import HARMONY
from farthing.conversation.formats.harmony import MARKS as harmony_marks
from farthing.conversation.formats.hermes import HERMES
from farthing.conversation.formats.kimi_k2 import KIMI_K2
from farthing.conversation.formats.llama3 import LLAMA3
from farthing.conversation.formats.minimax_m2 import MINIMAX_M2
from farthing.conversation.formats.mistral import MISTRAL, MISTRAL_LIST
from farthing.conversation.formats.qwen3_coder import QWEN3_CODER
from farthing.conversation.output import ListedCalls, NamedCall, OutputParser
from farthing.conversation.scan import MARK
from farthing.conversation.types import Answer, CallArguments, CallStart, Delta, Tool, ToolCall, collect

Calls = list[tuple[str, dict[str, Any]]]
TOOLS = (
    Tool("get_weather", None, {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}),
    Tool("f", None, {"properties": {"x": {"anyOf": [{"type": "object"}, {"type": "array"}]}}}),
    Tool("add-2", None, None),
)


def answer(parser: CallParser | OutputParser, chunks: list[str]) -> Answer:
    """Join all chunks and check the order of the deltas."""
    deltas: list[Delta] = []
    for chunk in chunks:
        deltas += parser.push(chunk)
    deltas += parser.finish()
    started = 0
    for delta in deltas:
        if isinstance(delta, CallStart):
            assert delta.index == started and delta.id
            started += 1
        elif isinstance(delta, CallArguments):
            assert delta.index == started - 1 and delta.text
        else:
            assert delta.text
    assert parser.calls == started
    return collect(deltas)


def plain(found: Answer) -> tuple[str, str, list[tuple[str, str]]]:
    """Without ids."""
    return found.text, found.reasoning, [(name, arguments) for _, name, arguments in found.calls]


def read(parser: CallParser | OutputParser, chunks: list[str]) -> tuple[str, Calls]:
    found = answer(parser, chunks)
    return found.text, [(name, json.loads(arguments)) for _, name, arguments in found.calls]


def chunked(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


# How each format writes calls.


def v3(calls: Calls) -> str:
    body = "\n".join(
        f"{DEEPSEEK.call_begin}function{DEEPSEEK.separator}{name}\n```json\n{json.dumps(a)}\n```{DEEPSEEK.call_end}"
        for name, a in calls
    )
    return f"{DEEPSEEK.calls_begin}{body}{DEEPSEEK.calls_end}"


def v31(calls: Calls) -> str:
    body = "".join(
        f"{DEEPSEEK.call_begin}{n}{DEEPSEEK.separator}{json.dumps(a)}{DEEPSEEK.call_end}" for n, a in calls
    )
    return f"{DEEPSEEK.calls_begin}{body}{DEEPSEEK.calls_end}"


def kimi(calls: Calls) -> str:
    body = "".join(
        f"{KIMI.call_begin}functions.{n}:{i}{KIMI.separator}{json.dumps(a)}{KIMI.call_end}"
        for i, (n, a) in enumerate(calls)
    )
    return f"{KIMI.calls_begin}{body}{KIMI.calls_end}"


def dsml(section: str) -> Callable[[Calls], str]:
    return lambda calls: write_calls(tuple(ToolCall("", n, json.dumps(a)) for n, a in calls), section)


def glm(calls: Calls, line: str = "\n") -> str:
    parts = []
    for name, arguments in calls:
        parts.append(f"{line}<tool_call>{name}{line}")
        for key, value in arguments.items():
            text = value if isinstance(value, str) else json.dumps(value)
            parts.append(f"<arg_key>{key}</arg_key>{line}<arg_value>{text}</arg_value>{line}")
        parts.append("</tool_call>")
    return "".join(parts)


def glm47(calls: Calls) -> str:
    return glm(calls, "")


def hermes(calls: Calls) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": {json.dumps(n)}, "arguments": {json.dumps(a)}}}\n</tool_call>'
        for n, a in calls
    )


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def qwen3_coder(calls: Calls) -> str:
    return "\n".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>\n{_value(value)}\n</parameter>\n" for key, value in a.items())
        + "</function>\n</tool_call>"
        for name, a in calls
    )


def minimax(calls: Calls) -> str:
    body = "".join(
        f'<invoke name="{name}">\n'
        + "".join(f'<parameter name="{key}">{_value(value)}</parameter>\n' for key, value in a.items())
        + "</invoke>\n"
        for name, a in calls
    )
    return f"\n<minimax:tool_call>\n{body}</minimax:tool_call>"


def mistral(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(a)}" for name, a in calls)


def listed(calls: Calls, opener: str = "[TOOL_CALLS] ") -> str:
    """As Mistral's older templates print them, with ids."""
    items = ({"name": name, "arguments": a, "id": "a1b2c3d4e"} for name, a in calls)
    return opener + json.dumps(list(items))


def harmony(calls: Calls) -> str:
    return "".join(
        f"<|start|>assistant<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>"
        f"{json.dumps(a)}<|call|>"
        for n, a in calls
    )


def gemma4(calls: Calls) -> str:
    def written(value: Any) -> str:
        if isinstance(value, str):
            return f'<|"|>{value}<|"|>'
        if isinstance(value, dict):
            return "{" + ",".join(f"{written(key)}:{written(v)}" for key, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(written, value)) + "]"
        return json.dumps(value)

    def arguments(a: dict[str, Any]) -> str:  # keys are bare, and sorted
        return ",".join(f"{key}:{written(a[key])}" for key in sorted(a, key=str.lower))

    return "".join(f"<|tool_call>call:{name}{{{arguments(a)}}}<tool_call|>" for name, a in calls)


FORMATS: list[tuple[str, Callable[[Calls], str], Callable[[], CallParser]]] = [
    ("v3", v3, lambda tokens=frozenset(): V3.calls(TOOLS, tokens)),
    ("v31", v31, lambda tokens=frozenset(): V31.calls(TOOLS, tokens)),
    ("kimi", kimi, lambda tokens=frozenset(): KIMI_K2.calls(TOOLS, tokens)),
    ("v32", dsml("function_calls"), lambda tokens=frozenset(): V32.calls(TOOLS, tokens)),
    ("v4", dsml("tool_calls"), lambda tokens=frozenset(): V4.calls(TOOLS, tokens)),
    ("glm", glm, lambda tokens=frozenset(): GLM45.calls(TOOLS, tokens)),
    ("glm47", glm47, lambda tokens=frozenset(): GLM47.calls(TOOLS, tokens)),
    ("hermes", hermes, lambda tokens=frozenset(): HERMES.calls(TOOLS, tokens)),
    ("qwen3_coder", qwen3_coder, lambda tokens=frozenset(): QWEN3_CODER.calls(TOOLS, tokens)),
    ("minimax", minimax, lambda tokens=frozenset(): MINIMAX_M2.calls(TOOLS, tokens)),
    ("mistral", mistral, lambda tokens=frozenset(): MISTRAL.calls(TOOLS, tokens)),
    ("harmony", harmony, lambda tokens=frozenset(): HARMONY.calls(TOOLS, tokens)),
    ("gemma4", gemma4, lambda tokens=frozenset(): GEMMA4.calls(TOOLS, tokens)),
    ("mistral_list", listed, lambda tokens=frozenset(): MISTRAL_LIST.calls(TOOLS, tokens)),
]
IDS = [name for name, _, _ in FORMATS]
TAGGED = [each for each in FORMATS if each[0] not in ("harmony", "gemma4")]  # reasoning is between tags
TAGGED_IDS = [name for name, _, _ in TAGGED]

TEXT = st.text(max_size=12) | st.sampled_from(
    ["```", "\n", "<｜", "a<b", "2>&1", "</", '"', "\\", "é 日 🎉", "5"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
CITY = st.fixed_dictionaries({"city": TEXT}, optional={"days": st.integers()})
CALL = st.one_of(
    st.tuples(st.just("get_weather"), CITY),
    st.tuples(st.just("f"), st.fixed_dictionaries({"x": st.lists(JSON, max_size=2)})),
    st.tuples(st.just("add-2"), st.just({})),
)
CALLS = st.lists(CALL, min_size=1, max_size=3)
CUTS = st.lists(st.integers(0), max_size=9)


@pytest.mark.parametrize(("write", "make"), [f[1:] for f in FORMATS], ids=IDS)
@settings(deadline=None)
@given(
    calls=CALLS, before=st.sampled_from(["", "Let me see."]), after=st.sampled_from(["", "Done."]), cuts=CUTS
)
def test_calls_survive_any_chunking(
    write: Callable[[Calls], str],
    make: Callable[[], CallParser],
    calls: Calls,
    before: str,
    after: str,
    cuts: list[int],
) -> None:
    text = before + write(calls) + after
    for chunks in ([text], list(text), chunked(text, cuts)):
        assert read(make(), chunks) == (before + after, calls)


MARKUP = [
    *DEEPSEEK.all,
    *KIMI.all,
    *(
        "<｜DSML｜tool_calls>",
        "</｜DSML｜tool_calls>",
        "<｜DSML｜function_calls>",
        "<｜DSML｜",
        "</｜DSML｜invoke>",
    ),
    *('<｜DSML｜invoke name="f">', '<｜DSML｜parameter name="x" string="true">', "</｜DSML｜parameter>"),
    *(
        '<｜DSML｜parameter name="days" string="false">',
        '<｜DSML｜invoke name="a\nb',
        "<｜｜DSML｜｜tool_calls>",
    ),
    *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *("<think>", "</think>", "function", "f\n", "```json\n", "```", "{", "}", '"', "\\", ":", "[", "]"),
    *(" ", "\n", "<", ">", "｜", "name", "x" * 600, "é", '{"a": 1}', '"parameters"', ","),
]
SPECIAL = [
    frozenset[str](),
    frozenset((DEEPSEEK.call_end, KIMI.call_end, "<think>", "<tool_call>", "｜DSML｜", "<｜")),
]
MARKUP += ["<|tool_call_section_begin|>", "call_1", "functionsf5", '{"name": "f"}', '{"x": [1]}', "x", "days"]
MARKUP += ["<function=f>", "<function=", "</function>", "<parameter=x>", "<parameter=days>", "</parameter>"]
MARKUP += ["<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="f">', '<parameter name="x">', "\n\n"]
MARKUP += [
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<|python_tag|>",
    '{"name": "f", "arguments": {',
    '"name": "f"',
]
MARKUP += [*harmony_marks, " to=functions.f", " to=", "analysis", "final", "commentary to=functions.add-2 "]
MARKUP += [*GEMMA_MARKS, "thought\n", "call:f", "call:f{x:", "call:add-2", ":", "}"]
MARKUP += [MARK + token for token in SPECIAL[1]]
SOUP = st.lists(st.sampled_from(MARKUP) | st.text(max_size=3), max_size=14).map("".join)
PARSERS: list[Callable[[], CallParser]] = [
    lambda: DelimitedCalls(DEEPSEEK),
    lambda: DelimitedCalls(KIMI, native_ids=True),
    lambda: DsmlCalls(TOOLS),
    lambda: GlmCalls(TOOLS),
    ListedCalls,
    lambda: NamedCall("f"),
    NoCalls,
    lambda: KIMI_K2.calls(TOOLS),
    lambda: NoCalls(DEEPSEEK.all),
    *(
        lambda form=form: form.calls(TOOLS)
        for form in (HERMES, QWEN3_CODER, MINIMAX_M2, MISTRAL, LLAMA3, HARMONY, GEMMA4)
    ),
]


@pytest.mark.parametrize("make", PARSERS)
@settings(deadline=None, max_examples=120)
@given(text=SOUP, opened=st.booleans(), reasons=st.booleans(), tokens=st.sampled_from(SPECIAL), cuts=CUTS)
@example(text='<｜DSML｜invoke name="a\nb', opened=False, reasons=False, tokens=frozenset(), cuts=[])
def test_any_text_parses_the_same_in_any_chunking(
    make: Callable[[], CallParser],
    text: str,
    opened: bool,
    reasons: bool,
    tokens: frozenset[str],
    cuts: list[int],
) -> None:
    def parser() -> OutputParser:
        return OutputParser(make(), THINK if reasons else None, opened, tokens)

    whole = plain(answer(parser(), [text]))
    assert plain(answer(parser(), list(text))) == whole
    assert plain(answer(parser(), chunked(text, cuts))) == whole


FEW = st.lists(st.sampled_from(MARKUP), max_size=3).map("".join)
LONG = st.tuples(FEW, st.integers(-3, 6), FEW).map(lambda t: t[0] + "x" * (MAX_HEAD + t[1]) + t[2])


@pytest.mark.parametrize("make", PARSERS)
@settings(deadline=None, max_examples=60)
@given(text=LONG, reasons=st.booleans())
@example(text="<|channel>" + "x" * 513 + "a", reasons=False)
@example(text="[TOOL_CALLS]" + "x" * 514 + "{", reasons=False)
def test_a_name_beyond_its_bound_parses_the_same_in_any_chunking(
    make: Callable[[], CallParser], text: str, reasons: bool
) -> None:
    def parser() -> OutputParser:
        return OutputParser(make(), THINK if reasons else None)

    assert plain(answer(parser(), list(text))) == plain(answer(parser(), [text]))


@pytest.mark.parametrize("make", PARSERS[:4])
@settings(deadline=None, max_examples=200)
@given(text=SOUP)
def test_no_markup_reaches_the_text(make: Callable[[], CallParser], text: str) -> None:
    parser = make()
    shown = answer(parser, list(text)).text
    own = {
        DelimitedCalls: DEEPSEEK.all if make is PARSERS[0] else KIMI.all,
        DsmlCalls: ("<｜DSML｜", "</｜DSML｜"),
        GlmCalls: ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    }[type(parser)]
    assert not any(mark in shown for mark in own)


FILLERS = [
    *(" ", "\n", "`", "<", "<｜", "a", '"', "\\", "{", "[", ","),
    *("<｜tool▁call▁begin｜>", "<｜DSML｜", "<tool_call>", "<tool_call>\n"),
]
BEGINNINGS = [
    "",
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n",
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n",
    '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}',
    '<｜DSML｜invoke name="f"><｜DSML｜parameter name="x" string="false">',
    '[{"name": "f", "parameters": {',
]


@pytest.mark.parametrize("make", PARSERS)
def test_linear_in_its_input(make: Callable[[], CallParser]) -> None:
    """Every run takes about 3 ms of CPU time; 800 blanks took 2.4 s once."""

    def seconds(filler: str, before: str) -> float:
        start = time.thread_time()
        parser = OutputParser(make(), THINK, tokens=frozenset((DEEPSEEK.call_end, "<｜User｜>")))
        parser.push(before)
        for _ in range(500 // len(filler)):
            for character in filler:
                parser.push(character)
        parser.finish()
        return time.thread_time() - start

    for case in itertools.product(FILLERS, BEGINNINGS):
        # A garbage collection, or a machine that takes the processor away, may fall into one run.
        assert any(seconds(*case) < 0.25 for _ in range(3)), case


def test_an_output_that_arrives_whole_is_parsed_in_slices() -> None:
    """Parsers copy what remains of a piece at every tag, which would be quadratic in its length."""

    class Recording(NoCalls):
        sizes: ClassVar[list[int]] = []

        def push(self, text: str) -> list[Delta]:
            self.sizes.append(len(text))
            return super().push(text)

    for tokens in (frozenset[str](), frozenset(("</think>",))):
        text = "a</think>" * 50_000
        found = answer(OutputParser(Recording(), THINK, opened=True, tokens=tokens), [text])
        assert len(found.reasoning + found.text) >= len(text) - len("</think>")
        assert max(Recording.sizes) < 10_000


# Individual cases.


def test_arguments_stream_before_the_call_ends() -> None:
    parser = DelimitedCalls(DEEPSEEK)
    parser.push("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n")
    assert parser.push('{"city": "Par') == [CallArguments(0, '{"city": "Par')]
    parser = DsmlCalls(TOOLS)
    parser.push('<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">')
    assert parser.push('New "Yo') == [CallArguments(0, 'New \\"Yo')]


@pytest.mark.parametrize(
    ("make", "text", "arguments"),
    [
        (
            PARSERS[0],
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1',
            '{"a": 1',
        ),
        (PARSERS[1], '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": [', '{"a": ['),
        (
            PARSERS[2],
            '<｜DSML｜invoke name="f"><｜DSML｜parameter name="y" string="true">abc</｜DSML｜para',
            '{"y": "abc',
        ),
        (
            PARSERS[3],
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Par",
            '{"city": "Par',
        ),
    ],
)
def test_truncated_call_keeps_its_arguments_so_far(
    make: Callable[[], CallParser], text: str, arguments: str
) -> None:
    for chunks in ([text], list(text)):
        ((_, _, found),) = answer(make(), chunks).calls
        assert found == arguments


@pytest.mark.parametrize(("write", "make"), [f[1:] for f in FORMATS], ids=IDS)
def test_an_output_cut_anywhere_shows_no_markup(
    write: Callable[[Calls], str], make: Callable[[], CallParser]
) -> None:
    text = "Why.</think>Hé < b" + write([("get_weather", {"city": "Rome"}), ("f", {"x": [1]})])
    for cut in range(len(text)):
        for chunks in ([text[:cut]], list(text[:cut])):
            found = answer(OutputParser(make(), THINK, opened=True), chunks)
            shown = found.text + found.reasoning
            marks = (
                "</thin",
                "<｜tool",
                "<|tool",
                "<tool_",
                "<｜DSML",
                "arg_",
                "<func",
                "param",
                "<minim",
                "[TOOL_",
                "invoke",
                "ARGS",
                "name",
            )
            assert not any(mark in shown for mark in marks), (cut, shown)
            assert not found.calls or found.text.strip() == "Hé < b", (cut, found.text)


def test_no_arguments_become_an_empty_object() -> None:
    empty = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜><｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )
    assert read(DelimitedCalls(DEEPSEEK), [empty]) == ("", [("f", {})])
    assert read(DsmlCalls(TOOLS), ['<｜DSML｜invoke name="f">\n</｜DSML｜invoke>']) == ("", [("f", {})])
    assert read(GlmCalls(TOOLS), ["<tool_call>f</tool_call>"]) == ("", [("f", {})])


def test_kimi_keeps_its_own_ids() -> None:
    found = answer(DelimitedCalls(KIMI, native_ids=True), [kimi([("f", {}), ("mcp:a", {})])])
    assert [(identity, name) for identity, name, _ in found.calls] == [
        ("functions.f:0", "f"),
        ("functions.mcp:a:1", "mcp:a"),
    ]


@pytest.mark.parametrize(("write", "make"), [f[1:] for f in FORMATS], ids=IDS)
def test_call_inside_the_reasoning_ends_the_reasoning(
    write: Callable[[Calls], str], make: Callable[[], CallParser]
) -> None:
    text = "Let me call it." + write([("get_weather", {"city": "Rome"})])
    for chunks in ([text], list(text)):
        found = answer(OutputParser(make(), THINK, opened=True), chunks)
        assert (found.reasoning, found.text) == ("Let me call it.", "")
        assert [name for _, name, _ in found.calls] == ["get_weather"]


@pytest.mark.parametrize(("write", "make"), [f[1:] for f in FORMATS], ids=IDS)
def test_arguments_may_contain_the_formats_markup(
    write: Callable[[Calls], str], make: Callable[[], CallParser]
) -> None:
    """Like a tool that edits a parser's source. Only a value's own closing tag is impossible."""
    marks = [*DEEPSEEK.all, *KIMI.all, "<think>", "</think>", "<tool_call>", "<｜DSML｜", "</invoke>"]
    marks += ["[TOOL_CALLS]", "<function=f>", "\n"]
    calls = [("get_weather", {"city": f"see {mark} 'x' {{ [ here"}) for mark in marks]
    text = write(calls)
    for chunks in ([text], list(text)):
        assert read(make(), chunks) == ("", calls)
