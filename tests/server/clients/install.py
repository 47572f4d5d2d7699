#!/usr/bin/env python3
"""Install the clients of clients.toml: `install.py FOLDER [NAME...]`, each into its own folder."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

CLIENTS = tomllib.loads(Path(__file__).with_name("clients.toml").read_text())
MARK = "installed"  # the packages that a client's folder holds
# npm runs no install scripts of packages unasked, but these fetch or link the program.
SCRIPTS = ("install.cjs", "postinstall.mjs", "postinstall.js")


def install(client: dict[str, Any], into: Path) -> None:
    """Raises CalledProcessError."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    packages = client["packages"]
    if client["registry"] == "npm":
        subprocess.run(["npm", "install", "--silent", "--prefix", into, *packages], check=True)
        for package in packages:
            folder = into / "node_modules" / package[: package.rindex("@")]
            for script in SCRIPTS:
                if (folder / script).is_file():
                    subprocess.run(["node", script], cwd=folder, check=True)
    else:
        uv = shutil.which("uv")
        subprocess.run([sys.executable, "-m", "venv", *["--without-pip"] * bool(uv), into], check=True)
        python = into / "bin" / "python"
        command = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
        subprocess.run([*command, "--quiet", *packages], check=True)
    (into / MARK).write_text("\n".join(packages))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER [NAME...]")
    folder, names = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(CLIENTS)
    if unknown := set(names) - set(CLIENTS):
        sys.exit(f"clients: got {', '.join(sorted(unknown))}; expected some of {', '.join(CLIENTS)}")
    failed = []
    for name in names:
        if CLIENTS[name]["registry"] != "none":
            try:
                install(CLIENTS[name], folder / name)
            except subprocess.CalledProcessError:
                failed.append(name)
    sys.exit(f"not installed: {', '.join(failed)}" if failed else 0)
