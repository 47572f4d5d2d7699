"""`farthing chat` with a server of the mcp package, whose calls it asks about."""

import json
import os
import subprocess
import sys
from pathlib import Path

from common import DONE, HELLO, LOOP, PLAIN, run

CLIENT, ROOT = Path(os.environ["CLIENT"]), os.environ["PYTHONPATH"]
PYTHON = str(CLIENT / "bin" / "python")
SERVER = """
import sys
from mcp.server import MCPServer
from common import look

server = MCPServer("weather")

@server.tool(name="look")
def called(city: str, days: int) -> str:
    "Looks up the weather."
    open(sys.argv[1], "a").write("called ")
    return look(city, days)

server.run("stdio")
"""


def talk(url, says, typed=""):
    """What `farthing chat` prints if its question is answered so, and how often the tool was called."""
    log = Path("log.txt")
    log.write_text("")
    Path("server.py").write_text(SERVER)
    entry = {
        "command": PYTHON,
        "args": ["server.py", str(log)],
        "env": {"PYTHONPATH": str(Path(__file__).parent)},
    }
    Path("mcp.json").write_text(json.dumps({"mcpServers": {"weather": entry}}))
    (packages,) = (CLIENT / "lib").glob("python*/site-packages")
    done = subprocess.run(
        [sys.executable, "-m", "farthing", "chat", url, "--prompt", says, "--mcp", "mcp.json"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}/src:{packages}"}, input=f"{typed}\n",
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, len(log.read_text().split())


def answer(url):
    said, calls = talk(url, PLAIN)
    return HELLO if HELLO in said and not calls else said


def tools(url, allowed="y", wanted=1):
    said, calls = talk(url, LOOP, allowed)
    return DONE if DONE in said and "look" in said and calls == wanted else (said, calls)


run({"answer": answer, "tools": tools, "tools (refused)": lambda url: tools(url, "n", 0)})
