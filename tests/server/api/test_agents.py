"""Long sessions of agents against scripted models, and the guide's snippets for Node.

The clients are those of tests/server/clients, in the folder FARTHING_CLIENTS; missing ones are skipped.
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conversation.test_parse import Calls, dsml
from tests.server.api.sessions import CachingEngine
from tests.server.api.snippets import blocks, pointed_at
from tests.server.clients.test_matrix import need
from tests.server.harness import Running, ScriptedEngine, letters, running

pytestmark = pytest.mark.slow


def program(client: str, name: str) -> str:
    """A program of a client's packages."""
    return str(need(client) / "node_modules" / ".bin" / name)


def test_the_snippet_for_vercels_sdk(tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(need("vercel") / "node_modules")
    (snippet,) = (block for block in blocks("clients", "js") if "createOpenAICompatible" in block)
    with running(ScriptedEngine(["Hello ", "there"])) as server:
        (tmp_path / "snippet.mjs").write_text(pointed_at(snippet, server.url))
        command = ["node", "snippet.mjs"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "Hello there", done.stderr


def agent_engine(calls: Calls) -> CachingEngine:
    """A model in V4's format that makes these calls one after another, then ends."""
    write = dsml("tool_calls")

    def say(prompt: str) -> list[str]:
        done = prompt.count("<tool_result>")
        if "### Available Tool Schemas" not in prompt:
            return letters("</think>A title")
        if done == len(calls):
            return letters("Enough.</think>ALL DONE")
        return letters(f"Thought {done}.</think>Step {done}." + write([calls[done]]))

    return CachingEngine(say, "deepseek_v4")


def headless(server: Running, command: list[str], home: Path, **environment: str) -> str:
    """Run an agent that can only reach this machine."""
    proxy = "http://127.0.0.1:9"
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "HTTPS_PROXY": proxy, "HTTP_PROXY": proxy}
    env |= {"NO_PROXY": "127.0.0.1,localhost", "TERM": "dumb"} | environment
    (home / "work").mkdir(exist_ok=True)
    done = subprocess.run(
        command,
        cwd=home / "work",
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_claude_code(tmp_path: Path) -> None:
    claude = program("claude-code", "claude")
    file = tmp_path / "work" / "out.txt"
    calls: Calls = [
        ("Bash", {"command": "echo 'hello 日 >&1' > out.txt && cat out.txt", "description": "Write"}),
        ("Read", {"file_path": str(file)}),
    ]
    engine = agent_engine(calls)
    with running(engine) as server:
        (snippet,) = blocks("clients", "", "Claude Code")
        *exports, last = pointed_at(snippet, server.url).strip().splitlines()
        environment = dict(line.removeprefix("export ").split("=", 1) for line in exports)
        assert shlex.split(last)[:2] == ["claude", "-p"]
        printed = headless(
            server,
            [claude, "-p", "Write hello.", "--allowedTools", "Bash,Read"],
            tmp_path,
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
            **environment,
        )
    assert "ALL DONE" in printed and file.read_text() == "hello 日 >&1\n"
    turns = [prompt for prompt in engine.prompts if "### Available Tool Schemas" in prompt]
    assert all(now.startswith(before) for before, now in itertools.pairwise(turns))


def test_codex(tmp_path: Path) -> None:
    codex = program("codex", "codex")
    commands = ("echo hello > out.txt", "cat out.txt")
    engine = agent_engine([("exec_command", {"cmd": command}) for command in commands])
    with running(engine) as server:
        (tmp_path / ".codex").mkdir()
        (snippet,) = blocks("clients", "toml", "Codex")
        (tmp_path / ".codex" / "config.toml").write_text(pointed_at(snippet, server.url))
        options = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--json", "Hi."]
        command = [codex, "exec", *options]
        printed = headless(server, command, tmp_path, CODEX_HOME=str(tmp_path / ".codex"))
    assert "ALL DONE" in printed and (tmp_path / "work" / "out.txt").read_text() == "hello\n"
    assert "<tool_result>" in engine.prompts[-1] and "hello" in engine.prompts[-1]


TURNS = 20


def long_session(tool: str, field: str, **more: str) -> CachingEngine:
    """20 turns in which the model appends a line to a file and prints it."""
    calls: Calls = [(tool, {field: f"echo line {i} >> out.txt; cat out.txt", **more}) for i in range(TURNS)]
    return agent_engine(calls)


def check_session(engine: CachingEngine, home: Path, printed: str) -> None:
    assert "ALL DONE" in printed
    assert (home / "work" / "out.txt").read_text() == "".join(f"line {i}\n" for i in range(TURNS))
    print(f"{len(engine.counts)} requests, {sum(count for count, *_ in engine.counts)} prompt tokens: "
          f"{engine.shares():.2%} of those that repeat are cached")  # fmt: skip
    assert engine.shares() >= 0.97


def test_twenty_turns_of_claude_code(tmp_path: Path) -> None:
    claude = program("claude-code", "claude")
    engine = long_session("Bash", "command", description="Append")
    with running(engine) as server:
        printed = headless(
            server,
            [claude, "-p", "Write lines.", "--allowedTools", "Bash"],
            tmp_path,
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
            ANTHROPIC_BASE_URL=server.url, ANTHROPIC_AUTH_TOKEN="none",
            ANTHROPIC_MODEL="tiny", ANTHROPIC_DEFAULT_HAIKU_MODEL="tiny",
        )  # fmt: skip
    check_session(engine, tmp_path, printed)


def test_twenty_turns_of_opencode(tmp_path: Path) -> None:
    opencode = program("opencode", "opencode")
    engine = long_session("bash", "command", description="Append")
    with running(engine) as server:
        (tmp_path / "work").mkdir()
        (snippet,) = blocks("clients", "json", "opencode")
        (tmp_path / "work" / "opencode.json").write_text(pointed_at(snippet, server.url))
        command = [opencode, "run", "-m", "farthing/tiny", "Write lines."]
        printed = headless(server, command, tmp_path, OPENCODE_DISABLE_MODELS_FETCH="1")
    check_session(engine, tmp_path, printed)
