"""ik_llama.cpp's `glm-dsa` through its llama-server: the same logits as ours, and times at a given context.

    python bench/glm_dsa_peer.py PATH/llama-server

compares next-token distributions with the reference backend on a small random model in float32, with dense
and with sparse attention, after a prompt and token by token. Prints mean KL divergences; the off-diagonal
ones show how far apart dense and sparse attention are on this model.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import glm_dsa_gguf
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.parameters import random_parameters
from farthing.model.source import MemorySource, WeightSource
from farthing.ops.reference import ReferenceOps
from farthing.ops.torch_util import make_batch

START_SECONDS = 120
DECODED = 9  # tokens per timed decode; the first one belongs to the prompt
SAVED = "prefix.bin"


class Server:
    """A llama-server with one slot, whose cache can be saved and restored."""

    def __init__(self, binary: Path, model: Path, threads: int, context: int, *flags: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        port = self._url.rpartition(":")[2]
        folder = model.resolve().parent
        command = [binary.resolve(), "-m", model.resolve(), "-t", threads, "-c", context, "-np", 1]
        command += ["--port", port, "--slot-save-path", folder, *flags]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        # The peer always selects the first token too ("sink"); V3.2 and GLM-5 do not.
        self._process = subprocess.Popen(
            [str(c) for c in command],
            stdout=self._log,
            stderr=self._log,
            env=os.environ | {"DSA_SINK": "0"},
            cwd=folder,  # it leaves a log where it runs
        )
        atexit.register(self.close)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self._url}/health").close()
                return
            except urllib.error.URLError:
                time.sleep(0.1)
        self._log.seek(0)
        raise SystemExit(f"{self._process.args!r} did not start:\n{self._log.read()[-2000:]}")

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def complete(self, tokens: list[int], new: int, probabilities: int = 0) -> dict[str, Any]:
        """Greedy tokens after a prompt; cached tokens that it shares are reused."""
        body = {"prompt": tokens, "n_predict": new, "n_probs": probabilities, "id_slot": 0}
        return self._post("/completion", body | {"temperature": 0, "samplers": [], "ignore_eos": True})

    def slot(self, action: str, name: str) -> None:
        """Save the slot's cache to a file next to the model, or restore it."""
        self._post(f"/slots/0?action={action}", {"filename": name})

    def close(self) -> None:
        """Stop the process."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Peer:
    """Times of a model in one server per way of attending ("sparse" and "dense"), after a random prefix.

    The folder keeps the model in the peer's format and the cache of the prefix, prefilled once for both ways:
    the cost of attention does not depend on the values.
    """

    def __init__(
        self, binary: Path, config: ModelConfig, source: WeightSource, folder: Path, threads: int,
        context: int, flags: list[str],
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        self._prefix = torch.randint(3, config.vocab_size, (context,), generator=generator).tolist()
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "slice.gguf"
        if not self.file.exists():
            partial = self.file.with_suffix(".partial")
            glm_dsa_gguf.write(config, source, partial)
            partial.rename(self.file)
        common = [binary, self.file, threads, context + 4096, "--cache-ram", 0]
        if not (folder / SAVED).exists():
            # With a top-k above the context it attends densely, which is faster, and caches index keys.
            server = Server(*common, "--dsa", "--dsa-top-k", 2**20, "-ub", 2048)
            server.complete(self._prefix, 1)
            server.slot("save", SAVED)
            server.close()
        self._servers = {"sparse": Server(*common, "--dsa", *flags), "dense": Server(*common, *flags)}

    def step(self, way: str, past: int, tokens: int) -> float:
        """Seconds to compute new tokens after `past` cached ones; if only one, the mean of several steps."""
        server = self._servers[way]
        server.slot("restore", SAVED)  # requests reuse what they share with it
        chunk = torch.randint(3, 1000, (tokens,)).tolist()
        found = server.complete(self._prefix[:past] + chunk, DECODED if tokens == 1 else 1)["timings"]
        if found["prompt_n"] != tokens:
            raise SystemExit(f"the server computed {found['prompt_n']} tokens; expected {tokens}")
        if tokens > 1:
            return float(found["prompt_ms"]) / 1e3
        return float(found["predicted_ms"]) / 1e3 / (DECODED - 1)


def small_model() -> ModelConfig:
    """Real head sizes, four layers, the last of which reuses a selection of 256 tokens."""
    return ModelConfig.from_json(
        dict(
            model_type="glm_moe_dsa", vocab_size=320, hidden_size=256, intermediate_size=512,
            moe_intermediate_size=128, num_hidden_layers=4, first_k_dense_replace=1, num_attention_heads=4,
            q_lora_rank=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
            n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, routed_scaling_factor=2.5,
            index_topk=256, index_head_dim=128, index_n_heads=8, max_position_embeddings=4096,
            rope_theta=10000.0, indexer_types=["full", "full", "full", "shared"],
        )
    )  # fmt: skip


def _distributions(answer: dict[str, Any], vocabulary: int) -> Tensor:
    """Log-probabilities [tokens, vocabulary]; the answer names tokens by their pieces."""
    which = {piece: i for i, piece in enumerate(glm_dsa_gguf.pieces(vocabulary))}
    found = torch.zeros(len(answer["completion_probabilities"]), vocabulary)
    for row, token in zip(found, answer["completion_probabilities"], strict=True):
        for entry in token["probs"]:
            row[which[entry["tok_str"]]] = entry["prob"]
    return found.log()


def _ours(model: DecoderModel, tokens: list[int]) -> Tensor:
    blocks = -(-len(tokens) // 16)
    cache, batch = (
        model.new_cache(blocks, 16, "float32"),
        make_batch([len(tokens)], [0], [list(range(blocks))], 16),
    )
    with torch.inference_mode():
        return model.logits(model.forward(torch.tensor(tokens), batch, cache)).log_softmax(-1)


def agreement(binary: Path, prompt: int = 700, new: int = 16) -> dict[str, dict[str, float]]:
    """Mean KL divergence of the peer's next-token distributions from ours: peer's way -> our way -> KL."""
    config = small_model()
    parameters = random_parameters(config)
    ops = ReferenceOps(torch.float32)
    models = {
        "sparse": DecoderModel(config, ops, MemorySource(parameters)),
        "dense": DecoderModel(config.selecting(None), ops, MemorySource(parameters)),
    }
    ids = torch.randint(259, 320, (prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.gguf"
        glm_dsa_gguf.write(config, MemorySource(parameters), file, "f32")
        for way, flags in (("sparse", ["--dsa"]), ("dense", [])):
            server = Server(binary, file, 1, 2048, "--cache-ram", 0, *flags)
            theirs = _distributions(server.complete(ids, new, config.vocab_size), config.vocab_size)
            server.close()
            known = theirs[:, 3:].log_softmax(-1)  # without the special tokens, some of which it suppresses
            tokens = ids + theirs.argmax(-1)[:-1].tolist()
            found[way] = {}
            for name, model in models.items():
                ours = _ours(model, tokens)[prompt - 1 :, 3:].log_softmax(-1)
                found[way][name] = float((ours.exp() * (ours - known)).sum(-1).mean())
    return found


if __name__ == "__main__":
    print(json.dumps(agreement(Path(sys.argv[1])), indent=1))
