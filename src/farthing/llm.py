"""Farthing in a script: `LLM("model").chat("What is a monad?")`; `AsyncLLM` for event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from farthing.config import EngineConfig
from farthing.engine.build import build_engine
from farthing.engine.embedding import HIDDEN, check_dimensions, check_pooling, embeddings
from farthing.engine.request import CompletionOutput, RequestOutput, RequestStream, SamplingParams
from farthing.engine.tokenizer import Tokenizer
from farthing.hub import EMBEDDED
from farthing.options import EngineOptions

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class _Engine:
    """What both interfaces have: an engine in this process, and requests to it."""

    def __init__(self, model: str | Path = EMBEDDED, **options: Unpack[EngineOptions]) -> None:
        """options: fields of `EngineConfig`. ValueError names a field, TypeError an unknown option and the
        nearest one."""
        # Offline batches may be of any size, and throughput matters more than per-token latency.
        settings: dict[str, Any] = {"max_queue": None, "max_step_ms": 0, **options}
        for name in ("packed", "prefix_cache_dir"):
            if settings.get(name) is not None:
                settings[name] = str(settings[name])
        self.engine = build_engine(EngineConfig(model=str(model), **settings))

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError with skip_tokenizer_init."""
        if self.engine.tokenizer is None:
            raise ValueError("this LLM was built with skip_tokenizer_init=True; expected token ids only")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends."""
        return SamplingParams(**self.engine.default_sampling)

    def _submit_probe(self, prompt: Prompt) -> RequestStream:
        return self.engine.submit(prompt, HIDDEN, kind="final")

    def _check_embedding(self, dimensions: int | None) -> None:
        check_pooling(self.engine.config.model)
        check_dimensions(dimensions, self.engine.model_config.hidden_size)

    def __del__(self) -> None:
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.shutdown()


class LLM(_Engine):
    """One model in this process. Option names follow vLLM's.

    `generate` and `chat` return when everything is finished, `stream` yields output as it arrives. Call
    `close` or use `with` to free the memory deterministically.
    """

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        add_special_tokens: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts (texts or lists of token ids) in one batch; outputs in the order of the prompts.

        sampling_params: one for all, or one for each. use_tqdm: a progress bar on stderr. Raises ValueError
        for a request that cannot be served, before anything runs; EngineError if the engine fails.
        """
        batch = _as_batch(prompts)
        params = self._per_prompt(sampling_params, len(batch))
        urgency = list(priority) if priority is not None else [0] * len(batch)
        if len(urgency) != len(batch):
            raise ValueError(
                f"priority has {len(urgency)} entries; expected {len(batch)}, one for each prompt"
            )
        return self._run(batch, params, urgency, use_tqdm, add_special_tokens)

    def chat(
        self,
        messages: str | Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, by the model's chat template. A text is one user's message."""
        conversations = _conversations(messages)
        prompts = [
            self.engine.chat_prompt(c, tools, add_generation_prompt, **(chat_template_kwargs or {}))
            for c in conversations
        ]
        params = self._per_prompt(sampling_params, len(prompts))
        return self._run(prompts, params, [0] * len(prompts), use_tqdm, add_special_tokens=False)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        add_special_tokens: bool = True,
    ) -> Iterator[RequestOutput]:
        """Yield new output as it arrives: each `text` and `token_ids` continues the previous ones.

        Leaving the loop early cancels the request.
        """
        params = sampling_params or self.get_default_sampling_params()
        stream = self.engine.submit(prompt, params, add_special_tokens=add_special_tokens)
        try:
            yield from stream
        finally:
            stream.cancel()

    def embed(self, texts: Prompt | Sequence[Prompt], dimensions: int | None = None) -> NDArray[np.float32]:
        """Embeddings [n, dimensions] of length one, by a model such as Qwen3-Embedding: of the last token.

        Raises ValueError for a model that pools otherwise.
        """
        self._check_embedding(dimensions)
        streams = [self._submit_probe(text) for text in _as_batch(texts)]
        return embeddings([_probe_of(stream.result()) for stream in streams], dimensions)

    def close(self) -> None:
        """End the engine's thread. May be called more than once."""
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _per_prompt(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise ValueError(f"sampling_params has {len(params)} entries; expected one, or {count}")
        return list(params)

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        priority: Sequence[int],
        progress: bool,
        add_special_tokens: bool,
    ) -> list[RequestOutput]:
        streams: list[RequestStream] = []
        try:
            for prompt, p, urgency in zip(prompts, params, priority, strict=True):
                stream = self.engine.submit(
                    prompt, p, priority=urgency, kind="final", add_special_tokens=add_special_tokens
                )
                streams.append(stream)
            return _collect(streams, progress)
        except BaseException:  # Ctrl-C included: nothing keeps running behind the caller's back
            for stream in streams:
                stream.cancel()
            raise


class AsyncLLM(_Engine):
    """One model in this process for an event loop: every call is one request, and calls that run at the same
    time are batched. A cancelled call ends its request."""

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        add_special_tokens: bool = True,
    ) -> RequestOutput:
        """Complete a text or a list of token ids. Raises ValueError for a request that cannot be served."""
        params = sampling_params or self.get_default_sampling_params()
        stream = self.engine.submit(
            prompt, params, priority=priority, kind="final", add_special_tokens=add_special_tokens
        )
        return await _finished(stream)

    async def chat(
        self,
        messages: str | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RequestOutput:
        """Answer a conversation by the model's chat template. A text is one user's message."""
        prompt = await self._chat_prompt(messages, tools, chat_template_kwargs)
        return await self.generate(prompt, sampling_params, add_special_tokens=False)

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> AsyncIterator[RequestOutput]:
        """Yield new output as it arrives: each `text` and `token_ids` continues the previous ones."""
        params = sampling_params or self.get_default_sampling_params()
        stream = self.engine.submit(prompt, params, add_special_tokens=add_special_tokens)
        try:
            async for output in stream:
                yield output
        finally:
            stream.cancel()

    async def stream_chat(
        self,
        messages: str | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """`chat`, yielding new output as it arrives."""
        prompt = await self._chat_prompt(messages, tools, chat_template_kwargs)
        async for output in self.stream(prompt, sampling_params, add_special_tokens=False):
            yield output

    async def embed(
        self, texts: Prompt | Sequence[Prompt], dimensions: int | None = None
    ) -> NDArray[np.float32]:
        """Embeddings [n, dimensions], as `LLM.embed`."""
        self._check_embedding(dimensions)
        streams = [self._submit_probe(text) for text in _as_batch(texts)]
        found = await asyncio.gather(*map(_finished, streams))
        return embeddings([_probe_of(output) for output in found], dimensions)

    async def close(self) -> None:
        """End the engine's thread. May be called more than once."""
        await asyncio.to_thread(self.engine.shutdown)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _chat_prompt(
        self,
        messages: str | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any] | None,
    ) -> str:
        (conversation,) = _conversations(messages)
        return await asyncio.to_thread(self.engine.chat_prompt, conversation, tools, True, **(options or {}))


async def _finished(stream: RequestStream) -> RequestOutput:
    try:
        return await stream.aresult()
    except BaseException:  # cancellation included
        stream.cancel()
        raise


def _probe_of(output: RequestOutput) -> NDArray[np.float32]:
    assert output.probe is not None
    return output.probe


def _conversations(
    messages: str | Sequence[Message] | Sequence[Sequence[Message]],
) -> list[Sequence[Message]]:
    """One conversation or several. Raises ValueError for what is neither, saying what is expected."""
    if isinstance(messages, str):
        return [[{"role": "user", "content": messages}]]
    if isinstance(messages, Mapping):
        return [[messages]]
    if messages and isinstance(messages[0], Mapping):
        return [cast("Sequence[Message]", messages)]
    if all(not isinstance(m, str) and isinstance(m, Sequence) for m in messages):
        return list(cast("Sequence[Sequence[Message]]", messages))
    raise ValueError(
        f"messages: got {str(messages)[:60]!r}; expected a text, a list of messages such as "
        '{"role": "user", "content": "Hello"}, or a list of such lists'
    )


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(p, int) for p in prompts):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _collect(streams: Sequence[RequestStream], progress: bool) -> list[RequestOutput]:
    if not progress:
        return [stream.result() for stream in streams]
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    outputs = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Generating", total=len(streams), rate="")
        tokens = 0
        for stream in streams:
            output = stream.result()
            outputs.append(output)
            tokens += sum(len(c.token_ids) for c in output.outputs)
            elapsed = bar.tasks[0].elapsed or 0.0
            bar.update(task, advance=1, rate=f"{tokens / elapsed:.0f} tokens/s" if elapsed else "")
    return outputs


__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
