"""The parser of plain answers returns what the general one does, wherever the pieces are cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from farthing.conversation.base import NoCalls
from farthing.conversation.output import OutputParser, PlainParser
from farthing.conversation.scan import MARK
from farthing.conversation.types import collect

TOKENS = frozenset({"<call>", "<calls>", "</call>"})  # none begins another
PARTS = st.sampled_from(
    [*(MARK + token for token in sorted(TOKENS)), *sorted(TOKENS), "<", "call", ">", "s", "é"]
)


@given(st.lists(PARTS, max_size=12), st.lists(st.integers(0, 100), max_size=6), st.booleans())
def test_plain_parser_equals_the_general_one(parts: list[str], cuts: list[int], raw: bool) -> None:
    text = "".join(parts)
    bounds = [0, *sorted({cut for cut in cuts if cut < len(text)}), len(text)]
    pieces = [text[start:end] for start, end in pairwise(bounds)]
    hidden = frozenset[str]() if raw else TOKENS
    general = OutputParser(NoCalls(hidden), tokens=TOKENS)
    plain = PlainParser(hidden)
    expected = [delta for piece in pieces for delta in general.push(piece)] + general.finish()
    answer = [delta for piece in pieces for delta in plain.push(piece)] + plain.push("", last=True)
    assert collect(answer) == collect(expected)
