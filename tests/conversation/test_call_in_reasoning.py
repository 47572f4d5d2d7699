"""A call begun inside the reasoning: the model may reason on, close its tag later or never, or call again."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from farthing.conversation.base import THINK
from farthing.conversation.output import OutputParser
from farthing.conversation.types import Answer
from tests.conversation.test_parse import TAGGED as FORMATS
from tests.conversation.test_parse import TAGGED_IDS as IDS
from tests.conversation.test_parse import Calls, answer
from tests.conversation.test_token_ids import BYTES, Make, parse, spelled, split, tokens

CALL: Calls = [("get_weather", {"city": "see </think> there"})]
MORE: Calls = [("f", {"x": [1]})]
by_format = pytest.mark.parametrize(("write", "make"), [f[1:] for f in FORMATS], ids=IDS)
# parts of an output, and its reasoning, text and number of calls
CASES = {
    "ends": (["Hm.", CALL], "Hm.", "", 1),
    "only calls": ([CALL], "", "", 1),
    "closes after the call": (["Hm.", CALL, "</think>"], "Hm.", "", 1),
    "closes and answers": (["Hm.", CALL, "\n</think>\n\nDone."], "Hm.", "Done.", 1),
    "continues reasoning": (["Hm.", CALL, "Wait.</think>Done."], "Hm.Wait.", "Done.", 1),
    "never closes": (["Hm.", CALL, "Wait."], "Hm.Wait.", "", 1),
    "calls again": (["Hm.", CALL, "</think>", MORE], "Hm.", "", 2),
    "calls on both sides": (["a", CALL, "b</think>c", MORE, "d"], "ab", "cd", 2),
    "closes twice": (["Hm.</think>\n</think>\nDone."], "Hm.", "Done.", 0),
    "closes twice, then calls": (["Hm.</think></think>", CALL], "Hm.", "", 1),
    "closes after a call of the answer": (["Hm.</think>", CALL, "</think>"], "Hm.", "", 1),
    "reasons again after a call": (["a</think>", CALL, "<think>b</think>", MORE], "ab", "", 2),
}


def written(parts: list[str | Calls], write: Callable[[Calls], str]) -> str:
    return "".join(part if isinstance(part, str) else write(part) for part in parts)


def check(found: Answer, parts: list[str | Calls], reasoning: str, text: str) -> None:
    assert (found.reasoning, found.text) == (reasoning, text)
    calls = [call for part in parts if not isinstance(part, str) for call in part]
    assert [(name, json.loads(arguments)) for _, name, arguments in found.calls] == calls


@pytest.mark.parametrize("case", CASES)
@by_format
def test_text_at_every_split(write: Callable[[Calls], str], make: Make, case: str) -> None:
    parts, reasoning, text, calls = CASES[case]
    whole = written(parts, write)
    for cut in range(len(whole) + 1):
        found = answer(OutputParser(make(frozenset()), THINK, opened=True), [whole[:cut], whole[cut:]])
        check(found, parts, reasoning, text)
        assert len(found.calls) == calls
    check(answer(OutputParser(make(frozenset()), THINK, opened=True), list(whole)), parts, reasoning, text)


@pytest.mark.parametrize("case", CASES)
@by_format
def test_token_ids(write: Callable[[Calls], str], make: Make, case: str) -> None:
    parts, reasoning, text, _ = CASES[case]
    for pieces in split(tokens(written(parts, write)), [7, 31, 59]):
        check(parse(make, pieces), parts, reasoning, text)
    ids = tokens(written(parts, write), BYTES)
    check(parse(make, [[token] for token in ids], BYTES), parts, reasoning, text)


@by_format
def test_stray_tags_amid_an_answer(write: Callable[[Calls], str], make: Make) -> None:
    """A tag that is a special token is dropped; one that is spelled is text, as in code."""
    spoken = "if line == '</think>':"
    ids = [*tokens("Hm.</think>So "), *spelled(spoken), *tokens("</think> is the code.")]
    for pieces in split(ids, [5, 20]):
        found = parse(make, pieces)
        assert (found.reasoning, found.text) == ("Hm.", f"So {spoken}is the code.")


MARKS = ("</thin", "｜", "<|tool", "<tool_", "arg_", "DSML", "<func", "param", "<minim", "[TOOL_", "name")


@by_format
def test_a_cut_anywhere_shows_no_markup(write: Callable[[Calls], str], make: Make) -> None:
    text = written(["Hm <b", CALL, "Wait.</think>Hé", MORE, "</think>"], write)
    outputs = [[[token] for token in tokens(text)[:cut]] for cut in range(len(tokens(text)))]
    for found in [
        *(parse(make, output) for output in outputs),
        *(parse(make, [tokens(text[:cut], BYTES)], BYTES) for cut in range(len(text))),
    ]:
        shown = found.text + found.reasoning
        assert not any(mark in shown for mark in MARKS), shown


@by_format
def test_a_call_that_is_only_mentioned_does_not_swallow_the_answer(
    write: Callable[[Calls], str], make: Make
) -> None:
    """Reasoning about the format: cut off the call anywhere before its arguments."""
    call = write([("f", {"x": [1]})])
    for cut in range(call.index("[1]") - 4):
        text = f"{call[:cut]} and so on</think>Done."
        for chunks in ([text], list(text)):
            found = answer(OutputParser(make(frozenset()), THINK, opened=True), chunks)
            assert found.text == "Done.", (call[:cut], found)
