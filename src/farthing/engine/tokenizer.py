"""Text <-> token ids: a directory's tokenizer.json and chat template, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _Tokenizer

from farthing.engine.chat_template import DEEPSEEK_TEMPLATE, compile_template, flatten


class Tokenizer:
    """A `tokenizers` tokenizer with what tokenizer_config.json says about it. Thread-safe."""

    def __init__(
        self,
        backend: _Tokenizer,
        config: Mapping[str, Any] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        config = config or {}
        self.backend = backend
        self.vocab_size = int(backend.get_vocab_size(with_added_tokens=True))
        self.bos_token = _content(config.get("bos_token"))
        self.bos_token_id = None if self.bos_token is None else backend.token_to_id(self.bos_token)
        eos_token = _content(config.get("eos_token"))
        own_eos = None if eos_token is None else backend.token_to_id(eos_token)
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *([] if own_eos is None else [own_eos])]))
        self.eos_token = eos_token or (
            backend.id_to_token(self.eos_token_ids[0]) if self.eos_token_ids else None
        )
        self._add_bos = bool(config.get("add_bos_token", False)) and self.bos_token_id is not None
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = {i: token.content.encode() for i, token in added.items()}
        decoder = json.loads(backend.to_str()).get("decoder") or {}
        self.byte_level = decoder.get("type") == "ByteLevel"
        self._bytes: dict[int, bytes] = {}
        self.chat_template = chat_template or config.get("chat_template")
        self._template: Any = None

    @classmethod
    def from_directory(cls, path: Path, eos_token_ids: Sequence[int] = ()) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template of a model directory."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; expected a Hugging Face tokenizer file, or skip_tokenizer_init=True "
                f"to work with token ids alone"
            )
        config = _json(path / "tokenizer_config.json")
        eos = [*eos_token_ids, *_ids(_json(path / "generation_config.json").get("eos_token_id"))]
        return cls(_Tokenizer.from_file(str(file)), config, eos, _chat_template(path, config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; add_special_tokens puts the BOS token in front where the model has it so."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._add_bos and ids[:1] != [self.bos_token_id]:
            assert self.bos_token_id is not None
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text; bytes that are no UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for (byte-level tokenizers), else its text. b"" for an unknown id."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._token_bytes(token)
        return known

    def token_text(self, token: int) -> str:
        """A token alone as text; parts of a character become U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation by the model's own chat template, or DeepSeek's where it has none.

        Raises ValueError where the template refuses the messages. Encode it with add_special_tokens=False.
        """
        if not messages:
            raise ValueError("messages is empty; expected at least one message")
        if self._template is None:
            self._template = compile_template(self.chat_template or DEEPSEEK_TEMPLATE)
        bos = self.bos_token
        if bos is None:
            default = "<｜begin▁of▁sentence｜>"
            bos = default if self.backend.token_to_id(default) is not None else ""
        values = {"bos_token": bos, "eos_token": self.eos_token or "", "tools": tools or None}
        return str(
            self._template(
                messages=flatten(messages), add_generation_prompt=add_generation_prompt, **(values | kwargs)
            )
        )

    def _token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        text = self.backend.id_to_token(token)
        if text is None:
            return b""
        if not self.byte_level:
            return str(self.backend.decode([token], skip_special_tokens=False)).encode()
        try:
            return bytes(_BYTE_OF[c] for c in text)
        except KeyError:
            return str(text).encode()


def generation_defaults(path: Path) -> dict[str, Any]:
    """Sampling fields that generation_config.json recommends, under SamplingParams' names."""
    raw = _json(path / "generation_config.json")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: raw[name] for name in names if raw.get(name) is not None}


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE (Radford et al. 2019) writes for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {type(value).__name__}; expected an object")
    return value


def _content(token: Any) -> str | None:
    """A special token is written as a string or as {"content": …}."""
    value = token.get("content") if isinstance(token, dict) else token
    return None if value is None else str(value)


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list) else [int(value)]


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _json(path / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several by name
        by_name = {entry["name"]: entry["template"] for entry in template}
        template = by_name.get("default")
    return None if template is None else str(template)
