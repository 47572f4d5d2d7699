"""Hub ids against a local hub over HTTP: what is requested, in which order, and what errors say."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from farthing import process
from farthing.catalogue import short_names
from farthing.checkpoint.reader import has_weights
from farthing.checkpoint.shards import CheckpointError
from farthing.cli.app import app
from farthing.cli.preflight import preflight
from farthing.config import EngineConfig
from farthing.hub import EMBEDDED, find_model, resolve_config, resolve_model
from farthing.model.fields import ConfigError
from farthing.model.types.unserved import unserved
from farthing.planner.estimate import published
from farthing.process import unseen
from tests.tiny import SMALL_V3

pytest.importorskip("huggingface_hub")

import huggingface_hub.constants as constants
from huggingface_hub.utils.tqdm import are_progress_bars_disabled

SHA = "0123456789abcdef0123456789abcdef01234567"
ID = "owner/model"
CONFIG = json.dumps(SMALL_V3)


def index(*shards: str) -> str:
    return json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(shards)}})


@dataclass
class Hub:
    """One repository and the files that were downloaded from it."""

    files: Mapping[str, str | bytes] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)  # where they differ from the truth
    fetched: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # paths of the API
    held: Callable[[], bool] = lambda: True  # whether the weights may be sent
    endpoint: str = ""
    large: frozenset[str] = frozenset()  # stored apart, by SHA-256: a request is redirected there
    ranges: list[str] = field(default_factory=list)  # that were requested of large files
    faults: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    damaged: bool = False  # whether large files arrive with another last byte
    deaf: bool = False  # whether ranges are ignored
    sent: int = 0  # bytes of large files
    etags: Mapping[str, str] = field(default_factory=dict)  # of small files, where they are no checksums
    revision: str = SHA
    said: Mapping[str, int] = field(default_factory=dict)  # sizes of large files that are not true

    def body(self, name: str) -> bytes:
        content = self.files[name]
        return content if isinstance(content, bytes) else content.encode()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        if "/api/" in path:
            self.asked.append(path)
        if path == f"/api/models/{ID}":
            siblings = [
                {"rfilename": n, "size": self.sizes.get(n, len(t)), "blobId": n}
                for n, t in self.files.items()
            ]
            self.send(request, json.dumps({"id": ID, "sha": self.revision, "siblings": siblings}), "api")
            return
        if path.startswith("/apart/"):
            self.send_large(request, path.removeprefix("/apart/"))
            return
        name = re.sub(rf"^/{ID}/resolve/(main|{SHA})/", "", path)
        if name in self.large:
            self.redirect(request, name)
            return
        if name not in self.files:
            request.send_response(404)
            request.send_header("X-Error-Code", "RepoNotFound" if "/api/" in path else "EntryNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if request.command == "GET":
            self.fetched.append(name)
            while name == "model.safetensors" and not self.held():
                time.sleep(0.01)
        self.send(request, self.body(name).decode(), name)

    def redirect(self, request: BaseHTTPRequestHandler, name: str) -> None:
        """To where large files are stored, with what the hub says of the file."""
        request.send_response(302)
        request.send_header("Location", f"{self.endpoint.replace('127.0.0.1', 'localhost')}/apart/{name}")
        request.send_header("X-Linked-Etag", f'"{hashlib.sha256(self.body(name)).hexdigest()}"')
        request.send_header("X-Linked-Size", str(self.said.get(name, len(self.files[name]))))
        request.send_header("X-Repo-Commit", SHA)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def send_large(self, request: BaseHTTPRequestHandler, name: str) -> None:
        """A file, or the rest of it from a byte on; breaks off where a fault says."""
        body = self.body(name)
        if self.damaged:
            body = body[:-1] + b"?"
        begin, last = 0, len(body) - 1
        if asked := "" if self.deaf else request.headers.get("Range"):
            self.ranges.append(asked)
            first, _, end = asked.removeprefix("bytes=").partition("-")
            begin, last = int(first), min(int(end or last), last)
        request.send_response(206 if asked else 200)
        request.send_header("Content-Length", str(last + 1 - begin))
        if asked:
            request.send_header("Content-Range", f"bytes {begin}-{last}/{len(body)}")
        request.end_headers()
        if request.command != "GET":
            return
        self.fetched.append(name)
        stop = begin + self.faults.pop(0) if self.faults else last + 1
        with suppress(OSError):  # whoever wanted a part may have left
            request.wfile.write(body[begin:stop])
            request.wfile.flush()
        self.sent += stop - begin
        request.close_connection = True

    def send(self, request: BaseHTTPRequestHandler, text: str, tag: str) -> None:
        body = text.encode()
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Content-Type", "application/json")
        digest = hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()
        request.send_header("ETag", f'"{self.etags.get(tag, digest)}"')
        request.send_header("X-Repo-Commit", SHA)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            served.answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.endpoint = f"http://127.0.0.1:{server.server_port}"
    use(monkeypatch, served.endpoint, tmp_path / "cache")
    yield served
    server.shutdown()
    server.server_close()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """Point huggingface_hub at a server. It reads its environment variables only when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def refused_by(*arguments: str) -> str:
    """The error of a command."""
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code in (2, 5), refused.output  # 5: of `compress`, for a disk or connection
    return " ".join(refused.output.split())


def test_only_what_serving_reads_is_downloaded_and_config_comes_first(hub: Hub) -> None:
    shards = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
    unwanted = [
        "consolidated-1-of-1.safetensors", "consolidated.safetensors.index.json", "pytorch_model-1.bin",
        "model.Q4.gguf", "original/model.safetensors", "README.md", "model.safetensors",
    ]  # fmt: skip
    small = ["tokenizer.json", "tokenizer_config.json", "tiktoken.model", "chat_template.jinja"]
    hub.files = {name: json.dumps({"of": name}) for name in unwanted + small + shards} | {  # no two equal
        "config.json": CONFIG,
        "model.safetensors.index.json": index(*shards, shards[0]),
    }
    path = resolve_model(ID)
    wanted = {"config.json", "model.safetensors.index.json", *small, *shards}
    assert hub.fetched[0] == "config.json" and sorted(hub.fetched) == sorted(wanted)
    assert {file.name for file in path.iterdir()} == wanted
    resolve_model(ID)
    assert len(hub.fetched) == len(wanted)  # nothing twice


def test_weights_in_mistrals_format_or_one_file(hub: Hub) -> None:
    hub.files = {
        "config.json": CONFIG,
        "consolidated.safetensors.index.json": index("consolidated-1.safetensors"),
        "consolidated-1.safetensors": "x",
    }
    assert (resolve_model(ID) / "consolidated-1.safetensors").is_file()


# DeepSeek-V4.1-Flash as published, its facts that a reader of V4's configuration would meet first.
V41 = {
    "architectures": ["DeepseekV41ForCausalLM"],
    "model_type": "deepseek_v41",
    "text_config": {
        "num_hidden_layers": 40,
        "kv_source_layer_ids": [2, 8, 14, 20],
        "compress_ratios": [0, 0, 2, *[1] * 37],
        "sliding_window": 128,
        "num_nextn_predict_layers": 3,
        "max_position_embeddings": 1_048_576,
        "scoring_func": "sqrtsoftplus",
    },
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (V41, f"'deepseek_v41', whose {unserved()['deepseek_v41']} not served yet"),
        ({"model_type": "cohere2"}, "'cohere2', whose form of layers is not served yet"),
        (SMALL_V3 | {"hidden_act": "gelu"}, "hidden_act: got 'gelu'; expected 'silu'"),
        (SMALL_V3 | {"quantization_config": {"quant_method": "hqq"}}, "quant_method: got 'hqq'"),
    ],
)
@pytest.mark.parametrize(
    "command", ["serve --port 0", "compress -o {}/out", "plan", "inspect", "pull", "check"]
)
def test_a_model_that_cannot_be_served_costs_one_small_file(
    hub: Hub, config: dict[str, object], message: str, command: str, tmp_path: Path
) -> None:
    hub.files = {"config.json": json.dumps(config), "model.safetensors": "x" * 1000, "tokenizer.json": "{}"}
    with pytest.raises((ConfigError, CheckpointError), match=message):
        resolve_model(ID)
    name, *options = command.format(tmp_path).split()
    refused = CliRunner().invoke(app, [name, ID, *options])
    assert refused.exit_code == (1 if name == "check" else 2)
    assert message in " ".join(refused.output.split())
    assert set(hub.fetched) == {"config.json"}


def test_quantization_beside_the_configuration_is_judged_before_the_weights(hub: Hub) -> None:
    hub.files = {
        "config.json": CONFIG,
        "hf_quant_config.json": json.dumps({"quantization": {"quant_algo": "W2A2_NOVEL"}}),
        "model.safetensors": "x" * 1000,
    }
    for of in (resolve_config, resolve_model):
        with pytest.raises(CheckpointError, match="quant_algo: got 'W2A2_NOVEL'"):
            of(ID)
    assert "model.safetensors" not in hub.fetched


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json", "pytorch_model.bin"], "the weights are pickled PyTorch, which is not read yet"),
        (["config.json", "x.bin"], ".* not read yet; expected a repository with safetensors"),
        (["x.bin"], ".* not read yet; expected a repository with safetensors"),
        (["README.md"], r"it has no config\.json; expected a repository with config\.json"),
    ],
)
def test_repositories_without_safetensors_are_named(hub: Hub, names: list[str], message: str) -> None:
    hub.files = {name: CONFIG for name in names}
    with pytest.raises(FileNotFoundError, match=f"model: got '{ID}'; {message}"):
        resolve_model(ID)
    assert set(hub.fetched) <= {"config.json"}


def test_plan_reads_the_configuration_alone(hub: Hub) -> None:
    hub.files = {"config.json": CONFIG, "model.safetensors": "x" * 1000}
    planned = CliRunner().invoke(app, ["plan", ID, "--json"])
    assert planned.exit_code == 0, planned.output
    assert hub.fetched == ["config.json"]


def test_too_little_disk_is_said_before_the_download(hub: Hub) -> None:
    hub.files = {"config.json": CONFIG, "model.safetensors": "x"}
    hub.sizes = {"model.safetensors": 10**17}
    with pytest.raises(OSError, match=r"needs 100000000\.0 GB more, and .* GB free; free some space, or set"):
        resolve_model(ID)
    assert hub.fetched == ["config.json"]


def test_unknown_repository(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match=r"model: got 'owner/other', which the hub does not show"):
        resolve_model("owner/other")


def test_unreachable_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"config.json": CONFIG, "model.safetensors": "x", "tokenizer.json": "{}"}
    resolve_config(ID)
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    unreached = rf"model: got '{ID}', of which the cache has no weights, and the hub cannot be reached \(.*\)"
    with pytest.raises(FileNotFoundError, match=unreached):
        resolve_model(ID)
    assert re.search(unreached, refused_by("serve", ID))
    use(monkeypatch, hub.endpoint, tmp_path / "cache")
    path = resolve_model(ID)
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert resolve_model(ID) == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(ID) == path
    refused = CliRunner().invoke(app, ["serve", "owner/other"])
    said = " ".join(refused.output.split())
    assert refused.exit_code == 2 and said.startswith("error: model: got 'owner/other', which is not in the")
    assert "the hub cannot be reached" in said and "Traceback" not in said


def test_local_files_in_another_format_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("ONNX")
    for model in (tmp_path, tmp_path / "model.onnx"):
        with pytest.raises(FileNotFoundError, match="the weights are ONNX, which is not read yet"):
            resolve_model(model)


@pytest.fixture
def no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise AssertionError("the port was opened")

    monkeypatch.setattr("farthing.server.run.serve", refuse)


@pytest.mark.usefixtures("no_port")
@pytest.mark.parametrize(
    ("files", "sizes", "message"),
    [
        ({"model.bin": "x"}, {}, "the weights are pickled PyTorch"),
        ({"README.md": "x"}, {}, "it has no weights; expected model.safetensors or"),
        ({"model.safetensors.index.json": "{"}, {}, "model.safetensors.index.json: not valid JSON"),
        ({"model.safetensors": "x"}, {"model.safetensors": 10**17}, "needs 100000000.0 GB more"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "compress"])
def test_errors_of_a_repository_come_before_the_port_and_before_its_weights(
    hub: Hub, command: str, files: dict[str, str], sizes: dict[str, int], message: str, tmp_path: Path
) -> None:
    hub.files, hub.sizes = {"config.json": CONFIG, **files}, sizes
    assert message in refused_by(
        command, ID, *(["-o", str(tmp_path / "out")] if command == "compress" else [])
    )
    assert "model.safetensors" not in hub.fetched


def test_serve_requests_the_repository_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"config.json": CONFIG, "model.safetensors": "x", "tokenizer.json": "{}"}
    built: list[str] = []
    monkeypatch.setattr(
        "farthing.engine.build.build_engine", lambda config, progress: built.append(config.model)
    )
    monkeypatch.setattr("farthing.server.run.serve", lambda config, name, load, *_: load(unseen) or 0)
    assert CliRunner().invoke(app, ["serve", ID]).exit_code == 0
    assert hub.asked == [f"/api/models/{ID}"] and sorted(hub.fetched) == sorted(hub.files)
    assert built == [str(resolve_model(ID))]


def test_files_of_an_interrupted_download_are_no_model_yet(hub: Hub, no_port: None) -> None:
    shards = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
    hub.files = {"config.json": CONFIG, "model.safetensors.index.json": index(*shards), shards[0]: "x"}
    with pytest.raises(OSError, match=f"cannot download {shards[1]}"):
        resolve_model(ID)
    hub.files = {**hub.files, shards[1]: "x"}
    found = preflight(EngineConfig(model=ID, backend="cpu"))
    assert found.absent == (shards[1],) and not has_weights(found.path)


def test_compress_compares_memory_before_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = {"config.json": CONFIG, "model.safetensors": "x"}
    monkeypatch.setattr("farthing.compress.needs.available_memory", lambda: 10**6)
    arguments = ["compress", ID, "-o", str(tmp_path / "out"), "--recipe", "int4"]
    assert "model: compressing its largest layer takes about" in refused_by(*arguments)
    assert hub.fetched == ["config.json"]


def test_a_download_logs_bytes_and_time_left_and_not_its_requests(
    hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = {"config.json": CONFIG, "model.safetensors": "x" * 10**6, "tokenizer.json": "{}"}
    monkeypatch.setattr("farthing.hub._LOOK_EVERY", 0.01)
    caplog.set_level(logging.INFO)
    hub.held = lambda: "tokenizer.json" in hub.fetched and f"downloading {ID}: 0%" in caplog.text
    resolve_model(ID)
    assert f"downloading {ID}: 0%" in caplog.text
    assert "HTTP Request" not in caplog.text


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 65_536)


def with_large(hub: Hub, size: int = 3_000_000) -> str:
    """Weights that are stored apart; returns them."""
    hub.files = {
        "config.json": CONFIG,
        "tokenizer.json": "{}",
        "model.safetensors": "0123456789" * (size // 10),
    }
    hub.large = frozenset({"model.safetensors"})
    return hub.files["model.safetensors"]


def test_weights_arrive_by_redirect_and_a_broken_connection_resumes_where_it_was(hub: Hub) -> None:
    text = with_large(hub)
    hub.faults = [1_000_000]
    assert (resolve_model(ID) / "model.safetensors").read_text() == text
    assert hub.fetched.count("model.safetensors") == 2 and len(hub.ranges) == 1
    assert 0 < int(re.findall(r"\d+", hub.ranges[0])[0]) <= 1_000_000


def test_another_run_resumes_what_a_killed_one_left(hub: Hub, tmp_path: Path) -> None:
    text = with_large(hub)
    kept = find_model(ID).path.parents[1] / "blobs"
    kept.mkdir(exist_ok=True)
    part = kept / f"{hashlib.sha256(text.encode()).hexdigest()}.resumed.incomplete"
    part.write_text(text[:2_000_000])
    assert (resolve_model(ID) / "model.safetensors").read_text() == text
    assert [re.findall(r"\d+", asked)[0] for asked in hub.ranges] == ["2000000"] and not part.exists()


def test_a_file_with_another_checksum_is_removed(hub: Hub) -> None:
    text = with_large(hub)
    hub.damaged = True
    with pytest.raises(
        OSError, match=f"model.safetensors of {ID}: the checksum is .*…; expected .*download it"
    ):
        resolve_model(ID)
    hub.damaged = False
    assert (resolve_model(ID) / "model.safetensors").read_text() == text


def test_pull_list_show_rm(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with_large(hub, 1000)

    def said(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        return done.output

    shown = json.loads(said("show", ID, "--json"))
    assert shown["type"] == "deepseek_v3" and shown["fit"].startswith("weights ")
    assert set(hub.fetched) == {"config.json"}, "nothing else is downloaded"
    assert json.loads(said("list", "--json"))[-1]["state"] == "incomplete"
    pulled = said("pull", ID)
    assert "fit: weights " in pulled and "2 files, 1.0 kB downloaded to " in pulled
    assert f"farthing run {ID}" in pulled and "complete in" in said("pull", ID, "--no-check-memory")
    *mine, theirs = json.loads(said("list", "--json"))
    assert [each["model"] for each in mine] == [EMBEDDED] and theirs["model"] == ID and theirs["state"] == ""
    assert ID in said("list")
    packed = process.cache_dir() / "packed" / f"{SHA}-x.packed"
    packed.parent.mkdir(parents=True, exist_ok=True)
    packed.write_text("x")
    assert CliRunner().invoke(app, ["rm", ID], input="n\n").exit_code == 2 and packed.is_file()
    assert f"removed {ID}, " in said("rm", ID, "--yes")
    assert [each["model"] for each in json.loads(said("list", "--json"))] == [EMBEDDED]
    assert not packed.exists()
    assert "expected a model of the hub's cache" in refused_by("rm", ID)
    assert "which belongs to ollama; remove it there" in refused_by("rm", "ollama:x:y")


def test_pull_compares_memory_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with_large(hub, 1000)
    monkeypatch.setattr("farthing.cli.models.available_memory", lambda: 1000)
    assert "needs " in refused_by("pull", ID) and set(hub.fetched) == {"config.json"}
    assert CliRunner().invoke(app, ["pull", ID, "--no-check-memory"]).exit_code == 0


def test_short_names_are_those_of_published_configurations(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(short_names()) == set(published())
    monkeypatch.setattr("farthing.catalogue.short_names", lambda: {"small": ID})
    with_large(hub, 1000)
    assert resolve_model("Small") == resolve_model(ID)
    with pytest.raises(FileNotFoundError, match=r"did you mean 'small'\?"):
        resolve_model("smal")


def test_show_describes_a_published_model_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["show", "Qwen3-8B", "--json"])
    shown = json.loads(done.output)
    assert shown["model"].startswith("Qwen/Qwen3-8B-GGUF:") and shown["path"] == "not downloaded"
    assert shown["type"] == "qwen3" and shown["layers"] == 36 and not hub.asked and not hub.fetched
    monkeypatch.setattr("farthing.cli.show.machine_memory", lambda: 10**9)
    small = json.loads(CliRunner().invoke(app, ["show", "qwen3-8b", "--json"]).output)
    assert small["fit"] == "no: a conversation takes 6.5 GB of 1.0 GB" and small["download"] == "about 5.0 GB"
    other = json.loads(CliRunner().invoke(app, ["show", "deepseek-v3", "--json"]).output)
    assert other["model"] == short_names()["deepseek-v3"] and "download" not in other
    assert other["fit"].startswith("no: model: deepseek-v3 needs ")


def test_downloads_show_one_progress(hub: Hub) -> None:
    with_large(hub)
    hub.faults = [2_000_000]  # so that it takes longer than a look
    seen = list[tuple[str, int, int]]()
    find_model(ID).fetch(lambda *step: seen.append(step))
    assert seen[-1] == (f"downloading {ID}", 3_000_002, 3_000_002)
    assert all(0 <= done <= total for _, done, total in seen)
    assert are_progress_bars_disabled("huggingface_hub.http_get")
