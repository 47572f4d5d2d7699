"""The server's state: the engine once it is loaded, the running jobs, and whether new ones are accepted."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.routing import Route

from farthing.server.cache_digest import CacheDigest
from farthing.server.config import KeyRing, ServerConfig
from farthing.server.errors import ApiError
from farthing.server.formats import ModelFormats
from farthing.server.jobs import Job
from farthing.server.memory import AnswerMemory, ResponseStore
from farthing.server.quotas import Quotas
from farthing.server.sampling import TokenTexts
from farthing.server.schema import UnknownFields, short
from farthing.server.stream import PieceWriter
from farthing.shares import Shares

if TYPE_CHECKING:
    from farthing.engine.engine import Engine
    from farthing.server.jobs import Accounts


class Service:
    """Used only in the event loop, except that the loading thread sets `loading`, `engine` and `accounts`."""

    def __init__(self, config: ServerConfig, model: str, page: Sequence[Route] = ()) -> None:
        """page: what the page alone asks; see `tools.page_routes`."""
        self.page = page
        self.config = config
        self.names = config.served_model_name or (model,)
        self.created = int(time.time())
        self.unknown_fields = UnknownFields(config.strict_fields)
        self.cache_digest = CacheDigest()
        limits = config.requests_per_minute, config.tokens_per_minute, config.work_seconds_per_minute
        self.quotas = Quotas(*limits) if any(limits) else None
        self.engine: Engine | None = None
        self.loading: tuple[str, int, int] | None = None  # what is done before there is one; see `Progress`
        self._formats: asyncio.Future[ModelFormats] | None = None
        self.chosen_formats: ModelFormats | None = None  # the result of `formats`, once it is known
        keys = (config.keys or KeyRing(())) | (config.admin_keys or KeyRing(()))
        self.several_keys = len(keys) > 1
        self.piece_writer = PieceWriter()
        self._token_texts: TokenTexts | None = None
        self.responses = ResponseStore(keys=max(1, len(keys.names())))
        self.answers = AnswerMemory()
        self.accounts: Accounts | None = None  # set before the engine is
        self.launch_to_ready: float | None = None  # seconds
        self.written_at_ready = 0  # bytes
        self.draining = False
        self.jobs: set[Job] = set()
        self.held = Shares()  # its pieces of work: sequences in flight
        self.idle = asyncio.Event()
        self.idle.set()

    # readiness

    def unready(self) -> str | None:
        """The reason to reject requests now; None if there is none."""
        if self.engine is None:
            what, done, total = self.loading or ("", 0, 0)
            return "the model is being loaded" + (f": {what}, {done / total:.0%}" if total else "")
        if self.draining:
            return "the server is shutting down"
        return self.broken()

    def broken(self) -> str | None:
        """The reason to restart the process; None if there is none."""
        try:
            if self.engine is not None:
                self.engine.health()
        except RuntimeError as error:  # EngineFailed
            return f"the engine has failed: {error}"
        return None

    def require_engine(self) -> Engine:
        """The engine. Raises ApiError (503) while it cannot accept requests."""
        reason = self.unready()
        if reason is not None or self.engine is None:
            raise ApiError(503, reason or "", code="not_ready", retry_after=5)
        return self.engine

    def check_model(self, name: str | None) -> str:
        """The served name for the answer. Raises ApiError (404)."""
        if name is None or name in self.names:
            return name or self.names[0]
        if (plain := name.removesuffix(":latest")) in self.names:  # as Ollama's clients write it
            return plain
        accepted = ", ".join(repr(known) for known in self.names)
        raise ApiError(
            404,
            f"model: got {short(name)}; expected one of {accepted}",
            param="model",
            code="model_not_found",
        )

    async def formats(self) -> ModelFormats:
        """The model's chat formats. Raises ApiError (503) while it is loading."""
        if self._formats is None:
            self._formats = asyncio.ensure_future(ModelFormats.of(self.require_engine(), self.config))
        self.chosen_formats = await asyncio.shield(self._formats)  # other requests wait for it too
        return self.chosen_formats

    def token_texts(self) -> TokenTexts:
        """The texts of the model's tokens. Raises ApiError (503) while it is loading."""
        if self._token_texts is None:
            self._token_texts = TokenTexts(self.require_engine().tokenizer)
        return self._token_texts

    # requests in flight

    def check_room(self, client: str, prompts: int, n: int) -> None:
        """Raises ApiError (429, or 400 if it could never fit) for more sequences than the queue has room for,
        or than one key's share."""
        room, sequences, own = self.require_engine().queue_room, prompts * n, self.held.work(client)
        if room is None:
            return
        if sequences > room:
            raise ApiError(
                429 if self.held.present else 400,
                f"{prompts} prompts with n = {n} are {sequences} sequences; expected at most {room}, "
                "the free places in the queue",
                param="n",
                reason="queue_full",
                retry_after=self.retry_after() if self.held.present else None,
            )
        if self.several_keys and own and own + sequences > room:
            raise ApiError(
                429,
                f"{client!r} has {own} sequences in flight and requests {sequences}; "
                f"expected at most {room} together, because as many places stay free for other keys",
                reason="queue_full",
                retry_after=self.retry_after(),
            )

    def salt(self, client: str, salt: str) -> str:
        """The salt of the prefix cache. Timing reveals cached prompts, so keys do not share them."""
        return salt if self.config.share_prefix_cache else f"{len(client)}:{client}{salt}"

    def begin(self, client: str, sequences: int) -> Job:
        """A job of this client, which holds places in the queue until it is closed."""
        charge = self.accounts.charge if self.accounts else None
        job = Job(client, sequences, self.config.request_timeout, on_close=self._closed, charge=charge)
        self.held.enter(client, sequences)
        self.jobs.add(job)
        self.idle.clear()
        return job

    def retry_after(self) -> int:
        """Seconds until a place in the queue is likely to be free: the mean wait so far, at most a minute."""
        waited = self.engine.stats.snapshot().request_queue_time if self.engine else None
        mean = waited.sum / waited.count if waited and waited.count else 0.0
        return min(60, max(1, math.ceil(mean)))

    def _closed(self, job: Job) -> None:
        if self.quotas is not None:
            self.quotas.charge(job.client, job.generated)
        self.held.leave(job.client, job.sequences)
        self.jobs.discard(job)
        if not self.jobs:
            self.idle.set()

    # the end

    async def drain(self) -> bool:
        """Reject new requests and let running ones finish for at most `drain_timeout` seconds; then end the
        rest with an error. Returns whether all of them finished."""
        self.draining = True
        try:
            await asyncio.wait_for(self.idle.wait(), self.config.drain_timeout)
            return True
        except TimeoutError:
            for job in list(self.jobs):
                job.interrupt(ApiError(503, "the server shut down before the answer ended", code="shutdown"))
            return False
