"""The engine work of one HTTP request, which a disconnect, a deadline or a shutdown may end early."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.types import Receive

from farthing.cost import meter
from farthing.cost.meter import CostMeter, CostReport, open_meter, together, usage_extension
from farthing.cost.prices import Machine, Prices
from farthing.cpus import cpu_name, usable_cpus
from farthing.engine.request import EngineError, EngineFailed, RequestAtFault, RequestOutput
from farthing.engine.sequence import Missed
from farthing.server.errors import ApiError, ClientGone

if TYPE_CHECKING:
    import torch

    from farthing.cost.meter import RequestCost
    from farthing.engine.engine import Engine
    from farthing.engine.request import RequestMetrics, RequestStream

    Charge = Callable[[str, RequestMetrics], RequestCost]


# Token usage of a request, in OpenAI's format.


PROMPT_HEADER = "X-Farthing-Prompt"  # cached and computed tokens; missing if a stream opens before them


@dataclass(slots=True)
class Usage:
    """Token counts of one HTTP request, summed over its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int = 0
    reasoning_tokens: int = 0  # completion tokens
    with_cost: bool = False  # report the cost in `x_farthing`
    prompts: dict[int, RequestMetrics] = field(default_factory=dict)  # by position

    @property
    def prompt_details(self) -> dict[str, int]:
        """Prompt tokens found in the prefix cache, and, if it was asked, those that were not, by reason."""
        found = [metrics.missed for metrics in self.prompts.values() if metrics.missed is not None]
        names = (f"{name}_tokens" for name in Missed._fields)
        missed = dict(zip(names, map(sum, zip(*found, strict=True)), strict=False))
        return {"cached_tokens": sum(each.cached_tokens for each in self.prompts.values()), **missed}

    def headers(self) -> dict[str, str]:
        """The same as a header."""
        counts = ", ".join(f"{name}={n}" for name, n in self.prompt_details.items())
        return {PROMPT_HEADER: counts} if self.prompts else {}

    def document(self, job: Job) -> dict[str, Any]:
        """The `usage` object of a job whose streams have all finished."""
        document: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": self.prompt_details,
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }
        if self.with_cost and job.costs:
            document["x_farthing"] = usage_extension(together(job.costs))
        return document


# Cost accounting of a server: the price of its machine and the spending of each API key.

log = logging.getLogger("farthing.server")


class Accounts:
    """Charges every request of one engine from the moment the object is created."""

    def __init__(self, engine: Engine, machine: Machine, model: str) -> None:
        self._stats = engine.stats
        self._model = model
        self._meter = CostMeter(machine, open_meter(machine))

    @property
    def machine(self) -> Machine:
        """The machine being paid for."""
        return self._meter.machine

    def charge(self, client: str, metrics: RequestMetrics) -> RequestCost:
        """Charge a finished request; `client` is the name of its key."""
        usage = meter.Usage(
            prefill_tokens=metrics.prefill_tokens,
            cached_tokens=metrics.cached_tokens,
            decode_tokens=metrics.decode_tokens,
            prefill_seconds=metrics.prefill_seconds,
            decode_seconds=metrics.decode_seconds,
        )
        return self._meter.record(usage, self._stats.busy_seconds, self._model, client)

    def report(self) -> CostReport:
        """A snapshot of all accounts."""
        return self._meter.report(self._stats.busy_seconds)


def machine_of(device: torch.device, prices: str | None = None, hardware: str | None = None) -> Machine:
    """The machine of an engine on `device`. Raises ValueError for unknown hardware or invalid prices."""
    declared = Prices.load(prices)
    if device.type == "cuda":
        import torch

        machine = declared.machine("gpu", torch.cuda.get_device_name(device), 1, hardware)
    else:
        machine = declared.machine("cpu", cpu_name(), usable_cpus(), hardware)
    log.info(
        "cost: %d x %s at %.4g USD/hour (declared %s)",
        *(machine.count, machine.hardware.name, machine.usd_per_hour, machine.declared),
    )
    return machine


# The streams of one request.

T = TypeVar("T")

UNREAD = 4 << 20  # bytes of an answer, besides what the kernel buffers


class Job:
    """Engine streams with one deadline. `close()` cancels those still running, exactly once."""

    def __init__(
        self,
        client: str,
        sequences: int,
        timeout: float,
        on_close: Callable[[Job], None],
        charge: Charge | None = None,
    ) -> None:
        """sequences: that its streams may have together. on_close: called once, when it ends."""
        loop = asyncio.get_running_loop()
        self.client, self.sequences = client, sequences
        self.streams: list[RequestStream] = []
        self.identity = ""  # of a chat's answer
        self.generated = 0  # tokens
        self.costs: list[RequestCost] = []  # of finished streams
        self._charge = charge
        self._settling: set[asyncio.Task[None]] = set()
        self._interrupted: asyncio.Future[ApiError] = loop.create_future()
        self._timer = loop.call_later(timeout, self._time_out, timeout)
        self._on_close = on_close
        self._open = True
        self._guarded = False

    def interrupt(self, error: ApiError) -> None:
        """Stop the work. If the response is incomplete, the client receives `error`."""
        if not self._interrupted.done():
            self._interrupted.set_result(error)
        if not self._guarded:
            self.close()

    def _time_out(self, seconds: float) -> None:
        message = f"the request did not finish within {seconds:g} s"
        self.interrupt(ApiError(504, message, code="timeout"))

    def bound_unread(self) -> None:
        """End the work, with an error, once the client has left too much of its answer unread."""
        loop = asyncio.get_running_loop()
        for stream in self.streams:
            stream.limit_unread(UNREAD // len(self.streams), lambda: loop.call_soon_threadsafe(self._give_up))

    def _give_up(self) -> None:
        message = f"the client left more than {UNREAD >> 20} MiB of the answer unread"
        self.interrupt(ApiError(408, message, code="client_too_slow"))

    def close(self) -> None:
        """Cancel the streams still running and release the job's slot."""
        if not self._open:
            return
        self._open = False
        self._timer.cancel()
        for stream in self.streams:
            if stream.done:
                continue
            stream.cancel()
            if self._charge is not None:
                task = asyncio.ensure_future(self._settle(stream))
                self._settling.add(task)
                task.add_done_callback(self._settling.discard)
        self._on_close(self)

    async def _settle(self, stream: RequestStream) -> None:
        """Charge a cancelled stream once the engine has released it."""
        try:
            async for output in stream:
                if output.finished and self._charge is not None:
                    self.costs.append(self._charge(self.client, output.metrics))
        except EngineError as error:
            self._failed(error)

    def _failed(self, error: EngineError) -> None:
        """Charge a failed request for its use until the failure."""
        if error.metrics is not None and self._charge is not None:
            self.costs.append(self._charge(self.client, error.metrics))

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yield (prompt index, output) as outputs arrive. Raises ApiError if the engine fails or stops."""
        try:
            if len(self.streams) == 1:
                async for output in self.streams[0]:
                    self._received(output)
                    yield 0, output
            else:
                async for position, output in self._merged():
                    self._received(output)
                    yield position, output
        except EngineError as error:
            self._failed(error)
            raise

    def _received(self, output: RequestOutput) -> None:
        """Count and charge an output. Raises ApiError if the engine has given up the request."""
        if output.finished and self._charge is not None:
            self.costs.append(self._charge(self.client, output.metrics))
        for completion in output.outputs:
            self.generated += len(completion.token_ids)
            if completion.finish_reason in ("abort", "error"):
                raise ApiError(503, f"the engine ended the request: {completion.finish_reason}")

    async def guard(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` until it ends, the client leaves (ClientGone), or the job is interrupted (ApiError).

        The job is always closed on return.
        """
        self._guarded = True
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            events: set[asyncio.Future[Any]] = {working, leaving, self._interrupted}
            await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if self._interrupted.done():
                raise self._interrupted.result()
            raise ClientGone
        except EngineFailed as error:  # a gateway retries this on another replica
            raise ApiError(503, str(error), code="engine_failed") from error
        except RequestAtFault as error:
            raise ApiError(400, str(error), code="invalid_value") from error
        except EngineError as error:
            raise ApiError(500, str(error), code="engine_error") from error
        finally:
            leaving.cancel()
            if not working.done():
                working.cancel()
                await asyncio.wait({working})
            self.close()

    async def _merged(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Outputs of several streams in order of arrival."""
        queue: asyncio.Queue[tuple[int, RequestOutput] | BaseException | None] = asyncio.Queue()

        async def feed(position: int, stream: RequestStream) -> None:
            try:
                async for output in stream:
                    queue.put_nowait((position, output))
                queue.put_nowait(None)
            except EngineError as error:
                queue.put_nowait(error)

        tasks = [asyncio.ensure_future(feed(*numbered)) for numbered in enumerate(self.streams)]
        try:
            open_streams = len(tasks)
            while open_streams:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    open_streams -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()


CONNECTION: ContextVar[Receive] = ContextVar("connection")  # of the running request, once its body is read


async def unless_gone(work: asyncio.Future[T]) -> T:
    """The result of work before there is a job; it is cancelled if the client leaves. Raises ClientGone."""
    receive = CONNECTION.get(None)
    if receive is None or work.done():
        return await work
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        events: set[asyncio.Future[Any]] = {work, leaving}
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return work.result()
    finally:
        leaving.cancel()
        work.cancel()


async def _disconnected(receive: Receive) -> None:
    """Return once the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
