"""Reasoning is told from the answer, wherever the stream is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from farthing.server.reasoning import ReasoningParser, held_back, opens_reasoning, split_reasoning

PIECES = st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "bc", "<think", "é"])
TEXTS = st.lists(PIECES, max_size=12).map("".join)


def streamed(chunks: list[str], prompt_opens: bool) -> tuple[str, str]:
    parser = ReasoningParser(prompt_opens)
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
    # the closing tag alone: the prompt opened it
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
def test_cases_whole_and_in_every_two_chunks(text: str, opens: bool, reasoning: str, content: str) -> None:
    assert split_reasoning(text, opens) == (reasoning, content)
    for cut in range(len(text) + 1):
        assert streamed([text[:cut], text[cut:]], opens) == (reasoning, content)
    assert streamed(list(text), opens) == (reasoning, content)


def test_a_whole_output_accepts_a_closing_tag_that_nothing_opened() -> None:
    assert split_reasoning("why</think>because", False) == ("why", "because")


@given(TEXTS, st.booleans(), st.lists(st.integers(0, 40), max_size=6))
@example("<think>x\n", False, [])
def test_any_chunking_gives_the_same(text: str, opens: bool, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert streamed(chunks, opens) == streamed([text], opens)


@given(TEXTS, st.booleans())
def test_nothing_but_tags_and_space_is_lost(text: str, opens: bool) -> None:
    kept = [c for c in "".join(streamed([text], opens)) if not c.isspace()]
    sent = [c for c in text if not c.isspace()]
    assert len(sent) - len(kept) in (0, len("<think>"), len("</think>"), len("<think></think>"))
    rest = iter(sent)
    assert all(c in rest for c in kept)  # in order


@given(st.text("<x/think>"), st.sampled_from(["</think>", "<think>"]))
def test_held_back_is_the_longest_possible_beginning(text: str, tag: str) -> None:
    held = held_back(text, tag)
    assert tag.startswith(text[len(text) - held :])
    assert all(not text.endswith(tag[:size]) for size in range(held + 1, len(tag)))


def test_prompts_that_open() -> None:
    assert opens_reasoning("<｜Assistant｜><think>\n")
    assert not opens_reasoning("<｜Assistant｜>")
