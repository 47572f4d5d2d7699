"""Several models behind one address: what each replica serves, by its /v1/models.

A replica is asked before it counts as healthy, and again when a request names a model that none serves: an
adapter may have been loaded. One that wants an API key is asked with that of the next request.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, unquote

from farthing.exchange import ReplicaLost, Upstream
from farthing.prompts import Prompt
from farthing_fleet.gateway.errors import Refused
from farthing_fleet.gateway.replicas import Balancer, Replica

PATH = "/v1/models"
_AGAIN_S = 2.0  # between reads for unknown names
_CREDENTIALS = ("Authorization", "X-Api-Key")
# To its end, or to the end of the body: a search that gave up there would begin again at every later quote.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_MOST_QUOTES = 1 << 18  # in a body of which the strings are skipped one by one


def check_model(balancer: Balancer, model: str | None) -> None:
    """Raises Refused (404) if no replica serves the model."""
    if balancer.unknown(model):
        message = f"model: got {str(model)[:80]!r}; expected one of {_named(balancer)}"
        raise Refused(404, message, code="model_not_found", param="model")


def _named(balancer: Balancer) -> str:
    return ", ".join(map(repr, balancer.names))


class Models:
    """Reads what replicas serve, and finds the model of a request."""

    def __init__(self, balancer: Balancer, upstream: Upstream, timeout: float) -> None:
        """timeout: seconds for a replica's answer."""
        self._balancer, self._upstream, self._timeout = balancer, upstream, timeout
        self._read_at: dict[str, float] = {}  # URL of a replica -> loop time
        self._reading = asyncio.Lock()

    async def meet(self, replica: Replica, headers: Mapping[str, str] | None = None) -> None:
        """Read what a replica serves, with the credentials in `headers`. One that lists nothing may serve
        anything.
        """
        self._read_at[replica.url] = asyncio.get_running_loop().time()
        try:
            status, body = await self._upstream.get(replica.url, PATH, headers, timeout=self._timeout)
        except ReplicaLost:
            return
        replica.asks_for_key = status in (401, 403)
        if replica.asks_for_key:
            del self._read_at[replica.url]  # the next request may have the right key
        else:
            self._balancer.reported(replica, _entries(body) if status == 200 else ())

    async def find(self, prompt: Prompt, target: str, headers: Mapping[str, str], body: bytes) -> Prompt:
        """The prompt with the model that its request is for.

        Raises Refused: 400 if it names none, 404 if none of the replicas serves it.
        """
        replicas = self._balancer.replicas.values()
        if not self._balancer.pool(prompt.model) and any(r.healthy and r.asks_for_key for r in replicas):
            await self._refresh([r for r in replicas if r.asks_for_key], headers)
        if len(self._balancer.pools) < 2:
            return prompt
        prompt = replace(prompt, model=prompt.model or self._elsewhere(prompt, target, body))
        if prompt.model is None and body:
            message = f"model is missing; expected one of {_named(self._balancer)}"
            raise Refused(400, message, code="missing_required_parameter", param="model")
        if self._balancer.unknown(prompt.model):
            await self._refresh(list(replicas), headers)
            check_model(self._balancer, prompt.model)
        return prompt

    def listed(self) -> dict[str, Any]:
        """The body of /v1/models: all models and adapters."""
        entries = {name: {"id": name, "object": "model"} for name in self._balancer.pools if name}
        for replica in self._balancer.replicas.values():
            entries |= {entry["id"]: dict(entry) for entry in replica.entries}
        ids = list(entries)
        return {
            "object": "list",
            "data": list(entries.values()),
            "has_more": False,  # from here on: for Anthropic's SDK
            "first_id": ids[0],
            "last_id": ids[-1],
        }

    async def _refresh(self, replicas: list[Replica], headers: Mapping[str, str]) -> None:
        passed = {name: headers[name] for name in _CREDENTIALS if name in headers}
        async with self._reading:
            before = asyncio.get_running_loop().time() - _AGAIN_S
            due = [r for r in replicas if r.healthy and self._read_at.get(r.url, before) <= before]
            await asyncio.gather(*(self.meet(replica, passed) for replica in due))

    def _elsewhere(self, prompt: Prompt, target: str, body: bytes) -> str | None:
        """The model that a request names in its path or query, or in a body that is too long to parse."""
        path, _, query = target.partition("?")
        if path.startswith(PATH + "/"):
            return unquote(path[len(PATH) + 1 :])
        if "model" in (fields := parse_qs(query)):
            return fields["model"][0]
        return None if prompt.parsed else _field(body, self._balancer.names)


def _field(body: bytes, names: Sequence[str]) -> str | None:
    """The known name in the field `model` of a JSON object, not of one inside it; None without one.

    In a body with very many strings, the first one counts.
    """
    written = {json.dumps(name, ensure_ascii=ascii) for name in names for ascii in (True, False)}
    known = b"|".join(re.escape(name.encode("utf-8", "surrogatepass")) for name in written)
    fine, depth, end = body.count(b'"') > _MOST_QUOTES, 0, 0
    for found in re.finditer(rb'(?<!\\)"model"\s*:\s*(' + known + rb")", body):
        between = b"" if fine else _STRING.sub(b"", body[end : found.start()])
        depth += sum(map(between.count, (b"{", b"["))) - sum(map(between.count, (b"}", b"]")))
        if fine or depth == 1:
            return str(json.loads(found[1]))
        end = found.end()
    return None


def _entries(body: bytes) -> list[Mapping[str, Any]]:
    """The entries of a list of models; empty if it is none."""
    try:
        entries = json.loads(body)["data"]
        return [entry for entry in entries if isinstance(entry["id"], str) and entry["id"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
