"""Models as a Ray Serve application: one deployment per model, one server process per replica.

    client -> Serve's proxy -> Front -> Prefix (chooses the replica) -> Replica -> server process

Front relays answers as they arrive and ends a broken stream with an error event, like our own gateway. The
number of replicas is decided by our controller, which runs in Serve's as its autoscaling policy. `farthing
ray up` runs the application; `serve deploy` and KubeRay build it with `build`.

Only this module imports Ray Serve (extra `ray`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from multidict import CIMultiDict
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import RequestRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

import ray
from farthing.exchange import Upstream, end_to_end, request_headers
from farthing.files import read
from farthing.prompts import read_prompt
from farthing.server.errors import ApiError, Passage
from farthing.upstream import ServerProcess, Watch, free_port, launch
from farthing_fleet.config import FleetConfig, GatewayConfig, PolicyConfig, SloConfig
from farthing_fleet.estimates import make_estimates
from farthing_fleet.gateway.proxy import Outgoing
from farthing_fleet.gateway.replicas import PrefixIndex, cost
from farthing_fleet.run import make_controller
from farthing_fleet.signals_scrape import Reading, ScrapeSource, parse
from farthing_fleet.types import Decision
from ray import serve

NAME = "farthing"  # of the application
_TRIES = 2  # replicas per request; a second one only before the client has received a byte
_HOST = "127.0.0.1"
_LONGEST_ROUTING_S = 60.0  # from a request's arrival until it counts in a queue
_GAUGES = ("running", "waiting", "kv_usage", "launch_s")
_LOST = (RayError, RayServeException)


@dataclass(frozen=True)
class ServeConfig:
    """The application. `{port}` and `{host}` in a command are replaced."""

    commands: dict[str, tuple[str, ...]]  # model name -> command of a replica
    fleet: FleetConfig = field(default_factory=lambda: FleetConfig(PolicyConfig(1.0)))
    health_path: str = "/ready"
    ready_timeout_s: float = 600.0
    drain_s: float = 60.0
    cpus: float = 1.0  # that a replica reserves
    gpus: float = 0.0


class Replica:
    """A server process. The actor ends with it, on which Serve replaces the replica at once."""

    async def __init__(  # type: ignore[misc]
        self, command: tuple[str, ...], watch: Watch, slo: SloConfig
    ) -> None:
        port = free_port(_HOST)
        words = [part.replace("{port}", str(port)).replace("{host}", _HOST) for part in command]
        self._upstream = Upstream(2.0, 600.0)
        self._slo, self._drain_s = slo, watch.drain_timeout
        process = await launch(words, None, {})
        self._server = ServerProcess(NAME, f"http://{_HOST}:{port}", process, time.monotonic())
        self._printing = asyncio.create_task(_print(process.stdout))
        ready = asyncio.Event()
        self._life = asyncio.create_task(
            self._server.live(self._upstream.status, watch, lambda _: ready.set())
        )
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait([waiting, self._life], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        self.check_health()
        self._life.add_done_callback(lambda _: os._exit(1) if self._server.reason else None)

    def check_health(self) -> None:
        """Called by Serve."""
        if self._server.state != "ready":
            raise RuntimeError(f"the server process {self._server.reason or 'is draining'}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The server's metrics as Serve's numbers, for `Scaling`."""
        _, text = await self._upstream.get(self._server.url, "/metrics")
        reading = parse(text.decode(), None, time.monotonic(), self._slo.ttft_s, self._slo.tpot_s)
        if reading is None:
            return {}
        gauges = {name: value for name in _GAUGES if (value := getattr(reading, name)) is not None}
        return {"at": reading.at, **gauges, **{f"total:{name}": n for name, n in reading.totals.items()}}

    async def answer(self, request: Outgoing) -> AsyncIterator[Any]:
        """The status and headers of the answer, then its bytes as they arrive. Raises ReplicaLost."""
        answer = await self._upstream.send(
            self._server.url, request.method, request.target, request.headers, request.body
        )
        try:
            yield answer.status, list(end_to_end(answer.headers.items()).items())
            while data := await answer.part():
                yield data
        finally:
            answer.close()

    async def __del__(self) -> None:
        """Called by Serve once no request is left, or `drain_s` has passed."""
        self._server.drain(self._drain_s)
        await self._life
        self._upstream.close()


async def _print(output: asyncio.StreamReader | None) -> None:
    """A server's lines into the log of its replica."""
    while output is not None and (line := await output.readline()):
        print(line.decode(errors="replace").rstrip(), flush=True)


class Front:
    """Passes each request to the deployment of its model."""

    def __init__(self, models: Mapping[str, Any]) -> None:
        """models: Serve's handles by name."""
        self._models = {name: handle.options(stream=True) for name, handle in models.items()}

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        headers = request_headers(request.headers.items(), request.client.host if request.client else "")
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        config = GatewayConfig()
        prompt = read_prompt(body, config.prefix_blocks, config.prefix_block)
        outgoing = Outgoing(request.method, target, headers, body, prompt)
        if target == "/v1/models" and len(self._models) > 1:
            return JSONResponse({"object": "list", "data": await self._listed(outgoing)})
        try:
            return await self._answer(outgoing, self._named(prompt.model))
        except ApiError as error:
            return error.response(request.scope)

    def _named(self, name: str | None) -> Any:
        """The handle of a model. Raises ApiError (404)."""
        if len(self._models) < 2 or name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            accepted = ", ".join(map(repr, self._models))
            message = f"model: got {name[:80]!r}; expected one of {accepted}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._models[name]

    async def _answer(self, outgoing: Outgoing, handle: Any) -> Response:
        """The answer of the first replica that sends a head. Raises ApiError (502)."""
        for _ in range(_TRIES):
            parts = handle.answer.remote(outgoing)
            try:
                status, headers = await anext(parts)
            except _LOST as problem:
                reason = str(problem).strip().splitlines()[-1]
                continue
            passage = Passage(CIMultiDict(headers), outgoing.target)
            response = StreamingResponse(_relay(parts, passage), status)
            response.raw_headers = [
                (name.lower().encode(), value.encode("latin-1", "replace"))
                for name, value in headers
                if name.lower() not in ("date", "server")  # Serve's proxy adds its own
            ]
            return response
        raise ApiError(502, f"no replica answered the request ({reason})")

    async def _listed(self, outgoing: Outgoing) -> list[Any]:
        """The entries of /v1/models of all deployments."""

        async def entries(handle: Any) -> list[Any]:
            parts = [part async for part in handle.answer.remote(outgoing)]
            return list(json.loads(b"".join(parts[1:]))["data"])

        return [
            entry for found in await asyncio.gather(*map(entries, self._models.values())) for entry in found
        ]


async def _relay(parts: Any, passage: Passage) -> AsyncIterator[bytes]:
    try:
        async for part in parts:
            passage.passed(part)
            yield part
    except _LOST:
        ending = passage.ending("the replica was lost before the answer was complete")
        if ending is None:
            raise  # breaks the connection
        yield ending


def _id(request: Any) -> str:
    return str(request.metadata.internal_request_id)


class Prefix(RequestRouter):  # type: ignore[misc]
    """Serve's request router with the gateway's rule: few requests in flight, little uncached prompt text."""

    def initialize_state(self, **_: Any) -> None:
        self._config = GatewayConfig()
        self._prefixes = PrefixIndex(self._config.prefix_entries)
        self._chosen: dict[str, tuple[Any, Any]] = {}  # request -> itself and its replica until it is sent

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[Any]:
        prompt = pending_request.args[0].prompt if pending_request is not None else read_prompt(b"", 0)
        depths = self._prefixes.depths(prompt.blocks)
        coming = self._coming()

        def of(replica: Any) -> float:
            requests = (self.replica_queue_len_cache.get(replica.replica_id) or 0) + coming[
                replica.replica_id
            ]
            return cost(self._config, requests, prompt, depths.get(str(replica.replica_id), 0))

        found = sorted(candidate_replicas, key=of)
        if pending_request is not None and found:
            self._chosen[_id(pending_request)] = pending_request, found[0].replica_id
        return [[replica] for replica in found]

    def _coming(self) -> Counter[Any]:
        """Requests by replica that Serve's queue lengths do not contain yet: those that arrive together would
        otherwise all choose the same replica."""
        begun = time.time() - _LONGEST_ROUTING_S
        self._chosen = {
            name: (request, replica)
            for name, (request, replica) in self._chosen.items()
            if request.created_at > begun and not request.future.cancelled()
        }
        return Counter(replica for _, replica in self._chosen.values())

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        self._chosen.pop(_id(pending_request), None)
        self._prefixes.learn(pending_request.args[0].prompt.blocks, str(replica_id))

    def update_replicas(self, replicas: list[Any]) -> None:
        for gone in set(self.curr_replicas) - {replica.replica_id for replica in replicas}:
            self._prefixes.forget(str(gone))
        super().update_replicas(replicas)


class Scaling(ScrapeSource):
    """Serve's autoscaling policy: our controller in a thread. Serve tells what it measured and asks for the
    target; to the controller this is both the source of signals and the actuator."""

    def __init__(self, config: str) -> None:
        """config: a FleetConfig as JSON."""
        self._fleet = read(FleetConfig, json.loads(config))
        super().__init__(dict, self._fleet.signals)
        self._seen: tuple[int, dict[str, Reading | None], float] | None = None
        self._target: int | None = None
        threading.Thread(target=lambda: asyncio.run(self._control()), daemon=True).start()

    async def _control(self) -> None:
        controller = make_controller(self._fleet, self, self, make_estimates(self._fleet))
        while self._seen is None:
            await asyncio.sleep(0.1)
        await controller.run(asyncio.Event())

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Called by Serve's controller several times a second."""
        oldest = time.time() - self._fleet.policy.stale_after_s
        found: dict[str, dict[str, float]] = {str(replica): {} for replica in context.running_replicas}
        for name, series in context.raw_metrics.items():
            for replica, points in series.items():
                if str(replica) in found and points and points[-1].timestamp >= oldest:
                    found[str(replica)][name] = points[-1].value
        readings = {replica: reading_of(values) for replica, values in found.items()}
        self._seen = context.target_num_replicas, readings, context.total_queued_requests or 0.0
        return (self._target if self._target is not None else context.target_num_replicas), {}

    async def read(self, current: int) -> Any:
        assert self._seen is not None
        _, readings, queued = self._seen
        return self.snapshot(current, readings, queued)

    async def current(self) -> int | None:
        return self._seen[0] if self._seen is not None else None

    async def apply(self, decision: Decision) -> None:
        self._target = decision.target


def reading_of(values: Mapping[str, float]) -> Reading | None:
    """Inverse of `Replica.record_autoscaling_stats`."""
    if "at" not in values:
        return None
    totals = {name.removeprefix("total:"): n for name, n in values.items() if name.startswith("total:")}
    return Reading(values["at"], totals=totals, **{name: values.get(name) for name in _GAUGES})


def application(config: ServeConfig) -> Any:
    """The Serve application."""
    deployments = {name: _deployment(name, command, config) for name, command in config.commands.items()}
    # Next to the head node's proxy: a lost node then never takes the front of a stream with it.
    at_head = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
    front = serve.deployment(Front).options(
        name="front", ray_actor_options=at_head, max_ongoing_requests=8192
    )
    return front.bind(deployments)


def _deployment(name: str, command: tuple[str, ...], config: ServeConfig) -> Any:
    fleet = config.fleet.of(name)
    fleet = replace(fleet, state=fleet.state.absolute())
    policy = fleet.policy
    watch = Watch(
        path=config.health_path,
        ready_timeout=config.ready_timeout_s,
        drain_timeout=config.drain_s,
        liveness=60.0,
    )
    scaling = {"config": json.dumps(asdict(fleet), default=str)}
    deployment = serve.deployment(Replica).options(
        name=name.replace("/", "--"),
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        max_ongoing_requests=2048,  # the server has a queue of its own
        graceful_shutdown_timeout_s=config.drain_s,
        health_check_period_s=1.0,
        autoscaling_config=AutoscalingConfig(
            min_replicas=policy.min_replicas,
            max_replicas=policy.max_replicas,
            metrics_interval_s=min(10.0, policy.interval_s),
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            policy=AutoscalingPolicy(policy_function=f"{__name__}:Scaling", policy_kwargs=scaling),
        ),
        request_router_config=RequestRouterConfig(request_router_class=f"{__name__}.Prefix"),
    )
    return deployment.bind(command, watch, policy.slo)


def build(arguments: dict[str, Any]) -> Any:
    """The application of a Serve configuration file: `import_path: farthing_ray.serve:build`, with the
    fields of `ServeConfig` as `args`. Raises ValueError."""
    config = read(ServeConfig, arguments)
    config.fleet.checked()
    return application(config)


@contextmanager
def serving(config: ServeConfig, address: str | None, host: str, port: int) -> Iterator[str]:
    """Run the application on a cluster, or one of this process (`address` None), until the context ends.

    Yields its URL once a replica of each model is ready. Raises ValueError.
    """
    try:
        ray.init(address=address or "local", logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as problem:
        raise ValueError(f"address: got {address!r}; expected HOST:PORT of a cluster: {problem}") from problem
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port, location="HeadOnly"))
        try:
            serve.run(application(config), name=NAME)
        except RuntimeError as problem:
            raise ValueError(f"the application did not start: {problem}") from problem
        yield f"http://{host}:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
