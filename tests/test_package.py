"""What is published: metadata made without a compiler, sources and nothing else, licences, one version."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from email.message import Message
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml

import farthing

pytest.importorskip("hatch_fancy_pypi_readme")
build = pytest.importorskip("scikit_build_core.build")

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLACEHOLDER = PROJECT["project"]["urls"]["Repository"]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Message:
    """METADATA, in an environment where nothing could be compiled."""
    target = tmp_path_factory.mktemp("metadata")
    call = f"import scikit_build_core.build as b; b.prepare_metadata_for_build_wheel({str(target)!r})"
    tools = tmp_path_factory.mktemp("tools")
    (tools / "cmake").symlink_to(shutil.which("cmake") or pytest.skip("needs CMake"))
    nothing = {"PATH": str(tools), "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=ROOT, env=os.environ | nothing, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    (found,) = target.glob("farthing-*.dist-info")
    assert not list(target.rglob("*.so"))
    return email.message_from_bytes((found / "METADATA").read_bytes())


def test_a_base_installation_has_no_torch_and_extras_compose(metadata: Message) -> None:
    wanted = metadata.get_all("Requires-Dist", [])
    base = [line for line in wanted if "extra ==" not in line]
    assert base and not any(line.startswith(("torch", "triton", "transformers")) for line in base)
    torch = {
        line.partition('extra == "')[2].rstrip('"') for line in wanted if line.startswith("farthing[torch")
    }
    assert {"gpu", "compress", "train", "ray"} <= torch
    assert not any("+" in line for line in wanted), "no build of a version is asked for"


@pytest.mark.parametrize(
    ("file", "extras"),
    [
        ("deploy/constraints.txt", {"fleet"}),
        ("dev.lock", {"fleet", "compress", "train", "ray", "mcp", "dev"}),
    ],
)
def test_locked_versions_are_of_everything_that_is_wanted(
    file: str, extras: set[str], metadata: Message
) -> None:
    def name(line: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", line)[0]).lower()

    locked = {name(line) for line in (ROOT / file).read_text().splitlines()}
    assert all("==" in line for line in (ROOT / file).read_text().splitlines())
    for line in metadata.get_all("Requires-Dist", []):
        extra = line.partition('extra == "')[2].rstrip('")')
        if (not extra or extra in extras) and not line.startswith("farthing["):
            assert name(line) in locked, f"{line}: `make lock`"


def test_links_of_the_readme_are_absolute(metadata: Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    assert isinstance(text, str)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 10
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    for kind, path in re.findall(rf"\({re.escape(PLACEHOLDER)}/(blob|raw)/main/([^)#\s]+)", text):
        assert (ROOT / path).exists() and (kind == "raw") == path.endswith((".png", ".svg")), path


def test_placeholders_are_in_one_file() -> None:
    grep = ["git", "-C", str(ROOT), "grep", "-lF", PLACEHOLDER]
    listed = subprocess.run(grep, capture_output=True, text=True, check=False).stdout
    assert listed.split() == ["pyproject.toml"]
    assert "example.invalid" in PROJECT["project"]["authors"][0]["email"]


def test_licences_of_what_is_bundled_are_declared_and_included(metadata: Message) -> None:
    files = metadata.get_all("License-File", [])
    assert metadata["License-Expression"] == "Apache-2.0 AND MIT AND BSD-3-Clause AND PSF-2.0"
    assert {Path(name).name for name in files} >= {
        "LICENSE",
        "nanobind.txt",
        "robin_map.txt",
        "temml.LICENSE",
        "uPlot.LICENSE",
    }
    text = (ROOT / "licenses" / "nanobind.txt").read_text()
    used = distribution("nanobind").read_text("licenses/LICENSE")
    assert used is None or text.split() == used.split()


def test_sources_have_what_a_build_reads_and_nothing_else(tmp_path: Path) -> None:
    call = f"import scikit_build_core.build as b; print(b.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    git = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "src", "native", "licenses"]
    listed = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\n")
    wanted = {name for name in listed if (ROOT / name).is_file()} - {"native/sanitize", "native/test-isa"}
    assert found == wanted | {"pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "PKG-INFO"}


def test_the_version_is_the_same_everywhere(metadata: Message) -> None:
    assert metadata["Version"] == farthing.__version__
    chart = yaml.safe_load((ROOT / "deploy/helm/farthing/Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == farthing.__version__
    images = yaml.safe_load((ROOT / "deploy/kustomize/base/kustomization.yaml").read_text())["images"]
    assert {image["newTag"] for image in images} == {farthing.__version__}
    assert f"\n## {farthing.__version__} — 20" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda p: p.name)
def test_workflows_call_scripts_that_exist(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    for script in re.findall(r"python (\.ci/\w+)", " ".join(step.get("run", "") for step in steps)):
        compile((ROOT / script).read_text(), script, "exec")
        assert os.access(ROOT / script, os.X_OK)
    for script in re.findall(r"bash (\.ci/\w+)", " ".join(step.get("run", "") for step in steps)):
        assert subprocess.run(["bash", "-n", str(ROOT / script)], check=False).returncode == 0
        assert os.access(ROOT / script, os.X_OK)
