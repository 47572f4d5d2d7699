"""Files are written atomically."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from farthing.files import replace, replace_json, replace_tensors, replace_text, to_json


def test_failed_write_leaves_only_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    replace_text(target, "old")

    def fails(file: Path) -> None:
        file.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    with pytest.raises(OSError, match="No space left on device") as caught:
        replace(target, fails)
    assert caught.value.filename == str(target) and caught.value.errno == errno.ENOSPC
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_json_has_no_nan(tmp_path: Path) -> None:
    value = {"a": float("nan"), "b": [float("inf"), 1.5, (float("-inf"),)], "c": "é", "d": None, "e": True}
    expected = {"a": None, "b": [None, 1.5, [None]], "c": "é", "d": None, "e": True}
    assert json.loads(to_json(value)) == expected
    replace_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == expected


def test_tensor_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        replace_tensors(tmp_path / "x.safetensors", {"a": torch.arange(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.arange(3))
