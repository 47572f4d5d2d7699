"""Sources, split, tokenizer, packing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from farthing_lab.train.data import (
    BOS,
    EOS,
    Document,
    PackedBatches,
    encode,
    find_sources,
    split,
    train_tokenizer,
)


def test_split_is_deterministic_and_disjoint(sources: Path) -> None:
    documents = find_sources(sources)
    train, held = split(documents, every=4)
    assert (train, held) == split(find_sources(sources), every=4)
    assert held
    assert sorted(d.path for d in train + held) == sorted(d.path for d in documents)
    assert not {d.text for d in train} & {d.text for d in held}


def test_split_of_a_file_does_not_depend_on_other_files(sources: Path) -> None:
    """The hash decides, so adding a file never moves another one across the split."""
    before = {d.path for d in split(find_sources(sources), every=4)[1]}
    (sources / "another.py").write_text("something_entirely_different = 'a line of its own'\n")
    assert {d.path for d in split(find_sources(sources), every=4)[1]} - {"another.py"} == before


def test_copies_never_leak(sources: Path) -> None:
    """Exact copies are dropped; near-duplicates are trained on, whatever their hash."""
    documents = find_sources(sources)
    assert len([d for d in documents if d.path in ("module_00.py", "copy_exact.py")]) == 1
    _, held = split(documents, every=1)  # every hash selects: only near-duplicates are excluded
    refused = {d.path for d in documents} - {d.path for d in held}
    assert refused == {"copy_near.py", "copy_exact.py"}


def test_no_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Python sources"):
        find_sources(tmp_path)


def test_tokenizer_round_trip_and_special_tokens(sources: Path) -> None:
    documents = find_sources(sources)
    tokenizer = train_tokenizer((d.text for d in documents), 400)
    assert tokenizer.get_vocab_size() == 400
    assert (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)) == (0, 1)
    text = 'def f(x):\n\tif x > 10:\n        return "ünï\u4e2d😀"  # \r\n\n\n'
    ids = encode(tokenizer, [Document("x.py", text)])[0]
    assert ids.dtype == np.uint16
    assert (ids[0], ids[-1]) == (0, 1)
    assert tokenizer.decode(ids.tolist()) == text
    with pytest.raises(ValueError, match="vocab_size=60000"):
        train_tokenizer((d.text for d in documents), 60000)


def test_ids_beyond_sixteen_bits(sources: Path) -> None:
    tokenizer = train_tokenizer((d.text for d in find_sources(sources)), 400)
    tokenizer.add_tokens([f"<unused {i}>" for i in range(1 << 16)] + ["<last>"])
    ids = encode(tokenizer, [Document("x.py", "x<last>")])[0]
    assert ids.tolist()[-2:] == [400 + (1 << 16), 1]
    assert PackedBatches([ids] * 9).next(1, 4).max() == 400 + (1 << 16)


def test_tokenizer_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no token '<｜begin▁of▁sentence｜>'; expected DeepSeek's"):
        encode(Tokenizer(models.BPE()), [Document("x.py", "x")])


def documents_of(sizes: list[int]) -> list[np.ndarray]:
    """Documents whose tokens are all different from each other."""
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end).astype(np.uint16) for end, size in zip(ends, sizes, strict=True)]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=3, max_size=12),
    length=st.integers(2, 9),
    seed=st.integers(0, 9),
)
def test_one_pass_yields_no_token_twice(sizes: list[int], length: int, seed: int) -> None:
    batches = PackedBatches(documents_of(sizes), seed)
    if batches.tokens <= length + 1:
        with pytest.raises(ValueError, match="too few"):
            batches.next(1, length)
        return
    first = batches.next(1, length)
    targets = first[:, 1:].flatten().tolist()
    while batches.index < len(batches._starts):
        targets += batches.next(1, length)[:, 1:].flatten().tolist()
    assert batches.passes == 0
    assert len(targets) == len(set(targets))
    assert len(targets) >= batches.tokens - 2 * length  # only ragged ends are dropped


@pytest.mark.parametrize("steps", [0, 1, 5, 40])
def test_resumes_at_the_same_batch(steps: int) -> None:
    a = PackedBatches(documents_of([30, 50, 20, 44]), seed=3)
    for i in range(steps):
        a.next(2, 8 if i < 3 else 16)
    b = PackedBatches(documents_of([30, 50, 20, 44]), seed=99)
    b.load_state_dict(a.state_dict())
    for length in (16, 16, 8):
        assert (a.next(3, length) == b.next(3, length)).all()
