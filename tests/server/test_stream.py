"""A lock and a gate that clients pass in turns."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.engine.request import Table, positions
from farthing.server import stream
from farthing.server.errors import ApiError, ClientTooSlow
from farthing.server.sampling import TokenTexts, chat_logprobs, completion_logprobs, prompt_logprobs
from farthing.server.stream import (
    SIZE,
    EventStream,
    FairLock,
    Gate,
    PiecedAnswer,
    Pieces,
    PieceWriter,
    event,
    texts,
)
from tests.server.harness import tokenizer


def test_client_with_one_request_waits_for_one_of_each_other() -> None:
    async def run() -> list[str]:
        lock, order = FairLock(), []

        async def work(client: str) -> None:
            await lock.acquire(client)
            await asyncio.sleep(0)
            order.append(client)
            lock.release()

        await asyncio.gather(*map(work, ["a", "a", "a", "a", "b", "c", "b"]))
        return order

    assert asyncio.run(run()) == ["a", "a", "b", "c", "a", "b", "a"]


def test_cancelled_request_passes_its_turn_on() -> None:
    async def run() -> bool:
        lock = FairLock()
        await lock.acquire("a")
        waiting = [asyncio.ensure_future(lock.acquire("a")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # while it waits
        await asyncio.sleep(0)
        lock.release()
        waiting[1].cancel()  # after it got the lock, before it runs
        await asyncio.wait_for(waiting[2], 1)
        lock.release()
        await asyncio.wait_for(lock.acquire("b"), 1)
        return True

    assert asyncio.run(run())


def test_a_burst_begins_a_few_at_a_time_and_does_not_pass_other_clients() -> None:
    began: list[tuple[str, int]] = []
    turn = 0

    async def run() -> None:
        nonlocal turn
        gate = Gate(per_turn=4)

        async def request(client: str) -> None:
            await gate.enter(client)
            began.append((client, turn))

        burst = [asyncio.ensure_future(request("bad")) for _ in range(100)]
        await asyncio.sleep(0)
        burst.append(asyncio.ensure_future(request("good")))
        while not all(task.done() for task in burst):
            turn += 1
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)
        assert gate._left == 4
        await asyncio.wait_for(gate.enter("late"), 1)

    asyncio.run(run())
    turns = [turn for _, turn in began]
    assert max(turns.count(each) for each in set(turns)) <= 4 and len(began) == 101
    assert [client for client, _ in began].index("good") < 12


DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(DOCUMENTS)
def test_pieces_form_the_document(document: Any) -> None:
    assert json.loads("".join(texts(document))) == json.loads(json.dumps(document))
    pieced = {"a": Pieces(iter([document, 1])), "b": [Pieces([]), document]}
    plain = {"a": [document, 1], "b": [[], document]}
    assert json.loads("".join(texts(pieced))) == json.loads(json.dumps(plain))
    (line, end) = "".join(event(pieced)).split("\n\n")
    assert line.startswith("data: ") and not end


def written(count: int, top: int, seed: int = 0) -> tuple[list[int], list[Any], np.ndarray]:
    """`count` tokens with the log-probabilities of `top` others each."""
    generator = np.random.default_rng(seed)
    values = -np.sort(generator.random((count, 1 + top), np.float32), axis=1)
    ids = np.stack([generator.permutation(260)[: 1 + top] for _ in range(count)]).astype(np.int32)
    table = Table(ids, values, np.full(count, top + 1, np.int32))
    return ids[:, 0].tolist(), positions(table, [top] * count, tokenizer().token_text), values


def test_log_probabilities_that_json_cannot_hold_are_the_floor() -> None:
    known = TokenTexts(tokenizer())
    assert [known.entry(5, value)["logprob"] for value in (math.nan, -math.inf, -0.5)] == [
        -9999.0,
        -9999.0,
        -0.5,
    ]


def test_log_probabilities_of_every_shape() -> None:
    tokens, given_positions, values = written(40, 5)
    known = TokenTexts(tokenizer())
    chat = json.loads("".join(texts(chat_logprobs(given_positions, 3, known))))
    legacy = json.loads(
        "".join(texts(completion_logprobs([7, *tokens], [None, *given_positions], 3, known, 2)))
    )
    prompt = json.loads("".join(texts(prompt_logprobs([None, *given_positions], known))))
    assert prompt[0] is None and legacy["token_logprobs"][0] is None and legacy["top_logprobs"][0] is None
    assert legacy["text_offset"][:1] == [2] and len(legacy["text_offset"]) == 41
    for row, (token, position) in enumerate(zip(tokens, given_positions, strict=True)):
        entry = chat["content"][row]
        assert entry["logprob"] == legacy["token_logprobs"][row + 1] == float(values[row, 0])
        assert [each["logprob"] for each in entry["top_logprobs"]] == values[row, 1:4].tolist()
        assert bytes(entry["bytes"]) == tokenizer().token_bytes(token)
        shown = {int(name): value for name, value in prompt[row + 1].items()}
        assert list(shown) == list(position) and shown[token]["rank"] == 6
        for name, value in shown.items():
            assert value["logprob"] == position[name].logprob and value["rank"] == position[name].rank


def test_pieces_are_small_and_built_one_per_iteration() -> None:
    """The delay of others is bounded for any size and number of requests."""
    made: list[int] = []
    turn = 0

    def counted(items: Any) -> Any:
        for item in items:
            made.append(turn)
            yield item

    async def run() -> list[str]:
        nonlocal turn
        turns, sizes = PieceWriter(), []

        async def write(client: str) -> None:
            _, given_positions, _ = written(400, 20)
            document = {"prompt_logprobs": prompt_logprobs(given_positions, TokenTexts(tokenizer()))}
            async for piece in turns.pieces(counted(texts(document)), client):
                sizes.append(piece)

        tasks = [asyncio.ensure_future(write(client)) for client in ("a", "a", "b")]
        while not all(task.done() for task in tasks):
            turn += 1
            await asyncio.sleep(0)
        return sizes

    pieces = asyncio.run(run())
    assert max(map(len, pieces)) < SIZE + 4_096
    most = max(made.count(each) for each in set(made))
    assert most <= 60  # of about 2,400 texts


class Late:
    """A job whose deadline passes as soon as its work is done."""

    async def guard(self, receive: Any, work: Any) -> None:
        await work
        raise ApiError(504, "late")


async def one_chunk() -> Any:
    yield "data: a\n\n"


@pytest.mark.parametrize("kind", ["pieces", "events"])
def test_answers_that_nothing_reads_raise_client_too_slow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_LAST_WORD", 0.01)
    answer: Any = PiecedAnswer({"a": Pieces([1])}, PieceWriter(), "", 0.01)
    if kind == "events":
        answer = EventStream(Late(), one_chunk(), every=60.0)  # type: ignore[arg-type]
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if kind == "pieces" or len(sent) > 3:  # what follows the stream's own end
            await asyncio.Event().wait()

    async def run() -> None:
        scope = {"type": "http", "path": "/v1/completions", "headers": []}
        await answer(scope, asyncio.Event().wait, send)

    with pytest.raises(ClientTooSlow):
        asyncio.run(run())
