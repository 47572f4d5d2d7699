"""Coding agents from npm, headless, set up as the guide says (docs/guide/clients.md)."""

import json
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from common import DONE, HELLO, PLAIN, RESULT, run

from tests.server.api.snippets import blocks, pointed_at

CLIENT = Path(os.environ["CLIENT"])
# The tool that runs commands, the field of the command, and what else a call needs.
TOOLS = {
    "claude-code": ("Bash", "command", {"description": "Looks"}),
    "codex": ("exec_command", "cmd", {}),
    "opencode": ("bash", "command", {"description": "Looks"}),
    "qwen-code": ("run_shell_command", "command", {"is_background": False}),
}
COMMAND = "echo RESULT-$((40 + 2)) | tee out.txt"  # the call itself does not contain its result


def exports(heading, url):
    """The environment and the command of a shell snippet of the guide."""
    (snippet,) = blocks("clients", "", heading)
    *lines, last = pointed_at(snippet, url).strip().splitlines()
    return dict(line.removeprefix("export ").split("=", 1) for line in lines), shlex.split(last)


def set_up(url, home, work, model):
    """The command, to which the user's words are added, and its environment."""

    def named(text):
        return text.replace('"tiny"', f'"{model}"')

    if CLIENT.name == "claude-code":
        environment, command = exports("Claude Code", url)
        more = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "CLAUDE_CODE_MAX_RETRIES": "0"}
        return [*command[:2], "--allowedTools=Bash"], environment | more | {"ANTHROPIC_MODEL": model}
    if CLIENT.name == "codex":
        (snippet,) = blocks("clients", "toml", "Codex")
        (home / "config.toml").write_text(named(pointed_at(snippet, url)))
        options = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
        return ["codex", "exec", *options], {"CODEX_HOME": str(home)}
    if CLIENT.name == "opencode":
        (snippet,) = blocks("clients", "json", "opencode")
        (work / "opencode.json").write_text(named(pointed_at(snippet, url)))
        return ["opencode", "run", "-m", f"farthing/{model}"], {"OPENCODE_DISABLE_MODELS_FETCH": "1"}
    environment, command = exports("qwen-code", url)
    direct = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY"), "")  # it does not read NO_PROXY
    return [command[0], "--yolo", "-p"], environment | direct | {"OPENAI_MODEL": model}


def ask(url, says, model="tiny"):
    """Run the agent, which can only reach this machine. Its result, and the folder it worked in."""
    home = Path(tempfile.mkdtemp(dir="."))
    work = home / "work"
    work.mkdir()
    command, environment = set_up(url, home.resolve(), work, model)
    blocked = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9")
    own = {
        "PATH": os.environ["PATH"],
        "HOME": str(home.resolve()),
        "TERM": "dumb",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    program = str(CLIENT / "node_modules" / ".bin" / command[0])
    # opencode joins its arguments, and puts those with blanks in quotes, with their own quotes escaped.
    words = says.split(" ") if CLIENT.name == "opencode" else [says]
    done = subprocess.run(
        [program, *command[1:], *words], cwd=work, env=own | blocked | environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done, work


def answer(url):
    done, _ = ask(url, PLAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    return HELLO if done.stdout.strip().splitlines()[-1:] == [HELLO] else done.stdout + done.stderr


def tools(url):
    name, field, more = TOOLS[CLIENT.name]
    done, work = ask(url, f"Call the tool {name} with {json.dumps({field: COMMAND} | more)}.")
    said = done.stdout + done.stderr
    assert done.returncode == 0 and (work / "out.txt").read_text().strip() == RESULT, said
    return DONE if done.stdout.strip().splitlines()[-1:] == [DONE] else said


def errors(url):
    done, _ = ask(url, PLAIN, "absent")
    said = done.stdout + done.stderr
    return 404 if "absent" in said and HELLO not in said else f"{done.returncode}: {said}"


run({"answer": answer, "tools": tools, "errors": errors})
