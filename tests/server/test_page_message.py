"""What goes with a message of the page, and what helps to find and to read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from farthing.engine.request import RequestMetrics
from tests.server.browser import browser_only, complaints, look, wait_for
from tests.server.harness import ScriptedEngine, running
from tests.server.test_page import DONE, NOTICE, SEND, bring, chatting, enter, fill, press, say, texts
from tests.server.test_pool import Fake, served

pytestmark = browser_only

READY = "document.querySelector('.compose option')"
SHOWN = "name.endsWith('/api/show')"


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """The browser, of which nothing remains afterwards."""
    complaints(browser)
    yield browser
    assert complaints(browser) == []
    browser.get("about:blank")


def begin(page: Any, url: str, width: int = 1280) -> None:
    """Open the page of a browser that has stored nothing."""
    look(page, url, width)
    page.execute_script("localStorage.clear()")
    look(page, url, width)
    wait_for(page, READY)


COLOUR = """
const [text, language, done] = arguments;
import("/dashboard/code.js").then(({ coloured }) => {
  const began = performance.now();
  const nodes = coloured(text, language);
  done([nodes.map((node) => node.textContent ?? node).join(""), nodes.filter((node) => node.className)
    .map((node) => [node.className, node.textContent]), performance.now() - began]);
});
"""
COLOURED = [
    ("python", "if x:  # why\n  y = 'a#b' + 2.5", "keyword if|comment # why|string 'a#b'|number 2.5"),
    ("Python", '"""a\nb""" None', 'string """a\nb"""|keyword None'),
    ("rust", "fn f() /* a\n*/ { 0x1f } // b", "keyword fn|comment /* a\n*/|number 0x1f|comment // b"),
    ("js", "const a = `x ${b}`", "keyword const|string `x ${b}`"),
    ("sql", "select 1 -- x", "keyword select|number 1|comment -- x"),
    ("bash", "echo $# '#' # done", "keyword echo|string '#'|comment # done"),
    ("json", '{"a": [1, true]}', 'string "a"|number 1|keyword true'),
    ("html", "<!-- a --><b id='c'>", "comment <!-- a -->|string 'c'"),
    ("brainfuck", "if 1", ""),
    ("", "if 1", ""),
]


def test_code_is_coloured_and_stays_the_same_text(page: Any) -> None:
    with chatting(["<think>x</think>```py\nif 1: '<b>'\n```"]) as (server, _):
        begin(page, server.url)
        for language, text, expected in COLOURED:
            whole, spans, _ = page.execute_async_script(COLOUR, text, language)
            assert whole == text
            assert "|".join(f"{name} {span}" for name, span in spans) == expected
        for text in ("'\\" * 10_000, '"' * 19_999, "\\'" * 10_000, "`" * 19_999, "/*" * 10_000, "'\"" * 9999):
            for language in ("js", "python", "sql", "sh", "json", "html"):
                whole, _, took = page.execute_async_script(COLOUR, text, language)
                assert whole == text and took < 1000
        say(page, "code")
        assert texts(page, ".code .string") == ["'<b>'"] and texts(page, ".code .keyword") == ["if"]


def test_text_files_go_with_a_message_and_others_are_refused(page: Any) -> None:
    with chatting(lambda _: ["<think>x</think>ok"]) as (server, engine):
        begin(page, server.url, 360)
        for content, name, why in (
            (b"\xff\xfe\x00x", "a.bin", "no text in UTF-8"),
            (b"a\0b", "b.txt", "no text in UTF-8"),
            (b"%PDF-1.7", "c.pdf", "PDF files are not read"),
            (b"x" * 400_001, "d.txt", "at most 400 kB"),
        ):
            bring(page, content, name, ".compose")
            assert why in wait_for(page, f"{NOTICE}?.startsWith('{name}') && {NOTICE}")
        assert texts(page, ".files li") == []
        bring(page, "left = ```out```", "no.py", ".compose")
        wait_for(page, "document.querySelectorAll('.files li').length === 1")
        press(page, "×")
        bring(page, "a = '```'\n<img src=x onerror=window.hacked=1>", "yes<b>.py", ".compose")
        wait_for(page, "document.querySelectorAll('.files li').length === 1")
        page.execute_script("document.querySelector('.compose > textarea').value = ''")
        page.execute_script(f"{SEND}.click()")
        wait_for(page, DONE)
        wanted = "yes<b>.py\n````\na = '```'\n<img src=x onerror=window.hacked=1>\n````"
        assert wanted in engine.prompts[-1] and "left =" not in engine.prompts[-1]
        assert texts(page, ".turn .file summary") == ["yes<b>.py"] and texts(page, ".files li") == []
        assert page.execute_script("return document.querySelector('.bubble').hidden && !window.hacked")
        assert texts(page, "aside .open") == ["yes<b>.py"]
        say(page, "and this?")
        assert wanted in engine.prompts[-1] and engine.prompts[-1].count("onerror") == 1
        press(page, "Edit")
        page.execute_script("document.querySelector('.editing textarea').value = 'What is it?'")
        press(page, "Send", "document.querySelector('.editing')")
        wait_for(page, f"{DONE} && document.querySelectorAll('.turn').length === 2")
        assert f"What is it?\n\n{wanted}" in engine.prompts[-1]
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_conversations_are_searched(page: Any) -> None:
    def find(text: str) -> list[str]:
        page.execute_script(
            "const box = document.querySelector('aside input[type=search]'); box.value = arguments[0];"
            "box.dispatchEvent(new Event('input'))",
            text,
        )
        return texts(page, "aside .open")

    with chatting(lambda prompt: ["<think>x</think>Lyon" if "France" in prompt else "Ostia"]) as (server, _):
        begin(page, server.url)
        say(page, "Towns of France")
        press(page, "New chat")
        bring(page, "Tiber", "rivers.csv", ".compose")
        wait_for(page, "document.querySelectorAll('.files li').length === 1")
        say(page, "Towns of Italy")
        assert find("") == ["Towns of Italy", "Towns of France"]
        assert find("towns of i") == find("tiber") == find("RIVERS") == ["Towns of Italy"]
        assert find(" lyon ") == ["Towns of France"]
        assert find("Oslo") == [] and texts(page, "aside .empty") == ["No conversation has this text."]


def test_every_sampling_field_reaches_the_engine(page: Any) -> None:
    fields = {
        **{"max_tokens": 40, "min_tokens": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 30, "min_p": 0.05},
        **{"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": -0.3, "seed": 7},
    }
    with chatting(lambda _: ["<think>x</think>ok"]) as (server, engine):
        begin(page, server.url)
        press(page, "Settings")
        fill(page, **{name: str(value) for name, value in fields.items()}, stop="END\nSTOP")
        fill(page, other="[1]")
        assert "Other fields: expected an object" in texts(page, ".settings .problem")
        fill(page, other='{"ignore_eos": true, "stream": false}')
        press(page, "Done")
        look(page, server.url, 1280)
        wait_for(page, READY)
        say(page, "Hello")
        given = engine.params[-1]
        assert {name: getattr(given, name) for name in fields} == fields
        assert tuple(given.stop) == ("END", "STOP") and given.ignore_eos
        assert texts(page, ".turn.assistant > .prose") == ["ok"]


@pytest.mark.parametrize("reasons", [True, False])
def test_thinking_is_offered_where_the_model_can(page: Any, reasons: bool) -> None:
    parser = {} if reasons else {"reasoning_parser": "none"}
    with chatting(lambda _: ["ok"], **parser) as (server, _):
        look(page, server.url, 1280)
        stored = json.dumps({"thinking": "on"})
        page.execute_script(
            "localStorage.clear(); localStorage.setItem('farthing.settings', arguments[0])", stored
        )
        look(page, server.url, 1280)
        wait_for(page, f"{READY} && performance.getEntriesByType('resource').some(({{name}}) => {SHOWN})")
        chooser = "document.querySelector('select[aria-label=Thinking]')"
        wait_for(page, f"{chooser}.hidden === {json.dumps(not reasons)}")
        page.execute_script(
            "const own = fetch;"
            "window.fetch = (path, more) => (more?.body && (window.sent = more.body), own(path, more))"
        )
        enter(page, "Hello")
        wait_for(page, DONE)
        assert ("thinking" in json.loads(page.execute_script("return window.sent"))) is reasons


WAITING = ".waiting:not([hidden])"


def test_a_loading_model_says_what_is_done_and_the_message_waits(page: Any) -> None:
    with running(None) as server:
        begin(page, server.url, 360)
        above = f"document.querySelector('.compose {WAITING}')"
        wait_for(page, f"{above}?.textContent.startsWith('The model is being loaded')")
        server.service.loading = ("downloading a/b", 25, 100)
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        assert refused.json()["error"]["message"] == "the model is being loaded: downloading a/b, 25%"
        said = wait_for(page, f"{above}?.querySelector('progress').value === 0.25 && {above}.textContent")
        assert said == "The model is being loaded: downloading a/b25 %"
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        enter(page, "Good morning")
        wait_for(page, f"{SEND}.textContent === 'Stop'")
        enter(page, "")
        page.execute_script(f"{SEND}.click()")
        wait_for(page, f"{DONE} && document.querySelector('.used').textContent === 'stopped'")
        press(page, "Regenerate")
        wait_for(page, f"{SEND}.textContent === 'Stop'")
        engine = ScriptedEngine(["Hello"])
        server.service.engine = engine  # type: ignore[assignment]
        wait_for(page, DONE)
        assert texts(page, ".turn.assistant > .prose") == ["Hello"] and len(engine.prompts) == 1
        assert texts(page, WAITING) == texts(page, ".turn .problem:not([hidden])") == []
        engine.shutdown()


def test_the_prompt_that_is_read_is_shown(page: Any) -> None:
    with chatting(["<think>x</think>", "ok"], step=1.5) as (server, engine):
        known = engine.metrics["scripted-1"] = RequestMetrics(cached_tokens=16, prefill_tokens=64)
        begin(page, server.url, 360)
        enter(page, "word " * 200)
        bar = f"document.querySelector('.turn {WAITING} progress')"
        first = wait_for(page, f"{bar}?.value")
        assert 0.05 < first < 0.2 and texts(page, f".turn {WAITING}")[0].startswith(
            "Reading the prompt of 1,0"
        )
        known.prefill_tokens = 640
        assert wait_for(page, f"{bar}?.value > 0.5 && {bar}.value") < 0.7
        wait_for(page, DONE)
        assert texts(page, WAITING) == []


def test_several_models_say_what_is_loaded_and_why_one_cannot_be(page: Any, tmp_path: Path) -> None:
    with served(Fake("a", tmp_path, delay=30), Fake("b", tmp_path, problem="no room")) as server:
        begin(page, server.url)
        for name, said in (("a", "a is being loaded: starting"), ("b", "b could not be loaded: no room")):
            page.execute_script(
                "const models = document.querySelector('.compose select'); models.value = arguments[0];"
                "models.dispatchEvent(new Event('change'))",
                name,
            )
            with httpx.Client(base_url=server.url) as http, suppress(httpx.TimeoutException):
                http.post("/models/load", json={"model": name}, timeout=1)
            wait_for(page, f"document.querySelector('.compose {WAITING}')?.textContent === '{said}'")
