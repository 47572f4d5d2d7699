"""`farthing chat` against servers on real sockets, in a pseudo-terminal where it is about the terminal."""

from __future__ import annotations

import gc
import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from http.client import HTTPResponse
from pathlib import Path
from typing import ClassVar, cast

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from farthing.cli.app import app
from farthing.cli.chat import (
    Screen,
    _account,
    _one_line,
    _started,
    _talk,
    obey,
    printable,
    reply,
    split_blocks,
)
from farthing.cli.conversation import Call, Conversation, Piece, Server, _is_own, _lines, find, started
from farthing.mcp import _SHOWN, McpServers, described, escaped
from farthing.planner.estimate import published_config
from farthing.server.config import KeyRing
from tests.server.harness import ScriptedEngine, letters, running
from tests.server.test_pool import Fake, served

ANSWER = "# Title\n\nSome **bold** text.\n\n```python\nx = 1\n\ny = 2\n```\n"
THOUGHT = ["<think>", "why", " not", "</think>", "be", "cause"]
EVENT = 'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [{"delta": {"content": "ab"}}]}\n\n'
ENVIRONMENT = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40", "NO_COLOR": "1"}


class Terminal:
    """`farthing chat` in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "farthing", "chat", *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=ENVIRONMENT,
            start_new_session=True,
            # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(slave)
        self._master, self.seen = master, ""

    def read(self, text: str, seconds: float = 60.0) -> None:
        """Wait until a text is shown."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._master, 65536).decode(errors="replace")
                except OSError:  # it ended
                    assert text in self.seen, self.seen

    def until(self, text: str) -> str:
        """What is shown until a text is, and with it, without formatting."""
        self.read(text)
        shown, _, self.seen = self.seen.partition(text)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown + text)

    def type(self, line: str) -> None:
        os.write(self._master, f"{line}\n".encode())

    def stop(self) -> None:
        """Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def stop_until(self, text: str) -> None:
        """Ctrl-C at a prompt, again every 5 s until a text is shown: readline keeps a signal that arrives
        after it wrote the prompt and before it waits, and the interpreter sees it with the next one."""
        deadline = time.monotonic() + 60
        self.stop()
        while text not in self.seen:
            try:
                self.read(text, 5)
            except AssertionError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.seen
                self.stop()
        self.until(text)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        os.close(self._master)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    opened = Terminal(*arguments)
    try:
        yield opened
    finally:
        opened.close()


def test_a_conversation_in_a_terminal(tmp_path: Path) -> None:
    prompts = list[str]()

    def script(prompt: str) -> list[str]:
        prompts.append(prompt)
        return letters(ANSWER, 7)

    with (
        running(ScriptedEngine(script)) as server,
        terminal(f"{server.url}/v1/", "--system", "Be brief.") as t,
    ):
        t.until(">>> ")
        t.type('"""two')
        t.until("... ")
        t.type('lines"""')
        shown = t.until(">>> ")
        assert "Title" in shown and "bold" in shown and "**" not in shown and "x = 1" in shown
        assert re.search(r"\d+ tokens, [\d.]+/s; \d+ of prompt, \d+ cached", shown)
        assert "Be brief." in prompts[0] and "two\nlines" in prompts[0]
        t.type("/system Be long.")
        t.until("system prompt: Be long.")
        t.type("again \\")
        t.until("... ")
        t.type("please")
        t.until("tokens")
        assert "Be long." in prompts[1] and "again \nplease" in prompts[1] and "x = 1" in prompts[1]
        t.type(f"/save {tmp_path / 'talk.md'}")
        t.until("saved 4 messages")
        assert (
            (tmp_path / "talk.md").read_text().startswith("## System\n\nBe long.\n\n## You\n\ntwo\nlines\n")
        )
        t.type("/nothing")
        t.until("Ctrl-C           stops an answer")
        t.type("/bye")
        assert t.process.wait(30) == 0


def test_ctrl_c_stops_an_answer_and_keeps_what_arrived() -> None:
    engine = ScriptedEngine(["ab "], step=0.02, forever=True)
    with running(engine) as server, terminal(server.url) as t:
        t.until(">>> ")
        t.type("go on")
        t.until("ab")
        t.stop()
        t.until("(stopped)")
        deadline = time.monotonic() + 20
        while server.service.jobs and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not server.service.jobs, "the server stopped too"
        t.until(">>> ")
        t.stop_until("Ctrl-D or /bye")
        t.type("/save /dev/stdout/no")
        t.until("Not a directory")
        t.type("/bye")
        assert t.process.wait(30) == 0


def test_ctrl_c_within_a_garbage_collection_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """An exception that a callback of the collector raises is only reported."""
    pressed = list[str]()

    def press(phase: str, info: dict[str, int]) -> None:
        if len(pressed) < 1:
            pressed.append(phase)
            signal.raise_signal(signal.SIGINT)

    class Collecting(Screen):
        def show(self, pieces: Iterator[Piece]) -> None:
            for number, piece in enumerate(pieces):
                print(piece.text, end="")
                gc.callbacks.append(press)
                gc.collect()
                gc.callbacks.remove(press)
                assert number < 1000, "Ctrl-C was lost"

    before = signal.getsignal(signal.SIGINT)
    with running(ScriptedEngine(["ab "], step=0.001, forever=True)) as server:
        talk = Conversation(Server(server.url), "tiny")
        assert reply(talk, "go on", Collecting(), None)
    assert pressed and capsys.readouterr().out.endswith("(stopped)\n")
    assert talk.messages[-1]["content"].startswith("ab")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("sent", ["", "HTTP/1.1 200 OK\r\n\r\n", EVENT])
def test_ctrl_c_ends_the_wait_for_a_silent_server(sent: str, capsys: pytest.CaptureFixture[str]) -> None:
    with silent(sent, lambda: os.kill(os.getpid(), signal.SIGINT)) as url:
        talk = Conversation(Server(url), "tiny")
        assert reply(talk, "go on", Screen(), None)
    assert "(stopped)" in capsys.readouterr().out


def test_an_answer_that_the_server_breaks_off_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with silent(EVENT, None) as url:
        talk = Conversation(Server(url), "tiny")
        assert not reply(talk, "go on", Screen(), None)
    assert "the connection ended amid an answer" in capsys.readouterr().out
    assert talk.messages[-1]["content"] == "ab"  # what arrived is kept


def test_a_reset_ends_an_answer_as_any_end_does() -> None:
    def reset() -> Iterator[bytes]:
        yield b"data: {}"
        raise ConnectionResetError(104, "Connection reset by peer")

    lines = _lines(cast(HTTPResponse, reset()))
    assert next(lines) == b"data: {}"
    with pytest.raises(ConnectionError, match="the connection ended amid an answer"):
        next(lines)


@contextmanager
def silent(sent: str, then: Callable[[], None] | None) -> Iterator[str]:
    """A server that reads a request, sends this, and then is silent until its client leaves. then: called
    once it is silent; None: it ends the connection instead."""

    def serve() -> None:
        connection = listener.accept()[0]
        with connection:
            connection.recv(65536)
            connection.sendall(sent.encode())
            if then is not None:
                then()
                while connection.recv(65536):
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(60)
        assert not thread.is_alive()


def test_reasoning_is_folded() -> None:
    with (
        running(ScriptedEngine(THOUGHT), reasoning_parser="deepseek_r1") as server,
        terminal(server.url) as t,
    ):
        t.until(">>> ")
        t.type("hm")
        shown = t.until("because")
        assert "thought for" in shown and "why not" not in shown
        t.until(">>> ")
        t.type("/thoughts")
        t.until("why not")


def test_without_a_terminal_the_answer_is_plain_text() -> None:
    with running(ScriptedEngine(letters(ANSWER, 5))) as server:
        command = [sys.executable, "-m", "farthing", "chat", server.url]
        for more, said in (([], "hello\n"), (["-p", "hello"], "")):
            done = subprocess.run([*command, *more], input=said, text=True, capture_output=True, timeout=60)
            assert (done.returncode, done.stdout) == (0, f"{ANSWER}\n"), done.stderr


@pytest.mark.parametrize(("think", "effort"), [("on", "high"), ("off", "none"), ("low", "low"), (None, None)])
def test_the_thinking_switch(
    think: str | None, effort: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Conversation(Server("x:1"), "m", effort="medium")
    obey(f"/think {think or ''}", talk, Screen())
    assert talk.effort == effort and talk._body().get("reasoning_effort") == effort


@pytest.mark.parametrize(
    ("think", "effort"), [("on", "high"), ("off", "none"), ("low", "low"), (None, "medium")]
)
def test_the_thinking_option_is_that_switch(
    monkeypatch: pytest.MonkeyPatch, think: str | None, effort: str
) -> None:
    monkeypatch.setattr("farthing.cli.chat.reply", lambda *_: True)
    monkeypatch.setattr("farthing.cli.chat.default_file", lambda: Path("absent"))
    talk = Conversation(Server("x:1"), "m", effort="medium")
    with ExitStack() as stack:
        _talk(stack, talk, "hello", think, None)
    assert talk.effort == effort


def test_errors_are_said_and_take_the_message_back(capsys: pytest.CaptureFixture[str]) -> None:
    with running(ScriptedEngine(["ok"])) as server:
        talk = Conversation(Server(server.url), "other")
        assert not reply(talk, "hello", Screen(), None) and not talk.messages
        assert "error: model: got 'other'; expected one of 'tiny'" in capsys.readouterr().out
        talk.model = "tiny"
        assert reply(talk, "hello", Screen(), None) and len(talk.messages) == 2
        url = server.url
    assert not reply(Conversation(Server(url), "tiny"), "x", Screen(), None)
    with pytest.raises(ValueError, match="got 'ftp://x'; expected an address such as http"):
        Server("ftp://x")


def test_keys_and_servers_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(ScriptedEngine(["ok"]), keys=KeyRing(["me:sk-1"])) as server:
        monkeypatch.setenv("FARTHING_URL", server.url)
        assert find(None, None) is None, "without the key"
        for model in (None, "tiny"):
            found = find(model, "sk-1")
            assert found and found[0].url == server.url and found[1] == "tiny"
        assert find("other", "sk-1") is None


@pytest.mark.parametrize(
    ("owner", "sent"), [("own", True), ("root", True), ("another", False), ("unknown", False)]
)
def test_key_is_for_the_users_own_server_unless_its_address_is_named(
    owner: str, sent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(ScriptedEngine(["ok"]), keys=KeyRing(["me:sk-1"])) as server:
        user = {"own": os.getuid(), "root": 0, "another": 4321}.get(owner)
        sockets = tmp_path / "tcp"
        local, rest = f"0100007F:{server.port:04X}", "00000000:0000 0A 0:0 0:0 0"
        line = f"   0: {local} {rest} {user} 0"
        sockets.write_text("header\n" + (f"{line}\n" if user is not None else ""))
        monkeypatch.setattr("farthing.cli.conversation._SOCKETS", (sockets, tmp_path / "absent"))
        monkeypatch.setattr("farthing.cli.conversation.ADDRESS", server.url)
        monkeypatch.setattr("os.getuid", lambda: user if owner == "own" else 4320)
        monkeypatch.delenv("FARTHING_URL", raising=False)
        if sent:
            found = find(None, "sk-1")
            assert found is not None and not found[0].withholds
        else:
            with pytest.raises(
                ValueError, match=f"api_key: not sent to {server.url}.*farthing chat {server.url}"
            ):
                find(None, "sk-1")
        assert find(None, None) is None  # it wants a key, and there is none to send
        monkeypatch.setenv("FARTHING_URL", server.url)
        assert find(None, "sk-1") is not None
        assert Server(server.url, "sk-1").model(None) == "tiny"


def test_owner_of_a_port_is_known() -> None:
    with running(ScriptedEngine(["ok"])) as server:
        assert _is_own(server.port)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert not _is_own(port)


def test_run_fits_serves_answers_and_ends_the_server() -> None:
    command = [sys.executable, "-m", "farthing", "run", "mite", "def f(", "--max-tokens", "4"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120, env=ENVIRONMENT)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert done.stderr.startswith("fit: weights fp8, ")
    url = re.search(r"mite is served on (\S+) while this runs", done.stderr)
    assert url and not Server(url[1]).ready()
    assert "mite is a small model of Python code: it continues what you write" in done.stderr


def test_a_base_model_continues_every_message_on_its_own() -> None:
    asked = list[dict[str, object]]()

    class Base(Server):
        def stream(self, body: dict[str, object]) -> Iterator[dict[str, object]]:
            asked.append(body)
            yield {"choices": [{"text": " 1"}], "usage": {"completion_tokens": 1}}

    talk = Conversation(Base("x:1"), "m", base=True)
    for text in ("a =", "b ="):
        assert [(piece.kind, piece.text) for piece in talk.say(text)] == [("text", " 1")]
    talk.sampling = {"max_tokens": 7}
    list(talk.say("c ="))
    assert [(body["prompt"], body["max_tokens"]) for body in asked] == [
        ("a =", 200),
        ("b =", 200),
        ("c =", 7),
    ]
    assert not any("messages" in body for body in asked)


def test_a_server_that_cannot_start_says_why() -> None:
    lines = list[str]()
    with (
        pytest.raises(ChildProcessError, match=r"model: got '\./none', which does not exist"),
        started("./none", (), lines.append),
    ):
        pass


@pytest.mark.parametrize("note", [None, "a base model"])
def test_the_started_model_says_whether_it_answers(
    monkeypatch: pytest.MonkeyPatch, note: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("farthing.cli.chat.started", lambda *_: nullcontext(Server("x:1")))
    monkeypatch.setattr("farthing.cli.chat.base_note", lambda *_: note)
    with _started("mite") as (_, base):
        assert base == (note is not None) == ("base model" in capsys.readouterr().err)


def test_a_model_that_does_not_fit_is_refused_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published_config("qwen3-8b")))
    monkeypatch.setattr("farthing.cli.chat.available_memory", lambda: 10**9)
    monkeypatch.setattr("farthing.hub.Found.fetch", lambda *_: pytest.fail("downloaded"))
    refused = CliRunner().invoke(app, ["run", str(tmp_path), "hello"])
    assert refused.exit_code == 2 and "even with int4 weights" in refused.output


@given(st.text("ab\n`# ", max_size=60))
def test_blocks_are_the_text_and_never_cut_code(text: str) -> None:
    text = text.replace("`", "```")
    whole, rest = split_blocks(text)
    assert whole + rest == text
    fences = [line for line in whole.splitlines() if line.lstrip().startswith("```")]
    assert len(fences) % 2 == 0 and whole.endswith("\n") == bool(whole)


MCP_SERVER = """
from mcp.server import MCPServer
server = MCPServer("test")

@server.tool()
def add(a: int, b: int) -> str:
    "Add two numbers."
    return str(a + b)

server.run("stdio")
"""


def test_tools_of_mcp_servers_are_called_after_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mcp")
    (tmp_path / "server.py").write_text(MCP_SERVER)
    file = tmp_path / "mcp.json"
    entry = {"command": sys.executable, "args": [str(tmp_path / "server.py")], "env": dict(os.environ)}
    file.write_text(json.dumps({"mcpServers": {"calculator": entry}}))
    asked, answers = list[str](), iter(["y", "n"])
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or next(answers))

    class Scripted(Server):
        bodies: ClassVar[list[dict[str, object]]] = []

        def stream(self, body: dict[str, object]) -> Iterator[dict[str, object]]:  # type: ignore[override]
            self.bodies.append(json.loads(json.dumps(body)))
            function = {"name": "add", "arguments": '{"a": 2, "b": 3}'}
            call = {"index": 0, "id": f"c{len(self.bodies)}", "function": function}
            delta = {"content": "five"} if len(self.bodies) % 2 == 0 else {"tool_calls": [call]}
            yield {"choices": [{"delta": delta}]}

    with McpServers(file) as servers:
        assert servers.tools[0]["function"]["name"] == "add"
        assert set(servers.tools[0]["function"]["parameters"]["properties"]) == {"a", "b"}
        assert servers.call("add", '{"a": "x"}').startswith(("error", "Error"))
        assert servers.call("sub", "{}") == "error: no tool 'sub'; expected one of add"
        talk = Conversation(Scripted("x:1"), "m", servers.tools)
        assert reply(talk, "2 + 3?", Screen(), servers) and reply(talk, "again?", Screen(), servers)
    results = [m["content"] for m in talk.messages if m["role"] == "tool"]
    assert results == ["5", "error: the user does not allow this call"] and len(asked) == 2
    assert talk.messages[-1]["content"] == "five" and Scripted.bodies[0]["tools"] == servers.tools


@given(
    st.dictionaries(
        st.text(max_size=9),
        st.recursive(
            st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)
        ),
        max_size=4,
    ),
    st.booleans(),
)
def test_arguments_are_shown_as_a_tool_gets_them(fields: dict[str, object], ascii_only: bool) -> None:
    """One line per field, whose characters are all visible, and from which the value can be read back."""
    lines = described(json.dumps(fields, ensure_ascii=ascii_only))
    assert len(lines) == len(fields)
    for (name, value), line in zip(fields.items(), lines, strict=True):
        assert line.isprintable() and len(line.splitlines()) == 1
        whole = [escaped(name), escaped(json.dumps(value, ensure_ascii=False))]
        if max(map(len, whole)) <= 2 * _SHOWN:
            assert line == ": ".join(whole)
        else:  # a longer text says how much of its middle is left out
            left = [len(text) - 2 * _SHOWN for text in whole]
            cut = [
                f"{t[:_SHOWN]} [… {n} characters …] {t[-_SHOWN:]}" for t, n in zip(whole, left, strict=True)
            ]
            assert line == ": ".join(c if n > 0 else t for t, c, n in zip(whole, cut, left, strict=True))
        assert all(unicodedata.category(each)[0] != "C" for each in line)


TRICKS = {
    "line breaks": '{"command": "rm -rf ~\\n\\n\\n\\n", "path": "README.md"}',
    "reversed": '{"command": "rm -rf ~ \u202egnp.txt", "path": "README.md"}',
    "white space": '{"command":' + " \n" * 200 + '"rm -rf ~"}',
    "escapes": '{"command": "rm -rf ~\\u001b[1A\\u001b[2K"}',
    "twice": '{"command": "ls", "command": "rm -rf ~"}',
    "no JSON": "rm -rf ~\u2028\x1b[2J",
    "blanks": '{"command": "rm -rf ~' + "\u3164\u200b\u2800" * 100 + '"}',
    "long": '{"command": "rm -rf ~; ' + "x" * 10_000 + '; rm -rf /"}',
}


def test_no_character_without_a_shape_is_shown_as_it_is() -> None:
    """Selectors of variants and joiners of marks are printable to Python, and nobody sees them."""
    letters = "VARIATION SELECTOR", "GRAPHEME JOINER", "INHERENT", "SEONG FILLER", "HANGUL FILLER"
    unseen = [
        chr(i) for i in range(sys.maxunicode + 1) if any(n in unicodedata.name(chr(i), "") for n in letters)
    ]
    assert len(unseen) > 260
    for each in unseen:
        assert escaped(f"a{each}b").isascii(), hex(ord(each))


@pytest.mark.parametrize("trick", TRICKS)
def test_a_question_hides_nothing(trick: str) -> None:
    lines = described(TRICKS[trick])
    assert all(line.isprintable() for line in lines) and len(lines) <= 2
    assert any("rm -rf ~" in line for line in lines) and sum(map(len, lines)) < 6000
    if trick == "long":
        assert "[… " in lines[0] and lines[0].endswith('; rm -rf /"')
    assert not any(each in line for line in lines for each in "\u202e\u2028\x1b\u3164\u200b\u2800")


def test_always_is_of_a_server_and_a_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, screen = iter(["a", "n", "n"]), Screen()
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    call = Call("1", "delete", "{}")
    assert screen.allowed(call, "files") and screen.allowed(call, "files")
    assert not screen.allowed(call, "other") and not screen.allowed(Call("2", "read", "{}"), "files")


@pytest.mark.parametrize("text", ["{", "[]", '{"mcpServers": []}', '{"mcpServers": {"x": {"args": []}}}'])
def test_files_that_name_no_server(tmp_path: Path, text: str) -> None:
    pytest.importorskip("mcp")
    (tmp_path / "mcp.json").write_text(text)
    with pytest.raises(ValueError, match="expected"):
        McpServers(tmp_path / "mcp.json")


def test_escape_sequences_of_a_model_do_not_reach_the_terminal() -> None:
    evil = "a\x1b]52;c;eA==\x07b\x9b2J\r\nc\td"
    assert printable(evil) == "a\ufffd]52;c;eA==\ufffdb\ufffd2J\nc\td"
    with running(ScriptedEngine([evil])) as server, terminal(server.url, "-p", "x") as t:
        assert t.process.wait(60) == 0
        t.read("of prompt")
        assert "]52;c" in t.seen and "\x1b]52" not in t.seen


def test_tokens_speed_and_price_of_an_answer() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 40, "prompt_tokens_details": {"cached_tokens": 7}}
    talk = Conversation(Server("x:1"), "m", usage=usage | {"x_farthing": {"usd": 1.5e-5}})
    assert _account(talk, 2.0) == "40 tokens, 20.0/s; 9 of prompt, 7 cached; $0.000015"
    talk.usage = {}  # of a server that reports none
    assert _account(talk, 2.0) == ""


def test_a_piece_is_text_or_reasoning() -> None:
    with running(ScriptedEngine(THOUGHT), reasoning_parser="deepseek_r1") as server:
        talk = Conversation(Server(server.url), "tiny")
        pieces = list(talk.say("hm"))
    assert "".join(p.text for p in pieces if p.kind == "text") == "because"
    assert Piece("reasoning", "why") in pieces and talk.reasoning == "why not"
    assert talk.messages[-1]["reasoning_content"] == "why not" and talk.usage["completion_tokens"]


def test_a_server_of_several_models_serves_each_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(Fake("a", tmp_path), Fake("b", tmp_path)) as front:
        monkeypatch.setenv("FARTHING_URL", front.url)
        for wanted, expected in ((None, "a"), ("b", "b")):
            found = find(wanted, None)
            assert found is not None and found[1] == expected
        assert find("c", None) is None and front.front.pool.loads == 0
        refused = CliRunner().invoke(app, ["chat", front.url, "--model", "c"])
        assert refused.exit_code == 2 and "model: got 'c'; expected one of a, b" in refused.output
        refused = CliRunner().invoke(app, ["chat", "a", "--model", "b"])
        assert refused.exit_code == 2 and "model: got both 'a' and 'b'" in refused.output
        httpx.post(f"{front.url}/models/load", json={"model": "b"}, timeout=60)
        found = find(None, None)
        assert found is not None and found[1] == "b"  # the loaded one
        talk = Conversation(found[0], "b")
        for line, expected in (
            ("/model", "  a  available\n* b  loaded\n"),
            ("/model a", "* a  available\n  b  loaded\n"),
            ("/model c", "error: model: got 'c'; expected one of a, b\n"),
        ):
            obey(line, talk, Screen())
            assert capsys.readouterr().out == expected
        assert talk.model == "a"


def test_a_model_of_a_server_is_chosen_in_the_conversation() -> None:
    with running(ScriptedEngine(["ok"])) as server, terminal(server.url, "--model", "tiny") as t:
        assert "talking to tiny" in t.until(">>> ")
        t.type("/model")
        t.until("* tiny")
        t.type("/bye")
        assert t.process.wait(60) == 0


def test_the_servers_lines_stay_in_one_row_of_the_terminal() -> None:
    console = Console(width=24, file=io.StringIO(), force_terminal=True)
    with console.status(_one_line("error: [/etc/x] is no " + "y" * 200, console)) as status:
        (row,) = console.render_lines(status.renderable)
    assert "".join(each.text for each in row)[2:] == "error: [/etc/x] is no…"


def test_many_fields_leave_the_question_on_the_screen() -> None:
    lines = described(json.dumps({f"field {at}": at for at in range(5000)}))
    assert len(lines) == 21 and lines[10] == "[… 4980 fields …]" and lines[-1] == "field 4999: 4999"
