"""The wheel installs and serves on a machine without a compiler; so do sources that could not be compiled.

Slow: builds the C++ sources. The fresh environment borrows torch and the other dependencies from the one that
runs the tests, by a path file, so that nothing is downloaded.
"""

import os
import re
import shutil
import site
import subprocess
import sys
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cmake", "ninja", "make")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return str(done.stdout + done.stderr)


def build(target: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel from a clean copy of the sources; returns it and the build's output."""
    source = target / "source"
    listed = run(["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    (source / "README.md").touch()
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    tools = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"} | environment
    said = run([*pip, "-w", str(target / "raw"), str(source)], env=env)
    return next((target / "raw").glob("farthing-*.whl")), said


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")
    pytest.importorskip("auditwheel")
    target = tmp_path_factory.mktemp("wheel")
    raw, _ = build(target)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    audit = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "-w", str(target), str(raw)]
    run(audit, env=env)
    return next(target.glob("farthing-*manylinux*.whl"))


def install(wheel: Path, target: Path) -> tuple[Path, dict[str, str]]:
    """Install the wheel in a new environment; returns its interpreter and variables that hide compilers."""
    venv.create(target, with_pip=False, symlinks=True)
    packages = next((target / "lib").glob("python*")) / "site-packages"
    # Only its modules are used; path files in it, such as those of editable installs, are not read.
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    python = target / "bin" / "python"
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--no-deps",
            "--no-index",
            str(wheel),
        ]
    )
    bare = target / "no-compilers"
    bare.mkdir()
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC", "CXX")}
    env |= {"PATH": f"{target / 'bin'}:{bare}", "OMP_NUM_THREADS": "1"}
    assert not any(shutil.which(name, path=env["PATH"]) for name in COMPILERS)
    return python, env


def serve_and_ask(python: Path, env: dict[str, str], backend: str) -> str:
    """Serve the embedded model and request four tokens; returns the server's log."""
    log = python.parent.parent / "serve.log"
    command = [str(python.parent / "farthing"), "serve", "--port", "0", "--backend", backend]
    with log.open("w") as file, subprocess.Popen(command, stderr=file, env=env, cwd=python.parent) as server:
        try:
            deadline = time.monotonic() + 180
            while not (port := re.search(r"listening on http://127.0.0.1:(\d+)", log.read_text())) or (
                "ready after" not in log.read_text()
            ):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            body = b'{"prompt": "def f(", "max_tokens": 4, "temperature": 0}'
            request = urllib.request.Request(
                f"http://127.0.0.1:{port.group(1)}/v1/completions",
                body,
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert b'"completion_tokens": 4' in answer.read()
        finally:
            server.terminate()
    return log.read_text()


def test_wheel_has_everything_for_serving_and_no_sources(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert re.search(r"manylinux_2_\d+_x86_64|manylinux_2_\d+_aarch64", wheel.name)
    for needed in (
        "farthing/cost/prices.toml",
        "farthing/server/dashboard/static/index.html",
        "farthing/server/dashboard/static/vendor/uPlot.LICENSE",
        "farthing/server/dashboard/static/vendor/temml.LICENSE",
        "farthing/assets/mite/model.safetensors",
        "farthing/assets/catalogue.toml",
        "farthing/py.typed",
    ):
        assert needed in names
    assert any(re.match(r"farthing/_native\..*\.so", name) for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".h", ".inl", ".pyc"))]


def test_wheel_installs_and_serves_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    python, env = install(wheel, tmp_path / "env")
    where = run([str(python), "-c", "import farthing; print(farthing.__file__)"], env=env, cwd=tmp_path)
    assert str(tmp_path) in where, "the installed package, not the working tree"
    doctor = run([str(python.parent / "farthing"), "doctor", "--no-measure"], env=env, cwd=tmp_path)
    assert "cpu kernels" in doctor and "missing:" not in doctor.split("compilers")[0]
    assert "ops: cpu/" in serve_and_ask(python, env, "auto")


def test_sources_install_without_a_compiler_and_report_what_is_missing(tmp_path: Path) -> None:
    bare = tmp_path / "tools"
    bare.mkdir()
    for name in ("git", "sh", "ninja", "cmake"):
        if found := shutil.which(name):
            (bare / name).symlink_to(found)
    raw, said = build(tmp_path, PATH=str(bare), CXX="/no/such/compiler", CC="/no/such/compiler")
    assert not [name for name in zipfile.ZipFile(raw).namelist() if name.endswith(".so")]
    assert "The CPU kernels cannot be built" in said
    python, env = install(raw, tmp_path / "env")
    assert "the native CPU kernels are not built" in serve_and_ask(python, env, "auto")
