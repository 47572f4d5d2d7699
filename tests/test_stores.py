"""Models of Ollama, LM Studio and llama.cpp, in the folders that these programs write."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing import hub, stores
from farthing.engine.tokenizer import Tokenizer, generation_defaults
from farthing.tokenizer_gguf import led_by
from tests.checkpoint.test_gguf import write as write_gguf


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("OLLAMA_MODELS", "LLAMA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def written(file: Path, content: str = "GGUF") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return file


def ollama(home: Path, name: str, digest: str, kind: str = "model", **others: str) -> Path:
    """A manifest and its blobs. digest: the checksum, or what is repeated in it. others: texts by kind."""
    digest = digest * 32 if len(digest) == 2 else digest
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:0"},
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}"},
    ]
    for other, text in others.items():
        own = sha256(text.encode()).hexdigest()
        written(home / "blobs" / f"sha256-{own}", text)
        layers.append({"mediaType": f"application/vnd.ollama.image.{other}", "digest": f"sha256:{own}"})
    written(home / "manifests" / name, json.dumps({"schemaVersion": 2, "layers": layers}))
    return written(home / "blobs" / f"sha256-{digest}")


@pytest.mark.parametrize("digest", ["../../../elsewhere", "a" * 63, "A" * 64, "", "/etc/passwd"])
def test_a_manifest_names_no_file_but_its_blob(home: Path, digest: str) -> None:
    ollama(home / ".ollama/models", "registry.ollama.ai/library/qwen3/8b", digest)
    assert not list(stores.stored())


def test_models_of_every_program_are_found_by_name(home: Path) -> None:
    ours = home / ".ollama/models"
    blob = ollama(ours, "registry.ollama.ai/library/qwen3/8b", "ab")
    latest = ollama(ours, "registry.ollama.ai/someone/qwen3/latest", "cd")
    other = ollama(ours, "hf.co/org/model-GGUF/Q4_K_M", "ef")
    ollama(ours, "registry.ollama.ai/library/tensors/latest", "01", kind="tensor")
    written(ours / "manifests/registry.ollama.ai/library/damaged/latest", "{")
    studio = home / ".lmstudio/models/pub/repo"
    parts = [written(studio / f"big-{i:05}-of-00002.gguf") for i in (1, 2)]
    written(studio / "mmproj-f16.gguf")
    whole = written(home / ".lmstudio/models/pub/mlx/config.json", "{}").parent
    flat = written(home / ".cache/llama.cpp/org_model_q8_0.gguf")
    assert {each.name: each.path for each in stores.stored()} == {
        "ollama:qwen3:8b": blob,
        "ollama:someone/qwen3:latest": latest,
        "ollama:hf.co/org/model-GGUF:Q4_K_M": other,
        "lmstudio:pub/mlx": whole,
        "lmstudio:pub/repo/big": parts[0],
        "llama.cpp:org_model_q8_0": flat,
    }
    assert {each.size for each in stores.stored() if each.name == "lmstudio:pub/repo/big"} == {8}
    assert stores.find("ollama:someone/qwen3").path == latest
    with pytest.raises(
        FileNotFoundError, match=r"got 'ollama:qwen3:9b'; expected .* such as ollama:qwen3:8b"
    ):
        stores.find("ollama:qwen3:9b")


def test_folders_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "o"))
    monkeypatch.setenv("LLAMA_CACHE", str(home / "l"))
    ollama(home / "o", "registry.ollama.ai/library/m/t", "ab")
    written(home / "l/x.gguf")
    assert [each.name for each in stores.stored()] == ["ollama:m:t", "llama.cpp:x"]


def test_a_machine_without_them(home: Path) -> None:
    assert list(stores.stored()) == []
    assert stores.program_of("qwen3:8b") is None and stores.program_of("ollama") is None
    with pytest.raises(FileNotFoundError, match="no model of ollama is on this machine"):
        hub.resolve_model("ollama:qwen3:8b")


def test_the_file_is_opened_in_place(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = ollama(home / ".ollama/models", "registry.ollama.ai/library/qwen3/8b", "ab")
    opened = list[Path]()
    monkeypatch.setattr("farthing.hub.open_gguf", lambda path, *_: opened.append(path) or home)
    hub.resolve_model("ollama:qwen3:8b")
    hub.resolve_model(blob)
    assert opened == [blob, blob]


NAME = "registry.ollama.ai/library/m/latest"


def test_what_a_model_of_ollama_says_and_samples_is_read(home: Path) -> None:
    """Beside the same weights under another name, which says nothing."""
    params = {"temperature": 0.3, "repeat_penalty": 1.2, "stop": ["<|3|>", "###"], "num_ctx": 4096}
    blob = ollama(home / ".ollama/models", NAME, "ab", system="Be brief.", params=json.dumps(params))
    blob.unlink()
    write_gguf(blob, "llama", "F16")
    plain = hub.resolve_model(blob)
    said = hub.resolve_model("ollama:m")
    assert generation_defaults(said) == generation_defaults(plain) | {
        "temperature": 0.3, "repetition_penalty": 1.2, "stop": ["###"], "stop_token_ids": [260],
    }  # fmt: skip
    assert "stop" not in generation_defaults(plain)
    template, led = (Tokenizer.from_directory(path).chat_template for path in (plain, said))
    assert template and led and led.endswith(template) and "Be brief." in led
    assert hub.resolve_model("ollama:m") == said != plain == hub.resolve_model(blob)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_stored_system_prompt_is_the_turn_of_conversations_without_one(system: str) -> None:
    """Whatever it contains; an empty conversation stays one."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    led = jinja2.Environment(keep_trailing_newline=True).from_string(
        led_by(system, {"chat_template": template})["chat_template"]
    )
    ours, user = ({"role": role, "content": role} for role in ("system", "user"))
    assert led.render(messages=[user]) == f"<system>{system}<user>user"
    assert led.render(messages=[ours, user]) == "<system>system<user>user"
    assert led.render(messages=[]) == ""


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "expected a JSON object"),
        ('{"top_k": "many"}', "top_k: got 'many'; expected a number"),
        ('{"temperature": true}', "temperature: got True; expected a number"),
        ('{"stop": "###"}', "stop: got '###'; expected texts"),
        ("9" * (1 << 20 | 1), "got 1048577 bytes; expected at most 1048576"),
    ],
)
def test_parameters_of_another_form_are_refused(home: Path, params: str, message: str) -> None:
    ollama(home / ".ollama/models", NAME, "ab", params=params)
    assert [each.name for each in stores.stored()] == ["ollama:m:latest"]
    with pytest.raises(ValueError, match=message):
        hub.resolve_model("ollama:m")


def test_a_model_with_an_adapter_is_refused(home: Path) -> None:
    ollama(home / ".ollama/models", NAME, "ab", adapter="GGUF")
    with pytest.raises(ValueError, match="has an adapter; expected a model of one piece"):
        hub.resolve_model("ollama:m")
