"""Tokenizes rendered prompts in which text of others is marked (see `conversation.untrusted`)."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from tokenizers import AddedToken
from tokenizers import Tokenizer as _Tokenizer

from farthing.conversation.marks import plain
from farthing.conversation.scan import alternatives


def is_control(token: AddedToken) -> bool:
    """Whether an added token is markup; others are text, such as GPT-NeoX's runs of spaces.

    Checkpoints do not flag all of their marks as special.
    """
    content = token.content
    return token.special or (len(content) > 1 and content[0] in "<[｜|" and content[-1] in ">]｜|")


class GuardedTokenizer:
    """A tokenizer's twin, in which control tokens have names that nobody can guess.

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
        self._names = {content: f"{secret}{i:08x}" for content, i in controls.items()}
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

    def _name(self, found: re.Match[str]) -> str:
        token = found[0]
        text, start, end = found.string, found.start(), found.end()
        beside = text[max(0, start - 1) : start], text[end : end + 1]
        if token in self._alone and any(map(str.isalnum, beside)):
            return token
        return self._names[token]

    def _cut_up(self, text: str) -> list[int]:
        """Token ids for a vocabulary that holds control tokens itself: text that would be merged to one is
        cut into its characters."""
        cut = self._backend.token_to_id(self._cut)
        while True:
            encoding = self._backend.encode(text, add_special_tokens=False)
            found = zip(encoding.ids, encoding.offsets, strict=True)
            spans = [(start, end) for i, (start, end) in found if i in self._spelled and end - start > 1]
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
