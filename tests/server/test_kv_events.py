"""Events of the prefix cache in vLLM's format, read by a subscriber written from its public description."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

zmq = pytest.importorskip("zmq")
msgpack = pytest.importorskip("msgpack")

from farthing.engine.request import SamplingParams  # noqa: E402
from farthing.server.config import ServerConfig  # noqa: E402
from farthing.server.kv_events import KvEvents  # noqa: E402
from farthing.server.run import serve  # noqa: E402
from tests.server.harness import tiny_engine  # noqa: E402

BLOCK = 16


class Subscriber:
    """What a router knows: the tokens of every block, by hash, with the block before."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.subscribe(b"")
        self.blocks: dict[int, tuple[int | None, list[int]]] = {}
        self.numbers: list[int] = []
        self.removed = self.cleared = 0

    def until(self, condition: Any) -> None:
        while not condition():
            assert self._socket.poll(60_000), "no message"
            topic, number, payload = self._socket.recv_multipart()
            assert topic == b"" and len(number) == 8
            self.numbers.append(int.from_bytes(number, "big"))
            time, events, *_ = msgpack.unpackb(payload)
            assert time > 0
            for event in events:
                self.apply(*event)

    def apply(self, tag: str, *fields: Any) -> None:
        if tag == "BlockStored":
            hashes, parent, tokens, size, adapter, *_ = fields
            assert size == BLOCK and len(tokens) == size * len(hashes) and adapter is None
            for i, block in enumerate(hashes):
                self.blocks[block] = parent, tokens[i * size : (i + 1) * size]
                parent = block
        elif tag == "BlockRemoved":
            self.removed += len(fields[0])
            for block in fields[0]:
                del self.blocks[block]  # it was announced before
        else:
            assert tag == "AllBlocksCleared" and not fields
            self.cleared += 1
            self.blocks.clear()

    def prompts(self) -> list[list[int]]:
        """The tokens of every chain of blocks."""
        parents = {parent for parent, _ in self.blocks.values()}
        chains = []
        for block in self.blocks.keys() - parents:
            tokens: list[int] = []
            at: int | None = block
            while at is not None:
                at, own = self.blocks[at]
                tokens = own + tokens
            chains.append(tokens)
        return chains

    def close(self) -> None:
        self._socket.close(linger=0)


@pytest.fixture
def events() -> Iterator[tuple[KvEvents, Subscriber]]:
    made = KvEvents("tcp://127.0.0.1:*")
    subscriber = Subscriber(made.endpoint)
    while not subscriber.numbers:  # a subscription takes a moment; before, messages are lost
        made.cleared()
        if subscriber._socket.poll(20):
            subscriber.until(lambda: subscriber.numbers)
    yield made, subscriber
    subscriber.close()
    made.close()


def test_a_subscriber_knows_the_cached_prompts(events: tuple[KvEvents, Subscriber]) -> None:
    publisher, subscriber = events
    engine = tiny_engine(num_blocks=12, block_size=BLOCK)
    try:
        publisher.follow(engine)
        first, second = list(range(3, 3 + 50)), [9] * 70
        for prompt in (first, first, second):
            engine.submit(prompt, SamplingParams(max_tokens=1, temperature=0)).result()
        subscriber.until(lambda: len(subscriber.blocks) == 3 + 4)
        assert sorted(subscriber.prompts()) == sorted([first[:48], second[:64]])
        for start in range(20, 100, 20):  # more than there is room for
            engine.submit([start] * 90, SamplingParams(max_tokens=1, temperature=0)).result()
        subscriber.until(lambda: subscriber.removed >= 7)
        assert first[:48] not in subscriber.prompts()
        assert subscriber.numbers == list(range(subscriber.numbers[0], subscriber.numbers[-1] + 1))
    finally:
        engine.shutdown()


def test_a_dropped_cache_is_announced(events: tuple[KvEvents, Subscriber]) -> None:
    publisher, subscriber = events
    engine = tiny_engine(num_blocks=12, block_size=BLOCK)
    try:
        publisher.follow(engine)
        engine.submit([5] * 40, SamplingParams(max_tokens=1)).result()
        subscriber.until(lambda: len(subscriber.blocks) == 2)
        cleared = subscriber.cleared

        def renew(core: Any) -> None:
            core.scheduler = core.scheduler.renewed()

        engine.between_steps(renew).result()
        subscriber.until(lambda: subscriber.cleared > cleared)
        assert not subscriber.blocks
        engine.submit([6] * 40, SamplingParams(max_tokens=1)).result()
        subscriber.until(lambda: len(subscriber.blocks) == 2)
    finally:
        engine.shutdown()


def test_a_bad_endpoint_is_an_error_before_the_model_is_loaded() -> None:
    with pytest.raises(ValueError, match="kv_events: got 'here'; expected an endpoint"):
        serve(ServerConfig(port=0, kv_events="here"), "tiny", lambda _: pytest.fail("loaded"))
