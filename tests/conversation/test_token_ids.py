"""Outputs as token ids: special tokens are markup, and the same text spelled by other tokens is not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from farthing.conversation.base import THINK, CallParser
from farthing.conversation.formats.delimited import DEEPSEEK, KIMI
from farthing.conversation.formats.minimax_m2 import MINIMAX_M2
from farthing.conversation.formats.mistral import MISTRAL
from farthing.conversation.formats.qwen3_coder import QWEN3_CODER
from farthing.conversation.output import OutputParser
from farthing.conversation.types import Answer
from farthing.engine.generation import Detokenizer
from farthing.engine.tokenizer import Tokenizer
from tests.conversation.test_parse import CALLS, CUTS, Calls, answer, plain
from tests.conversation.test_parse import TAGGED as FORMATS
from tests.conversation.test_parse import TAGGED_IDS as IDS

Make = Callable[[frozenset[str]], CallParser]
GLM = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
OTHERS = (*QWEN3_CODER.markup - {*GLM}, *MINIMAX_M2.markup - QWEN3_CODER.markup, *MISTRAL.markup)
TAGS = ("<think>", "</think>", *GLM, *sorted(OTHERS))


def byte_tokenizer(special: Sequence[str], added: Sequence[str]) -> Tokenizer:
    """One token per byte, after the special tokens; `added` are tokens that are not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = HfTokenizer(models.BPE({t: i for i, t in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    backend.add_tokens([AddedToken(token) for token in added])
    return Tokenizer(backend, {"bos_token": special[0]})


TOKENS = byte_tokenizer(["<s>", *sorted(DEEPSEEK.all | KIMI.all), "｜DSML｜"], TAGS)
BYTES = byte_tokenizer(["<s>"], ())  # no tag is a token


def tokens(text: str, tokenizer: Tokenizer = TOKENS) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def spelled(text: str) -> list[int]:
    """A text without any special token."""
    return [token for character in text for token in tokens(character)]


def parse(make: Make, pieces: Sequence[Sequence[int]], tokenizer: Tokenizer = TOKENS) -> Answer:
    """Detokenize and parse an output that begins inside the reasoning."""
    marked = {token: tokenizer.token_text(token) for token in tokenizer.control_ids}
    markup = frozenset(marked.values()) - {"<s>"}
    detokenizer = Detokenizer(tokenizer, True, [token for token, text in marked.items() if text in markup])
    chunks = ["".join(map(detokenizer.push, piece)) for piece in pieces] + [detokenizer.flush()]
    return answer(OutputParser(make(markup), THINK, True, markup), chunks)


def split(ids: list[int], cuts: list[int]) -> Iterator[list[list[int]]]:
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    yield [ids]
    yield [[token] for token in ids]
    yield [ids[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("tokenizer", [TOKENS, BYTES], ids=["marks are tokens", "marks are text"])
@pytest.mark.parametrize(("write", "make"), [f[1:] for f in FORMATS], ids=IDS)
@settings(deadline=None, max_examples=50)
@given(calls=CALLS, reasoning=st.sampled_from(["", "Hm, 日本 🎉."]), cuts=CUTS)
def test_calls_survive(
    write: Callable[[Calls], str],
    make: Make,
    tokenizer: Tokenizer,
    calls: Calls,
    reasoning: str,
    cuts: list[int],
) -> None:
    ids = tokens(f"{reasoning}</think>Look: " + write(calls), tokenizer)
    for pieces in split(ids, cuts):
        found = parse(make, pieces, tokenizer)
        assert (found.reasoning, found.text) == (reasoning, "Look:")
        assert [(name, json.loads(arguments)) for _, name, arguments in found.calls] == calls


@pytest.mark.parametrize(("write", "make"), [f[1:] for f in FORMATS], ids=IDS)
def test_spelled_markup_is_text(write: Callable[[Calls], str], make: Make) -> None:
    """An answer about the format, and a tool that edits a parser's source."""
    quoted = "A call: " + write([("f", {"x": [1]})]) + " <think> ends with </think> -- see?"
    ids = spelled(quoted) + tokens("</think>") + spelled(quoted)
    for pieces in split(ids, [3]):
        found = parse(make, pieces)
        assert (found.reasoning, found.text, found.calls) == (quoted, quoted, ())


@pytest.mark.parametrize(("write", "make"), [f[1:] for f in FORMATS], ids=IDS)
def test_arguments_keep_spelled_markup(write: Callable[[Calls], str], make: Make) -> None:
    calls = [("get_weather", {"city": f"see {write([('f', {'x': [1]})])} and </think>"}), ("add-2", {})]
    head, city, tail = write(calls).partition(json.dumps(calls[0][1]["city"])[1:-1])
    if not city:  # written as it is
        head, city, tail = write(calls).partition(calls[0][1]["city"])
    for pieces in split(tokens("</think>" + head) + spelled(city) + tokens(tail), [9]):
        found = parse(make, pieces)
        assert found.text == ""
        assert [(name, json.loads(arguments)) for _, name, arguments in found.calls] == calls


@pytest.mark.parametrize("form", ["v3", "v31", "kimi"])
def test_special_token_ends_an_unterminated_string(form: str) -> None:
    (write, make), marks = next(f[1:] for f in FORMATS if f[0] == form), KIMI if form == "kimi" else DEEPSEEK
    first, second = ("get_weather", {"city": "Rome"}), ("f", {"x": ["{"]})
    text = write([first, second])
    ids = tokens("</think>" + text.replace('Rome"}', "Rome"))
    for pieces in split(ids, [50]):
        found = parse(make, pieces)
        (_, name, arguments), (_, other, later) = found.calls
        assert (name, arguments.removesuffix("\n```")) == (first[0], '{"city": "Rome')
        assert (other, json.loads(later)) == second and found.text == ""
    assert marks.call_end in text


SOUP = st.lists(
    st.sampled_from(["{", "}", '"', "\\", "f", "\n", "a", " ", "``", "[", ":", "é", "functions.f:0"]).map(
        tokens
    )
    | st.sampled_from(sorted(DEEPSEEK.all | KIMI.all | {"<｜DSML｜", "</｜DSML｜parameter>", *TAGS})).flatmap(
        lambda mark: st.sampled_from([tokens(mark), spelled(mark)])
    ),
    max_size=16,
).map(lambda parts: [token for part in parts for token in part])


@pytest.mark.parametrize("make", [f[2] for f in FORMATS], ids=IDS)
@settings(deadline=None, max_examples=60)
@given(ids=SOUP, cuts=CUTS)
def test_any_tokens_parse_the_same_in_any_chunking(make: Make, ids: list[int], cuts: list[int]) -> None:
    (first, *others) = (plain(parse(make, pieces)) for pieces in split(ids, cuts))
    assert all(other == first for other in others)
