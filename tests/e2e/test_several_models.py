"""Three packed models where two fit, under random requests. FARTHING_STRESS_SECONDS: of a longer run."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from farthing.server import pool as pool_module
from farthing.server.config import Given, KeyRing, ServerConfig
from farthing.server.front import Front, create_front
from farthing.server.pool import Pool, PoolConfig
from farthing.server.presets import read_presets
from farthing.server.run import listen, server_of

SECONDS = float(os.environ.get("FARTHING_STRESS_SECONDS", "20"))
CLIENTS, KEYS = 6, ["one", "two", "three"]


class Sampler(threading.Thread):
    """What the models hold, many times a second."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(daemon=True)
        self.pool, self.ended = pool, threading.Event()
        self.most = self.loaded = self.samples = 0
        self.evicted_in_use: list[str] = []

    def run(self) -> None:
        while not self.ended.wait(0.1):
            models = list(self.pool.models.values())
            servers = {each.server.process.pid for each in models if each.server is not None}
            self.most = max(self.most, sum(pool_module._group_memory(servers).values()))
            self.loaded = max(self.loaded, sum(each.state == "loaded" for each in models))
            self.evicted_in_use += [each.name for each in models if each.state == "unloading" and each.users]
            self.samples += 1


async def ask(url: str, client: int, deadline: float, answers: Counter[str]) -> None:
    rng = random.Random(client)
    headers = {"Authorization": f"Bearer {KEYS[client % len(KEYS)]}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300) as http:
        while time.monotonic() < deadline:
            model, tokens = rng.choice("abc"), rng.choice((1, 4, 32, 200))
            body = {
                "model": model,
                "prompt": f"import {rng.random()}",
                "max_tokens": tokens,
                "ignore_eos": True,
            }
            if rng.random() < 0.5:
                answer = (await http.post("/v1/completions", json=body)).json()
                right = answer.get("model") == model and answer["usage"]["completion_tokens"] == tokens
            else:
                async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                    lines = [line async for line in stream.aiter_lines()]
                right = stream.status_code == 200 and "data: [DONE]" in lines
            answers["right" if right else "wrong"] += 1
            answers[model] += 1
            await asyncio.sleep(rng.expovariate(4.0))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_none_is_lost_none_in_use_is_unloaded_and_memory_stays_within_the_limit(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(
        "".join(f'[{name}]\nmodel = "mite"\nthreads = 1\nmax_num_seqs = 8\n' for name in "abc")
    )
    presets = read_presets(tmp_path / "models.toml", Given({}, {"drain_timeout": 10.0}))
    models = [each.sized(10**10) for each in presets]
    limit = sum(each.size for each in models[:2]) + models[2].size // 2
    environment = {"FARTHING_API_KEY": ",".join(KEYS)}
    pool = Pool(models, PoolConfig(limit=limit, wait=250.0), environment)
    front = Front(ServerConfig(keys=KeyRing(KEYS)), pool)
    server = server_of(create_front(front), front)
    answers: Counter[str] = Counter()
    with listen("127.0.0.1", 0) as listener:
        serving = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
        serving.start()
        while not server.started:
            time.sleep(0.05)
        sampler = Sampler(pool)
        sampler.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        async def everyone() -> None:
            deadline = time.monotonic() + SECONDS
            await asyncio.gather(*(ask(url, client, deadline, answers) for client in range(CLIENTS)))

        asyncio.run(everyone())
        sampler.ended.set()
        sampler.join()
        server._loop.call_soon_threadsafe(server.begin_drain)
        serving.join(60)
    print(f"{answers}; {pool.loads} loads, {pool.unloads} unloads; "
          f"{sampler.most / 1e6:.0f} of {limit / 1e6:.0f} MB in {sampler.samples} samples")  # fmt: skip
    assert not answers["wrong"] and all(answers[name] for name in "abc")
    assert pool.loads > len(models) and sampler.loaded == 2
    assert not sampler.evicted_in_use
    assert sampler.most <= limit
