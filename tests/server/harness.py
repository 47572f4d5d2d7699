"""A running server for the tests: real sockets, the real engine over a tiny model, or a scripted one."""

from __future__ import annotations

import asyncio
import atexit
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from openai import OpenAI
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from farthing.config import EngineConfig
from farthing.engine.engine import Engine
from farthing.engine.generation import Detokenizer
from farthing.engine.request import (
    CompletionOutput,
    FinishReason,
    Position,
    Request,
    RequestMetrics,
    RequestOutput,
    RequestStream,
    SamplingParams,
    Table,
    deliver,
)
from farthing.engine.sandbox.sandbox import Sandbox
from farthing.engine.sequence import PrefixCache
from farthing.engine.stats import Stats
from farthing.engine.tokenizer import Tokenizer
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.server.config import ServerConfig
from farthing.server.run import Server, listen, make_server
from farthing.server.service import Service
from farthing.server.tools import PageTools
from tests.served import form_for, served_model
from tests.tiny import tiny

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
RAW = tiny(vocab_size=267, max_position_embeddings=2048)


@cache
def tokenizer(chat_template: str | None = None) -> Tokenizer:
    """One token per byte, after the special tokens; DeepSeek's tool and reasoning tags are also tokens."""
    special = [BOS, EOS, "<｜User｜>", "<｜Assistant｜>"]
    special += [
        f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = HfTokenizer(models.BPE({t: i for i, t in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    config = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True}
    return Tokenizer(backend, config, chat_template=chat_template)


@cache
def tiny_model() -> DecoderModel:
    """A dense and a MoE layer with random weights."""
    torch.set_num_threads(1)
    return served_model(ModelConfig.from_json(RAW))


atexit.register(tiny_model.cache_clear)  # nanobind reports native weights that outlive the interpreter


def letters(text: str, size: int = 1) -> list[str]:
    """A text in pieces of so many characters; the tokenizer's special tokens stay whole."""
    special = "|".join(re.escape(tokenizer().token_text(token)) for token in tokenizer().control_ids)
    return re.findall(rf"(?s)(?:{special}|.){{1,{size}}}", text)


def tiny_engine(**config: Any) -> Engine:
    """The real engine on the tiny model; the caller shuts it down."""
    defaults = {"max_num_seqs": 64, "num_blocks": 1024, "block_size": 4, "max_num_batched_tokens": 256}
    options = EngineConfig(**(defaults | config))
    return Engine(form_for(tiny_model(), options), options, tokenizer())


def _certain(token: int) -> Position:
    table = Table(np.array([[token]], np.int32), np.zeros((1, 1), np.float32), np.ones(1, np.int32))
    return Position(table, 0, 0)


class ScriptedEngine:
    """A fake engine that streams a script.

    script: the text of every answer, as the pieces it streams in; or a function of the prompt's text. A
    special token that a piece does not hold whole is spelled by other tokens. step: seconds before each
    piece. forever: repeat the pieces until cancelled.
    """

    def __init__(
        self,
        script: Sequence[str] | Callable[[str], Sequence[str]] = ("ok",),
        *,
        step: float = 0.0,
        forever: bool = False,
        finish_reason: FinishReason = "stop",
        chat_template: str | None = None,
        max_model_len: int = 100_000,
    ) -> None:
        self.script = script
        self.step, self.forever, self.finish_reason = step, forever, finish_reason
        self.tokenizer = tokenizer(chat_template)
        self.sandbox = Sandbox(self.tokenizer, RAW["vocab_size"])
        self.config = EngineConfig(max_model_len=max_model_len, num_blocks=64, max_num_batched_tokens=64)
        self.model_config = ModelConfig.from_json(RAW)
        self.backend, self.device, self.cache_bytes = "scripted", torch.device("cpu"), 0
        self.default_sampling: Mapping[str, Any] = {}
        self.stats = Stats()
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.cancelled: list[str] = []
        self.metrics: dict[str, RequestMetrics] = {}  # by request; empty ones for others
        self.running = 0
        self.queue_room: int | None = None
        self.error: Exception | None = None  # raised by submit

    def submit(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> RequestStream:
        """Start a thread that streams the script."""
        if self.error is not None:
            raise self.error
        text = self.tokenizer.decode(prompt, skip_special_tokens=False)
        self.prompts.append(text)
        self.params.append(params)
        pieces = self.script if isinstance(self.script, list | tuple) else self.script(text)  # type: ignore[operator]
        stop = threading.Event()
        request = Request(
            request_id=f"scripted-{len(self.prompts)}",
            prompt_token_ids=list(prompt),
            params=params,
            kind=options.get("kind", "delta"),
        )

        def cancel() -> None:
            if not stop.is_set():
                stop.set()
                self.cancelled.append(request.request_id)

        stream = RequestStream(request, cancel, self.metrics.get(request.request_id))
        self.running += 1
        threading.Thread(target=self._play, args=(stream, list(pieces), stop), daemon=True).start()
        return stream

    def _play(self, stream: RequestStream, pieces: list[str], stop: threading.Event) -> None:
        params = stream.request.params
        text = Detokenizer(self.tokenizer, params.skip_special_tokens, params.marked_token_ids)
        whole: list[int] = []
        while not stop.is_set():
            for piece in pieces:
                if self.step and stop.wait(self.step):
                    break
                ids = self.tokenizer.encode(piece, add_special_tokens=False) if piece else []
                whole += ids
                if stream.request.kind == "delta":
                    self._say(stream, "".join(map(text.push, ids)), ids, None)
            if not self.forever:
                break
        reason: FinishReason = "abort" if stop.is_set() else self.finish_reason
        self.running -= 1
        left = [] if stream.request.kind == "delta" else whole
        self._say(stream, "".join(map(text.push, left)) + text.flush(), left, reason)
        stop.set()

    def _say(self, stream: RequestStream, text: str, ids: list[int], reason: FinishReason | None) -> None:
        request, params = stream.request, stream.request.params
        outputs = [
            CompletionOutput(
                i,
                text,
                list(ids),
                logprobs=None if params.logprobs is None else [_certain(token) for token in ids],
                finish_reason=reason,
            )
            for i in range(params.n)
        ]
        output = RequestOutput(
            request.request_id, None, request.prompt_token_ids, outputs, reason is not None,
            self.metrics.get(request.request_id, RequestMetrics()),
        )  # fmt: skip
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None, *map(_certain, request.prompt_token_ids[1:])]
        if params.probe is not None:
            width = self.model_config.hidden_size if params.probe == "hidden" else len(params.probe)
            output.probe = np.ones(width, np.float32)
        deliver([(stream, output)])

    def between_steps(self, call: Callable[[Any], Any]) -> Future[Any]:
        """Call immediately, with a core whose prefix cache is empty."""
        core = SimpleNamespace(scheduler=SimpleNamespace(prefix=PrefixCache(self.config.block_size)))
        future: Future[Any] = Future()
        future.set_result(call(core))
        return future

    def chat_prompt(self, messages: Any, tools: Any = None, **kwargs: Any) -> str:
        """Render with the tokenizer's template."""
        return self.tokenizer.render_chat(messages, tools, **kwargs)

    def health(self) -> None:
        """Always healthy."""

    def shutdown(self) -> None:
        """Terminate the child processes."""
        self.sandbox.close()


class Running:
    """A server in a thread of this process."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.server: Server = make_server(service)
        self.guard = self.server.guard
        self._listener = listen("127.0.0.1", 0)
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started or not self.thread.is_alive())

    def _run(self) -> None:
        asyncio.run(self.server.serve([self._listener]))
        self._listener.close()

    def call(self, function: Callable[[], Any]) -> None:
        """Run a function in the server's event loop."""
        self.server._loop.call_soon_threadsafe(function)

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        """The OpenAI client, without retries."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def stop(self) -> None:
        """Stop immediately."""
        if self.thread.is_alive():
            self.call(lambda: setattr(self.server, "should_exit", True))
            self.thread.join(20)
        assert not self.thread.is_alive()


@contextmanager
def running(engine: Any, tools: Any = None, **config: Any) -> Iterator[Running]:
    """Serve an engine (real, scripted, or None: still loading) as model 'tiny' within the context.

    tools: those of MCP servers, for the page.
    """
    limits = ServerConfig(**config)
    service = Service(limits, "tiny", PageTools(limits, tools).routes() if tools else ())
    service.engine = engine
    server = Running(service)
    try:
        yield server
    finally:
        server.stop()
        if engine is not None:
            engine.shutdown()


def until(condition: Callable[[], Any], timeout: float = 60.0) -> None:
    """Wait for a condition. Raises TimeoutError."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.005)


def events(body: str) -> list[Any]:
    """The data of server-sent events; [DONE] stays a string."""
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
