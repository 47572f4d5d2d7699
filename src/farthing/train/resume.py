"""Starting or continuing a run in a directory: a resumed run must have the settings of the stored one.

Length, threads, device and directory may change; the record lists the lengths.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def check_start(state: Path, given: Mapping[str, Any], resume: bool) -> None:
    """Raise unless a run with these settings may start, or resume from `state`."""
    if not resume:
        if state.is_file():
            raise ValueError(
                f"{state.parent} already has a run; use --resume to continue it or choose another --out"
            )
        return
    if not state.is_file():
        raise FileNotFoundError(f"{state} does not exist: no run to resume in this directory")
    try:
        stored = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{state}: unreadable ({reason}); expected a run's state, or another --out"
        ) from None
    require_same(state, stored.get("settings", {}), given)


def require_same(file: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first setting that differs; settings that `file` does not have are free."""
    for name, value in given.items():
        if name in stored and stored[name] != value:
            raise ValueError(
                f"{name}: got {json.dumps(value)}; expected {json.dumps(stored[name])}, as in {file} "
                "(or another --out)"
            )


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON has them, so that stored and given ones compare equal."""
    found: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return found
