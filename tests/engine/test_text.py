"""Tokenizer, incremental text, stop strings and chat templates."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from farthing.conversation.jinja import compile_template
from farthing.conversation.scan import MARK, plain
from farthing.engine.generation import Detokenizer, StopChecker
from farthing.engine.tokenizer import Tokenizer, generation_defaults
from farthing.hub import resolve_model

U, A, E = "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"
B = "<｜begin▁of▁sentence｜>"


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_streamed_text_equals_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    for skip in (True, False):
        detokenizer = Detokenizer(tokenizer, skip)
        parts = [detokenizer.push(token) for token in tokens]
        assert "".join(parts) + detokenizer.flush() == tokenizer.decode(tokens, skip)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_marks_precede_the_marked_tokens(tokenizer: Tokenizer, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    marked = data.draw(st.frozensets(st.sampled_from(sorted(tokenizer.special_ids))))
    detokenizer = Detokenizer(tokenizer, True, marked)
    text = "".join([detokenizer.push(token) for token in tokens]) + detokenizer.flush()
    shown = [token for token in tokens if token in marked or token not in tokenizer.special_ids]
    assert plain(text) == tokenizer.decode(shown, skip_special_tokens=False)
    found = text.split(MARK)[1:]
    expected = [tokenizer.token_text(token) for token in tokens if token in marked]
    assert len(found) == len(expected)
    assert all(map(str.startswith, found, expected))


@given(st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_partial_characters_are_never_emitted(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assume(not tokenizer.special_ids & set(tokens))  # Hypothesis knows the constants of our sources
    detokenizer = Detokenizer(tokenizer)
    shown = ""
    for token in tokens:
        shown += detokenizer.push(token)
        assert text.startswith(shown)
    assert shown + detokenizer.flush() == text


def test_truncated_character_is_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("é", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    assert (detokenizer.push(first), detokenizer.flush()) == ("", "\ufffd")


def test_other_decoders_stream_too() -> None:
    vocab = {"<unk>": 0, "▁Hello": 1, "▁wor": 2, "ld": 3}
    backend = HfTokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    detokenizer = Detokenizer(tokenizer)
    assert not tokenizer.byte_level
    assert "".join(detokenizer.push(t) for t in (1, 2, 3)) == tokenizer.decode([1, 2, 3]) == "Hello world"
    marked = Detokenizer(tokenizer, True, {0})
    assert "".join(marked.push(t) for t in (1, 0, 2, 3)) == f"Hello{MARK}<unk> world"


def test_bos_is_added_once_and_only_if_requested(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("def", add_special_tokens=False)
    assert tokenizer.encode("def") == [0, *plain]
    assert tokenizer.encode(B + "def") == [0, *plain]
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.token_text(0) == B and tokenizer.token_bytes(99999) == b""


def reference_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    hits = [(text.index(s), -len(s), s) for s in stops if s in text]
    if not hits:
        return text, None
    at, _, stop = min(hits)
    return text[: at + len(stop) * include], stop


@given(
    st.text("ab", max_size=24),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_in_pieces(text: str, stops: list[str], include: bool, data: st.DataObject) -> None:
    checker = StopChecker(stops, include)
    shown, rest = "", text
    while rest and checker.stop is None:
        size = data.draw(st.integers(1, len(rest)))
        shown += checker.push(rest[:size])
        rest = rest[size:]
        done = text[: len(text) - len(rest)]
        assert checker.stop is not None or not any(s in done for s in stops)
    if checker.stop is None:
        assert shown + checker.flush() == text
        return
    end = len(text) - len(rest)
    assert (shown, checker.stop) == reference_stop(text[:end], stops, include)


def test_inactive_checker_passes_everything() -> None:
    checker = StopChecker(["ab"])
    assert checker.push("xab", armed=False) == "xab" and checker.stop is None
    assert checker.push("a") == "" and checker.push("c") == "ac"


def test_nearly_matching_stop_strings_add_no_cost() -> None:
    """Held-back text is not searched again for each token, which took milliseconds for 16 strings."""
    checker = StopChecker(["a" * 1023 + "b", *("a" * (500 + k) + "b" * 500 for k in range(15))])
    lines = 0

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    for _ in range(1000):
        checker.push("a")
    sys.settrace(count)
    try:
        for _ in range(20):
            checker.push("a")
    finally:
        sys.settrace(None)
    assert checker.stop is None and lines / 20 < 16 * 12


def test_deepseek_template(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "One."},
        {"role": "system", "content": [{"type": "text", "text": "Two."}]},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>why</think>Hello"},
        {"role": "user", "content": "More"},
    ]
    text = tokenizer.render_chat(messages)
    assert text == f"{B}One.\n\nTwo.{U}Hi{A}Hello{E}{U}More{A}"
    assert tokenizer.render_chat(messages[:3], add_generation_prompt=False) == f"{B}One.\n\nTwo.{U}Hi"


def test_deepseek_template_with_tools(tokenizer: Tokenizer) -> None:
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"é": "<"}}}
    text = tokenizer.render_chat(messages, tools=[tool])
    one = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"x": 1}\n```<｜tool▁call▁end｜>'
    assert f"{U}Go{A}<｜tool▁calls▁begin｜>{one}\n{one}<｜tool▁calls▁end｜>{E}" in text
    assert text.endswith(
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>2<｜tool▁output▁end｜>"
        "\n<｜tool▁output▁begin｜>3<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )
    assert json.dumps(tool["function"], ensure_ascii=False) in text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\].role: got 'robot'"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content: got int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "part of type 'image_url'"),
    ],
)
def test_bad_messages(tokenizer: Tokenizer, messages: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.render_chat(messages)


def test_templates_run_in_a_sandbox() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        compile_template("{{ messages.__class__.__mro__[1].__subclasses__() }}")(messages=[])
    with pytest.raises(ValueError, match="only users"):
        compile_template("{{ raise_exception('only users') }}")()
    with pytest.raises(ValueError, match="does not compile"):
        compile_template("{% if %}")
    assert (
        compile_template("{% for i in [1, 2] %}{% break %}{% endfor %}{{ strftime_now('%Y') }}")() >= "2024"
    )


def test_template_eos_and_sampling_defaults_come_from_the_directory(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": B, "chat_template": "config"}))
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [1, 5], "temperature": 0.6, "top_k": null}'
    )
    loaded = Tokenizer.from_directory(tmp_path, eos_token_ids=(1,))
    assert loaded.eos_token_ids == (1, 5)
    assert loaded.render_chat([{"role": "user", "content": "x"}]) == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_directory(tmp_path).render_chat([{"role": "user", "content": "x"}]) == "file"
    assert generation_defaults(tmp_path) == {"temperature": 0.6}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        generation_defaults(tmp_path)


def test_missing_tokenizer_error_names_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="skip_tokenizer_init"):
        Tokenizer.from_directory(tmp_path)


def test_resolve_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(tmp_path) == tmp_path
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no config"):
        resolve_model(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="expected 'mite', a directory, a GGUF file, a hub id"):
        resolve_model("no/such/thing")
    for missing in ("./missing", "../missing"):
        with pytest.raises(FileNotFoundError, match="expected 'mite', a directory"):
            resolve_model(missing)


def test_error_for_the_former_name_gives_the_new_one() -> None:
    with pytest.raises(FileNotFoundError, match="former name of the embedded model; expected 'mite'"):
        resolve_model("reference")


def test_template_that_drops_a_tool_is_an_error() -> None:
    known = Tokenizer.from_directory(resolve_model("mite"))
    tools = [{"type": "function", "function": {"name": "weather"}}]
    turns = [{"role": "user", "content": "Rome?"}, {"role": "tool", "content": "sunny"}]
    prompt = known.render_chat(turns, tools)
    assert "weather" in prompt and "sunny" in prompt
    silent = Tokenizer(known.backend, {}, chat_template="{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="does not print the tool 'weather'"):
        silent.render_chat(turns, tools)
