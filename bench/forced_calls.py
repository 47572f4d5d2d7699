"""How many required calls of a weak model end within a token limit, per chat format and schema.

usage: python bench/forced_calls.py [--model mite] [--random] [--seeds 8] [--tokens 256]
Temperature 1. --random gives the model random weights. A call that does not end is cut by the limit.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from farthing.config import EngineConfig
from farthing.conversation import forced
from farthing.conversation.base import ChatFormat, ControlTokens
from farthing.conversation.select import FORMATS
from farthing.conversation.strict import forced_grammar
from farthing.conversation.types import Conversation, Tool, ToolChoice, Turn
from farthing.engine.build import build_engine
from farthing.engine.engine import Engine
from farthing.engine.request import CallParams, SamplingParams, StructuredOutputsParams
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig
from farthing.model.load import random_model
from farthing.ops.select import select


def _object(required: int, **properties: dict[str, Any]) -> dict[str, Any]:
    """A schema whose first properties are required."""
    return {"type": "object", "properties": properties, "required": list(properties)[:required]}


INTEGER, BOOLEAN = {"type": "integer"}, {"type": "boolean"}
FILTER = _object(0, field={"enum": ["a", "b"]}, negate=BOOLEAN)
COUNTS = {"type": "array", "items": INTEGER}
SCHEMAS = {
    "weather": _object(1, city={"type": "string"}, days=INTEGER),
    "light": _object(1, on=BOOLEAN, level={"type": "number"}),
    "query": _object(2, filter=FILTER, limit=INTEGER),
    "choices": _object(2, unit={"enum": ["C", "F"]}, counts=COUNTS, ratio={"type": "number"}),
    "free": _object(1, meta={"type": "object"}, value={}),
}


def submit(engine: Engine, form: ChatFormat, schema: dict[str, Any], seed: int, tokens: int) -> Any:
    """Request a call and return its stream."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None

    def special(text: str) -> int | None:
        token: int | None = tokenizer.backend.token_to_id(text)
        return token if token in tokenizer.control_ids else None

    tool = Tool("call_it", "Does it.", schema)
    conversation = Conversation((Turn("user", "What now?"),), (tool,), ToolChoice("required"))
    grammar = forced_grammar(conversation, form.syntax, special, tokens)
    params = SamplingParams(
        temperature=1.0,
        seed=seed,
        max_tokens=tokens,
        calls=CallParams(openers=(), grammar=grammar.grammar) if grammar else None,
        structured_outputs=None
        if grammar
        else StructuredOutputsParams(json=forced.schema(conversation, tokens)),
    )
    control = ControlTokens(tokenizer.bos_token or "", tokenizer.eos_token or "")
    prompt = tokenizer.encode(form.render(conversation, control), add_special_tokens=False)
    return engine.submit(prompt[-256:], params, kind="final")


def main() -> None:
    """Print one row per format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mite")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    engine = build_engine(EngineConfig(model=args.model, threads=2, max_num_seqs=32))
    if args.random:
        config = ModelConfig.from_directory(resolve_model(args.model))
        tokenizer, engine_config = engine.tokenizer, engine.config
        engine.shutdown()
        engine = Engine(random_model(config, select("cpu"), seed=7), engine_config, tokenizer)
    forms = {name: form for name, form in FORMATS.items() if name != "deepseek_r1"}
    forms["json list"] = replace(FORMATS["deepseek_v3"], syntax=None)
    streams = {
        (name, schema): [
            submit(engine, form, SCHEMAS[schema], seed, args.tokens) for seed in range(args.seeds)
        ]
        for name, form in forms.items()
        for schema in SCHEMAS
    }
    print(f"{'format':14}", *(f"{name:>8}" for name in (*SCHEMAS, "all")))
    total = 0.0
    for name in forms:
        shares = []
        for schema in SCHEMAS:
            outputs = [list(stream)[-1].outputs[0] for stream in streams[name, schema]]
            shares.append(sum(output.finish_reason == "stop" for output in outputs) / args.seeds)
        total += sum(shares) / len(shares) / len(forms)
        print(f"{name:14}", *(f"{share:8.0%}" for share in (*shares, sum(shares) / len(shares))))
    print(f"all {total:.1%} of {len(forms) * len(SCHEMAS) * args.seeds}")
    engine.shutdown()


if __name__ == "__main__":
    main()
