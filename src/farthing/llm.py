"""Farthing in a script: `LLM("model").generate(["def fibonacci(n):"], SamplingParams(max_tokens=64))`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from farthing.config import EngineConfig
from farthing.engine.build import build_engine
from farthing.engine.request import CompletionOutput, RequestOutput, RequestStream, SamplingParams
from farthing.engine.tokenizer import Tokenizer
from farthing.hub import EMBEDDED

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """One model in this process. Option names follow vLLM's.

    `generate` and `chat` return when everything is finished, `stream` yields output as it arrives. Call
    `close` or use `with` to free the memory deterministically.
    """

    def __init__(self, model: str | Path = EMBEDDED, **options: Any) -> None:
        """options: fields of `EngineConfig`. ValueError names a field, TypeError an unknown option."""
        # Offline batches may be of any size, and throughput matters more than per-token latency.
        settings: dict[str, Any] = {"max_queue": None, "max_step_ms": 0} | options
        for name in ("packed", "prefix_cache_dir"):
            if settings.get(name) is not None:
                settings[name] = str(settings[name])
        self.engine = build_engine(EngineConfig(model=str(model), **settings))

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
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, by the model's chat template."""
        if messages and isinstance(messages[0], Mapping):
            conversations = [cast("Sequence[Message]", messages)]
        else:
            conversations = list(cast("Sequence[Sequence[Message]]", messages))
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

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError with skip_tokenizer_init."""
        if self.engine.tokenizer is None:
            raise ValueError("this LLM was built with skip_tokenizer_init=True; expected token ids only")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends."""
        return SamplingParams(**self.engine.default_sampling)

    def close(self) -> None:
        """End the engine's thread. May be called more than once."""
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
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


__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
