"""What helps to read the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.browser import browser_only, complaints, look, wait_for
from tests.server.test_page import chatting, say, texts

pytestmark = browser_only

READY = "document.querySelector('.compose option')"


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
