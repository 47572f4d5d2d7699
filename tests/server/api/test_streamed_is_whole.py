"""With any fields, a streamed answer is the whole one in parts, in every API, and changes no other answer.

The fields and their values are those of test_sampling_matrix.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest

from farthing.server.config import ServerConfig
from farthing.server.service import Service
from tests.server.api.test_sampling_matrix import APIS, body_of, fields, served
from tests.server.harness import events, tiny_engine

# For a stream alone or a whole answer alone; or they make an answer differ from the same request's next one.
APART = {"stream", "stream_options", "prompt_logprobs", "seed", "options.seed", "previous_response_id"}
# What a request has besides: enough tokens for stops to end it, and the likeliest of them.
GREEDY: dict[str, dict[str, Any]] = {
    "/v1/completions": {"max_tokens": 12, "temperature": 0},
    "/v1/chat/completions": {"max_tokens": 12, "temperature": 0},
    "/v1/responses": {"max_output_tokens": 16, "temperature": 0},
    "/v1/messages": {"max_tokens": 12, "temperature": 0},
    "/api/chat": {"options.num_predict": 12, "options.temperature": 0},
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
# Values that end an answer, begin calls or show what was sampled, besides those of the matrix.
STOPS = [["\ufffd"], ["N", "e"], ["\ufffd\ufffd", "\ufffdN"], [" ", "a", "o"]]
CHAT_TOOLS = [[{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]]
LIKELY: dict[str, dict[str, list[Any]]] = {
    "/v1/completions": {"stop": STOPS, "logprobs": [0, 2]},
    "/v1/chat/completions": {
        "stop": STOPS, "tools": CHAT_TOOLS, "tool_choice": ["required"],
        "logprobs": [True], "top_logprobs": [2],
    },
    "/v1/responses": {
        "tools": [[{"type": "function", "name": "f", "parameters": SCHEMA}]], "tool_choice": ["required"],
        "include": [["message.output_text.logprobs"]],
    },
    "/v1/messages": {
        "stop_sequences": STOPS, "tools": [[{"name": "f", "input_schema": SCHEMA}]],
        "tool_choice": [{"type": "any"}],
    },
    "/api/chat": {"options.stop": STOPS, "tools": CHAT_TOOLS, "logprobs": [True], "format": [SCHEMA]},
}  # fmt: skip
CANARY = {"messages": [{"role": "user", "content": "Sing."}], "max_tokens": 8, "temperature": 0, "logprobs": True}  # fmt: skip  # noqa: E501
COUNT = 300

Folded = list[tuple[Any, ...]]  # per choice: texts, calls, reported tokens, and why it ended


def _joined(parts: Iterable[str | None]) -> str:
    return "".join(part or "" for part in parts)


def tokens(entries: Iterable[dict[str, Any]]) -> list[tuple[str, int]]:
    """Of log probabilities; their values depend in the last digits on what else a step computes."""
    return [(entry["token"], len(entry.get("top_logprobs") or ())) for entry in entries]


def completions(documents: list[dict[str, Any]]) -> Folded:
    found: dict[int, list[dict[str, Any]]] = {}
    for choice in (choice for document in documents for choice in document["choices"]):
        found.setdefault(choice["index"], []).append(choice)
    return [
        (
            _joined(part["text"] for part in parts),
            [token for part in parts for token in (part.get("logprobs") or {}).get("tokens", ())],
            parts[-1]["finish_reason"],
        )
        for _, parts in sorted(found.items())
    ]


def chats(documents: list[dict[str, Any]]) -> Folded:
    found: dict[int, list[dict[str, Any]]] = {}
    for choice in (choice for document in documents for choice in document["choices"]):
        found.setdefault(choice["index"], []).append(choice)
    folded = []
    for _, parts in sorted(found.items()):
        said = [part.get("delta") or part.get("message") or {} for part in parts]
        calls = [call["function"] for each in said for call in each.get("tool_calls") or ()]
        calls += [each["function_call"] for each in said if each.get("function_call")]
        folded.append(
            (
                _joined(each.get("content") for each in said),
                _joined(each.get("reasoning_content") for each in said),
                _joined(call.get("name") for call in calls),
                _joined(call.get("arguments") for call in calls),
                tokens(p for part in parts for p in (part.get("logprobs") or {}).get("content") or ()),
                parts[-1]["finish_reason"],
            )
        )
    return folded


def responses(documents: list[dict[str, Any]]) -> Folded:
    whole = documents[-1].get("response", documents[-1])
    parts = [part for item in whole["output"] for part in item.get("content") or ()]
    if len(documents) > 1:
        told = _joined(each["delta"] for each in documents if each["type"] == "response.output_text.delta")
        assert told == _joined(part["text"] for part in parts if part["type"] == "output_text")
    kinds = [(item["type"], item.get("name"), item.get("arguments")) for item in whole["output"]]
    texts = [(part["text"], tokens(part.get("logprobs") or ())) for part in parts]
    return [(kinds, texts, whole["status"], whole["incomplete_details"], whole["usage"]["output_tokens"])]


def messages(documents: list[dict[str, Any]]) -> Folded:
    if len(documents) == 1:
        (whole,) = documents
        blocks = [
            (b["type"], b.get("text") or b.get("thinking") or "", b.get("name"), b.get("input", {}))
            for b in whole["content"]
        ]
        return [(blocks, whole["stop_reason"], whole["stop_sequence"], whole["usage"]["output_tokens"])]
    blocks = []
    for start in (each for each in documents if each["type"] == "content_block_start"):
        own = [
            e["delta"]
            for e in documents
            if e["type"] == "content_block_delta" and e["index"] == start["index"]
        ]
        text = _joined(delta.get("text") or delta.get("thinking") for delta in own)
        given = _joined(delta.get("partial_json") for delta in own)
        block = start["content_block"]
        blocks.append((block["type"], text, block.get("name"), json.loads(given or "{}")))
    (end,) = (each for each in documents if each["type"] == "message_delta")
    return [(blocks, *(end["delta"][name] for name in ("stop_reason", "stop_sequence")), end["usage"]["output_tokens"])]  # fmt: skip  # noqa: E501


def ollama(documents: list[dict[str, Any]]) -> Folded:
    said = [document["message"] for document in documents]
    return [
        (
            _joined(each["content"] for each in said),
            _joined(each.get("thinking") for each in said),
            [call["function"] for each in said for call in each.get("tool_calls") or ()],
            tokens(p for document in documents for p in document.get("logprobs") or ()),
            documents[-1]["done_reason"],
            documents[-1]["eval_count"],
        )
    ]


FOLD: dict[str, Callable[[list[dict[str, Any]]], Folded]] = dict(
    zip(APIS, (completions, chats, responses, messages, ollama), strict=True)
)


def documents_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The parts of an answer; one if it was not streamed."""
    kind = answer.headers["content-type"].partition(";")[0]
    if kind == "text/event-stream":
        return [event for event in events(answer.text) if event != "[DONE]"]
    return [json.loads(line) for line in answer.text.splitlines()]


def check(path: str, requests: list[dict[str, Any]]) -> int:
    """Send each both ways, one after the other, beside a client whose answers must stay the same. Returns how
    many were answered."""
    service = Service(ServerConfig(), "tiny")
    engine = service.engine = tiny_engine(max_model_len=128)

    async def main() -> int:
        answered, over = 0, asyncio.Event()
        async with served(service) as send:

            async def sing() -> set[str]:
                songs = set()
                while not over.is_set():
                    answer = await send("/v1/chat/completions", CANARY)
                    songs.add(json.dumps(chats([answer.json()])))
                return songs

            canary = asyncio.ensure_future(sing())
            try:
                for chosen in requests:
                    body = body_of(path, chosen | GREEDY[path])
                    whole, parts = [await send(path, body | {"stream": way}) for way in (False, True)]
                    said = f"{path} {json.dumps(chosen)[:600]}"
                    assert whole.status_code == parts.status_code, said
                    if whole.status_code == 200:
                        answered += 1
                        fold = FOLD[path]
                        assert fold(documents_of(whole)) == fold(documents_of(parts)), said
            finally:
                over.set()
            assert len(await canary) == 1
        return answered

    try:
        return asyncio.run(main())
    finally:
        engine.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("path", APIS)
def test_a_stream_is_the_whole_answer_in_parts(path: str) -> None:
    pick = random.Random(path)
    known = {name: found for name, found in fields(path).items() if name not in APART | GREEDY[path].keys()}
    known |= {name: known.get(name, []) + 3 * found for name, found in LIKELY[path].items()}
    alone = [{name: value} for name, found in known.items() for value in found]
    mixed = [
        {
            name: pick.choice(known[name])
            for name in (
                *pick.sample(list(known), pick.randint(1, 3)),
                *pick.sample(list(LIKELY[path]), pick.randint(0, 2)),
            )
        }
        for _ in range(COUNT)
    ]
    assert check(path, alone + mixed) > COUNT // 4
