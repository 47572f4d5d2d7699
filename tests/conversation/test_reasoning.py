"""Reasoning is separated from the answer in any chunking."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from farthing.conversation.base import THINK
from farthing.conversation.output import ReasoningSplitter
from farthing.conversation.scan import Literals
from farthing.conversation.types import collect

PIECES = st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "bc", "<think", "é"])
TEXTS = st.lists(PIECES, max_size=12).map("".join)


def streamed(chunks: list[str], prompt_opens: bool, exact: bool = False) -> tuple[str, str]:
    parser = ReasoningSplitter(THINK, prompt_opens, exact)
    found = collect([delta for chunk in chunks for delta in parser.push(chunk)] + parser.finish())
    return found.reasoning, found.text


CASES = [
    # both tags
    ("<think>\nwhy\n</think>\n\nbecause", False, "why", "because"),
    ("<think>\nwhy\n</think>\n\nbecause", True, "why", "because"),
    # only the closing tag: the prompt opened the reasoning
    ("why\n</think>\n\nbecause", True, "why", "because"),
    # none
    ("because", False, "", "because"),
    ("cut off by the tok", True, "cut off by the tok", ""),
    # edges
    ("<think></think>x", False, "", "x"),
    ("<think>a < b </thin></think> c", False, "a < b </thin>", "c"),
    ("<thinking> is not the tag", False, "", "<thinking> is not the tag"),
    ("", True, "", ""),
    ("  <", False, "", "  <"),
    # closed twice, or never opened
    ("why</think>\n</think>\n\nbecause", True, "why", "because"),
    ("</think>\nbecause", False, "", "because"),
    # opened again before any answer
    ("a</think>\n<think>\nb</think>because", True, "a\nb", "because"),
    ("</think><think>why</think>because", False, "why", "because"),
    # amid the answer it cannot be told from a quotation
    ("a</think>because of <think>b</think>.", True, "a", "because of <think>b</think>."),
    ("because</think>", False, "", "because</think>"),
]
# Where each tag is a special token.
EXACT = [
    ("why</think>because</think> it is", True, "why", "becauseit is"),
    ("because</think>", False, "", "because"),
    ("a</think>First <think>b</think>then", True, "ab", "First then"),
    ("a<think>b</think>c", True, "ab", "c"),
    ("a</think>b </thin", True, "a", "b </thin"),
]


@pytest.mark.parametrize(("text", "opens", "reasoning", "content"), CASES)
def test_cases_whole_and_split_in_two(text: str, opens: bool, reasoning: str, content: str) -> None:
    assert streamed([text], opens) == (reasoning, content)
    for cut in range(len(text) + 1):
        assert streamed([text[:cut], text[cut:]], opens) == (reasoning, content)
    assert streamed(list(text), opens) == (reasoning, content)


@pytest.mark.parametrize(("text", "opens", "reasoning", "content"), EXACT)
def test_tags_that_are_special_tokens(text: str, opens: bool, reasoning: str, content: str) -> None:
    for cut in range(len(text) + 1):
        assert streamed([text[:cut], text[cut:]], opens, exact=True) == (reasoning, content)
    assert streamed(list(text), opens, exact=True) == (reasoning, content)


@given(TEXTS, st.booleans(), st.booleans(), st.lists(st.integers(0, 40), max_size=6))
@example("<think>x\n", False, False, [])
def test_result_does_not_depend_on_chunking(text: str, opens: bool, exact: bool, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert streamed(chunks, opens, exact) == streamed([text], opens, exact)


@given(TEXTS, st.booleans(), st.booleans())
def test_only_tags_and_space_are_removed(text: str, opens: bool, exact: bool) -> None:
    removed = Counter(c for c in text if not c.isspace())
    for part in streamed([text], opens, exact):
        removed.subtract(c for c in part if not c.isspace())
    assert min(removed.values(), default=0) >= 0
    assert {c for c, count in removed.items() if count} <= set("</think>")


@given(st.text("<x/think>"), st.lists(st.sampled_from(["</think>", "<think>", "<"]), min_size=1))
def test_released_text_cannot_become_part_of_a_tag(text: str, strings: list[str]) -> None:
    known = Literals(strings)
    if known.find(text) is not None:
        return
    ready = known.ready(text)
    held = text[ready:]
    assert not held or any(string.startswith(held) for string in strings)
    for start in range(ready):
        assert not any(len(text) - start < len(s) and s.startswith(text[start:]) for s in strings)


@pytest.mark.parametrize("filler", [" ", "\n", "<", "</think", "a"])
def test_linear_in_its_input(filler: str) -> None:
    parser = ReasoningSplitter(THINK, True)
    start = time.perf_counter()
    for _ in range(100_000 // len(filler)):
        for character in filler:
            parser.push(character)
    parser.finish()
    assert time.perf_counter() - start < 5
