"""Agent sessions: every turn resends the whole, growing conversation."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farthing.bench.load import Target, Timing, chat, percentiles

_WORDS = (
    "the",
    "file",
    "test",
    "error",
    "line",
    "value",
    "return",
    "function",
    "build",
    "list",
    "path",
    "read",
)
_TOOL = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation: the agent harness's messages by turn. The server generates the answers in between."""

    system: str
    says: tuple[str, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class SessionShape:
    """Sizes of synthetic sessions, in words of about one token each."""

    turns: int = 10
    system_words: int = 400  # shared by all sessions, like an agent's instructions
    ask_words: int = 60
    result_words: int = 80  # of each tool result

    def __post_init__(self) -> None:
        for name in ("turns", "system_words", "ask_words", "result_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least 1")


def synthetic(shape: SessionShape, count: int, seed: int = 0) -> list[Session]:
    """`count` sessions with shared instructions and tool, but different requests and results."""
    rng = random.Random(seed)

    def words(number: int) -> str:
        return " ".join(rng.choice(_WORDS) for _ in range(number))

    system = words(shape.system_words)
    function = {"name": "run", "description": "Run a command.", "parameters": _TOOL}
    tools = ({"type": "function", "function": function},)
    return [
        Session(
            system,
            (words(shape.ask_words), *(words(shape.result_words) for _ in range(shape.turns - 1))),
            tools,
        )
        for _ in range(count)
    ]


def recorded(path: Path, count: int, turns: int, characters: int) -> list[Session]:
    """Sessions of a recording in lucebench's format: {"cases": [{"messages": [{"role", "content"}, …]}, …]}.

    Only the user's messages are sent, at most `turns` of them and `characters` in total. Raises ValueError
    for any other kind of file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"recording: got {path}, which cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"recording: got {path}, which is not JSON: {error}") from error
    try:
        sessions = [_recorded(messages, turns, characters) for messages in _conversations(document)]
    except ValueError as error:
        raise ValueError(f"recording: got {path}, in which {error}") from error
    sessions = [session for session in sessions if len(session.says) > 1]
    if not sessions:
        raise ValueError(f"{path} has no session of two turns; expected `cases` with `messages`")
    return [sessions[number % len(sessions)] for number in range(count)]


def _conversations(document: Any) -> Iterator[list[dict[str, Any]]]:
    """The messages of each case that has any. Raises ValueError."""
    cases = document.get("cases") if isinstance(document, dict) else None
    if not isinstance(cases, list):
        raise ValueError("`cases` is missing; expected a list of conversations")
    for number, case in enumerate(cases):
        messages = case.get("messages", []) if isinstance(case, dict) else None
        if not isinstance(messages, list):
            raise ValueError(f"cases[{number}].messages is no list; expected a list of messages")
        for position, message in enumerate(messages):
            if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                where = f"cases[{number}].messages[{position}]"
                raise ValueError(f"{where} lacks role or content; expected an object with both")
        yield messages


def _recorded(messages: Sequence[dict[str, Any]], turns: int, characters: int) -> Session:
    says: list[str] = []
    for message in messages:
        text = message["content"]
        if message["role"] != "user" or not isinstance(text, str):
            continue
        characters -= len(text)
        if len(says) == turns or characters < 0:
            break
        says.append(text)
    return Session("", tuple(says))


async def run_sessions(
    target: Target,
    sessions: Sequence[Session],
    concurrency: int,
    max_tokens: int,
    on_done: Callable[[Timing], None] = lambda _: None,
    **options: Any,
) -> list[list[Timing]]:
    """Run `concurrency` sessions at a time; returns timings per turn. A failed turn ends its session."""
    if concurrency < 1:
        raise ValueError(f"concurrency: got {concurrency}; expected at least 1")
    gate = asyncio.Semaphore(concurrency)

    async def one(session: Session) -> list[Timing]:
        async with gate:
            return await _run(target, session, max_tokens, on_done, options)

    return await asyncio.gather(*map(one, sessions))


async def _run(
    target: Target,
    session: Session,
    max_tokens: int,
    on_done: Callable[[Timing], None],
    options: dict[str, Any],
) -> list[Timing]:
    turns: list[dict[str, Any]] = [{"role": "system", "content": session.system}] if session.system else []
    fields = {"tools": list(session.tools)} if session.tools else {}
    timings: list[Timing] = []
    calls: list[dict[str, Any]] = []
    for text in session.says:
        if calls:  # the harness sends this turn's text as the result of every call
            turns += ({"role": "tool", "tool_call_id": call["id"], "content": text} for call in calls)
        else:
            turns.append({"role": "user", "content": text})
        timing = await chat(target, turns, max_tokens, **fields, **options)
        timings.append(timing)
        on_done(timing)
        if timing.error is not None:
            break
        calls = timing.calls
        answer: dict[str, Any] = {"role": "assistant", "content": timing.text}
        if timing.reasoning:
            answer["reasoning_content"] = timing.reasoning
        turns.append(answer | ({"tool_calls": calls} if calls else {}))
    return timings


@dataclass(frozen=True, slots=True)
class AgentResult:
    """Results of a run. Shares are of prompt tokens; latencies in milliseconds by percentile."""

    sessions: int
    turns: int
    failed: int
    errors: tuple[str, ...]
    seconds: float
    prompt_tokens: int
    output_tokens: int
    cached_share: float
    cached_share_later: float  # from each session's second turn on
    repeated_share: float  # of later turns' tokens: those of the previous turn, which a cache can hold
    reused_share: float  # cached share of these
    turn_ms: dict[str, float]
    ttft_first_ms: dict[str, float]  # of first turns
    ttft_later_ms: dict[str, float]
    usd_per_hour: float | None

    @property
    def usd_per_session(self) -> float | None:
        """Price per session on hardware at this hourly price."""
        return None if self.usd_per_hour is None else self.usd_per_hour / 3600 * self.seconds / self.sessions

    def to_json(self) -> dict[str, Any]:
        """All figures, including derived ones."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"usd_per_session": self.usd_per_session}


def summarize(sessions: Sequence[Sequence[Timing]], usd_per_hour: float | None = None) -> AgentResult:
    """Compute the figures over successful turns."""
    every = [timing for timings in sessions for timing in timings]
    good = [timing for timing in every if timing.error is None]
    first = [timings[0] for timings in sessions if timings and timings[0].error is None]
    later = [timing for timings in sessions for timing in timings[1:] if timing.error is None]
    prompts = sum(timing.prompt_tokens for timing in later)
    repeated, reused = _repeated(sessions)
    return AgentResult(
        sessions=len(sessions),
        turns=len(every),
        failed=len(every) - len(good),
        errors=tuple(dict.fromkeys(timing.error for timing in every if timing.error is not None))[:5],
        seconds=max(timing.end for timing in every) - min(timing.start for timing in every),
        prompt_tokens=sum(timing.prompt_tokens for timing in good),
        output_tokens=sum(timing.output_tokens for timing in good),
        cached_share=_share(good),
        cached_share_later=_share(later),
        repeated_share=repeated / prompts if prompts else 0.0,
        reused_share=reused / repeated if repeated else 0.0,
        turn_ms=percentiles([timing.e2e for timing in good]),
        ttft_first_ms=percentiles([timing.ttft for timing in first]),
        ttft_later_ms=percentiles([timing.ttft for timing in later]),
        usd_per_hour=usd_per_hour,
    )


def _repeated(sessions: Sequence[Sequence[Timing]]) -> tuple[int, int]:
    """Tokens of later turns that repeat the previous turn, and how many of them were cached."""
    old = hits = 0
    for timings in sessions:
        for before, now in itertools.pairwise(timings):
            if now.error is None:
                same = min(now.prompt_tokens, before.prompt_tokens + before.output_tokens)
                old += same
                hits += min(now.cached_tokens, same)
    return old, hits


def _share(timings: Sequence[Timing]) -> float:
    prompt = sum(timing.prompt_tokens for timing in timings)
    return sum(timing.cached_tokens for timing in timings) / prompt if prompt else 0.0
