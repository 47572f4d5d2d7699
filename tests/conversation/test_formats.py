"""Prompts of every packaged format, compared with DeepSeek's rules written out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.conversation.arguments import parsed
from farthing.conversation.base import ControlTokens, FormatError
from farthing.conversation.formats.deepseek_v3 import R1, V3
from farthing.conversation.formats.deepseek_v4 import V4
from farthing.conversation.formats.deepseek_v31 import V31
from farthing.conversation.formats.deepseek_v32 import V32
from farthing.conversation.formats.glm import GLM45, GLM47
from farthing.conversation.formats.kimi_k2 import KIMI_K2, KIMI_K2_THINKING, KIMI_K25
from farthing.conversation.formats.template import arguments, finished
from farthing.conversation.jinja import compile_template, variables
from farthing.conversation.select import FORMATS, Checkpoint, choose, template_source
from farthing.conversation.types import Conversation, Tool, ToolCall, ToolChoice, Turn
from farthing.engine.tokenizer import DEEPSEEK_TEMPLATE, flatten
from farthing.server.config import Format

TOKENS = ControlTokens()
BOS, EOS = TOKENS.bos, TOKENS.eos
WEATHER = Tool("weather", "Forecast.", {"type": "object", "properties": {"city": {"type": "string"}}})
TALK = Conversation(
    (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "Rome?"))
)
LOOP = Conversation(
    (
        Turn("user", "Rome?"),
        Turn(
            "assistant",
            "Let me look.",
            "Hm.",
            (ToolCall("functions.weather:0", "weather", '{"city": "Rome"}'),),
        ),
        Turn("tool", "sunny", call_id="functions.weather:0"),
    ),
    (WEATHER,),
)
INVOKE = (
    '<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>"
)


@pytest.mark.parametrize(
    ("form", "talk"),
    [
        (V3, f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜>Hello.{EOS}<｜User｜>Rome?<｜Assistant｜>"),
        (R1, f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜>Hello.{EOS}<｜User｜>Rome?<｜Assistant｜><think>\n"),
        (
            V31,
            f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜></think>Hello.{EOS}"
            "<｜User｜>Rome?<｜Assistant｜></think>",
        ),
        (
            V32,
            f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜></think>Hello.{EOS}"
            "<｜User｜>Rome?<｜Assistant｜></think>",
        ),
        (
            KIMI_K2,
            "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>Hi<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>Hello.<|im_end|>"
            "<|im_user|>user<|im_middle|>Rome?<|im_end|><|im_assistant|>assistant<|im_middle|>",
        ),
        (
            GLM45,
            "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>\n<think></think>\nHello."
            "<|user|>\nRome?<|assistant|>",
        ),
        (
            GLM47,
            "[gMASK]<sop><|system|>Be brief.<|user|>Hi<|assistant|></think>Hello.<|user|>Rome?"
            "<|assistant|><think>",
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_conversation(form, talk: str) -> None:  # type: ignore[no-untyped-def]
    assert form.render(TALK, TOKENS) == talk


def test_v4_conversation_opens_the_reasoning() -> None:
    talk = f"Be brief.<｜User｜>Hi<｜Assistant｜></think>Hello.{EOS}<｜User｜>Rome?<｜Assistant｜>"
    high = V4.render(TALK, TOKENS)
    assert high.startswith(f"{BOS}Reasoning Effort: Absolute maximum") and high.endswith(f"\n\n{talk}<think>")
    assert V4.render(replace(TALK, effort="low"), TOKENS) == f"{BOS}{talk}<think>"
    assert V4.render(replace(TALK, thinking=False), TOKENS) == f"{BOS}{talk}</think>"
    assert V4.render(replace(TALK, effort="none"), TOKENS) == f"{BOS}{talk}</think>"
    assert "Beyond maximum" in V4.render(replace(TALK, effort="max"), TOKENS)


@pytest.mark.parametrize(
    ("form", "tail"),
    [
        (
            V31,
            "<｜User｜>Rome?<｜Assistant｜></think>Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
            f'weather<｜tool▁sep｜>{{"city": "Rome"}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}'
            "<｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜>",
        ),
        (
            V32,
            "<｜User｜>Rome?<｜Assistant｜><think>Hm.</think>Let me look.\n\n<｜DSML｜function_calls>\n"
            f"{INVOKE}\n</｜DSML｜function_calls>{EOS}\n\n<function_results>\n<result>sunny</result>\n"
            "</function_results>\n\n<think>",
        ),
        (
            V4,
            "<｜User｜>Rome?<｜Assistant｜><think>Hm.</think>Let me look.\n\n<｜DSML｜tool_calls>\n"
            f"{INVOKE}\n</｜DSML｜tool_calls>{EOS}<｜User｜><tool_result>sunny</tool_result><｜Assistant｜><think>",
        ),
        (
            KIMI_K2_THINKING,
            "<|im_user|>user<|im_middle|>Rome?<|im_end|><|im_assistant|>assistant<|im_middle|><think>Hm.</think>"
            "Let me look.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
            '<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|>'
            "<|im_end|><|im_system|>tool<|im_middle|>## Return of functions.weather:0\nsunny<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>",
        ),
        (
            GLM45,
            "<|user|>\nRome?<|assistant|>\n<think>Hm.</think>\nLet me look.\n<tool_call>weather\n"
            "<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call><|observation|>\n"
            "<tool_response>\nsunny\n</tool_response><|assistant|>",
        ),
        (
            GLM47,
            "<|user|>Rome?<|assistant|><think>Hm.</think>Let me look.<tool_call>weather<arg_key>city"
            "</arg_key><arg_value>Rome</arg_value></tool_call><|observation|><tool_response>sunny</tool_response>"
            "<|assistant|><think>",
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_tool_loop(form, tail: str) -> None:  # type: ignore[no-untyped-def]
    prompt = form.render(replace(LOOP, thinking=True), TOKENS)
    assert prompt.endswith(tail)
    if form is V31:
        assert "### weather\nDescription: Forecast." in prompt
    else:
        assert '"name": "weather"' in prompt or '"name":"weather"' in prompt


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_no_client_text_is_dropped(form) -> None:  # type: ignore[no-untyped-def]
    turns = (
        Turn("developer", "DEVELOPER"),
        Turn("system", "SYSTEM"),
        Turn("user", "USER"),
        Turn("assistant", "SAID", "", (ToolCall("functions.f:0", "f", '{"a": "ARGUMENT"}'),)),
        Turn("tool", "RESULT", call_id="functions.f:0"),
        Turn("developer", "LATER"),
        Turn("user", "AGAIN"),
    )
    for choice in ("auto", "none", "required"):
        talk = Conversation(turns, (Tool("TOOL"),), ToolChoice(choice))  # type: ignore[arg-type]
        prompt = form.render(talk, TOKENS)
        for text in ("DEVELOPER", "SYSTEM", "USER", "SAID", "ARGUMENT", "RESULT", "LATER", "AGAIN"):
            assert text in prompt, text
        assert ("TOOL" in prompt) is (choice != "none")


def test_kimi_thinking_has_empty_reasoning_in_earlier_turns() -> None:
    turns = (Turn("user", "1"), Turn("assistant", "2", "WHY"), Turn("user", "3"))
    said, ask = "<|im_assistant|>assistant<|im_middle|>", "<|im_user|>user<|im_middle|>3<|im_end|>"
    for form, earlier, opening in (
        (KIMI_K2, "", ""),
        (KIMI_K2_THINKING, "<think></think>", ""),
        (KIMI_K25, "<think></think>", "<think>"),
    ):
        prompt = form.render(Conversation(turns), TOKENS)
        assert prompt.endswith(f"{said}{earlier}2<|im_end|>{ask}{said}{opening}")
        silent = form.render(Conversation(turns, thinking=False), TOKENS)
        assert silent.endswith(f"{ask}{said}{earlier}") and form.render(LOOP, TOKENS).count("Hm.") == bool(
            earlier
        )


def test_v4_merges_results_with_the_user() -> None:
    calls = tuple(ToolCall(identity, "f", "{}") for identity in ("a", "b"))
    turns = (
        Turn("user", "?"),
        Turn("assistant", "", "", calls),
        Turn("tool", "of b", call_id="b"),
        Turn("tool", "of a", call_id="a"),
        Turn("user", "and?"),
    )
    prompt = V4.render(Conversation(turns, thinking=False).with_results_in_call_order(), TOKENS)
    wanted = (
        "<tool_result>of a</tool_result>\n\n<tool_result>of b</tool_result>\n\nand?<｜Assistant｜></think>"
    )
    assert prompt.endswith(f"<｜User｜>{wanted}")


def test_v4_keeps_earlier_reasoning_only_with_tools() -> None:
    turns = (Turn("user", "1"), Turn("assistant", "2", "WHY"), Turn("user", "3"))
    assert "WHY" not in V4.render(Conversation(turns), TOKENS)
    assert "<think>WHY</think>2" in V4.render(Conversation(turns, (WEATHER,)), TOKENS)


TURNS = st.lists(
    st.sampled_from(
        [
            Turn("system", "S"),
            Turn("developer", "D"),
            Turn("user", "U"),
            Turn("assistant", " <think>x</think>\n A "),
            Turn("assistant", "", calls=(ToolCall("c", "f", '{"a": 1}'), ToolCall("d", "g", "{}"))),
            Turn("tool", "R"),
        ]
    ),
    min_size=1,
    max_size=7,
)


@settings(deadline=None)
@given(TURNS, st.booleans(), st.booleans())
def test_v3_is_the_default_template(turns: list[Turn], with_tools: bool, generate: bool) -> None:
    turns.sort(key=lambda turn: turn.role not in ("system", "developer"))
    talk = Conversation(tuple(turns), (WEATHER,) if with_tools else (), generate=generate)
    values = arguments(talk, DEEPSEEK_TEMPLATE)
    messages = flatten(values.pop("messages"))
    expected = compile_template(DEEPSEEK_TEMPLATE)(messages=messages, bos_token=BOS, eos_token=EOS, **values)
    assert V3.render(talk, TOKENS) == expected


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_continuation_leaves_the_last_turn_open(form) -> None:  # type: ignore[no-untyped-def]
    talk = Conversation((Turn("user", "Hi"), Turn("assistant", "Hello wo")), resume=True)
    assert form.render(talk, TOKENS).endswith("Hello wo")


@pytest.mark.parametrize("form", [V32, V4, GLM45])
@pytest.mark.parametrize("text", ["x", "[1]", "5"])
def test_invalid_arguments_are_kept_as_the_only_value(form, text: str) -> None:  # type: ignore[no-untyped-def]
    """A model that wrote an invalid call reads it again, with the tool's complaint."""
    call, whole = ToolCall("c", "f", text), ToolCall("c", "f", json.dumps({"arguments": text}))
    talk = Conversation((Turn("user", "?"), Turn("assistant", calls=(call,))))
    assert form.render(talk, TOKENS) == form.render(
        replace(talk, turns=(Turn("user", "?"), Turn("assistant", calls=(whole,)))), TOKENS
    )


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_call_that_was_cut_can_be_sent_back(form) -> None:  # type: ignore[no-untyped-def]
    whole = json.dumps({"city": 'Ro"m\\e 🎉', "days": [1, {"a": None}], "late": True})
    for cut in range(len(whole)):
        call = ToolCall("c", "weather", whole[:cut])
        turns = (
            Turn("user", "?"),
            Turn("assistant", "", "Hm.", (call,)),
            Turn("tool", "no JSON", call_id="c"),
        )
        assert "no JSON" in form.render(Conversation(turns, (WEATHER,)), TOKENS)


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.recursive(st.text() | st.integers() | st.none(), st.lists), max_size=3))
def test_arguments_that_were_cut_keep_their_beginning(value: dict[str, object]) -> None:
    text = json.dumps(value)
    assert parsed(text) == value
    for cut in range(1, len(text)):
        found = parsed(text[:cut])
        assert found is not None and list(found) == list(value)[: len(found)]
        assert all(found[name] == value[name] for name in list(found)[:-1])
        json.dumps(found, ensure_ascii=False).encode()
    for other in ("", "[1", "5", "x", "}", '{"a": 1}}'):
        assert parsed(other) is None


def test_half_a_surrogate_pair_in_arguments_is_replaced() -> None:
    talk = Conversation(
        (Turn("user", "?"), Turn("assistant", calls=(ToolCall("c", "f", '{"a": "\\ud83d"}'),)))
    )
    assert ">\ufffd<" in V4.render(talk, TOKENS)


# The model's template.


def test_template_that_drops_content_is_detected() -> None:
    prompt = "Rome?"
    with pytest.raises(FormatError, match="the tool 'weather'"):
        finished(LOOP, prompt)
    with pytest.raises(FormatError, match="of role 'tool'"):
        finished(replace(LOOP, tools=()), prompt + "weather")
    with pytest.raises(FormatError, match="of role 'system'"):
        finished(TALK, prompt)
    assert finished(replace(LOOP, tools=()), "weather Rome? sunny") == "weather Rome? sunny"


def test_developer_turns_become_system_turns_if_unsupported() -> None:
    talk = Conversation((Turn("developer", "D"),))
    assert arguments(talk, "{{ messages }}")["messages"][0]["role"] == "system"
    assert arguments(talk, "if role == 'developer'")["messages"][0]["role"] == "developer"


def _checkpoint(template: str | None, *tokens: str, kind: str = "deepseek_v3") -> Checkpoint:
    return Checkpoint(kind, template, lambda token: token in tokens)


MARK = "<｜tool▁calls▁begin｜>"


@pytest.mark.parametrize(
    ("checkpoint", "plain", "tools"),
    [
        (_checkpoint(None), "deepseek_v3", "deepseek_v3"),
        (_checkpoint(None, "｜DSML｜"), "deepseek_v4", "deepseek_v4"),
        (_checkpoint(None, kind="deepseek_v32"), "deepseek_v32", "deepseek_v32"),
        (_checkpoint(None, kind="glm_moe_dsa"), "glm47", "glm47"),
        (_checkpoint(None, kind="glm4_moe_lite"), "glm47", "glm47"),
        (_checkpoint(None, kind="glm4_moe"), "glm45", "glm45"),
        (_checkpoint("{{ messages }}", kind="glm4_moe"), "own", "own"),
        (_checkpoint("{{ messages }}", "<arg_key>", kind="glm4_moe"), "own", "glm45"),
        (_checkpoint("{{ messages }}</arg_key><arg_value>", "<arg_key>", kind="glm4_moe"), "own", "glm47"),
        (_checkpoint(None, kind="kimi_k2"), "kimi_k2", "kimi_k2"),
        (_checkpoint(None, "<think>", kind="kimi_k2"), "kimi_k2_thinking", "kimi_k2_thinking"),
        (_checkpoint(None, "<think>", kind="kimi_k25"), "kimi_k25", "kimi_k25"),
        (_checkpoint("{{ messages }}", MARK), "own", "deepseek_v3"),
        (_checkpoint("{{ messages }}<think>", MARK), "own", "deepseek_r1"),
        (_checkpoint("{{ messages }}{{ thinking }}</think>", MARK), "own", "deepseek_v31"),
        (_checkpoint("{{ messages }}{{ tools }}", MARK), "own", "own"),
        (_checkpoint("{{ messages }}"), "own", "own"),
    ],
)
def test_format_selected_by_the_checkpoint(checkpoint: Checkpoint, plain: str, tools: str) -> None:
    chosen = choose(checkpoint)
    assert (chosen.plain.name, chosen.tools.name) == (plain, tools)


def test_format_selected_by_the_command_line() -> None:
    checkpoint = _checkpoint("{{ messages }}{{ tools }}</think>", MARK)
    assert choose(checkpoint, template="deepseek_v4").plain.name == "deepseek_v4"
    assert choose(checkpoint, calls="glm45").plain.calls is GLM45.calls
    assert choose(checkpoint, reasoning="none").plain.tags is None
    assert choose(_checkpoint("{{ messages }}"), reasoning="deepseek_r1").plain.tags is not None


@pytest.mark.parametrize(
    ("source", "tokens", "reasons"),
    [
        ("{{ messages }}", ("<think>",), False),
        ("{{ messages }}</think>", (), False),  # removes what other models wrote
        ("{{ messages }}</think>", ("<think>",), True),
        ("{{ messages }}<think>", (), True),
        ("{{ messages }}{{ enable_thinking }}", (), True),
        ("{{ messages }}{{ reasoning_effort }}", (), True),
        (None, ("<think>",), False),
    ],
)
def test_a_template_says_whether_the_model_reasons(
    source: str | None, tokens: tuple[str, ...], reasons: bool
) -> None:
    assert (choose(_checkpoint(source, *tokens)).plain.tags is not None) == reasons


def test_template_variables() -> None:
    assert variables("{% for m in messages %}{{ m }}{{ tools }}{% endfor %}") == {"messages", "tools"}
    assert variables("{% broken") == frozenset()


def test_template_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages }}")
    assert template_source(str(file)) == "{{ messages }}"
    assert template_source("deepseek_v4") is None and template_source(None) is None
    with pytest.raises(ValueError, match="chat_template: got 'no such'; expected a readable file or one of"):
        template_source("no such")
    assert set(get_args(Format)) == set(FORMATS)


def test_kimi_function_names_do_not_depend_on_client_ids() -> None:
    calls = (
        ToolCall("call_1", "look", "{}"),
        ToolCall("functions.see:7", "see", "{}"),
        ToolCall("", "old", "{}"),
    )
    turns = (Turn("user", "x"), Turn("assistant", calls=calls), Turn("tool", "found", call_id="call_1"))
    prompt = KIMI_K2.render(Conversation(turns), ControlTokens())
    for text in (
        "functions.look:0<",
        "functions.see:7<",
        "functions.old:2<",
        "## Return of functions.look:0\n",
    ):
        assert text in prompt


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_results_are_in_the_order_of_their_calls(order: tuple[str, str]) -> None:
    calls = (ToolCall("a", "weather", '{"city": "Paris"}'), ToolCall("b", "weather", '{"city": "Rome"}'))
    results = [Turn("tool", f"result of {call}", call_id=call) for call in order]
    turns = (Turn("user", "Where?"), Turn("assistant", calls=calls), *results, Turn("user", "So?"))
    sorted_turns = Conversation(turns).with_results_in_call_order().turns
    assert [turn.text for turn in sorted_turns] == ["Where?", "", "result of a", "result of b", "So?"]


def test_results_around_a_text_are_in_the_order_of_their_calls() -> None:
    calls = (ToolCall("a", "f", "{}"), ToolCall("b", "f", "{}"))
    results = (Turn("tool", "of b", call_id="b"), Turn("user", "and"), Turn("tool", "of a", call_id="a"))
    turns = (
        Conversation((Turn("user"), Turn("assistant", calls=calls), *results))
        .with_results_in_call_order()
        .turns
    )
    assert [turn.text for turn in turns[2:]] == ["of a", "and", "of b"]


def test_results_of_several_turns_are_in_the_order_of_their_calls() -> None:
    made = [Turn("assistant", calls=(ToolCall(identity, "f", "{}"),)) for identity in "ab"]
    results = tuple(Turn("tool", call_id=identity) for identity in "ba")
    turns = Conversation((*made, *results)).with_results_in_call_order().turns
    assert [turn.call_id for turn in turns[2:]] == ["a", "b"]


def test_results_of_unknown_calls_stay_in_place() -> None:
    calls = (ToolCall("a", "f", "{}"), ToolCall("b", "f", "{}"))
    results = tuple(Turn("tool", call_id=call) for call in ("b", "z", "a"))
    conversation = Conversation((Turn("user"), Turn("assistant", calls=calls), *results))
    assert conversation.with_results_in_call_order() == conversation
