"""A hub with faults of its own: every file arrives, or one sentence says why it does not."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from farthing import downloads
from farthing.cli.app import app
from farthing.cli.errors import Exit
from farthing.hub import resolve_model
from tests.test_hub import CONFIG, ID, SHA, use

NAME = "model.safetensors"
CONTENT = hashlib.sha256(b"weights").digest() * 20_000  # 640 kB
DIGEST = hashlib.sha256(CONTENT).hexdigest()
Fault = Callable[["Request"], None]


@dataclass
class Hub:
    """One repository with one weight file. `faults` answer the first requests for it, in order."""

    faults: list[Fault] = field(default_factory=list)
    of_head: list[Fault] = field(default_factory=list)
    of_api: list[Fault] = field(default_factory=list)
    always: Fault | None = None
    asked: list[str] = field(default_factory=list)  # ranges, "" for none
    sent: int = 0  # bytes of the weight file


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        path = urlsplit(self.path).path
        if path.endswith(NAME) and self.hub.of_head:
            self.hub.of_head.pop(0)(self)
        elif path.endswith(NAME):
            self.head(200, len(CONTENT), ETag=f'"{DIGEST}"')
        else:
            self.small(path)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/api/") and self.hub.of_api:
            self.hub.of_api.pop(0)(self)
        elif path.endswith(NAME):
            self.hub.asked.append(self.headers.get("Range", ""))
            fault = self.hub.faults.pop(0) if self.hub.faults else self.hub.always or honest
            fault(self)
        else:
            self.small(path)

    def small(self, path: str) -> None:
        files = {"config.json": CONFIG, "tokenizer.json": "{}"}
        if path.startswith("/api/"):
            siblings = [{"rfilename": n, "size": len(t)} for n, t in files.items()]
            siblings += [{"rfilename": NAME, "size": len(CONTENT)}]
            body = json.dumps({"id": ID, "sha": SHA, "siblings": siblings}).encode()
        else:
            body = files[path.rpartition("/")[2]].encode()
        digest = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        self.head(200, len(body), ETag=f'"{digest}"')
        if self.command == "GET":
            self.wfile.write(body)

    def head(self, status: int, length: int | None, **fields: str) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": SHA, **fields}.items():
            self.send_header(name.replace("_", "-"), value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    @property
    def start(self) -> int:
        """The first byte that is asked for."""
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])

    def send(self, start: int, stop: int | None = None, said: int | None = None, **fields: str) -> None:
        """The content from a byte on, up to `stop`; said: the length that the head names."""
        part = CONTENT[start:stop]
        if start:
            fields["Content_Range"] = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        self.head(206 if start else 200, len(CONTENT) - start if said is None else said, **fields)
        self.wfile.write(part)
        self.hub.sent += len(part)
        self.close_connection = True


def honest(request: Request) -> None:
    request.send(request.start)


def breaks_after(count: int) -> Fault:
    return lambda request: request.send(request.start, request.start + count)


def ends_after(count: int) -> Fault:
    """With a length that is true of what is sent, and not of the file."""
    return lambda request: request.send(
        request.start, request.start + count, min(count, len(CONTENT) - request.start)
    )


def answers(status: int, **fields: str) -> Fault:
    return lambda request: request.head(status, 0, **fields)


def resets(request: Request) -> None:
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    request.close_connection = True


def hangs(request: Request) -> None:
    request.send(request.start, request.start + 1000)
    request.close_connection = False
    time.sleep(1.0)
    request.close_connection = True


def says_nonsense(request: Request) -> None:
    request.wfile.write(b"\0\1\2 nonsense\r\n\r\n")
    request.close_connection = True


def ignores_ranges(request: Request) -> None:
    request.send(0)


def breaks_from_the_start(request: Request) -> None:
    request.send(0, 400_000)


def never_beyond(request: Request) -> None:
    request.send(request.start, 500_000)


def of_another_range(request: Request) -> None:
    request.head(206, 1000, Content_Range=f"bytes 0-999/{len(CONTENT)}")
    request.wfile.write(CONTENT[:1000])


def encoded(request: Request) -> None:
    body = gzip.compress(CONTENT)
    request.head(200, len(body), Content_Encoding="gzip")
    request.wfile.write(body)


def in_chunks(request: Request) -> None:
    part = CONTENT[request.start : request.start + 10_000]
    fields = {"Content_Range": f"bytes {request.start}-{len(CONTENT) - 1}/{len(CONTENT)}"}
    request.head(206 if request.start else 200, None, Transfer_Encoding="chunked", **fields)
    request.wfile.write(b"%x\r\n" % len(part) + part + b"\r\n")
    request.close_connection = True


def without_length(request: Request) -> None:
    request.head(200, None, Connection="close")
    request.wfile.write(CONTENT)
    request.close_connection = True


def too_long(request: Request) -> None:
    request.head(200, len(CONTENT) + 9)
    request.wfile.write(CONTENT + b"and more.")


def changed(request: Request) -> None:
    request.head(200, len(CONTENT))
    request.wfile.write(CONTENT[:-1] + b"?")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name, value in {"PAUSE": 0.001, "LONGEST_PAUSE": 0.002, "SILENCE": 0.5, "PATIENCE": 4}.items():
        monkeypatch.setattr(downloads, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    served = Hub()
    handler = type("Handler", (Request,), {"hub": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    use(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    yield served
    server.shutdown()
    server.server_close()


def arrived() -> bool:
    return (resolve_model(ID) / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([breaks_after(1)], id="one byte"),
        pytest.param([breaks_after(0)] * 3, id="no byte, three times"),
        pytest.param([breaks_after(9_400)] * 30, id="a line that breaks again and again"),
        pytest.param(
            [breaks_after(100_000), breaks_after(0), breaks_after(0), breaks_after(1)] * 2, id="mixed"
        ),
        pytest.param([ends_after(70_000)] * 9, id="answers that end early, as their heads say"),
        pytest.param([answers(429)], id="429"),
        pytest.param([answers(429, Retry_After="0")] * 3, id="429 with a time"),
        pytest.param([answers(503, Retry_After=formatdate(0, usegmt=True))], id="503 with a date"),
        pytest.param([answers(503, Retry_After="soon")], id="503 with nonsense"),
        *(pytest.param([answers(status)] * 2, id=str(status)) for status in (408, 500, 502, 504)),
        pytest.param([breaks_after(300_000), answers(502), answers(429)], id="busy in the middle"),
        pytest.param([resets], id="reset"),
        pytest.param([breaks_after(5000), resets, resets], id="reset in the middle"),
        pytest.param([hangs], id="silence"),
        pytest.param([says_nonsense], id="no HTTP"),
        pytest.param([breaks_after(1000), ignores_ranges], id="a server without ranges"),
        pytest.param([breaks_from_the_start] * 3, id="without ranges, and breaking"),
        pytest.param([breaks_after(5000), of_another_range], id="another range than was asked for"),
        pytest.param([breaks_after(5000), answers(416)], id="a range that is refused"),
        pytest.param([encoded], id="compressed"),
        pytest.param([breaks_after(5000), encoded], id="compressed in the middle"),
        pytest.param([in_chunks] * 5, id="chunks without an end"),
        pytest.param([without_length], id="no length"),
    ],
)
def test_a_file_arrives(hub: Hub, faults: list[Fault]) -> None:
    hub.faults = list(faults)
    assert arrived() and not hub.faults


@pytest.mark.parametrize(
    ("what", "faults"),
    [
        ("of_api", [breaks_after(0)]),  # a HEAD has no body that could break
        *product(
            ("of_head", "of_api"),
            ([answers(503)] * 2, [says_nonsense], [resets], [answers(429, Retry_After="0")]),
        ),
    ],
)
def test_what_is_said_of_a_file_is_asked_for_again(hub: Hub, what: str, faults: list[Fault]) -> None:
    setattr(hub, what, list(faults))
    assert arrived() and not getattr(hub, what)


@pytest.mark.parametrize(
    ("always", "why"),
    [
        (answers(401), "401"),
        (answers(403), "403"),
        (answers(404), "404"),
        (answers(503), "503"),
        (answers(429, Retry_After="3600"), r"the hub is busy \(status 429\), and asks to wait 60 minutes"),
        (breaks_after(0), "RemoteProtocolError|ended after 0 bytes"),
        (breaks_from_the_start, "RemoteProtocolError|ended after 400000 bytes"),
        (
            lambda request: request.send(request.start, 500_000),
            "RemoteProtocolError|ended after 500000 bytes",
        ),
        (too_long, "the hub sends more than the 640000 bytes that it said"),
        (changed, "the checksum is .*download it again"),
        (resets, "RemoteProtocolError|ReadError|disconnected"),
    ],
)
def test_or_one_sentence_says_why(hub: Hub, always: Fault, why: str) -> None:
    hub.always = always
    refused = CliRunner().invoke(app, ["pull", ID, "--no-check-memory"])
    assert refused.exit_code in (Exit.INPUT, Exit.STORAGE) and "Traceback" not in refused.output
    last = refused.output.strip().splitlines()[-1]
    assert NAME in last and ID in last
    assert re.search(why, last), last
    hub.always = None
    assert arrived(), "the same command, later"


def test_no_byte_is_sent_twice_where_ranges_are_known(hub: Hub) -> None:
    hub.faults = [breaks_after(9_400)] * 30
    assert arrived() and hub.sent == len(CONTENT)
    assert hub.asked == ["", *(f"bytes={9_400 * i}-" for i in range(1, 31))]


@given(st.lists(st.integers(0, 300_000), max_size=12))
def test_any_breaks(breaks: list[int]) -> None:
    """Fewer in a row than patience, each after so many bytes."""
    file = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downloads, "PAUSE", 0.0)
        patch.setattr(downloads, "PATIENCE", 13)
        left = list(breaks)

        def append(url: str, out: io.BytesIO, size: int | None, most: int, part: bool) -> None:
            stop = out.tell() + left.pop(0) if left else len(CONTENT)
            out.write(CONTENT[out.tell() : stop])
            if out.tell() < len(CONTENT):
                raise ConnectionResetError

        patch.setattr(downloads, "_append", append)
        downloads.receive("", file, len(CONTENT), len(CONTENT), NAME)
    assert file.getvalue() == CONTENT
