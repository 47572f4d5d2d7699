"""Our 4-bit weights against other quantizers', on trained models: loss at stated bytes.

    python bench/compress_peers.py --model SmolLM2-135M-Instruct.Q4_1.gguf --work DIR --llama BIN

Every row is a set of weights of one model, dequantized and run by transformers in float32, so that nothing
but the weights differs: KL divergence to the untouched model per token, and perplexity, on held-out chat,
code and prose. All tools see the same calibration windows. The untouched model is the GGUF file's
dequantized weights, which favours grids in groups of 32, as the file's are. A row whose grid contains the
file's own would measure nothing: there is none for Q4_1, and for other files --dither adds noise as wide
as the steps of each group.

Bytes are those of all tensors that are served, embedding and head included; numbers of 32 bits count as 16.

Rows need `pip install llmcompressor auto-round` and, for --llama, a build of ik_llama.cpp's llama-imatrix and
llama-quantize. Results are kept in --work, and a row that is there is not computed again.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from farthing.checkpoint import Checkpoint
from farthing.checkpoint.compressed_tensors import MARK
from farthing.checkpoint.gguf import ARCHITECTURES
from farthing.compress.evaluate import Interval, ratio_interval
from farthing.engine.tokenizer import Tokenizer as Served
from farthing.hub import resolve_model
from farthing.model.load import load
from farthing.ops.cpu.formats import choose, packed_bytes
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing.ops.weights import Weight, loaded_as, quantize_int8, rounded

ROOT = Path(__file__).parents[1]
sys.path = [path for path in sys.path if path != str(ROOT / "bench")]  # transformers would import kernels.py
WINDOW = 512  # tokens
KINDS = ("chat", "code", "prose")
TABLE = "model.embed_tokens.weight"
FEED_FORWARD = ("*.gate_proj", "*.up_proj", "*.down_proj")
MATRICES = {  # what can be in 4 bits alone, the rest in 8; latent attention has no keys and values
    "nothing": (),
    "queries": ("*.q_proj", "*.q_a_proj", "*.q_b_proj"),
    "keys": ("*.k_proj",),
    "values": ("*.v_proj",),
    "latents": ("*.kv_a_proj_with_mqa", "*.kv_b_proj"),
    "outputs": ("*.o_proj",),
    "gates": ("*.gate_proj",),
    "ups": ("*.up_proj",),
    "downs": ("*.down_proj",),
    "routed experts": ("*.experts.*",),
    "shared experts": ("*.shared_experts.*",),
    "embedding and head": ("model.embed_tokens", "lm_head"),
}
console = Console(width=150)


@dataclass(frozen=True)
class Paths:
    """Where a model's files and results are."""

    work: Path
    llama: Path | None
    chats: Path  # a folder with what `write_chats` writes
    model: Path | None = None

    @property
    def source(self) -> Path:
        return self.work / "source"

    @property
    def calibration(self) -> Path:
        return self.work / "calibration.jsonl"

    @property
    def held_out(self) -> Path:
        return self.work / "heldout.jsonl"

    def row(self, name: str) -> Path:
        return self.work / "rows" / name


# -- weights


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of a model, dequantized, under the names of transformers."""
    checkpoint = Checkpoint.open(resolve_model(path))
    found: dict[str, Tensor] = {}
    for name in checkpoint.names():
        module, _, leaf = name.rpartition(".")
        if not checkpoint.is_quantized(module) or leaf == "bias":
            found[name] = checkpoint.tensor(name).float()
        else:
            found[f"{module}.weight"] = checkpoint.weight(module).dequantize().float()
    return found


def stored_bytes(path: Path) -> int:
    """Bytes of all tensors; those of 32-bit floating point count as 16 bits."""
    checkpoint, names = Checkpoint.open(resolve_model(path)), Checkpoint.open(resolve_model(path)).names()
    return sum(checkpoint.nbytes(name) // (1 + (checkpoint.dtype(name) == "F32")) for name in names)


def dithered(w: Tensor, generator: torch.Generator) -> Tensor:
    """With uniform noise as wide as the least distance of two values in each group of 32 columns, so that no
    value is on its file's grid any more."""
    groups = w.reshape(-1, 32)
    gaps = groups.sort(1).values.diff(dim=1)
    step = torch.where(gaps > 0, gaps, torch.inf).amin(1, keepdim=True)
    noise = torch.rand(groups.shape, generator=generator) - 0.5
    return (groups + noise * torch.where(step.isinf(), 0, step)).reshape(w.shape)


def unpack(model: Path, out: Path, dither: bool) -> None:
    """The untouched model as float32 safetensors."""
    directory = resolve_model(model)
    out.mkdir(parents=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors_of(model).items()}
    if dither:
        generator = torch.Generator().manual_seed(0)
        tensors = {name: dithered(w, generator) if w.ndim == 2 else w for name, w in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(directory / name, out / name)
    config = json.loads((directory / "config.json").read_text())
    kinds = {"llama": "Llama", "gemma3_text": "Gemma3", "deepseek_v3": "DeepseekV3"}
    kind = f"{kinds[config['model_type']]}ForCausalLM"
    config.pop("quantization_config", None)
    config |= {"architectures": [kind], "torch_dtype": "float32", "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=1))


# -- texts


def prose() -> str:
    """The guides of this checkout without tables and code."""
    files = sorted((ROOT / "docs" / "guide").glob("*.md"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


def topics() -> list[str]:
    """Prose for calibration: the topics of Python's own manual."""
    file = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [text for text in strings if isinstance(text, str) and len(text) > 4000]


def sources() -> Iterator[str]:
    """Code for calibration: the standard library without the held-out sample's files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    held = [json.loads(line)["path"] for line in sample().read_text(encoding="utf-8").splitlines()]
    for file in sorted(root.glob("*/*.py")):
        taken = any(str(file).endswith(path) for path in held if path)
        if not taken and "site-packages" not in file.parts and "pydoc_data" not in file.parts:
            yield file.read_text(encoding="utf-8", errors="replace")


def sample() -> Path:
    return ROOT / "src" / "farthing" / "assets" / "mite" / "heldout.jsonl"


def chats(file: Path) -> list[str]:
    """Questions and answers, from JSON lines of `messages`."""
    names = {"user": "User", "assistant": "Assistant", "system": "System"}
    rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    return ["\n\n".join(f"{names[m['role']]}: {m['content'].strip()}" for m in row) for row in rows]


def write_chats(model: Path, out: Path) -> None:
    """Answers that SmolLM2-135M-Instruct samples to the questions next to this file."""
    from farthing import LLM, SamplingParams

    llm = LLM(model=str(model), backend="cpu")
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    for name, questions in json.loads((ROOT / "bench" / "chat_questions.json").read_text()).items():
        start = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
        prompts = [f"{start}{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions]
        sampling = [
            SamplingParams(max_tokens=380, temperature=0.8, top_p=0.95, seed=seed)
            for seed in range(len(prompts))
        ]
        lines = []
        for question, done in zip(questions, llm.generate(prompts, sampling), strict=True):
            turns = [("user", question), ("assistant", done.outputs[0].text)]
            lines.append(json.dumps({"messages": [{"role": r, "content": t} for r, t in turns]}))
        (out / f"chat-{name}.jsonl").write_text("\n".join(lines) + "\n")


def write_texts(paths: Paths, calibration: int, held_out: int) -> None:
    """Windows of ids: for calibration so many in all, a third of each kind, and as text; held out so many of
    each kind."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(paths.source / "tokenizer.json"))
    start = Served.from_directory(paths.source).encode("")  # of every window, as of every text that is served

    def windows(texts: Iterator[str] | list[str], count: int, each: int) -> list[list[int]]:
        """The first `each` windows of every text."""
        found: list[list[int]] = []
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            step = WINDOW + 1 - len(start)
            cut = [start + ids[at : at + step] for at in range(0, len(ids), step)]
            found += [ids for ids in cut if len(ids) == WINDOW + 1][:each]
            if len(found) >= count:
                break
        return found[:count]

    def joined(name: str) -> list[str]:
        return ["\n\n\n".join(chats(paths.chats / f"chat-{name}.jsonl"))]

    code = [json.loads(line)["text"] for line in sample().read_text(encoding="utf-8").splitlines()]
    held = {
        "chat": windows(joined("heldout"), held_out, held_out),
        "code": windows(code, held_out, 1),
        "prose": windows([prose()], held_out, held_out),
    }
    third = calibration // 3
    given = windows(joined("calibration"), third, third)
    given += windows(topics(), third, 2)
    given += windows(sources(), calibration - len(given), 1)
    rows = [json.dumps({"kind": kind, "ids": ids}) for kind in KINDS for ids in held[kind]]
    paths.held_out.write_text("\n".join(rows) + "\n")
    paths.calibration.write_text("\n".join(json.dumps({"ids": ids}) for ids in given) + "\n")
    text = "\n".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in given)
    paths.calibration.with_suffix(".txt").write_text(text)


def ids_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# -- rows: each writes a model, or changes tensors


@dataclass(frozen=True)
class Result:
    """A row's tensors and their bytes."""

    tensors: dict[str, Tensor]
    bytes: int

    @property
    def head(self) -> Tensor:
        return self.tensors.get("lm_head.weight", self.tensors[TABLE])


Row = Callable[[Paths, Path], Result]


def untouched(paths: Paths, out: Path) -> Result:
    return Result(tensors_of(paths.source), stored_bytes(paths.source))


def random(paths: Paths, out: Path) -> Result:
    """Normal numbers of each matrix's deviation: the worst that a quantizer can do."""
    tensors, generator = tensors_of(paths.source), torch.Generator().manual_seed(0)
    for name, w in tensors.items():
        if w.ndim == 2 and name not in (TABLE, "lm_head.weight"):
            tensors[name] = torch.randn(w.shape, generator=generator) * w.std()
    return Result(tensors, stored_bytes(paths.source))


def ours(recipe: dict[str, Any]) -> Row:
    """`farthing compress` with a recipe, as it is served: the head in 8 bits if the recipe says so."""

    def row(paths: Paths, out: Path) -> Result:
        fields = out.with_suffix(".yaml")
        fields.parent.mkdir(parents=True, exist_ok=True)
        fields.write_text(json.dumps(recipe))
        if not (out / "config.json").exists():
            command = [sys.executable, "-m", "farthing.cli.app", "compress", str(paths.source), "--recipe"]
            command += [str(fields), "-o", str(out), "--calibration", str(paths.calibration), "--no-gate"]
            subprocess.run([*command, "--no-check-memory"], check=True)
        tensors, size = tensors_of(out), stored_bytes(out)
        if Checkpoint.open(out).config.get(MARK, {}).get("head") != "int8":
            return Result(tensors, size)
        # A tied embedding is served from the head's 8 bits.
        table = quantize_int8(tensors[TABLE])
        size += table.nbytes - 2 * tensors[TABLE].numel()
        tensors[TABLE] = table.dequantize()
        return Result(tensors, size)

    return row


def planned(peer: str) -> Row:
    """`auto` at no more bytes than another row has."""

    def row(paths: Paths, out: Path) -> Result:
        limit = json.loads(paths.row(peer).with_suffix(".json").read_text())["bytes"]
        return ours({"base": "auto", "budget_bytes": limit})(paths, out)

    return row


def loaded(quantization: str, narrow: tuple[str, ...] = FEED_FORWARD) -> Row:
    """`farthing serve --quantization`: rounded while loading, without calibration. narrow: fnmatch patterns
    of the modules in 4 bits."""

    def row(paths: Paths, out: Path) -> Result:
        tensors, size = tensors_of(paths.source), 0
        for name, w in tensors.items():
            if w.ndim < 2:
                size += 2 * w.numel()
                continue
            mlp = any(fnmatchcase(name.removesuffix(".weight"), pattern) for pattern in narrow)
            size += packed_bytes(*w.shape, choose("float32", w.shape[1], 0, loaded_as(quantization, mlp)))
            tensors[name] = rounded(Weight("dense", w), quantization, mlp).dequantize()
        return Result(tensors, size)

    return row


def llm_compressor(group: int, best: bool = False) -> Row:
    """GPTQ of llm-compressor, which rounds columns in the order of activation; the head stays in 16 bits.
    best: ranges by squared error instead of extremes, keys and values in 8 bits."""

    def row(paths: Paths, out: Path) -> Result:
        if not (out / "config.json").exists():
            from datasets import Dataset
            from llmcompressor import oneshot
            from llmcompressor.modifiers.quantization import GPTQModifier
            from transformers import AutoModelForCausalLM

            data = Dataset.from_list([
                {"input_ids": row["ids"][:-1], "attention_mask": [1] * WINDOW}
                for row in ids_in(paths.calibration)
            ])  # fmt: skip
            model = AutoModelForCausalLM.from_pretrained(paths.source, dtype=torch.float32)
            weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
            weights |= {"group_size": group}
            groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
            if best:
                weights |= {"observer": "memoryless_mse"}
                wide = [f"re:.*{name[1:]}$" for name in (*MATRICES["keys"], *MATRICES["values"])]
                narrow = [f"re:.*{name[1:]}$" for name in (*FEED_FORWARD, "*.q_proj", "*.o_proj")]
                groups = {
                    "group_0": {"targets": narrow, "weights": weights},
                    "group_1": {"targets": wide, "weights": weights | {"num_bits": 8}},
                }
            oneshot(
                model=model,
                dataset=data,
                recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
                max_seq_length=WINDOW,
                num_calibration_samples=len(data),
            )
            model.save_pretrained(out, save_compressed=True)
        return Result(tensors_of(out), stored_bytes(out))

    return row


def auto_round(group: int, **more: Any) -> Row:
    """AutoRound."""

    def row(paths: Paths, out: Path) -> Result:
        if not (out / "config.json").exists():
            from auto_round import AutoRound
            from transformers import AutoModelForCausalLM, AutoTokenizer

            model = AutoModelForCausalLM.from_pretrained(paths.source, dtype=torch.float32)
            rows = [{"input_ids": torch.tensor([row["ids"][:-1]])} for row in ids_in(paths.calibration)]
            rounding = AutoRound(
                model,
                AutoTokenizer.from_pretrained(paths.source),
                scheme={"bits": 4, "group_size": group, "sym": True, "data_type": "int", "act_bits": 16},
                dataset=rows,
                seqlen=WINDOW,
                nsamples=len(rows),
                device_map="cpu",
                **more,
            )
            rounding.quantize_and_save(str(out), format="auto_round")
        path = out if (out / "config.json").exists() else next(out.glob("*/config.json")).parent
        return Result(tensors_of(path), stored_bytes(path))

    return row


def llama(kind: str) -> Row:
    """llama-quantize of ik_llama.cpp with an importance matrix of the calibration text."""

    def row(paths: Paths, out: Path) -> Result:
        assert paths.llama is not None, "--llama is needed"
        plain, matrix = paths.work / "f32.gguf", paths.work / "imatrix.dat"
        out.mkdir(parents=True, exist_ok=True)

        def run(tool: str, *words: Any) -> None:
            command = [str(paths.llama / tool), *map(str, words)]
            with (out / f"{tool}.log").open("w") as log:
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)

        if not plain.exists():
            model_type = json.loads((paths.source / "config.json").read_text())["model_type"]
            if any(model_type in names.types for names in ARCHITECTURES.values()):
                command = [sys.executable, "-m", "farthing.cli.app", "export", str(paths.source), str(plain)]
                subprocess.run(command, check=True)
            else:
                run("llama-quantize", "--allow-requantize", paths.model, plain, "F32", 2)
                replace_matrices(plain, tensors_of(paths.source))
        if not matrix.exists():
            text = paths.calibration.with_suffix(".txt")
            run("llama-imatrix", "-m", plain, "-f", text, "-o", matrix, "-c", WINDOW, "-t", 2)
        file, decoded = out / f"{kind}.gguf", out / "decoded.gguf"
        if not file.exists():
            run("llama-quantize", "--imatrix", matrix, plain, file, kind, 2)
        run("llama-quantize", "--allow-requantize", file, decoded, "F32", 2)
        tensors = {name: tensor.clone() for name, tensor in tensors_of(decoded).items()}
        decoded.unlink()
        return Result(tensors, gguf_bytes(file, plain))

    return row


def replace_matrices(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write matrices into a float32 GGUF file of an architecture that is not exported and turns no rows (see
    `Names`)."""
    import gguf

    reader = gguf.GGUFReader(file, "r+")
    field = reader.get_field("general.architecture")
    assert field is not None
    names = ARCHITECTURES[field.contents()]
    assert not names.turned
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name, w in tensors.items():
        if w.ndim == 2:
            stored[names.stored(name)].data[...] = w.numpy()
    reader.data.flush()


def gguf_bytes(file: Path, plain: Path) -> int:
    """Bytes of a file's tensors, of which the library `gguf` may not know the types: without the header,
    which is as long as that of the float32 file."""
    floats = sum(t.numel() for t in tensors_of(plain).values())
    return file.stat().st_size - (plain.stat().st_size - 4 * floats)


INT4 = {"base": "int4"}
MOST_DOWN = [f"*.{layers}.mlp.down_proj" for layers in ("[0-9]", "1[0-2]", "1[7-9]", "2?")]  # 26 of 30
# Its recipe of minutes; that of 1,000 iterations takes a day on two cores.
LIGHT = {"iters": 50, "lr": 5e-3, "batch_size": 2, "enable_torch_compile": False}
ROWS: dict[str, Row] = {
    "untouched": untouched,
    "random": random,
    "int4": ours(INT4),
    "int4, queries and outputs in 4 bits": ours(INT4 | {"wide": ["*.k_proj", "*.v_proj"]}),
    "int4 g32, all but values in 4 bits": ours(INT4 | {"group_size": 32, "wide": ["*.v_proj"]}),
    "int4, values and down_proj in 8 bits": ours(INT4 | {"wide": ["*.v_proj", "*.down_proj"]}),
    "int4 g32, values and most of down_proj in 8 bits": ours(
        INT4 | {"group_size": 32, "wide": ["*.v_proj", *MOST_DOWN]}
    ),
    "int4 g32": ours(INT4 | {"group_size": 32}),
    "int5": ours({"base": "int5"}),
    "auto as IQ4_NL": planned("IQ4_NL imatrix"),
    "auto as IQ4_K": planned("IQ4_K imatrix"),
    "load-time int4": loaded("int4"),
    **{f"4 bits: {name}": loaded("int4", patterns) for name, patterns in MATRICES.items()},
    "llm-compressor GPTQ g64": llm_compressor(64),
    "llm-compressor GPTQ g32": llm_compressor(32),
    "llm-compressor GPTQ g32, best": llm_compressor(32, best=True),
    "AutoRound g64, no iterations": auto_round(64, iters=0, disable_opt_rtn=False),
    "AutoRound g64": auto_round(64, **LIGHT),
    "AutoRound g32": auto_round(32, **LIGHT),
    "IQ4_NL imatrix": llama("IQ4_NL"),
    "IQ4_K imatrix": llama("IQ4_K"),
}


# -- figures


def hidden_of(paths: Paths, result: Result) -> list[Tensor]:
    """The normed hidden states of each held-out window, [T, D]."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if any(".experts." in name for name in result.tensors):
        return _hidden_here(paths, result)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(paths.source), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(result.tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.eval()
    found = []
    for row in ids_in(paths.held_out):
        ids = torch.tensor([row["ids"][:-1]])
        found.append(model.model(input_ids=ids, use_cache=False).last_hidden_state[0].clone())
    return found


def _hidden_here(paths: Paths, result: Result) -> list[Tensor]:
    """The same by our reference ops, of files whose experts transformers would have to stack."""
    folder = paths.work / "row"
    shutil.copytree(paths.source, folder, dirs_exist_ok=True)
    save_file({name: w.contiguous() for name, w in result.tensors.items()}, folder / "model.safetensors")
    model, found = load(folder, select("reference", dtype=torch.float32)), []
    for row in ids_in(paths.held_out):
        ids = torch.tensor(row["ids"][:-1])
        blocks = list(range(-(-len(ids) // 16)))
        batch, cache = make_batch([len(ids)], [0], [blocks], 16), model.new_cache(len(blocks), 16, "float32")
        found.append(model.normed(model.forward(ids, batch, cache)).clone())
    return found


def figures(paths: Paths, result: Result) -> list[dict[str, Any]]:
    """Of each held-out window: kind, tokens, and the sums of KL divergence and of the loss."""
    reference = paths.work / "hidden.pt"
    base = Result(tensors_of(paths.source), 0)
    if not reference.exists():
        torch.save(hidden_of(paths, base), reference)
    true = torch.load(reference)
    found = []
    for row, a, b in zip(ids_in(paths.held_out), true, hidden_of(paths, result), strict=True):
        targets, kl, loss = torch.tensor(row["ids"][1:]), 0.0, 0.0
        for at in range(0, len(a), 128):
            p = F.log_softmax(a[at : at + 128] @ base.head.T, -1)
            q = F.log_softmax(b[at : at + 128] @ result.head.T, -1)
            kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            loss -= float(q.gather(1, targets[at : at + 128, None]).sum(dtype=torch.float64))
        found.append({"kind": row["kind"], "tokens": len(targets), "kl": kl, "loss": loss})
    return found


def measure(paths: Paths, name: str, row: Row) -> dict[str, Any]:
    """A row's figures, computed once."""
    file = paths.row(name).with_suffix(".json")
    if file.exists():
        done: dict[str, Any] = json.loads(file.read_text())
        return done
    start = time.monotonic()
    with torch.inference_mode(False):
        result = row(paths, paths.row(name))
    seconds = time.monotonic() - start
    with torch.inference_mode():
        windows = figures(paths, result)
    document = {"bytes": result.bytes, "seconds": seconds, "windows": windows}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document))
    return document


def show(paths: Paths, against: str) -> None:
    """The table of all rows that are there."""
    files = {name: paths.row(name).with_suffix(".json") for name in ROWS}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    if against not in found:
        return
    table = Table("weights", "MB", "KL, nats", f"more than {against}", *KINDS, "perplexity")
    for name, row in found.items():
        windows, base = row["windows"], found[against]["windows"]
        more = [a["kl"] - b["kl"] for a, b in zip(windows, base, strict=True)]
        table.add_row(
            name,
            f"{row['bytes'] / 1e6:.1f}",
            f"{mean(windows):.4f}",
            spread(ratio_interval(more, [w["tokens"] for w in windows])),
            *(f"{mean([w for w in windows if w['kind'] == kind]):.4f}" for kind in KINDS),
            f"{math.exp(mean(windows, 'loss')):.3f}",
        )
    console.print(table)


def mean(windows: list[dict[str, Any]], what: str = "kl") -> float:
    """Per token."""
    return float(sum(w[what] for w in windows) / sum(w["tokens"] for w in windows))


def spread(interval: Interval) -> str:
    return f"{interval.estimate:+.4f} ({interval.low:+.4f} … {interval.high:+.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--chat-model", type=Path, help="SmolLM2, where --model is another; writes the chats")
    parser.add_argument("--chats", type=Path, help="folder of the chats, shared by models; default: --work")
    parser.add_argument("--dither", action="store_true", help="add the noise of the file's steps")
    parser.add_argument("--calibration-windows", type=int, default=32, help="in all, of 512 tokens")
    parser.add_argument("--held-out-windows", type=int, default=4, help="of each kind")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--against", default="int4")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    paths = Paths(args.work, args.llama, args.chats or args.work, args.model)
    if not (paths.chats / "chat-heldout.jsonl").exists():
        write_chats(args.chat_model or args.model, paths.chats)
    if not paths.source.exists():
        unpack(args.model, paths.source, args.dither)
    if not paths.held_out.exists():
        write_texts(paths, args.calibration_windows, args.held_out_windows)
    for name in args.rows:
        row = measure(paths, name, ROWS[name])
        kl = mean(row["windows"])
        console.print(f"{name}: {row['bytes'] / 1e6:.1f} MB, KL {kl:.4f}, {row['seconds']:.0f} s")
    show(paths, args.against)


if __name__ == "__main__":
    main()
