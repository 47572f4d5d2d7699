"""The chat in a real browser, against the real API with scripted answers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from farthing.cost.prices import Hardware, Machine
from farthing.server.config import KeyRing
from farthing.server.jobs import Accounts
from tests.server.browser import browser_only, complaints, look, requested, wait_for
from tests.server.harness import Running, ScriptedEngine, running
from tests.server.test_pool import Fake, served

pytestmark = browser_only

MACHINE = Machine(
    Hardware(name="box", kind="cpu", usd_per_hour=1, watts=10, idle_watts=5), 2, declared="2026-01-01"
)
SEND = "document.querySelector('.compose .primary')"
DONE = f"{SEND}.textContent === 'Send' && document.querySelector('.turn:last-child .used')"


@contextmanager
def chatting(script: Any, step: float = 0.0, **config: Any) -> Iterator[tuple[Running, ScriptedEngine]]:
    """A server whose answers follow a script, with prices."""
    engine = ScriptedEngine(script, step=step)
    with running(engine, **{"reasoning_parser": "deepseek_r1", **config}) as server:
        server.service.accounts = Accounts(engine, MACHINE, "tiny")  # type: ignore[arg-type]
        yield server, engine


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """The browser, of which nothing remains afterwards."""
    complaints(browser)
    yield browser
    browser.get("about:blank")


def enter(page: Any, text: str) -> None:
    page.execute_script(
        "const input = document.querySelector('.compose > textarea'); input.value = arguments[0];"
        "input.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true}))",
        text,
    )


def say(page: Any, text: str) -> None:
    enter(page, text)
    wait_for(page, f"{DONE} && document.querySelectorAll('.bubble').length")


def press(page: Any, label: str, within: str = "document") -> None:
    wait_for(page, f"[...{within}.querySelectorAll('button')].some((b) => b.textContent === '{label}')")
    page.execute_script(
        f"[...{within}.querySelectorAll('button')].find((b) => b.textContent === '{label}').click()"
    )


def fill(page: Any, **values: str) -> None:
    """Enter values in the fields of the settings."""
    for name, value in values.items():
        page.execute_script(
            "const field = document.querySelector(`.settings [name=${arguments[0]}]`);"
            "field.value = arguments[1]; field.dispatchEvent(new Event('input'))",
            *(name, value),
        )


def texts(page: Any, selector: str) -> list[str]:
    found: list[str] = page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)", selector
    )
    return found


def greet(prompt: str) -> Sequence[str]:
    last = prompt.rpartition("user")[2] or prompt
    if "forever" in last:
        return ["<think>A ", "long</think>"] + ["tale "] * 4000
    return ["<think>Let me", " think.</think>", "**Hello**", " there"]


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_a_conversation_streams_stops_forks_and_survives_a_reload(page: Any, width: int) -> None:
    # A browser that gets all of an answer at once knows no rate.
    with chatting(greet, step=0.05) as (server, engine):
        look(page, server.url, width, "dark")
        page.execute_script("localStorage.clear()")
        look(page, server.url, width, "dark")
        wait_for(page, "document.querySelector('.compose option')?.value === 'tiny'")
        assert "Talk to tiny" in texts(page, ".greeting h1")
        say(page, "Good morning")
        assert texts(page, ".turn.assistant > .prose") == ["Hello there"]
        assert page.execute_script("return document.querySelector('.prose strong').textContent") == "Hello"
        assert texts(page, ".thoughts .prose") == ["Let me think."]
        assert not page.execute_script("return document.querySelector('.thoughts').open"), "folded"
        (used,) = texts(page, ".used")
        assert all(part in used for part in ("tokens/s", "prompt tokens cached", "$"))

        enter(page, "go on forever")
        wait_for(page, "document.querySelector('.turn:last-child > .prose p')?.textContent.includes('tale')")
        assert page.execute_script(f"return {SEND}.textContent") == "Stop"
        page.execute_script(f"{SEND}.click()")
        wait_for(page, DONE)
        assert "stopped" in texts(page, ".used")[-1] and engine.cancelled
        tale = texts(page, ".turn.assistant > .prose")[-1]

        press(page, "Edit", "document.querySelectorAll('.turn.user')[1]")
        page.execute_script("document.querySelector('.editing textarea').value = 'a short one'")
        press(page, "Send", "document.querySelector('.editing')")
        wait_for(page, f"{DONE} && document.querySelectorAll('.bubble')[1].textContent === 'a short one'")
        assert texts(page, ".forks") == ["‹2/2›"]
        assert "forever" not in engine.prompts[-1] and "a short one" in engine.prompts[-1]

        look(page, server.url, width, "dark")
        assert wait_for(page, "document.querySelectorAll('.bubble').length") == 2
        assert texts(page, ".bubble") == ["Good morning", "a short one"]
        assert "Good morning" in texts(page, "aside .open")
        press(page, "‹")
        wait_for(page, "document.querySelectorAll('.bubble')[1].textContent === 'go on forever'")
        assert texts(page, ".turn.assistant > .prose")[-1] == tale
        press(page, "Regenerate", "document.querySelectorAll('.turn.assistant')[0]")
        wait_for(page, f"{DONE} && document.querySelectorAll('.turn').length === 2")
        assert texts(page, ".turn.assistant .forks") == ["‹2/2›"]
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        row = "document.querySelector('.compose .row')"
        assert page.execute_script(f"return {row}.scrollWidth <= {row}.clientWidth")
        assert complaints(page) == []


def test_no_request_leaves_the_origin(page: Any) -> None:
    hostile = (
        "![x](https://evil.example/p.png) <img src=//evil.example/i> [a](https://evil.example/a)</think>"
    )
    with chatting([hostile, hostile.replace("</think>", "").replace("<think>", "")]) as (server, _):
        requested(page)
        look(page, f"{server.url}/#charts", 1280)
        wait_for(page, "document.querySelectorAll('.plot canvas').length >= 4")
        look(page, server.url, 1280)
        say(page, "show me")
        seen = {url for url in requested(page) if not url.startswith("about:")}
    assert seen and {url for url in seen if not url.startswith(f"{server.url}/")} == set()


def test_charts_open_with_speed_cache_and_queue(page: Any) -> None:
    with chatting(greet) as (server, _):
        look(page, f"{server.url}/#charts", 1280)
        wait_for(page, "document.querySelectorAll('.plot canvas').length >= 4")
        names = texts(page, ".grid h2")
        assert names[0] == "Tokens per second" and texts(page, ".tile .name")[-1] == "Cost per million tokens"
        assert names.index("Dollars per million tokens") > max(map(names.index, ("Cache", "Requests")))
        last = "document.querySelector('.tile:last-child').textContent"
        assert wait_for(page, f"{last}.includes('idle now') && {last}") == "Cost per million tokens–idle now"
        assert complaints(page) == []


HOSTILE = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 1">

[a](javascript:window.hacked=1) [b](data:text/html,x) [c]( javascript:alert(1)) <javascript:alert(1)>
[d](https://ok.example/"onmouseover="x) ![e](javascript:x)

| <b>x</b> | `a|b` |
|---|---|
| <svg onload=window.hacked=1> | **<i>y</i>** |

```html"><script>
<script>window.hacked = 1</script>
```
> > > > > > > > > > > > > > > > > > deep <iframe src=//evil.example></iframe>
<style>body{display:none}</style> <form action=//evil.example><input name=q></form>
"""


def test_hostile_answers_stay_text(page: Any) -> None:
    with chatting([HOSTILE]) as (server, _):
        look(page, server.url, 768)
        wait_for(page, "document.querySelector('.compose option')")
        say(page, "<b>mine</b>")
        tags = page.execute_script(
            "return [...new Set([...document.querySelectorAll('.turn *')].map((each) => each.tagName))]"
        )
        allowed = "A ARTICLE BLOCKQUOTE BUTTON CODE DETAILS DIV FOOTER P PRE SPAN STRONG SUMMARY"
        allowed += " TABLE TBODY TD TH THEAD TR"
        assert set(tags) <= set(allowed.split())
        links = page.execute_script(
            "return [...document.querySelectorAll('.turn a')].map((a) => [a.href, a.rel])"
        )
        assert links and all(href.startswith("https://") and "noopener" in rel for href, rel in links)
        attributes = "[...document.querySelectorAll('.turn *')].flatMap((e) => e.getAttributeNames())"
        assert not page.execute_script(
            f"return window.hacked || {attributes}.some((a) => a.startsWith('on'))"
        )
        shown = page.execute_script("return document.querySelector('.turn.assistant').textContent")
        assert "<script>window.hacked = 1</script>" in shown and texts(page, ".bubble") == ["<b>mine</b>"]
        assert complaints(page) == []


RENDER = """
const [text, done] = arguments;
import("/dashboard/markdown.js").then(({ Markdown }) => {
  const whole = new Markdown(), growing = new Markdown();
  whole.show(text);
  const step = Math.max(1, Math.floor(text.length / 50));
  for (let end = 1; end <= text.length; end += step) growing.show(text.slice(0, end));
  growing.show(text);
  done([whole.element.innerHTML, growing.element.innerHTML]);
});
"""
RENDERED = [
    ("a\nb", "<p>a\nb</p>"),
    ("## T #\ntext", "<h4>T</h4><p>text</p>"),
    (
        "- a\n  - b\n- [x] c",
        "<ul><li>a<ul><li>b</li></ul></li>"
        '<li><input type="checkbox" disabled="" aria-label="Done">c</li></ul>',
    ),
    ("3. a\n\n   b\n4. c", '<ol start="3"><li>a<p>b</p></li><li>c</li></ol>'),
    ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
    ("1 * 2 * 3, snake_case_name, \\*x\\*", "<p>1 * 2 * 3, snake_case_name, *x*</p>"),
    (
        "***both*** ~~gone~~ `` a`b ``",
        "<p><strong><em>both</em></strong> <del>gone</del> <code>a`b</code></p>",
    ),
    ("---", "<hr>"),
    ("an *open **end", "<p>an *open **end</p>"),
    ("x\\,dx costs $5 and $6", "<p>x\\,dx costs $5 and $6</p>"),
    ("`$a$` and \\$b\\$", "<p><code>$a$</code> and $b$</p>"),
    ("$\\frac{$", "<p><code>$\\frac{$</code></p>"),
]


@pytest.mark.parametrize(("text", "expected"), RENDERED)
def test_markdown_is_rendered_whole_and_while_it_grows(page: Any, text: str, expected: str) -> None:
    with chatting(["ok"]) as (server, _):
        look(page, server.url, 1280)
        whole, growing = page.execute_async_script(RENDER, text)
    assert whole == growing == expected


FORMULAS = """$\\int_0^1 x\\,dx$ and \\(a_1\\).

$$
- b \\pm \\sqrt{b^2}

+ c
$$

\\[ E = mc^2 \\]

\\begin{align} a &= b \\\\ c &= d \\end{align}

$\\href{javascript:window.hacked=1}{x}$ $\\style{color:red}{y}$ $<img src=x onerror=window.hacked=1>$
"""


def test_formulas_become_mathml_and_nothing_else(page: Any) -> None:
    with chatting([FORMULAS]) as (server, _):
        look(page, server.url, 360)
        wait_for(page, "document.querySelector('.compose option')")
        say(page, "formulas")
        count = "document.querySelectorAll('.turn.assistant math').length"
        assert page.execute_script(f"return {count}") >= 5
        blocks = "document.querySelectorAll('.turn.assistant math[display=block]').length"
        assert page.execute_script(f"return {blocks}") == 3
        assert "," not in texts(page, ".turn.assistant p")[0].split("and")[0].split("\\int")[0]
        assert page.execute_script("return document.querySelector('.turn.assistant msqrt') !== null")
        assert page.execute_script("return document.querySelector('.turn.assistant :is(a, img)')") is None
        assert not page.execute_script("return window.hacked")
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert complaints(page) == []


@pytest.mark.parametrize(
    "text",
    [
        "$" * 4000,
        "$a" * 2000,
        "\\[" * 2000,
        "*" * 4000,
        "[" * 4000,
        "> " * 3000,
        "`" * 4001 + "a",
        "**a " * 3000,
        "_a" * 4000,
    ],
)
def test_markdown_of_any_text_ends_and_is_the_same_while_it_grows(page: Any, text: str) -> None:
    with chatting(["ok"]) as (server, _):
        look(page, server.url, 1280)
        whole, growing = page.execute_async_script(RENDER, text)
    assert whole == growing


def test_key_errors_and_lost_server_are_said(page: Any) -> None:
    with chatting(["<think>x</think>yes"], keys=KeyRing(["me:a-key"]), requests_per_minute=2) as (server, _):
        look(page, server.url, 360)
        page.execute_script("localStorage.clear()")
        wait_for(page, "document.querySelector('#login').open")
        page.execute_script("document.querySelector('#login-key').value = 'wrong'")
        press(page, "Use key")
        wait_for(page, "!document.querySelector('#login-problem').hidden")
        page.execute_script("document.querySelector('#login-key').value = 'a-key'")
        press(page, "Use key")
        wait_for(page, "document.querySelector('#state').classList.contains('live')")
        assert page.execute_script("return Object.values(localStorage).join().includes('a-key')") is False
        wait_for(page, "document.querySelector('.compose option')")
        enter(page, "one " * 120_000)
        wait_for(page, "document.querySelector('.turn .problem:not([hidden])')")
        assert (
            "has 480" in texts(page, ".turn .problem")[-1]
            and "start a new chat" in texts(page, ".turn .problem")[-1]
        )
        press(page, "New chat")
        for _ in range(3):
            say(page, "again")
        assert "try again in" in texts(page, ".turn .problem")[-1]
    press(page, "Try again")
    wait_for(
        page,
        "document.querySelector('.turn .problem:not([hidden])')?.textContent.includes('does not answer')",
    )


CALL = (
    "<think>x</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    '```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


NOTICE = "document.querySelector('.compose .problem:not([hidden])')?.textContent"


def bring(page: Any, content: str | bytes, name: str = "chat.json", within: str = "aside") -> None:
    """Choose a file: to import it, or to attach it to the message."""
    page.execute_script(
        "const [inside, content, name] = arguments, files = new DataTransfer();"
        "const input = document.querySelector(`${inside} input[type=file]`);"
        "files.items.add(new File([new Uint8Array(content)], name)); input.files = files.files;"
        "input.dispatchEvent(new Event('change'))",
        *(within, list(content.encode() if isinstance(content, str) else content), name),
    )


def test_a_full_browser_is_said_and_stops_nothing(page: Any) -> None:
    with chatting(greet) as (server, _):
        look(page, server.url, 1280)
        page.execute_script(
            "localStorage.clear();"
            "Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError') }"
        )
        page.execute_script("document.querySelector('.compose select').dispatchEvent(new Event('change'))")
        assert "settings hold until" in wait_for(page, NOTICE)
        press(page, "Auto")
        press(page, "Light")
        say(page, "Hello")
        assert "export and delete" in wait_for(page, NOTICE)
        assert complaints(page) == []


def test_calls_settings_and_the_list(page: Any) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

    def script(prompt: str) -> Sequence[str]:
        return ["<think>x</think>18 degrees"] if "sunny" in prompt else [CALL]

    with chatting(script, tool_call_parser="deepseek_r1") as (server, engine):
        look(page, server.url, 1280)
        page.execute_script("localStorage.clear()")
        look(page, server.url, 1280)
        wait_for(page, "document.querySelector('.compose option')")
        press(page, "Settings")
        fill(page, system="Be brief.", temperature="0.5", tools=json.dumps([tool]))
        press(page, "Done")
        say(page, "How is the weather?")
        assert texts(page, ".call summary") == ["Calls weather"]
        page.execute_script("document.querySelector('.calls textarea').value = 'sunny'")
        press(page, "Send results")
        wait_for(page, f"{DONE} && document.querySelectorAll('.turn').length === 4")
        assert texts(page, ".turn.assistant > .prose")[-1] == "18 degrees"
        assert "Be brief." in engine.prompts[-1] and engine.params[-1].temperature == 0.5

        press(page, "Rename")
        page.execute_script(
            "const input = document.querySelector('aside li input'); input.value = 'Rome';"
            "input.dispatchEvent(new Event('change')); input.blur()"
        )
        wait_for(page, "document.querySelector('aside .open')?.textContent === 'Rome'")
        page.execute_script(
            "window.confirm = () => true; const make = URL.createObjectURL;"
            "URL.createObjectURL = (blob) => (blob.text().then((t) => (window.exported = t)), make(blob))"
        )
        press(page, "Export")
        exported = json.loads(wait_for(page, "window.exported"))
        assert exported["title"] == "Rome"
        assert [m["role"] for m in exported["messages"]] == [
            "system",
            "user",
            "assistant",
            "tool",
            "assistant",
        ]
        press(page, "Delete")
        wait_for(page, "!document.querySelector('aside .open')")
        bring(page, "no JSON")
        assert "no exported conversation" in wait_for(page, NOTICE)
        bring(page, json.dumps(exported))
        wait_for(page, "document.querySelector('aside .open')?.textContent === 'Rome'")
        assert texts(page, ".turn.assistant > .prose")[-1] == "18 degrees"
        assert texts(page, ".call summary") == ["Calls weather"] and not texts(page, ".calls textarea")
        assert texts(page, ".turn.tool summary") == ["Result of weather"]
        say(page, "And tomorrow?")
        assert "sunny" in engine.prompts[-1]
        press(page, "Delete")
        wait_for(page, "!document.querySelector('aside .open')")
        look(page, server.url, 1280)
        assert wait_for(page, "document.querySelector('aside .empty')")
        assert complaints(page) == []


def test_charts_count_refusals_of_the_api_alone() -> None:
    with chatting(["ok"]) as (server, _), httpx.Client(base_url=server.url) as client:
        assert client.post("/v1/chat/completions", json={"messages": []}).status_code == 400
        assert client.get("/no-page").status_code == 404
        assert client.get("/v1/models").status_code == 200
        data = client.get("/dashboard/data").json()
        deadline = time.monotonic() + 20
        while data["counters"].get("refused") != 1 and time.monotonic() < deadline:
            data = client.get("/dashboard/data").json()
    assert data["counters"]["refused"] == 1
    assert data["gauges"]["memory"] > 1 << 20 and data["counters"]["cpu_seconds"] > 0 and data["layers"] > 0


def test_a_page_of_several_models_says_that_none_is_loaded(page: Any, tmp_path: Path) -> None:
    with served(Fake("a", tmp_path), Fake("b", tmp_path)) as server:
        look(page, server.url, 360)
        wait_for(page, "document.querySelectorAll('.compose option[value]').length >= 2")
        wait_for(page, "document.querySelector('#state.live')?.textContent === 'model not loaded'")
        look(page, f"{server.url}/#charts", 360)
        wait_for(page, "document.querySelector('#charts').textContent.includes('not loaded')")
        assert server.front.pool.loads == 0
        assert complaints(page) == []


def test_two_tabs_keep_what_each_has_added_and_text_has_its_direction(page: Any) -> None:
    with chatting(["<think>x</think>שלום עולם"]) as (server, _):
        look(page, server.url, 360)
        page.execute_script("localStorage.clear()")
        look(page, server.url, 360)
        wait_for(page, "document.querySelector('.compose option')")
        say(page, "one")
        style = "getComputedStyle(document.querySelector('.turn.assistant > .prose p'))"
        assert page.execute_script(f"return [{style}.unicodeBidi, {style}.textAlign]") == [
            "plaintext",
            "start",
        ]
        page.execute_script(
            "const name = Object.keys(localStorage).find((each) => each.startsWith('farthing.chat.'));"
            "const other = JSON.parse(localStorage[name]);"
            "other.turns.push({id: 'tab', parent: other.leaf, role: 'user', text: 'of another tab'});"
            "localStorage[name] = JSON.stringify(other)"
        )
        say(page, "two")
        stored = "Object.entries(localStorage).find(([name]) => name.startsWith('farthing.chat.'))[1]"
        turns = page.execute_script(f"return JSON.parse({stored}).turns.map((each) => each.text)")
        assert {"one", "two", "of another tab"} <= set(turns) and complaints(page) == []
