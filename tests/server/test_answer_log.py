"""Answers on disk: what is written is read by the next process, and nothing else is believed."""

from __future__ import annotations

import logging
import os
from array import array
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.server import answer_log
from farthing.server.answer_log import AnswerLog, Record, Written
from farthing.server.memory import AnswerMemory
from tests.server.harness import EOS, tokenizer

TOKENIZER = tokenizer()
NAMES = st.text(max_size=8)  # of clients; any character


def written(tokens: list[int], prompt: int = 0, opening: int = 7) -> Written:
    return Written(opening, prompt, array("I", tokens))


def record(number: int, size: int = 5) -> Record:
    return f"client {number % 3}", number << 40, written([number] * size, size // 2)


def store(folder: Path, records: list[Record]) -> None:
    log = AnswerLog(folder)
    for each in records:
        log.append(*each)
    log.close()


def files(folder: Path) -> list[Path]:
    return sorted(folder.parent.glob("*.answers"))


U64, U32 = st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1)
WRITTEN = st.builds(
    lambda tokens, prompt, opening: written(tokens, min(prompt, len(tokens)), opening),
    st.lists(U32, max_size=9), st.integers(0, 9), U64,
)  # fmt: skip


@given(records=st.lists(st.tuples(NAMES, U64, WRITTEN), max_size=6))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, records: list[Record]) -> None:
    folder = tmp_path_factory.mktemp("cache") / "identity"
    store(folder, records[:3])
    store(folder, records[3:])
    assert sorted(map(repr, AnswerLog(folder).read())) == sorted(map(repr, records))
    assert not list(AnswerLog(folder.with_name("other")).read())
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files(folder))


def test_damage_costs_what_follows_it_and_nothing_else(tmp_path: Path) -> None:
    folder, records = tmp_path / "identity", [record(number) for number in range(4)]
    store(folder, records)
    (path,) = files(folder)
    content, random = path.read_bytes(), Random(0)
    assert list(AnswerLog(folder).read()) == records
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= random.randrange(1, 256)
        for damaged in (bytes(changed), content[:at], content[:at] + random.randbytes(200)):
            path.write_bytes(damaged)
            found = list(AnswerLog(folder).read())
            assert found == records[: len(found)] and len(found) < 4


@given(content=st.binary(max_size=200), header=st.booleans())
def test_foreign_files_are_ignored(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, header: bool
) -> None:
    folder = tmp_path_factory.mktemp("cache") / "identity"
    (folder.parent / "identity-x.answers").write_bytes(answer_log._MAGIC * header + content)
    (folder.parent / "identity-y.answers").mkdir()
    (folder.parent / "identity-z.answers").symlink_to("/dev/zero")
    os.mkfifo(folder.parent / "identity-f.answers")
    assert not list(AnswerLog(folder).read())


def test_tokens_of_a_file_enter_a_prompt_only_as_its_text(tmp_path: Path) -> None:
    """Whatever a file claims: unknown tokens, control tokens, other texts, more tokens than the file has."""
    memory, folder = AnswerMemory(), tmp_path / "identity"
    asked = TOKENIZER.encode("<｜User｜>one<｜Assistant｜>", add_special_tokens=False)
    text = TOKENIZER.encode(f"<｜User｜>one<｜Assistant｜>Hello{EOS}", add_special_tokens=False)
    memory.persist(folder)
    memory.remember("me", memory.prompt("me", asked, TOKENIZER), text[len(asked) :])
    memory.close()
    ((client, key, own),) = AnswerLog(folder).read()
    again = AnswerMemory()
    again.persist(folder)
    assert again.prompt("me", text, TOKENIZER).latest == "sampled"
    again.close()
    hello = own.tokens.tolist()
    forged = [
        [(1 << 32) - 1, *hello], [*hello[:2], 5000, *hello[2:]], [*hello[:-1], 2, 3], [2, *hello], hello[1:],
        [*hello[:3], hello[-1], *hello[3:]], [],
    ]  # fmt: skip
    for tokens in forged:
        store(folder, [(client, key, written(tokens, prompt, own.opening)) for prompt in {0, len(tokens)}])
    memory = AnswerMemory()
    memory.persist(folder)
    for client in ("me", "you"):
        assert memory.prompt(client, text, TOKENIZER).ids == text
    assert memory.prompt("you", text, TOKENIZER).latest is None


def test_files_are_bounded_and_the_oldest_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_log, "DIRECTORY_BYTES", 16_000)
    monkeypatch.setattr(answer_log, "FILE_BYTES", 1_000)
    folder = tmp_path / "identity"
    for start in range(0, 400, 20):
        store(folder if start % 40 else tmp_path / "other", [record(start + n, 20) for n in range(20)])
        assert sum(path.stat().st_size for path in files(folder)) <= 16_000
    found = list(AnswerLog(folder).read())
    assert record(399, 20) in found and record(20, 20) not in found
    for number in range(300):  # processes that store one answer each
        store(folder, [record(number)])
    assert len(files(folder)) < 300


def test_a_full_disk_costs_the_records_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "identity"
    with caplog.at_level(logging.WARNING):
        store(folder, [record(number) for number in range(400)])
    assert len(caplog.records) == 1 and "cannot store answers" in caplog.text
    assert not list(AnswerLog(folder).read())
    store(tmp_path / "removed" / "identity", [record(1)])
    assert list(AnswerLog(tmp_path / "removed" / "identity").read()) == [record(1)]


def test_nothing_is_stored_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    memory = AnswerMemory()
    memory.remember("me", memory.prompt("me", [2, 3], TOKENIZER), [30, 31])
    memory.close()
    assert not list(tmp_path.iterdir())
