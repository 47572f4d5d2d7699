"""Tools of MCP servers on the page: real servers on stdio, no call without its question, and who may ask."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from farthing.mcp import McpServers
from farthing.server.config import KeyRing, ServerConfig
from farthing.server.tools import page_routes
from tests.server.browser import browser_only, complaints, look, wait_for
from tests.server.harness import ScriptedEngine, running
from tests.server.test_page import DONE, enter, fill, press, texts
from tests.server.test_page_access import faults
from tests.server.test_pulls import STRANGERS

pytest.importorskip("mcp")
SOURCE = """
import pathlib, sys
from mcp.server import MCPServer
server = MCPServer("test")

@server.tool()
def add(a: int, b: int) -> str:
    "Add two numbers."
    with pathlib.Path(sys.argv[1]).open("a") as log:
        log.write(f"{a} {b};")
    return f"<b>{a + b}</b>"

server.run("stdio")
"""
CALL = {"name": "add", "arguments": '{"a": 2, "a": 3, "b": 4}'}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mcp")
    (made / "server.py").write_text(SOURCE)
    arguments = [str(made / "server.py"), str(made / "log")]
    entry = {"command": sys.executable, "args": arguments, "env": dict(os.environ)}
    (made / "mcp.json").write_text(json.dumps({"mcpServers": {"sum\u202e": entry}}))
    return made


@pytest.fixture(scope="module")
def connected(folder: Path) -> Iterator[McpServers]:
    with page_routes(ServerConfig()) as routes:
        assert routes == []
    with page_routes(ServerConfig(mcp=str(folder / "mcp.json"))) as routes:
        assert len(routes) == 3
    with McpServers(folder / "mcp.json") as servers:
        yield servers


@pytest.fixture
def tools(connected: McpServers, folder: Path) -> McpServers:
    """The servers, whose log of calls is empty."""
    (folder / "log").write_text("")
    return connected


def test_a_call_is_that_of_its_question_and_happens_once(tools: McpServers, folder: Path) -> None:
    with running(ScriptedEngine(), tools) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        (only,) = http.get("/dashboard/tools").json()["tools"]
        assert only["server"] == "sum\u202e" and only["tool"]["function"]["name"] == "add"
        asked = [http.post("/dashboard/tools/question", json=CALL).json() for _ in range(2)]
        assert [asked[0][name] for name in ("server", "tool")] == ["sum\\u202e", "add"]
        assert asked[0]["lines"] == ["a: 3", "b: 4"] and (folder / "log").read_text() == ""
        for _ in range(2):  # the second time, another call's fields change nothing
            found = http.post("/dashboard/tools/call", json={**CALL, "question": asked[1]["question"]})
            assert (found.status_code == 200) is (_ == 0)
            assert found.status_code == 404 or found.json() == {"text": "<b>7</b>"}
        assert (folder / "log").read_text() == "3 4;"
        wrong = http.post("/dashboard/tools/question", json={"name": "add", "arguments": '{"a": "x"}'}).json()
        failed = http.post("/dashboard/tools/call", json={"question": wrong["question"]}).json()["text"]
        assert failed.lower().startswith("error") and (folder / "log").read_text() == "3 4;"
        for path, body in (
            ("question", {"name": "rm"}),
            ("call", {"question": ""}),
            ("call", {}),
            ("call", 1),
        ):
            assert http.post(f"/dashboard/tools/{path}", json=body).status_code in (400, 404)
        for _ in range(70):  # old questions are forgotten
            http.post("/dashboard/tools/question", json=CALL)
        forgotten = http.post("/dashboard/tools/call", json={"question": asked[0]["question"]})
        assert forgotten.status_code == 404


def test_strangers_call_nothing(tools: McpServers, folder: Path) -> None:
    keys = {"keys": KeyRing(["a:user"]), "admin_keys": KeyRing(["b:admin"])}
    refused = [({}, headers, 403) for headers, _ in STRANGERS]
    refused += [
        (keys, {"Authorization": f"Bearer {key}"}, status) for key, status in (("x", 401), ("user", 403))
    ]
    for config, headers, status in refused:
        with running(ScriptedEngine(), tools, **config) as server:
            own = {} if not config else {"Authorization": "Bearer admin"}
            asked = httpx.post(f"{server.url}/dashboard/tools/question", json=CALL, headers=own).json()
            with httpx.Client(base_url=server.url, headers=headers) as http:
                answers = [http.get("/dashboard/tools"), http.post("/dashboard/tools/question", json=CALL)]
                answers.append(http.post("/dashboard/tools/call", json={"question": asked["question"]}))
            assert [each.status_code for each in answers] == [status] * 3
    assert (folder / "log").read_text() == ""
    with pytest.raises(ValueError, match=r"mcp: got .* only this machine"):
        ServerConfig(mcp="mcp.json", host="0.0.0.0", insecure=True)
    with running(ScriptedEngine()) as server:
        assert httpx.get(f"{server.url}/dashboard/tools").status_code == 404


def script(prompt: str) -> Sequence[str]:
    """Calls the tool after each message of a user, and ends after its result."""
    if "tool▁outputs" in prompt.rpartition("<｜User｜>")[2] or prompt.count("the end"):
        return ["<think>x</think>so be it"]
    call = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 2, "b": 3}\n```<｜tool▁call▁end｜>'
    return [f"<think>x</think><｜tool▁calls▁begin｜>{call}<｜tool▁calls▁end｜>"]


@browser_only
@pytest.mark.parametrize("width", [360, 1440])
def test_the_page_asks_before_a_call_and_shows_its_result(
    browser: Any, tools: McpServers, folder: Path, width: int
) -> None:
    log, engine = folder / "log", ScriptedEngine(script)
    asking = "document.querySelector('.question .choices button')"
    options = {"reasoning_parser": "deepseek_r1", "tool_call_parser": "deepseek_r1"}
    with running(engine, tools, **options) as server:
        for _ in range(2):
            look(browser, server.url, width)
            browser.execute_script("localStorage.clear()")
        look(browser, server.url, width)
        wait_for(browser, "document.querySelector('.settings [name=mcp]')")

        def say(text: str) -> None:
            enter(browser, text)
            wait_for(browser, f"[...document.querySelectorAll('.bubble')].at(-1)?.textContent === '{text}'")

        def ended(count: int) -> None:
            said = "[...document.querySelectorAll('.turn.assistant')].at(-1).textContent.includes('so be it')"
            wait_for(browser, f"{DONE} && {said} && document.querySelectorAll('.bubble').length === {count}")

        for count, (answer, called) in enumerate(
            [("Refuse", ""), ("Allow once", "2 3;"), ("Always allow", "2 3;2 3;"), (None, "2 3;2 3;2 3;")], 1
        ):
            say(f"sum {count}")
            if answer is not None:
                wait_for(browser, asking)
                assert texts(browser, ".question pre") == ["a: 2\nb: 3"] and faults(browser) == []
                assert texts(browser, ".question p") == ["Call add of sum\\u202e?"]
                assert log.read_text() == "2 3;" * (count - 2 if count > 2 else 0)
                press(browser, answer, "document.querySelector('.question')")
            ended(count)
            assert log.read_text() == called
        results = texts(browser, ".turn.tool pre")
        assert results[0].startswith("error: the user") and results[1:] == ["<b>5</b>"] * 3
        assert texts(browser, ".turn.tool summary") == ["Result of add"] * 4
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        # A call of a conversation that is read again has its question again.
        press(browser, "New chat")
        say("again")
        wait_for(browser, "document.querySelectorAll('.turn.tool').length === 1")
        wait_for(browser, DONE)
        browser.execute_script(
            "const name = Object.keys(localStorage).find((each) => each.startsWith('farthing.chat.')"
            " && localStorage.getItem(each).includes('again'));"
            "const read = JSON.parse(localStorage.getItem(name)); read.turns = read.turns.slice(0, 2);"
            "read.leaf = read.turns[1].id; read.changed = Date.now() + 1e6;"
            "localStorage.setItem(name, JSON.stringify(read))"
        )
        calls = log.read_text()
        look(browser, server.url, width)
        wait_for(browser, asking)
        assert log.read_text() == calls
        fill(browser, system="the end")
        browser.execute_script("document.querySelector('.settings [name=mcp]').click()")
        enter(browser, "without")
        ended(2)
        assert "Add two numbers" in engine.prompts[0] and "Add two numbers" not in engine.prompts[-1]
        browser.get("about:blank")
    assert complaints(browser) == []
