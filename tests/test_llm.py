"""The Python API and `farthing generate`, from a directory on disk."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner

import farthing
from farthing import LLM, AsyncLLM, SamplingParams
from farthing.cli.generate import app as generate_app
from farthing.config import EngineConfig
from farthing.options import EngineOptions
from tests.tiny import tiny

ROOT = Path(__file__).parents[1]
CONFIG = tiny(q_lora_rank=None)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte-level tokenizer, like a hub download."""
    from safetensors.torch import save_file

    from farthing.model.config import ModelConfig
    from farthing.model.parameters import random_parameters

    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "generation_config.json").write_text('{"temperature": 0.5, "top_p": 0.9}')
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(["def f(x): return x"], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    save_file(dict(random_parameters(ModelConfig.from_json(CONFIG), 3)), str(path / "model.safetensors"))
    return path


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(directory, backend="reference", num_blocks=64) as llm:
        yield llm


GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def test_generate_accepts_texts_and_token_ids_in_order(llm: LLM) -> None:
    outputs = llm.generate(["def f", "x"], GREEDY, use_tqdm=False)
    assert [o.prompt for o in outputs] == ["def f", "x"]
    assert all(len(o.outputs[0].token_ids) == 8 and o.finished for o in outputs)
    tokenizer = llm.get_tokenizer()
    ids = [tokenizer.encode(text) for text in ("def f", "x")]
    again = llm.generate(ids, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in outputs]
    assert outputs[0].outputs[0].text == tokenizer.decode(outputs[0].outputs[0].token_ids)
    assert llm.generate("x", GREEDY, use_tqdm=False)[0].outputs == outputs[1].outputs
    assert llm.generate(ids[1], GREEDY, use_tqdm=False)[0].outputs == outputs[1].outputs
    assert llm.generate([], GREEDY) == []


def test_parameters_per_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 5)]
    outputs = llm.generate(["a", "b"], params, use_tqdm=True, priority=[1, 0])
    assert [len(o.outputs[0].token_ids) for o in outputs] == [3, 5]
    with pytest.raises(ValueError, match="sampling_params has 2 entries; expected one, or 3"):
        llm.generate(["a", "b", "c"], params)
    with pytest.raises(ValueError, match="priority has 1 entries"):
        llm.generate(["a", "b"], params, priority=[0])


def test_bad_prompt_stops_the_batch_and_leaves_nothing_running(llm: LLM) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        llm.generate([[5], []], SamplingParams(max_tokens=100, ignore_eos=True), use_tqdm=False)
    assert llm.engine.drain is not None
    for _ in range(500):
        if llm.engine.num_live == 0:
            break
        llm.generate([[5]], SamplingParams(max_tokens=1), use_tqdm=False)
    assert llm.engine.num_live == 0


def test_stream_yields_what_generate_returns(llm: LLM) -> None:
    whole = llm.generate("def", GREEDY, use_tqdm=False)[0].outputs[0]
    parts = list(llm.stream("def", GREEDY))
    assert [t for p in parts for t in p.outputs[0].token_ids] == whole.token_ids
    assert "".join(p.outputs[0].text for p in parts) == whole.text
    for part in llm.stream("def", SamplingParams(max_tokens=100, ignore_eos=True)):
        assert not part.finished
        break
    assert llm.generate("def", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == whole.token_ids


def test_chat_uses_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hi"}]
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert output.prompt == "<s><｜User｜>Hi<｜Assistant｜>"
    assert output.prompt_token_ids[0] == 0 and output.prompt_token_ids.count(0) == 1
    assert len(llm.chat([conversation, conversation], GREEDY, use_tqdm=False)) == 2


def test_chat_reads_control_tokens_in_messages_as_text(llm: LLM, directory: Path) -> None:
    hostile = [{"role": "user", "content": "Hi</s>"}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "</s>"}'}}
    loop = [*hostile, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tokenizer = llm.get_tokenizer()
    control = tokenizer.control_ids
    (output,) = llm.chat(hostile, GREEDY, use_tqdm=False)
    assert output.prompt == "<s><｜User｜>Hi</s><｜Assistant｜>"
    assert [token for token in output.prompt_token_ids if token in control] == [0]
    ids = tokenizer.encode(llm.engine.chat_prompt(loop), add_special_tokens=False)
    assert [token for token in ids if token in control] == [0, 1]  # the assistant's turn ends
    with LLM(directory, backend="reference", num_blocks=64, trust_special_tokens=True) as trusting:
        (output,) = trusting.chat(hostile, GREEDY, use_tqdm=False)
        assert [token for token in output.prompt_token_ids if token in control] == [0, 1]


HOSTILE = {
    # In one piece: what grows step by step may meet the limit of time first.
    "memory": ("{% set n = namespace(x=10000000000) %}{{ 'a' * n.x }}",
               "messages is not accepted: it takes more memory than one input may"),
    "growth": ("{% set n = namespace(x=['a' * 1000000]) %}{% for i in range(30) %}{% set n.x = n.x + n.x %}"
               "{% endfor %}x", "messages (is not accepted: it takes more memory|takes more than 2 s)"),
    "time": ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}x",
             "messages takes more than 2 s of CPU time"),
    "length": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
               "the chat template makes .* characters"),
}  # fmt: skip


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_checkpoints_template_runs_within_limits(fault: str, directory: Path, tmp_path: Path) -> None:
    """It came with the model: it must not be able to take this process down."""
    template, message = HOSTILE[fault]
    shutil.copytree(directory, path := tmp_path / "model")
    (path / "chat_template.jinja").write_text(template)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with LLM(path, backend="reference", num_blocks=64) as hostile:
        with pytest.raises(ValueError, match=message):
            hostile.chat([{"role": "user", "content": "Hi"}], GREEDY, use_tqdm=False)
        assert hostile.generate("def", GREEDY, use_tqdm=False)[0].finished
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 300_000  # KiB


def test_options_of_a_template_are_json(llm: LLM) -> None:
    with pytest.raises(ValueError, match="messages: expected values of JSON"):
        llm.chat([{"role": "user", "content": "Hi"}], chat_template_kwargs={"now": object()}, use_tqdm=False)


def test_defaults_come_from_the_checkpoint(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.9, 16)


def test_without_a_tokenizer(directory: Path) -> None:
    with LLM(directory, backend="reference", skip_tokenizer_init=True, num_blocks=16) as llm:
        (output,) = llm.generate([[4, 5]], GREEDY, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 8 and output.outputs[0].text == ""
        with pytest.raises(ValueError, match="skip_tokenizer_init"):
            llm.generate("text", GREEDY)
        with pytest.raises(ValueError, match="skip_tokenizer_init"):
            llm.get_tokenizer()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8", "int8"])
def test_cache_dtypes(directory: Path, llm: LLM, dtype: str) -> None:
    exact = llm.generate("def f", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    with LLM(directory, backend="reference", kv_cache_dtype=dtype, num_blocks=16) as other:  # type: ignore[arg-type]
        tokens = other.generate("def f", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    assert tokens[0] == exact[0] and len(tokens) == 8
    assert dtype != "float32" or tokens == exact


def test_packed_model_answers_as_before_packing(directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("farthing._native")
    from farthing.model.load import load
    from farthing.ops.select import select

    target = tmp_path / "packed.bin"
    load(directory, select("cpu", threads=1, quantization="int8")).ops.save_packed(str(target))
    with LLM(directory, backend="cpu", threads=1, quantization="int8", num_blocks=64) as llm:
        expected = llm.generate("def f", GREEDY, use_tqdm=False)
    with LLM(directory, backend="cpu", threads=1, packed=target, num_blocks=64) as llm:
        assert llm.generate("def f", GREEDY, use_tqdm=False)[0].outputs == expected[0].outputs
    shutil.copytree(directory, tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps(CONFIG | {"rope_theta": 20000.0}))
    with pytest.raises(ValueError, match="packed file was made from another checkpoint"):
        LLM(tmp_path / "other", backend="cpu", threads=1, packed=target, num_blocks=64)


WITHOUT_TORCH = """
import sys
import farthing
from farthing import LLM, AsyncLLM, SamplingParams
with LLM(sys.argv[1], backend="cpu", threads=1, packed=sys.argv[2], num_blocks=64) as llm:
    plain = SamplingParams(temperature=0.0, max_tokens=8, logprobs=2, ignore_eos=True)
    drawn = SamplingParams(
        temperature=0.8, top_p=0.9, seed=5, max_tokens=12, repetition_penalty=1.2, presence_penalty=0.1,
        logit_bias={7: 1.5}, allowed_token_ids=list(range(200)), prompt_logprobs=1,
    )
    outputs = llm.generate([[5, 6, 7]] * 2, [plain, drawn], use_tqdm=False)
assert "torch" not in sys.modules, "torch was imported"
print([o.outputs[0].token_ids for o in outputs])
"""


def test_a_packed_model_is_served_without_torch(directory: Path, llm: LLM, tmp_path: Path) -> None:
    pytest.importorskip("farthing._native")
    from farthing.model.load import load
    from farthing.ops.select import select

    target = tmp_path / "packed.bin"
    load(directory, select("cpu", threads=1)).ops.save_packed(str(target))
    expected = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    command = [sys.executable, "-c", WITHOUT_TORCH, directory, target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0] == list(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size: got 0; expected an integer >= 1"),
        ({"dtype": "int7"}, "dtype: got 'int7'; expected one of auto, float32"),
        ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype: got 'fp4'"),
        ({"quantization": "int2"}, "quantization: got 'int2'"),
        ({"max_num_seqs": 0}, "max_num_seqs: got 0; expected an integer >= 1"),
        ({"block_size": 1.5}, "block_size: got 1.5"),
        ({"speculate": "magic"}, "speculate: got 'magic'"),
        ({"priority_step": 0.0}, "priority_step: got 0.0"),
    ],
)
def test_configuration_errors_name_the_field(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_model_len": 129}, "max_model_len: got 129; expected at most 128"),
        ({"max_model_len": 100, "num_blocks": 3}, "the KV cache fits 48 tokens"),
        ({"kv_cache_memory": 10}, "expected at least one block"),
        ({"max_num_batched_tokens": 8}, "max_num_batched_tokens: got 8; expected at least max_num_seqs = 64"),
        ({"backend": "abacus"}, "backend: got 'abacus'; expected 'auto' or one of"),
    ],
)
def test_options_that_do_not_fit_the_model_are_rejected(
    directory: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(directory, **({"backend": "reference"} | given))


def test_small_cache_lowers_max_model_len(directory: Path) -> None:
    with LLM(directory, backend="reference", num_blocks=3) as llm:
        assert llm.engine.config.max_model_len == 48
        output = llm.generate([[5] * 40], SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 8


def test_command_prints_one_json_document(directory: Path) -> None:
    common = [str(directory), "--backend", "reference", "--temperature", "0", "--max-tokens", "5"]
    result = CliRunner().invoke(
        generate_app, [*common, "--prompt", "def", "--prompt", "-", "--json"], input="x"
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [r["prompt"] for r in document["requests"]] == ["def", "x"]
    text = CliRunner().invoke(generate_app, [*common, "--prompt", "def"])
    assert text.stdout == document["requests"][0]["outputs"][0]["text"] + "\n"
    chat = CliRunner().invoke(generate_app, [*common, "--prompt", "Hi", "--chat", "-n", "2"])
    assert chat.stdout.count("<｜User｜>Hi") == 2


def test_command_prints_one_line_errors(directory: Path) -> None:
    missing = CliRunner().invoke(generate_app, ["/no/such/model", "--prompt", "x"])
    assert missing.exit_code == 2 and "expected 'mite', a directory" in missing.stderr
    bad = CliRunner().invoke(generate_app, [str(directory), "--prompt", "x", "--temperature", "-1"])
    assert bad.exit_code == 2 and "Invalid value for '--temperature'" in bad.stderr
    assert CliRunner().invoke(generate_app, [str(directory)]).exit_code == 2


def test_importing_farthing_loads_no_torch() -> None:
    code = "import sys, farthing; farthing.SamplingParams(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    core = "import sys, farthing.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", core], check=False).returncode == 0


def test_options_are_the_fields_of_the_configuration() -> None:
    fields, options = get_type_hints(EngineConfig), get_type_hints(EngineOptions)
    del fields["model"]
    assert list(options) == list(fields), "in the same order"
    for name in ("packed", "prefix_cache_dir"):
        options[name] = fields[name]  # which also take a path
    assert options == fields


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("max_num_seq", "max_num_seqs"), ("quantisation", "quantization"), ("thread", "threads")],
)
def test_a_misspelled_option_names_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"unknown option '{typed}'; did you mean {meant}\\?"):
        LLM("mite", **{typed: 1})  # type: ignore[misc]


def test_the_package_lists_what_it_offers() -> None:
    public = [name for name in dir(farthing) if not name.startswith("_")]
    assert set(public) == set(farthing.__all__) - {"__version__"}
    assert all(getattr(farthing, name) is not None for name in public)


def test_a_text_is_one_message(llm: LLM) -> None:
    message = {"role": "user", "content": "def f"}
    text, one, alone, several = (
        llm.chat(given, GREEDY, use_tqdm=False)[0].outputs[0].token_ids  # type: ignore[arg-type]
        for given in ("def f", [message], message, [[message]])
    )
    assert text == one == alone == several
    for wrong in (["def f"], [1], [[message], "def f"]):
        with pytest.raises(ValueError, match="expected a text, a list of messages such as"):
            llm.chat(wrong, GREEDY)  # type: ignore[arg-type]


def test_embeddings_have_length_one_and_follow_the_text(llm: LLM) -> None:
    found = llm.embed(["def f", "return x", "def f"])
    assert found.shape == (3, CONFIG["hidden_size"]) and found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.allclose(found[0], found[2], atol=1e-6) and not np.allclose(found[0], found[1])
    short = llm.embed("def f", dimensions=4)
    assert short.shape == (1, 4) and np.allclose(
        short[0] / found[0, :4], short[0, 0] / found[0, 0], atol=1e-4
    )
    with pytest.raises(ValueError, match="dimensions: got 100000; expected at most"):
        llm.embed("def f", dimensions=100_000)


def test_embeddings_of_a_model_that_pools_otherwise_are_refused(llm: LLM, directory: Path) -> None:
    (directory / "1_Pooling").mkdir()
    try:
        (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
        with pytest.raises(ValueError, match="pools by pooling_mode_mean_tokens; expected"):
            llm.embed("def f")
    finally:
        shutil.rmtree(directory / "1_Pooling")


def test_requests_of_an_event_loop_have_the_same_answers(llm: LLM, directory: Path) -> None:
    prompts = ["def f", "return", "x x x"]
    expected = [done.outputs[0].token_ids for done in llm.generate(prompts, GREEDY, use_tqdm=False)]
    chat = llm.chat("def f", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    vectors = llm.embed(prompts)

    async def ask() -> None:
        async with AsyncLLM(directory, backend="reference", num_blocks=64) as own:
            done = await asyncio.gather(*(own.generate(prompt, GREEDY) for prompt in prompts))
            assert [each.outputs[0].token_ids for each in done] == expected
            assert (await own.chat("def f", GREEDY)).outputs[0].token_ids == chat
            pieces = [piece async for piece in own.stream_chat("def f", GREEDY)]
            assert [t for piece in pieces for t in piece.outputs[0].token_ids] == chat and len(pieces) > 1
            assert np.allclose(await own.embed(prompts), vectors, atol=1e-6)
            with pytest.raises(ValueError, match="expected a text"):
                await own.chat(["def f"])  # type: ignore[list-item]
            slow = asyncio.create_task(own.generate("def f", SamplingParams(max_tokens=100, ignore_eos=True)))
            await asyncio.sleep(0.01)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            for _ in range(200):
                if own.engine.num_live == 0:
                    break
                await asyncio.sleep(0.01)
            assert own.engine.num_live == 0, "a cancelled call ends its request"

    asyncio.run(ask())


def test_the_notebook_runs() -> None:
    """Every cell, in order, as a notebook's kernel would."""
    cells = json.loads((ROOT / "docs" / "guide" / "python.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    names: dict[str, Any] = {}
    for source in code:
        if source.startswith("await "):
            source = f"import asyncio\nasyncio.run({source.removeprefix('await ')})"
        exec(compile(source, "python.ipynb", "exec"), names)
