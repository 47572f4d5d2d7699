"""Reasoning is separated from the answer in any chunking."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from farthing.conversation.parse.output import THINK, ReasoningSplitter
from farthing.conversation.scan import Literals

PIECES = st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "bc", "<think", "é"])
TEXTS = st.lists(PIECES, max_size=12).map("".join)


def streamed(chunks: list[str], prompt_opens: bool) -> tuple[str, str]:
    parser = ReasoningSplitter(THINK, prompt_opens)
    parts = [part for chunk in chunks for part in parser.push(chunk)] + parser.finish()
    assert all(text for _, text in parts)
    kinds = [kind for kind, _ in parts]
    assert kinds == sorted(kinds, reverse=True)  # reasoning first, then content
    return (
        "".join(text for kind, text in parts if kind == "reasoning"),
        "".join(text for kind, text in parts if kind == "content"),
    )


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
]


@pytest.mark.parametrize(("text", "opens", "reasoning", "content"), CASES)
def test_cases_whole_and_split_in_two(text: str, opens: bool, reasoning: str, content: str) -> None:
    assert streamed([text], opens) == (reasoning, content)
    for cut in range(len(text) + 1):
        assert streamed([text[:cut], text[cut:]], opens) == (reasoning, content)
    assert streamed(list(text), opens) == (reasoning, content)


@given(TEXTS, st.booleans(), st.lists(st.integers(0, 40), max_size=6))
@example("<think>x\n", False, [])
def test_result_does_not_depend_on_chunking(text: str, opens: bool, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert streamed(chunks, opens) == streamed([text], opens)


@given(TEXTS, st.booleans())
def test_only_tags_and_space_are_removed(text: str, opens: bool) -> None:
    kept = [c for c in "".join(streamed([text], opens)) if not c.isspace()]
    sent = [c for c in text if not c.isspace()]
    assert len(sent) - len(kept) in (0, len("<think>"), len("</think>"), len("<think></think>"))
    rest = iter(sent)
    assert all(c in rest for c in kept)  # in order


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
