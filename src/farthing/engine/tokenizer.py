"""Text <-> token ids: a directory's tokenizer.json and chat template, without transformers."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as _Tokenizer

from farthing.checkpoint.shards import read_json
from farthing.conversation.formats import template
from farthing.conversation.scan import MARK, alternatives, plain
from farthing.conversation.select import PACKAGED, Habits, probe
from farthing.conversation.untrusted import TRUSTED, Untrusted, printed
from farthing.engine.request import Rendering
from farthing.tokenizer_file import read_tokenizer

# DeepSeek's chat template, for checkpoints without one, and what any template gets as messages.

# DeepSeek's format, for checkpoints without a template. Reasoning in front of an answer is
# dropped from the history, as the model was trained; tools are described in the system prompt.
DEEPSEEK_TEMPLATE = """\
{%- set ns = namespace(system='', after_tool=false) -%}
{%- for m in messages if m['role'] in ('system', 'developer') -%}
  {%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + (m['content'] or '') -%}
{%- endfor -%}
{%- if tools -%}
  {%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') -%}
  {%- set ns.system = ns.system + '## Tools\\nYou may call these functions:' -%}
  {%- for tool in tools -%}
    {%- set ns.system = ns.system + '\\n' + (tool['function'] | tojson) -%}
  {%- endfor -%}
  {%- set ns.system = ns.system + '\\nTo call one, answer with\\n'
      ~ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function'
      ~ '<｜tool▁sep｜>NAME\\n```json\\nARGUMENTS\\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>' -%}
{%- endif -%}
{{- bos_token ~ ns.system -}}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}
    {%- set ns.after_tool = false -%}
    {{- '<｜User｜>' ~ (m['content'] or '') -}}
  {%- elif m['role'] == 'assistant' -%}
    {{- '' if ns.after_tool else '<｜Assistant｜>' -}}
    {%- set ns.after_tool = false -%}
    {%- set text = (m['content'] or '') | trim -%}
    {{- text.split('</think>', 1)[-1] | trim if text.startswith('<think>') else text -}}
    {%- if m['tool_calls'] -%}
      {{- '<｜tool▁calls▁begin｜>' -}}
      {%- for call in m['tool_calls'] -%}
        {%- set f = call['function'] -%}
        {%- set arguments = f['arguments'] if f['arguments'] is string else f['arguments'] | tojson -%}
        {{- '\\n' if not loop.first -}}
        {{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' ~ f['name'] ~ '\\n```json\\n' ~ arguments -}}
        {{- '\\n```<｜tool▁call▁end｜>' -}}
      {%- endfor -%}
      {{- '<｜tool▁calls▁end｜>' -}}
    {%- endif -%}
    {{- eos_token -}}
  {%- elif m['role'] == 'tool' -%}
    {{- '\\n' if ns.after_tool else '<｜tool▁outputs▁begin｜>' -}}
    {%- set ns.after_tool = true -%}
    {{- '<｜tool▁output▁begin｜>' ~ (m['content'] or '') ~ '<｜tool▁output▁end｜>' -}}
    {%- if loop.last or loop.nextitem['role'] != 'tool' -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.after_tool -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""

ROLES = ("system", "developer", "user", "assistant", "tool")


def flatten(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with text parts joined to one string and without null fields, which templates do not expect.
    Raises ValueError on other kinds of content."""
    result = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"messages[{i}].role: got {role!r}; expected one of {ROLES}")
        if isinstance(content, list | tuple):
            content = "".join(_text(i, part) for part in content)
        elif content is not None and not isinstance(content, str):
            raise ValueError(f"messages[{i}].content: got {type(content).__name__}; expected text")
        flat = {**message, "content": content}
        result.append({name: value for name, value in flat.items() if value is not None})
    return result


def _text(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"messages[{index}].content has a part of type {kind!r}; expected 'text'")


def is_control(token: AddedToken) -> bool:
    """Whether an added token is markup; others are text, such as GPT-NeoX's runs of spaces.

    Checkpoints do not flag all of their marks as special, and not all of them close: `<dsml:`.
    """
    content = token.content
    if token.special:
        return True
    if len(content) < 2 or content[0] not in "<[｜|":
        return False
    return content[-1] in ">]｜|" or any(map(str.isalpha, content))


_WORD = re.compile(r"\w")  # beside it, a token that is a single word is text


class GuardedTokenizer:
    """A tokenizer's twin, in which control tokens have unguessable names.

    A prompt's genuine control tokens are given these names, then the marks are removed. The rest is encoded
    exactly as it is next to the original tokens, white space and prefixes included, and yields none.
    """

    def __init__(self, original: _Tokenizer) -> None:
        added = original.get_added_tokens_decoder()
        controls = {token.content: i for i, token in added.items() if is_control(token)}
        self._backend = _Tokenizer(original.model)  # shares the vocabulary
        if original.normalizer is not None:
            self._backend.normalizer = original.normalizer
        if original.pre_tokenizer is not None:
            self._backend.pre_tokenizer = original.pre_tokenizer
        vocabulary = original.get_vocab(with_added_tokens=False)
        secret = secrets.token_hex(16)
        self._cut = f"{secret}cut"
        # The brackets end words, as those of most control tokens: a token beside may be a single word only.
        self._names = {content: f"<{secret}{i:08x}>" for content, i in controls.items()}
        names = {i: self._names.get(token.content, token.content) for i, token in sorted(added.items())}
        skipped = _taken(vocabulary.values(), len(names) + 1)
        self._backend.add_tokens(
            [AddedToken(f"{secret}skipped{i}", normalized=False) for i in range(skipped)]
            + [AddedToken(self._cut, normalized=False)]
            + [_named(added[i], name) for i, name in names.items()]
        )
        self._ids = {self._backend.token_to_id(name): i for i, name in names.items()}  # here -> original
        self._alone = {token.content for token in added.values() if token.single_word}
        self._genuine = re.compile(alternatives(controls) or "(?!)")
        unknown = getattr(original.model, "unk_token", None)
        self._spelled = {
            i for text, i in controls.items() if text != unknown and original.model.id_to_token(i) is not None
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt."""
        text = plain(self._genuine.sub(self._name, text))
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        if not self._spelled.isdisjoint(ids):
            ids = self._cut_up(text)
        return [self._ids.get(i, i) for i in ids]

    def _name(self, match: re.Match[str]) -> str:
        token = match[0]
        text, start, end = match.string, match.start(), match.end()
        beside = text[max(0, start - 1) : start], text[end : end + 1]
        if token in self._alone and any(map(_WORD.match, beside)):
            return token
        return self._names[token]

    def _cut_up(self, text: str) -> list[int]:
        """Token ids for a vocabulary that holds control tokens itself: text that would be merged to one is
        cut into its characters."""
        cut = self._backend.token_to_id(self._cut)
        while True:
            encoding = self._backend.encode(text, add_special_tokens=False)
            tokens = zip(encoding.ids, encoding.offsets, strict=True)
            spans = [(start, end) for i, (start, end) in tokens if i in self._spelled and end - start > 1]
            if not spans:
                return [i for i in encoding.ids if i != cut]
            parts: list[str] = []
            at = 0
            for start, end in spans:
                parts += (text[at:start], self._cut.join(text[start:end]))
                at = end
            text = "".join(parts) + text[at:]


def _taken(ids: Iterable[int], count: int) -> int:
    """How many ids to skip after the vocabulary so that `count` free ones follow: new ids follow the number
    of tokens, and in a vocabulary with gaps some of those are taken."""
    used = sorted(ids)
    start = len(used)
    for i in used:
        if i >= start + count:
            break
        start = max(start, i + 1)
    return start - len(used)


def _named(token: AddedToken, name: str) -> AddedToken:
    return AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
    )


def _whole(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool with the fields that clients may leave out and some templates need: gpt-oss's prints a
    description."""
    whole = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return {**tool, "function": whole | dict(tool["function"])} if "function" in tool else whole | dict(tool)


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

    def encode(self, text: str, add_special_tokens: bool = True, plain: bool = False) -> list[int]:
        """Token ids; add_special_tokens puts the BOS token in front where the model has it so.

        plain: nothing in the text becomes a control token. A rendered prompt may contain text that
        `untrusted` has marked, which becomes none either.
        """
        if plain:
            text = self.untrusted.text(text)
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
        piece = self._bytes.get(token)
        if piece is None:
            piece = self._bytes[token] = self._token_bytes(token)
        return piece

    def token_text(self, token: int) -> str:
        """A token alone as text; parts of a character become U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def spelled(self, tokens: Sequence[int]) -> bytes | None:
        """What tokens within a longer text stand for, equal for two splits of one text; None if that is
        uncertain: for an unknown token, or a part of a character."""
        if self.byte_level:
            pieces = [self.token_bytes(token) for token in tokens]
            return b"".join(pieces) if all(pieces) else None
        before = min(self.control_ids, default=None)  # decoders drop a text's first space
        text = self.decode(([] if before is None else [before]) + list(tokens), skip_special_tokens=False)
        known = all(self.backend.id_to_token(token) is not None for token in tokens)
        return text.encode() if known and "\ufffd" not in text else None

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
        late = any(turn["role"] in ("system", "developer") for turn in turns[1:])
        if late or any(turn.get("tool_calls") for turn in turns):
            turns = self.habits().adapt(turns)
        values = {"tools": tools or None, "add_generation_prompt": add_generation_prompt, **kwargs}
        try:
            prompt = printed(self._render(messages=turns, **values))
        except ValueError:
            if tools is None or (whole := list(map(_whole, tools))) == tools:
                raise
            prompt = printed(self._render(messages=turns, **values | {"tools": whole}))
        for tool in tools or ():
            name = tool.get("function", tool).get("name")
            if isinstance(name, str) and name not in prompt:
                raise ValueError(
                    f"the chat template does not print the tool {name!r}; expected a chat_template that does"
                )
        return prompt

    def prompt(self, rendering: Rendering) -> str:
        """The prompt of a conversation, with marks in text that is not to become control tokens. Raises
        ValueError if the format cannot express it."""
        marking = TRUSTED if rendering.trusted else self.untrusted
        form = None if rendering.form is None else PACKAGED[rendering.form]
        removed = rendering.tags if form is None or form.strips else None
        talk = marking.conversation(rendering.conversation, removed)
        if form is not None:
            return form.render(talk, rendering.control)
        values = template.arguments(talk, self.chat_template or "", rendering.efforts)
        return template.finished(talk, self.render_chat(**values))

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
        defaults = {"bos_token": bos, "eos_token": self.eos_token or "", "documents": None}
        return self._template(**(defaults | values))

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
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    names = {name: name for name in ("temperature", "top_k", "top_p", "min_p", *penalties)}
    names |= {"stop_strings": "stop", "stop_token_ids": "stop_token_ids"}
    return {ours: raw[name] for name, ours in names.items() if raw.get(name) is not None}


_USED = ("bos_token", "eos_token", "add_bos_token", "chat_template")  # of tokenizer_config.json


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE (Radford et al. 2019) writes for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _content(token: Any) -> str | None:
    """A special token is written as a string or as {"content": …}."""
    value = token.get("content") if isinstance(token, dict) else token
    return None if value is None else str(value)


def _ids(value: Any, file: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ValueError(f"eos_token_id in {file}: got {value!r}; expected a token id or a list of them")
    return ids


def has_chat_template(path: Path) -> bool:
    """Whether a model directory has one; a base model has none. Raises ValueError for a damaged one."""
    return _chat_template(path, _json(path / "tokenizer_config.json")) is not None


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
