"""Text <-> token ids: a directory's tokenizer.json and chat template, without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _Tokenizer

from farthing.conversation.habits import Habits, probe
from farthing.conversation.marks import MARK
from farthing.conversation.untrusted import Untrusted, printed
from farthing.engine.chat_template import DEEPSEEK_TEMPLATE, flatten
from farthing.engine.guarded import GuardedTokenizer, is_control
from farthing.tokenizer_file import read_tokenizer


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
        self._config = {name: config[name] for name in _USED if name in config}
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
        # No text becomes one of these, in a chat's prompt or in a grammar.
        self.control_ids = frozenset(i for i, token in added.items() if is_control(token))
        self._added = {i: token.content.encode() for i, token in added.items()}
        decoder = json.loads(backend.to_str()).get("decoder") or {}
        self.byte_level = decoder.get("type") == "ByteLevel"
        self._bytes: dict[int, bytes] = {}
        self.chat_template = chat_template or config.get("chat_template")
        self._template: Callable[..., str] | None = None
        self._habits: Habits | None = None
        self._longest: int | None = None

    @classmethod
    def from_directory(cls, path: Path, eos_token_ids: Sequence[int] = ()) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template of a model directory."""
        file = path / "tokenizer.json"
        if not file.is_file() and (path / "tiktoken.model").is_file():
            raise FileNotFoundError(
                f"{path} has tiktoken.model but no tokenizer.json; convert it once with: "
                f"python -m farthing.engine.tiktoken {path}"
            )
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; expected a Hugging Face tokenizer file, or skip_tokenizer_init=True "
                f"to work with token ids alone"
            )
        config = _json(path / "tokenizer_config.json")
        generation = path / "generation_config.json"
        eos = [*eos_token_ids, *_ids(_json(generation).get("eos_token_id"), generation)]
        return cls(read_tokenizer(file), config, eos, _chat_template(path, config))

    def state(self) -> dict[str, Any]:
        """JSON that `from_state` makes the same tokenizer of, in another process."""
        return {
            "backend": self.backend.to_str(),
            "config": self._config,
            "eos_token_ids": list(self.eos_token_ids),
            "chat_template": self.chat_template,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that `state` describes."""
        backend = _Tokenizer.from_str(state["backend"])
        return cls(backend, state["config"], state["eos_token_ids"], state["chat_template"])

    @property
    def trusted_template(self) -> bool:
        """Whether chats are rendered by the built-in template."""
        return not self.chat_template or self.chat_template == DEEPSEEK_TEMPLATE

    def max_characters(self, tokens: int) -> int:
        """A text with more characters than this has more than `tokens` tokens, or nearly so.

        A byte-level token stands for as many bytes as its text has characters. Normalizers and other models
        may drop or merge text, so there the bound is four times as wide.
        """
        if self._longest is None:
            texts = (*self.backend.get_vocab(), *(content.decode() for content in self._added.values()))
            self._longest = max(map(len, texts), default=1)
        exact = self.byte_level and self.backend.normalizer is None
        return tokens * self._longest * (1 if exact else 4)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; add_special_tokens puts the BOS token in front where the model has it so.

        A rendered prompt may contain text that `untrusted` has marked, which becomes no control token.
        """
        if MARK in text:
            front = self.encode("") if add_special_tokens else []
            ids = self._guarded.encode(text)
            return ids if ids[: len(front)] == front else front + ids
        # Unlike `encode`, this releases the GIL and computes no offsets, which take most of the time.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids = list(encoding.ids)
        if add_special_tokens and self._add_bos and ids[:1] != [self.bos_token_id]:
            assert self.bos_token_id is not None
            ids.insert(0, self.bos_token_id)
        return ids

    @cached_property
    def untrusted(self) -> Untrusted:
        """Marks text in conversations, so that it does not become control tokens."""
        controls = [t for t in self.backend.get_added_tokens_decoder().values() if is_control(t)]
        normalizer = self.backend.normalizer if any(token.normalized for token in controls) else None
        texts = (token.content for token in controls if len(token.content) > 1)
        return Untrusted(texts, normalizer.normalize_str if normalizer is not None else None)

    def prepare(self) -> None:
        """Build what chats need, ahead of the first one."""
        _ = self.untrusted, self._guarded

    @cached_property
    def _guarded(self) -> GuardedTokenizer:
        return GuardedTokenizer(self.backend)

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
        /,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation by the model's own chat template, or DeepSeek's where it has none.

        Raises ValueError where the template refuses the messages or leaves out a tool. Encode it with
        add_special_tokens=False.
        """
        if not messages:
            raise ValueError("messages is empty; expected at least one message")
        turns = flatten(messages)
        if any(turn.get("tool_calls") for turn in turns):
            turns = self.habits().adapt(turns)
        values = {"tools": tools or None, "add_generation_prompt": add_generation_prompt, **kwargs}
        prompt = printed(self._render(messages=turns, **values))
        for tool in tools or ():
            name = tool.get("function", tool).get("name")
            if isinstance(name, str) and name not in prompt:
                raise ValueError(
                    f"the chat template does not print the tool {name!r}; expected a chat_template that does"
                )
        return prompt

    def habits(self) -> Habits:
        """What the chat template expects of messages, found once by rendering a short tool loop. Raises
        ValueError if the template does not compile."""
        if self._habits is None:
            from farthing.conversation.jinja import variables

            self._habits = probe(self._render, variables(self.chat_template or DEEPSEEK_TEMPLATE))
        return self._habits

    def _render(self, /, **values: Any) -> str:
        """Render the chat template with the variables that transformers gives it."""
        if self._template is None:
            from farthing.conversation.jinja import compile_template

            self._template = compile_template(self.chat_template or DEEPSEEK_TEMPLATE)
        bos = self.bos_token
        if bos is None:
            default = "<｜begin▁of▁sentence｜>"
            bos = default if self.backend.token_to_id(default) is not None else ""
        given = {"bos_token": bos, "eos_token": self.eos_token or "", "documents": None}
        return self._template(**(given | values))

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


_USED = ("bos_token", "eos_token", "add_bos_token", "chat_template")  # of tokenizer_config.json


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
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply; expected a configuration file") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} contains {type(value).__name__}; expected an object")
    return value


def _content(token: Any) -> str | None:
    """A special token is written as a string or as {"content": …}."""
    value = token.get("content") if isinstance(token, dict) else token
    return None if value is None else str(value)


def _ids(value: Any, file: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ValueError(f"eos_token_id in {file}: got {value!r}; expected a token id or a list of them")
    return ids


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}") from error
    template = _json(path / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise ValueError(f"chat_template of {path}: got {type(template).__name__}; expected a text")
    return template
