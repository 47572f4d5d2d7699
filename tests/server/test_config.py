"""API keys: files, names, comparison."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.server.config import ENVIRONMENT, KeyRing, ServerConfig, ambiguity, gather_keys, is_loopback

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1).filter(
    lambda word: ":" not in word and not word.startswith("#") and not any(c.isspace() for c in word)
)


def header(key: str) -> str:
    """As read by a server: UTF-8 bytes, one character each."""
    return f"Bearer {key}".encode().decode("latin-1")


def test_file_with_names_comments_and_bare_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nalice:sk-1\n  bob : sk-2  \nsk-3\nalice:sk-4\n", encoding="utf-8")
    ring = KeyRing.from_file(file)
    assert len(ring) == 4
    assert [ring.check(header(f"sk-{i}")) for i in (1, 2, 4)] == ["alice", "bob", "alice"]
    bare = ring.check(header("sk-3"))
    assert bare and bare.startswith("key-") and "sk-3" not in bare
    assert ring.names() == sorted({"alice", "bob", bare})


@pytest.mark.parametrize(
    "wrong", [None, "", "Bearer", "Bearer ", "Bearer sk", "Basic sk-1", "sk-1", "Bearer sk-1 x"]
)
def test_unknown_keys_are_rejected(wrong: str | None) -> None:
    assert KeyRing(["alice:sk-1"]).check(wrong) is None


def test_scheme_is_case_insensitive() -> None:
    assert KeyRing(["a:k"]).check("bearer k") == "a"


@given(st.dictionaries(WORDS, WORDS, min_size=1, max_size=8))
def test_every_key_maps_to_its_name_only(names: dict[str, str]) -> None:
    ring = KeyRing(f"{name}:{key}" for key, name in names.items())
    assert {key: ring.check(header(key)) for key in names} == names
    assert ring.check(header("".join(names) + "x" * 50)) is None


@pytest.mark.parametrize("text", ["", "# only a comment\n", "name:\n", ":key\n", "a b c\n"])
def test_malformed_files_are_rejected(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="key"):
        KeyRing.from_file(file)
    with pytest.raises(ValueError, match="cannot be read"):
        KeyRing.from_file(tmp_path / "missing")


def test_key_with_two_names_is_rejected() -> None:
    with pytest.raises(ValueError, match="one name per key"):
        KeyRing(["a:k", "b:k"])


def test_environment_and_file_are_combined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "env:k1, k2")
    (tmp_path / "keys").write_text("file:k3")
    ring = gather_keys(["line:k4"], tmp_path / "keys")
    assert [ring.check(header(f"k{i}")) for i in (1, 3, 4)] == ["env", "file", "line"]
    assert len(ring) == 4


def test_non_loopback_host_requires_a_key() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ValueError, match="--insecure"):
            ServerConfig(host=host)
        ServerConfig(host=host, insecure=True)
        ServerConfig(host=host, keys=KeyRing(["k"]))
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", 70000),
        ("requests_per_minute", 0),
        ("max_body_bytes", 0),
        ("request_timeout", 0),
        ("drain_timeout", -1),
    ],
)
def test_errors_name_bad_settings(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}: got {value}"):
        ServerConfig(**{field: value})


@pytest.mark.parametrize(("mode", "warned"), [(0o644, True), (0o640, False), (0o600, False)])
def test_file_that_everyone_can_read_is_named(
    tmp_path: Path, mode: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("alice:sk-a\n")
    file.chmod(mode)
    assert KeyRing.from_file(file).names() == ["alice"]
    assert [
        str(file) in record.getMessage() and "644" in record.getMessage() for record in caplog.records
    ] == ([True] if warned else [])


@pytest.mark.parametrize(
    ("target", "hosts", "version", "clear"),
    [
        (b"/", [b"a"], (1, 1), True),
        (b"/", [b"[::1]:80"], (1, 1), True),
        (b"/", [b""], (1, 1), True),
        (b"/", [], (1, 0), True),
        (b"/", [], (1, 1), False),
        (b"/", [b"a", b"a"], (1, 0), False),
        (b"/", [b"a, b"], (1, 1), False),
        (b"/", [b"a b/c@d"], (1, 1), False),
        (b"/", [b"a:b"], (1, 1), False),
        (b"http://localhost:80/", [b"localhost"], (1, 1), True),
        (b"HTTP://localhost/", [b"LOCALHOST:80"], (1, 1), True),
        (b"https://localhost:443/", [b"localhost"], (1, 1), True),
        (b"http://localhost:443/", [b"localhost"], (1, 1), False),
        (b"http://evil/", [b"localhost"], (1, 1), False),
    ],
)
def test_a_request_names_one_host(
    target: bytes, hosts: list[bytes], version: tuple[int, int], clear: bool
) -> None:
    assert (ambiguity(target, [(b"Host", host) for host in hosts], version) is None) is clear
