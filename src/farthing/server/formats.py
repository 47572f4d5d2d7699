"""The chat formats of the served model."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from farthing.conversation.base import ChatFormat, ControlTokens
from farthing.conversation.select import Checkpoint, Chosen, Habits, choose
from farthing.conversation.types import Conversation

if TYPE_CHECKING:
    from farthing.engine.engine import Engine
    from farthing.engine.tokenizer import Tokenizer
    from farthing.server.config import ServerConfig

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ModelFormats:
    """The chat formats of an engine's model, and their tokens in its tokenizer."""

    chosen: Chosen
    tokenizer: Tokenizer | None
    control: ControlTokens

    @classmethod
    async def of(cls, engine: Engine, config: ServerConfig) -> ModelFormats:
        """Choose by the command line, the checkpoint's template, which is probed, and its tokenizer."""
        tokenizer = engine.tokenizer
        own = None if tokenizer is None or tokenizer.trusted_template else tokenizer.chat_template
        checkpoint = Checkpoint(
            engine.model_config.model_type,
            own,
            lambda token: tokenizer is not None and tokenizer.backend.token_to_id(token) is not None,
            await _habits(engine) if own is not None else Habits(),
        )
        reasoning = config.reasoning_parser
        template = engine.config.chat_template
        chosen = choose(checkpoint, template, config.tool_call_parser, reasoning)
        if chosen.template is None:
            log.info("chat format: %s", chosen.plain.name)
        else:
            tools = "" if chosen.tools is chosen.plain else f"; {chosen.tools.name} with tools"
            log.info("chat format: the model's template, which %s%s", checkpoint.habits.described, tools)
        return cls(chosen, tokenizer, _control(tokenizer))

    def of_conversation(self, conversation: Conversation) -> ChatFormat:
        """The format for a conversation."""
        uses_tools = bool(conversation.offered) or conversation.has_calls
        return self.chosen.tools if uses_tools else self.chosen.plain

    def source(self, form: ChatFormat) -> str | None:
        """The Jinja source if the format is the model's own template; None for a packaged one."""
        return self.chosen.template if form is self.chosen.plain else None

    def token_id(self, text: str) -> int | None:
        """The token id of a text that is a single token, else None."""
        if self.tokenizer is None:
            return None
        found: int | None = self.tokenizer.backend.token_to_id(text)
        return found

    def special_id(self, text: str) -> int | None:
        """The token id of a text that is a single control token, which no text in a grammar matches."""
        token = self.token_id(text)
        return token if self.tokenizer is not None and token in self.tokenizer.control_ids else None

    def stops(self, form: ChatFormat) -> list[int]:
        """Tokens that end a turn in this format, besides the model's own."""
        return [token for stop in form.stops if (token := self.token_id(stop)) is not None]

    def ends(self, form: ChatFormat) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset((*self.stops(form), *(self.tokenizer.eos_token_ids if self.tokenizer else ())))

    def ending(self, text: str) -> list[int]:
        """The token that ends a turn, if a text ends with one."""
        stops = (self.control.eos, *self.chosen.tools.stops, *self.chosen.plain.stops)
        found = (self.token_id(stop) for stop in stops if stop and text.endswith(stop))
        return [token for token in found if token is not None][:1]

    def markup(self, form: ChatFormat) -> dict[int, str]:
        """The format's markup that consists of special tokens of the tokenizer."""
        tags = (form.tags.open, form.tags.close) if form.tags else ()
        found = ((self.special_id(text), text) for text in (*form.markup, *tags))
        return {token: text for token, text in found if token is not None}


def _control(tokenizer: Tokenizer | None) -> ControlTokens:
    default = ControlTokens()
    if tokenizer is None:
        return default
    bos = tokenizer.bos_token
    if bos is None:
        bos = default.bos if tokenizer.backend.token_to_id(default.bos) is not None else ""
    return ControlTokens(bos, tokenizer.eos_token or "")


async def _habits(engine: Engine) -> Habits:
    """The habits of the model's template, found in the sandbox, because a template is a program."""
    if engine.sandbox is None:
        return Habits()
    try:
        found = await asyncio.wrap_future(engine.sandbox.habits())
    except (ValueError, RuntimeError) as error:
        log.warning("the model's chat template failed: %s", error)
        return Habits()
    return Habits(**found | {"efforts": tuple(found["efforts"])})
