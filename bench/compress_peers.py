"""Our 4-bit weights against other quantizers', on trained models: loss at stated bytes.

    python bench/compress_peers.py --model SmolLM2-135M-Instruct.Q4_1.gguf --work DIR --llama BIN

Every row is a set of weights of one model, dequantized and run by transformers in float32, so that nothing
but the weights differs: KL divergence to the untouched model per token, and perplexity, on held-out chat,
code and prose. All tools see the same calibration windows. The untouched model is the GGUF file's
dequantized weights, which favours grids in groups of 32, as the file's are. A row whose grid contains the
file's own would measure nothing; there is none for Q4_1.

Bytes are those of all tensors that are served, embedding and head included; numbers of 32 bits count as 16.

Rows need `pip install llmcompressor auto-round` and, for --llama, a build of ik_llama.cpp's llama-imatrix and
llama-quantize. Results are kept in --work, and a row that is there is not computed again.
"""

from __future__ import annotations

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
from safetensors.torch import save_file
from torch import Tensor

from farthing.checkpoint import Checkpoint
from farthing.checkpoint.compressed_tensors import MARK
from farthing.compress.evaluate import ratio_interval
from farthing.engine.tokenizer import Tokenizer as Served
from farthing.hub import resolve_model
from farthing.ops.cpu.formats import choose, packed_bytes
from farthing.ops.weights import Weight, loaded_as, quantize_int8, rounded

ROOT = Path(__file__).parents[1]
sys.path = [str(ROOT), *(path for path in sys.path if path != str(ROOT / "bench"))]  # not our kernels.py
from bench.harness import FARTHING, log, parser, report  # noqa: E402

WINDOW = 512  # tokens
KINDS = ("chat", "code", "prose")
TABLE = "model.embed_tokens.weight"
FEED_FORWARD = ("*.gate_proj", "*.up_proj", "*.down_proj")


@dataclass(frozen=True)
class Paths:
    """Where a model's files and results are."""

    work: Path
    llama: Path | None

    def __getattr__(self, name: str) -> Path:
        return self.work / FILES[name]

    def row(self, name: str) -> Path:
        return self.work / "rows" / name


FILES = {"source": "source", "calibration": "calibration.jsonl", "held_out": "heldout.jsonl"}


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


def unpack(model: Path, out: Path) -> None:
    """The untouched model as float32 safetensors."""
    directory = resolve_model(model)
    out.mkdir(parents=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors_of(model).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(directory / name, out / name)
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config", None)
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "dtype": "float32"}
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
        return ["\n\n\n".join(chats(paths.work / f"chat-{name}.jsonl"))]

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


def ours(recipe: dict[str, Any]) -> Row:
    """`farthing compress` with a recipe, as it is served: the head in 8 bits if the recipe says so."""

    def row(paths: Paths, out: Path) -> Result:
        fields = out.with_suffix(".yaml")
        fields.parent.mkdir(parents=True, exist_ok=True)
        fields.write_text(json.dumps(recipe))
        if not (out / "config.json").exists():
            command = [*FARTHING, "compress", str(paths.source), "--recipe", str(fields), "-o", str(out)]
            options = ["--calibration", str(paths.calibration), "--no-gate", "--no-check-memory"]
            subprocess.run([*command, *options], check=True)
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


def loaded(quantization: str) -> Row:
    """`farthing serve --quantization`: rounded while loading, without calibration."""

    def row(paths: Paths, out: Path) -> Result:
        tensors, size = tensors_of(paths.source), 0
        for name, w in tensors.items():
            if w.ndim < 2:
                size += 2 * w.numel()
                continue
            mlp = any(fnmatchcase(name.removesuffix(".weight"), pattern) for pattern in FEED_FORWARD)
            size += packed_bytes(*w.shape, choose("float32", w.shape[1], 0, loaded_as(quantization, mlp)))
            tensors[name] = rounded(Weight("dense", w), quantization, mlp).dequantize()
        return Result(tensors, size)

    return row


def llm_compressor(paths: Paths, out: Path) -> Result:
    """GPTQ of llm-compressor, which rounds columns in the order of activation; the head stays in 16 bits."""
    if not (out / "config.json").exists():
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import GPTQModifier
        from transformers import AutoModelForCausalLM

        windows = [row["ids"][:-1] for row in ids_in(paths.calibration)]
        data = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * WINDOW} for ids in windows])
        model = AutoModelForCausalLM.from_pretrained(paths.source, dtype=torch.float32)
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
        shape = {"max_seq_length": WINDOW, "num_calibration_samples": len(data)}
        oneshot(model=model, dataset=data, recipe=recipe, **shape)
        model.save_pretrained(out, save_compressed=True)
    return Result(tensors_of(out), stored_bytes(out))


def auto_round(paths: Paths, out: Path) -> Result:
    """AutoRound's recipe without iterations; 50 of them take four minutes for one of 30 layers."""
    if not (out / "config.json").exists():
        from auto_round import AutoRound
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(paths.source, dtype=torch.float32)
        rows = [{"input_ids": torch.tensor([row["ids"][:-1]])} for row in ids_in(paths.calibration)]
        scheme = {"bits": 4, "group_size": 64, "sym": True, "data_type": "int", "act_bits": 16}
        size = {"seqlen": WINDOW, "nsamples": len(rows), "device_map": "cpu"}
        how = {"scheme": scheme, "dataset": rows, "iters": 0, "disable_opt_rtn": False}
        rounding = AutoRound(model, AutoTokenizer.from_pretrained(paths.source), **how, **size)
        rounding.quantize_and_save(str(out), format="auto_round")
    path = out if (out / "config.json").exists() else next(out.glob("*/config.json")).parent
    return Result(tensors_of(path), stored_bytes(path))


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
            subprocess.run([*FARTHING, "export", str(paths.source), str(plain)], check=True)
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


def gguf_bytes(file: Path, plain: Path) -> int:
    """Bytes of a file's tensors, of which the library `gguf` may not know the types: without the header,
    which is as long as that of the float32 file."""
    floats = sum(t.numel() for t in tensors_of(plain).values())
    return file.stat().st_size - (plain.stat().st_size - 4 * floats)


INT4 = {"base": "int4"}
MOST_DOWN = [f"*.{layers}.mlp.down_proj" for layers in ("[0-9]", "1[0-2]", "1[7-9]", "2?")]  # 26 of 30
ROWS: dict[str, Row] = {
    "untouched": untouched,
    "load-time int4": loaded("int4"),
    "int4": ours(INT4),
    "int4 g32": ours(INT4 | {"group_size": 32}),
    "int4 g32, all but values in 4 bits": ours(INT4 | {"group_size": 32, "wide": ["*.v_proj"]}),
    "int4 g32, values and most of down_proj in 8 bits": ours(
        INT4 | {"group_size": 32, "wide": ["*.v_proj", *MOST_DOWN]}
    ),
    "int5": ours({"base": "int5"}),
    "llm-compressor GPTQ g64": llm_compressor,
    "AutoRound g64, no iterations": auto_round,
    "IQ4_NL imatrix": llama("IQ4_NL"),
    "IQ4_K imatrix": llama("IQ4_K"),
    "auto as IQ4_NL": planned("IQ4_NL imatrix"),
    "auto as IQ4_K": planned("IQ4_K imatrix"),
}


# -- figures


def hidden_of(paths: Paths, result: Result) -> list[Tensor]:
    """The normed hidden states of each held-out window, [T, D]."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(paths.source), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(result.tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.eval()
    found = []
    for row in ids_in(paths.held_out):
        ids = torch.tensor([row["ids"][:-1]])
        found.append(model.model(input_ids=ids, use_cache=False).last_hidden_state[0].clone())
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


HEADINGS = ("weights", "MB", "KL, nats", "more than --against (95 %)", *KINDS, "perplexity")


def cells(paths: Paths, against: str) -> list[list[object]]:
    """The table of all rows that are there."""
    files = {name: paths.row(name).with_suffix(".json") for name in ROWS}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    rows: list[list[object]] = []
    for name, row in found.items():
        windows, base = row["windows"], found.get(against, row)["windows"]
        more = [a["kl"] - b["kl"] for a, b in zip(windows, base, strict=True)]
        interval = ratio_interval(more, [w["tokens"] for w in windows])
        spread = f"{interval.estimate:+.4f} ({interval.low:+.4f} … {interval.high:+.4f})"
        kinds = [f"{mean([w for w in windows if w['kind'] == kind]):.4f}" for kind in KINDS]
        size, loss = f"{row['bytes'] / 1e6:.1f}", f"{math.exp(mean(windows, 'loss')):.3f}"
        rows.append([name, size, f"{mean(windows):.4f}", spread, *kinds, loss])
    return rows


def mean(windows: list[dict[str, Any]], what: str = "kl") -> float:
    """Per token."""
    return float(sum(w[what] for w in windows) / sum(w["tokens"] for w in windows))


def main() -> None:
    """Parse, run, print."""
    p = parser(__doc__)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--llama", type=Path)
    p.add_argument("--calibration-windows", type=int, default=32, help="in all, of 512 tokens")
    p.add_argument("--held-out-windows", type=int, default=4, help="of each kind")
    p.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    p.add_argument("--against", default="int4")
    a = p.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    paths = Paths(a.work, a.llama)
    if not (paths.work / "chat-heldout.jsonl").exists():
        write_chats(a.model, paths.work)
    if not paths.source.exists():
        unpack(a.model, paths.source)
    if not paths.held_out.exists():
        write_texts(paths, a.calibration_windows, a.held_out_windows)
    for name in a.rows:
        row = measure(paths, name, ROWS[name])
        log.print(f"{name}: KL {mean(row['windows']):.4f}, {row['seconds']:.0f} s")
    rows = cells(paths, a.against)
    report([dict(zip(HEADINGS, row, strict=True)) for row in rows], a.json, str(a.model), HEADINGS, rows)


if __name__ == "__main__":
    main()
