"""Share of an agent session's repeated prompt tokens that are computed again, by kind of cache.

Every turn sends the whole conversation: instructions, then answers and results of tools. All tokens but the
last result were sent or generated before; the prefix cache should find them. On models with windows and
recurrent states it must also find what these layers keep at the end of the prefix. The models have random
weights, few and narrow layers and a part of the heads. Windows, and the bytes of a state relative to those of
a token, are as published, so the published models compute the same tokens again.

    python bench/agent_cache.py                # every model, restarted once
    python bench/agent_cache.py --restarts 4   # a new process on the same disk cache every fourth turn
    python bench/agent_cache.py --peer PATH/llama-server   # the same weights and sessions on llama.cpp

The peer gets the shapes as a GGUF file that `farthing export` writes. One slot computes all prompts; it is
saved before a restart and restored after it. Its other settings are the defaults.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from farthing.compress.gguf import export_gguf
from farthing.config import EngineConfig
from farthing.engine.engine import Engine
from farthing.engine.request import SamplingParams
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.load import random_model
from farthing.ops.select import select
from glm_dsa_peer import Server

VOCABULARY = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
    "max_position_embeddings": 32768, "num_experts_per_tok": 2, "rms_norm_eps": 1e-6,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": COMMON | {
        "model_type": "qwen3_moe", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 128, "num_experts": 4, "norm_topk_prob": True,
    },
    "gpt_oss": COMMON | {
        "model_type": "gpt_oss", "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 1,
        "head_dim": 64, "num_local_experts": 4, "sliding_window": 128, "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen3_5_moe": {"model_type": "qwen3_5_moe", "text_config": COMMON | {
        "model_type": "qwen3_5_moe_text", "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 1, "head_dim": 256, "num_experts": 4, "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    }},
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Tokens of a session."""

    turns: int = 20
    instructions: int = 2000
    result: int = 300
    thinking: int = 40
    answer: int = 40

    @property
    def length(self) -> int:
        """Tokens of the last prompt and its answer, at most."""
        return self.instructions + self.turns * (self.result + self.thinking + self.answer)


@dataclass
class Count:
    """Prompt tokens of a session."""

    sent: int = 0
    repeated: int = 0  # sent or generated in an earlier turn
    again: int = 0  # repeated and computed again

    @property
    def share(self) -> float:
        """Of the repeated tokens."""
        return self.again / max(1, self.repeated)


class Ours:
    """Our engine with a disk cache."""

    def __init__(self, model: DecoderModel, shape: Shape, folder: Path) -> None:
        self._model, self._new = model, shape.thinking + shape.answer
        self._config = EngineConfig(
            max_num_seqs=4, num_blocks=2 * shape.length // 16, max_model_len=shape.length + 64,
            prefix_cache_dir=str(folder),
        )  # fmt: skip
        self._engine = Engine(model, self._config)

    def turn(self, prompt: list[int]) -> tuple[list[int], int]:
        """The answer, and how many tokens of the prompt were cached."""
        params = SamplingParams(temperature=0, max_tokens=self._new, ignore_eos=True)
        found = self._engine.submit(prompt, params).result()
        return list(found.outputs[0].token_ids), found.metrics.cached_tokens

    def restart(self) -> None:
        """A new engine on the same disk cache."""
        self.close()
        self._engine = Engine(self._model, self._config)

    def close(self) -> None:
        """Stop the engine."""
        self._engine.shutdown()


class LlamaServer:
    """A llama-server with one slot."""

    def __init__(self, binary: Path, name: str, shape: Shape, folder: Path) -> None:
        checkpoint, model = folder / name, folder / f"{name}.gguf"
        raw = dict(MODELS[name].get("text_config", MODELS[name]))
        config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(checkpoint)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        pair = (letters[0], letters[1])  # llama.cpp refuses a tokenizer without merges
        vocabulary = {token: i for i, token in enumerate([*letters, "".join(pair)])}
        tokenizer = Tokenizer(models.BPE(vocabulary, [pair]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(checkpoint / "tokenizer.json"))
        export_gguf(checkpoint, model)
        self._start = lambda: Server(binary, model, 2, shape.length + 64)
        self._server, self._new = self._start(), shape.thinking + shape.answer

    def turn(self, prompt: list[int]) -> tuple[list[int], int]:
        """The answer, and how many tokens of the prompt were cached."""
        found = self._server.complete(prompt, self._new, 1)
        answer = [each["id"] for each in found["completion_probabilities"]]
        return answer, len(prompt) - int(found["timings"]["prompt_n"])

    def restart(self) -> None:
        """A new process with the saved slot."""
        self._server.slot("save", "slot.bin")
        self._server.close()
        self._server = self._start()
        self._server.slot("restore", "slot.bin")

    def close(self) -> None:
        """Stop the process."""
        self._server.close()


def session(system: Ours | LlamaServer, shape: Shape, restarts: int, keep_thinking: bool) -> Count:
    """Run one session; restarts: turns that one process serves."""
    draw, count, known = random.Random(1), Count(), 0
    prompt = [draw.randrange(2, VOCABULARY) for _ in range(shape.instructions)]
    try:
        for turn in range(shape.turns):
            if turn and turn % restarts == 0:
                system.restart()
            prompt += [draw.randrange(2, VOCABULARY) for _ in range(shape.result)]
            answer, cached = system.turn(prompt)
            count.sent += len(prompt)
            count.repeated += known
            count.again += max(0, known - cached)
            known = len(prompt) + (len(answer) if keep_thinking else 0)
            prompt += answer if keep_thinking else answer[shape.thinking :]
    finally:
        system.close()
    return count


def measure(
    name: str, shape: Shape, restarts: int, keep_thinking: bool, ops: str, peer: Path | None = None
) -> Count:
    """One session of a model, with a disk cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        if peer is not None:
            system: Ours | LlamaServer = LlamaServer(peer, name, shape, Path(folder))
        else:
            model = random_model(ModelConfig.from_json(MODELS[name]), select(ops), seed=3)
            model.ops.source = name  # identifies blocks on disk
            system = Ours(model, shape, Path(folder))
        return session(system, shape, restarts, keep_thinking)


def main() -> None:
    """Print a line per model, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--turns", type=int, default=Shape.turns)
    parser.add_argument("--restarts", type=int, default=10, help="turns that one process serves")
    parser.add_argument("--ops", default="cpu", help="backend; counts do not depend on it")
    parser.add_argument("--peer", type=Path, metavar="PATH", help="llama-server, measured instead of ours")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    shape, rows = Shape(turns=a.turns), []
    for name in a.models:
        for keep in (True, False):
            count = measure(name, shape, a.restarts, keep, a.ops, a.peer)
            rows.append({"model": name, "thinking": "kept" if keep else "dropped", **asdict(count)})
            print(
                f"{name:12} thinking {'kept' if keep else 'dropped':8} {count.repeated:8,} repeated tokens, "
                f"{count.again:7,} computed again: {count.share:.2%}"
            )
    if a.json:
        a.json.write_text(
            json.dumps({"shape": asdict(shape), "restarts": a.restarts, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
