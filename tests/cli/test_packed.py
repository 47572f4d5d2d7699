"""The packed file that the first start of the embedded model writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from farthing.cli.packed import with_packed
from farthing.config import EngineConfig
from farthing.hub import resolve_model


def homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_the_embedded_model_is_packed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("farthing._native")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, config = resolve_model("mite"), EngineConfig()
    assert with_packed(config, path, progress=None) == config, "nothing is packed yet"
    seen = list[tuple[str, int, int]]()
    first = with_packed(config, path, lambda *step: seen.append(step))
    assert first.packed is not None and Path(first.packed).parent == tmp_path / "farthing" / "packed"
    assert [step[0] for step in seen] == ["packing"] * len(seen) and seen[-1][1] == seen[-1][2] == len(seen)
    old = Path(first.packed).with_name(f"{Path(first.packed).stem[:-8]}00000000.packed")
    Path(first.packed).rename(old)
    seen.clear()
    assert with_packed(config, path) == first and not old.exists(), "of another installation"
    assert with_packed(config, path, progress=None) == first
    for other in ({"backend": "reference"}, {"deterministic": True}, {"packed": "my.file"}):
        changed = EngineConfig(**other)  # type: ignore[arg-type]
        assert with_packed(changed, path) == changed
    assert with_packed(EngineConfig(model="elsewhere"), path).packed is None
    Path(first.packed).write_bytes(Path(first.packed).read_bytes()[:-1])
    assert with_packed(config, path, progress=None) == config, "cut off"
    assert with_packed(config, path) == first and with_packed(config, path, progress=None) == first
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    assert with_packed(config, path).packed is None
    monkeypatch.setattr("farthing.cli.packed.cache_dir", homeless)
    assert with_packed(config, path).packed is None and with_packed(config, path, progress=None) == config
