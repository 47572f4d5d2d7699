"""Quality against a plain loop, and intervals against the literature and simulation."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, processors
from typer.testing import CliRunner

from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.writer import CheckpointWriter
from farthing.cli.compress import eval_app
from farthing.compress import api
from farthing.compress.evaluate import (
    calibration_corpus,
    compare,
    evaluate,
    proportion_interval,
    ratio_interval,
    student_t,
)
from farthing.compress.recipe import RECIPES
from farthing.model import AdaptiveExperts, ModelConfig, decoder, routers_of
from farthing.model.decoder import DecoderModel
from farthing.model.deepseek import FeedForward
from farthing.model.load import load
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from tests.compress.conftest import corpus_of, write_model


def plain(model: DecoderModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of ids[:-1] one token at a time through the cache, and the hidden states."""
    cache = model.new_cache(64, 4, "float32")
    rows = []
    for t in range(len(ids) - 1):
        batch = make_batch([1], [t], [range(64)], 4)
        rows.append(model.forward(ids[t : t + 1], batch, cache))
    hidden = torch.cat(rows)
    return model.logits(hidden), hidden


def test_perplexity_bits_and_acceptance_against_a_plain_loop(model_dir: Path, data: Path) -> None:
    model = load(model_dir, select("reference"))
    corpus = corpus_of(data, model_dir, 50)
    quality = evaluate(model, corpus, batch_tokens=130)
    loss, tokens, hits, drafts = 0.0, 0, 0, 0
    for line in data.read_text().splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([0, *(2 + sorted_byte(c) for c in text.encode())])
        for start in range(0, len(ids) - 1, 50):
            part = ids[start : start + 51]
            logits, hidden = plain(model, part)
            loss -= float(logits.log_softmax(-1)[torch.arange(len(part) - 1), part[1:]].sum())
            tokens += len(part) - 1
            n = len(part) - 1
            cache = model.new_cache(64, 4, "float32")
            draft = model.draft(part[1:], hidden, make_batch([n], [0], [range(64)], 4), cache)
            guess = model.draft_logits(draft).argmax(-1)
            hits += int((guess[:-1] == logits.argmax(-1)[1:]).sum())
            drafts += n - 1
    assert quality.tokens == tokens == corpus.tokens
    assert quality.bytes == sum(len(json.loads(r)["text"].encode()) for r in data.read_text().splitlines())
    assert quality.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert quality.bits_per_byte == pytest.approx(loss / math.log(2) / quality.bytes, rel=1e-4)
    assert quality.mtp_acceptance == pytest.approx(hits / drafts)


def sorted_byte(byte: int) -> int:
    from tokenizers import pre_tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    character = chr(byte) if byte in printable else chr(256 + others.index(byte))
    return sorted(pre_tokenizers.ByteLevel.alphabet()).index(character)


def test_every_window_begins_as_served_texts_do(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """A model without BOS in config.json, as GGUF files are read, gets the one that serving adds; where
    serving adds it to every text, it is the first token of every window, and no token is predicted twice."""
    copy = shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    plain = corpus_of(data, copy, 50)
    assert {int(w.ids[0]) for w in plain.windows} > {0}  # of texts alone
    (copy / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "add_bos_token": True}))
    for bos in (0, None):
        (copy / "config.json").write_text(json.dumps(config | {"bos_token_id": bos}))
        corpus = corpus_of(data, copy, 50)
        assert corpus.tokens == plain.tokens and all(int(w.ids[0]) == 0 for w in corpus.windows)
        assert all(
            torch.equal(a.ids[1:], b.ids[1:]) for a, b in zip(corpus.windows, plain.windows, strict=True)
        )
        files = calibration_corpus(copy, ModelConfig.from_directory(copy), None, 200, 50)
        assert all(int(w.ids[0]) == 0 for w in files.windows)


def test_a_token_that_serving_appends_begins_no_window(model_dir: Path, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text()) | {"bos_token_id": None}
    (copy / "config.json").write_text(json.dumps(config))
    plain = corpus_of(data, copy, 50)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    end = ("<bos>", 0)
    for template, begun in (("$A <bos>", False), ("<bos> $A <bos>", True)):
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[end])
        tokenizer.save(str(copy / "tokenizer.json"))
        windows = corpus_of(data, copy, 50).windows
        assert all(int(w.ids[0]) == 0 for w in windows) == begun
        if not begun:
            assert [w.ids.tolist() for w in windows] == [w.ids.tolist() for w in plain.windows]


def test_model_compared_with_itself_and_with_a_worse_one(model_dir: Path, data: Path, tmp_path: Path) -> None:
    a = load(model_dir, select("reference"))
    corpus = corpus_of(data, model_dir, 50)
    same = compare(a, a, corpus)
    assert same.relative_increase == 0 and same.interval == (0, 0) and same.kl == 0
    assert same.greedy_agreement == 1 and same.verdict(0.0).answer == "pass"

    source, writer = Checkpoint.open(model_dir), CheckpointWriter(tmp_path)
    for name in source.names():
        tensor = source.tensor(name)
        writer.add(name, tensor * 1.3 if name == "lm_head.weight" else tensor)
    writer.close(source.config)
    b = load(tmp_path, select("reference"))
    result = compare(a, b, corpus, batch_tokens=60)
    quality_a, quality_b = evaluate(a, corpus), evaluate(b, corpus)
    assert result.perplexity_a == pytest.approx(quality_a.perplexity)
    assert result.perplexity_b == pytest.approx(quality_b.perplexity)
    assert result.relative_increase == pytest.approx(quality_b.perplexity / quality_a.perplexity - 1)
    assert result.greedy_agreement == 1  # a scaled head chooses the same tokens
    low, high = result.interval
    assert low < result.relative_increase < high
    # KL(p || softmax(1.3 log p)) has a closed form
    kl = 0.0
    for window in corpus.windows:
        logits, _ = plain(a, window.ids)
        p = logits.log_softmax(-1)
        kl += float((p.exp() * (p - (1.3 * logits).log_softmax(-1))).sum())
    assert result.kl == pytest.approx(kl / corpus.tokens, rel=1e-3)
    assert result.verdict(high + 0.01).answer == "pass"
    assert result.verdict(low - 0.01).answer == "fail"
    unsure = result.verdict((result.relative_increase + high) / 2)
    assert unsure.answer == "cannot tell"
    assert unsure.tokens_needed == pytest.approx(4 * corpus.tokens, rel=0.3)


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10, 40, 1000])
@pytest.mark.parametrize("p", [0.9, 0.95, 0.975])
def test_student_t(freedom: int, p: float) -> None:
    assert student_t(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=0.01)


def test_interval_has_its_nominal_coverage() -> None:
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(1000):
        counts = torch.randint(50, 200, (12,), generator=generator)
        # every cluster has its own effect, so its tokens are correlated
        effect = 0.1 + 0.05 * torch.randn(12, generator=generator)
        noise = torch.randn(12, generator=generator) * counts.sqrt() * 0.2
        interval = ratio_interval((effect * counts + noise).tolist(), counts.tolist())
        covered += interval.low <= 0.1 <= interval.high
    assert 0.92 <= covered / 1000 <= 0.98


def test_single_window_is_undecided() -> None:
    assert ratio_interval([1.0], [10]).high == math.inf


def test_paired_proportions_against_the_exact_variance() -> None:
    interval = proportion_interval(wins=30, losses=50, total=1000)
    differences = torch.tensor([1.0] * 30 + [-1.0] * 50 + [0.0] * 920)
    half = 1.96 * float(differences.std(unbiased=False)) / math.sqrt(1000)
    assert interval.estimate == -0.02
    assert interval.high - interval.estimate == pytest.approx(half, rel=1e-3)


def test_the_command(model_dir: Path, data: Path) -> None:
    args = [str(model_dir), "--data", str(data), "--backend", "reference", "--json"]
    result = CliRunner().invoke(eval_app, args)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert set(document) == {"perplexity", "bits_per_byte", "mtp_acceptance", "tokens", "bytes"}
    result = CliRunner().invoke(eval_app, [*args, "--against", str(model_dir), "--max-drop", "0.3%"])
    document = json.loads(result.stdout)
    assert result.exit_code == 0 and document["verdict"] == "pass"
    wanted = {"perplexity_a", "perplexity_b", "relative_increase", "interval", "kl", "greedy_agreement"}
    assert wanted <= set(document)


def test_command_errors_name_the_problem(data: Path) -> None:
    for arguments, words in (
        (["/nowhere"], "model: got '/nowhere', which does not exist; expected 'mite', a directory"),
        (["--max-drop", "much"], "max-drop: got 'much'; expected a share"),
        (["--data", "/nowhere"], "data: got '/nowhere', which does not exist"),
    ):
        result = CliRunner().invoke(eval_app, arguments)
        assert result.exit_code == 2 and words in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": 1}', "neither 'text' nor 'ids'"),
        ("", "no token to predict"),
        ('{"ids": [1, 264]}', "d.jsonl:1: token id 264; expected a whole number from 0 to 263"),
        ('{"ids": [1, -1]}', "token id -1; expected"),
        ('{"ids": [1, 2.5]}', "token id 2.5; expected"),
        ('{"ids": [1, true]}', "token id True; expected"),
        ('{"ids": [1, "a"]}', "token id a; expected"),
        ('{"ids": [1, null]}', "token id None; expected"),
    ],
)
def test_bad_data(model_dir: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        corpus_of(tmp_path / "d.jsonl", model_dir, 10)


def test_models_that_are_compared_choose_experts_as_they_do_when_served(
    model_dir: Path, data: Path, tmp_path: Path
) -> None:
    adaptive = write_model(tmp_path / "adaptive", seed=1)
    corpus, file = corpus_of(data, model_dir, 64), adaptive / "config.json"
    config = ModelConfig.from_directory(adaptive)
    given = api.compare_in_turn(model_dir, adaptive, corpus, ("reference", "reference"))
    rule = AdaptiveExperts((0.3,) * len(routers_of(config)), 1).to_json(config)
    file.write_text(json.dumps(json.loads(file.read_text()) | rule))
    found = api.compare_in_turn(model_dir, adaptive, corpus, ("reference", "reference"))
    models = (load(path, select("reference")) for path in (model_dir, adaptive))
    assert found == compare(*models, corpus) != given


def test_exact_comparisons_round_no_inputs(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """What is said of a file is said of its values, not of the kernels that happen to compute it."""
    small = tmp_path / "int8"
    api.compress(model_dir, small, RECIPES["int8"], api.Options(gate=False, calibration=data))
    corpus = corpus_of(data, model_dir, 64)
    exact, rounded, expected = (
        api.compare_in_turn(model_dir, small, corpus, (backend, backend)).kl
        for backend in ("exact", "auto", "reference")
    )
    assert abs(exact - expected) < 0.5 * abs(rounded - expected)


def test_gate_is_exact_and_never_loads_both_models(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_model(tmp_path / "other", seed=1)
    corpus = corpus_of(data, model_dir, 64)
    expected = compare(load(model_dir, select("reference")), load(other, select("reference")), corpus)
    built: list[weakref.ref[FeedForward]] = []

    def watched(*args: Any) -> FeedForward:
        assert all(layer() is None for layer in built)  # one layer in memory at a time
        layer = FeedForward(*args)
        built.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(decoder, "FeedForward", watched)
    done: list[int] = []
    result = api.compare_in_turn(model_dir, other, corpus, ("reference", "reference"), done.append)
    assert result == expected and len(built) == 6
    assert sum(done) == 2 * corpus.tokens
