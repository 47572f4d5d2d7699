"""Hostile grammars, templates and texts: rejected within seconds, in a separate process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farthing.conversation.base import THINK, ControlTokens
from farthing.conversation.select import BY_TYPE, Checkpoint, choose
from farthing.conversation.types import Conversation, Tool, ToolCall, ToolChoice, Turn
from farthing.engine.engine import Engine
from farthing.engine.request import Rendering, SamplingParams, StructuredOutputsParams
from farthing.engine.sandbox import sandbox as sandbox_module
from farthing.engine.sandbox.sandbox import Sandbox
from farthing.engine.sandbox.workers import Work
from farthing.engine.tokenizer import Tokenizer
from farthing.shares import Busy

pytest.importorskip("llguidance")


@pytest.fixture
def sandbox(tokenizer: Tokenizer) -> Iterator[Sandbox]:
    box = Sandbox(tokenizer, tokenizer.vocab_size)
    yield box
    box.close()


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> Iterator[Sandbox]:
    box = Sandbox(tokenizer, tokenizer.vocab_size)
    yield box
    box.close()


def nested(inner: Any, depth: int, wrap: Callable[[Any], Any]) -> Any:
    for _ in range(depth):
        inner = wrap(inner)
    return inner


def chained(count: int) -> dict[str, Any]:
    definitions = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{count}": {"type": "string"}}}


RULES = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3500)) + '\nr3500: "x"'
HOSTILE: dict[str, dict[str, Any]] = {
    "3000 chained references": {"json": chained(3000)},
    "2000 nested allOf": {"json": nested({"type": "string"}, 2000, lambda s: {"allOf": [s]})},
    "60 nested anyOf of two": {"json": nested({"type": "string"}, 60, lambda s: {"anyOf": [s, s]})},
    "3500 Lark rules": {"grammar": RULES},
    "a million repetitions": {"regex": "(x{1000}){1000}"},
    "a million, later": {"regex": "[a-z](x{1000}){1000}"},
    "a large multipleOf": {"json": {"type": "integer", "multipleOf": 999_999_937}},
    "a million, after what is tried": {"regex": "[a-z]{70}(x{900}){1000}"},
    "brackets": {"regex": "(" * 5000 + "x" + ")" * 5000},
    "no JSON": {"json": "[" * 3000},
    "a list": {"json": "[]"},
    "a broken grammar": {"grammar": "start: ((("},
    "nothing allowed": {"json": {"type": "string", "enum": []}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammar_is_rejected_within_seconds(shared: Sandbox, name: str) -> None:
    with pytest.raises(ValueError, match=r"structured_outputs\.(json|regex|grammar)") as refused:
        constraint = StructuredOutputsParams(**HOSTILE[name])
        shared.grammar(constraint, name).result(60)
    assert len(str(refused.value)) < 500
    shared.grammar(StructuredOutputsParams(regex=f"a|{name[:1]}"), "other").result(60)  # the next is served


def test_rejection_is_cached(sandbox: Sandbox) -> None:
    constraint = StructuredOutputsParams(json=chained(3000))
    with pytest.raises(ValueError):
        sandbox.grammar(constraint).result(30)
    errors, depths = set(), set()
    for _ in range(1_000):
        known = sandbox.grammar(StructuredOutputsParams(json=chained(3000)))
        assert known.done()
        with pytest.raises(ValueError) as refused:
            known.result()
        errors.add(refused.value)
        depths.add(len(refused.traceback))
    assert len(errors) == 1_000 and len(depths) == 1  # each caller's own: none grows with the others


def test_many_choices_options_and_special_literals(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(num_blocks=256)
    assert engine.tokenizer is not None
    special = "<｜end▁of▁sentence｜>"
    cases: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
        ({"choice": [f"v{i}" for i in range(3000)]}, lambda text: text[0] == "v"),
        ({"json": {"const": special}}, lambda text: json.loads(text) == special),
        ({"choice": [special + "!"]}, lambda text: text == special + "!"),
        (
            {
                "json": {
                    "type": "object",
                    "properties": {f"p{i}": {"type": "integer", "maximum": 9} for i in range(1000)},
                    "required": ["p999"],
                    "additionalProperties": False,
                }
            },
            lambda text: text.startswith("{"),
        ),
    ]
    for constraint, good in cases:
        params = SamplingParams(
            max_tokens=100, seed=3, structured_outputs=StructuredOutputsParams(**constraint)
        )
        completion = engine.submit("x", params).result().outputs[0]
        assert good(completion.text), completion.text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.builds(lambda r: {"regex": r}, st.text(alphabet="ab()[]{}|*+?.\\^$0123456789,", max_size=30)),
        st.builds(lambda g: {"grammar": "start: " + g}, st.text(alphabet='ab"()|*+?~/%\n: ', max_size=30)),
        st.builds(
            lambda s: {"json": s},
            st.recursive(
                st.sampled_from(["string", "integer", {"type": "array"}, {"$ref": "#"}, True, 5, None]),
                lambda inner: st.dictionaries(
                    st.sampled_from(
                        ["type", "items", "anyOf", "properties", "$ref", "pattern", "enum", "minItems"]
                    ),
                    inner | st.lists(inner, max_size=3),
                    max_size=4,
                ),
                max_leaves=8,
            ).filter(lambda s: isinstance(s, dict)),
        ),
    )
)
def test_any_grammar_is_accepted_or_rejected(shared: Sandbox, constraint: dict[str, Any]) -> None:
    try:
        shared.grammar(StructuredOutputsParams(**constraint)).result(60)
    except ValueError as refused:
        assert str(refused)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{% set ns = namespace(s='x') %}{% for a in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_template_run_time_is_limited(
    tokenizer: Tokenizer, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_module, "_LIGHT_SECONDS", 0.5)
    hostile = Tokenizer(tokenizer.backend, eos_token_ids=(1,), chat_template=template)
    box = Sandbox(hostile, hostile.vocab_size)
    try:
        with pytest.raises(ValueError):
            box.prompt(message("x"), 10_000).result(60)
    finally:
        box.close()


def test_long_texts_tokenize_the_same(sandbox: Sandbox, tokenizer: Tokenizer) -> None:
    for text in ("abc " * 10, "abc " * 5_000, "é" * 200_000):
        assert sandbox.encode([text, "x"]).result(60) == [tokenizer.encode(text), tokenizer.encode("x")]


def test_conversation_is_rendered_the_same(tokenizer: Tokenizer) -> None:
    own = Tokenizer(
        tokenizer.backend,
        {"bos_token": "<｜begin▁of▁sentence｜>"},
        eos_token_ids=(1,),
        chat_template="{{ bos_token }}{% for m in messages %}{{ m.content ~ m.tool_calls }}{% endfor %}"
        "{{ tools ~ extra }}",
    )
    box = Sandbox(own, own.vocab_size)
    call = ToolCall("id", "f", json.dumps({"a": "<think>", "b": [None, "\ud83d\ude00"]}))
    talk = Conversation(
        (
            Turn("user", "hi 😀"),
            Turn("assistant", "", "Hm.", (call,)),
            Turn("tool", "<｜User｜>", call_id="id"),
        ),
        (Tool("f", "finds", {"type": "object"}),),
        ToolChoice("required", ("f",)),
        template_options={"extra": "!"},
    )
    given = replace(message(""), conversation=talk)
    try:
        assert Rendering.of_document(json.loads(json.dumps(given.document()))) == given
        assert box.prompt(given, 1000).result(60) == own.prompt(given)
        for text in ("x", "x" * 100_000):  # in a thread, and in a worker
            packaged = replace(message(text), form="deepseek_v4")
            assert box.prompt(packaged, 1000).result(60) == own.prompt(packaged)
    finally:
        box.close()


@pytest.mark.parametrize("kind", BY_TYPE)
def test_models_without_a_template_get_the_format_of_their_type(tokenizer: Tokenizer, kind: str) -> None:
    form = choose(Checkpoint(kind, None, lambda token: False)).plain
    given = replace(message("Hello"), form=form.name)
    expected = form.render(given.conversation, given.control)
    assert "Hello" in tokenizer.prompt(given) == expected


def regex(text: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(regex=text)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def endless(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A sandbox whose chat template never ends, except for one message."""
    monkeypatch.setattr(sandbox_module, "_LIGHT_SECONDS", 0.5)
    template = "{% if messages[0].content != 'quick' %}" + ENDLESS + "{% endif %}ok"
    own = Tokenizer(tokenizer.backend, eos_token_ids=(1,), chat_template=template)
    box = Sandbox(own, own.vocab_size)
    box.prompt(message("quick"), 100).result(60)
    yield box
    box.close()


def message(text: str) -> Rendering:
    """A conversation for the model's own template."""
    return Rendering(Conversation((Turn("user", text),)), None, THINK, ControlTokens(), (), trusted=False)


def test_slow_jobs_of_one_client_do_not_delay_another(endless: Sandbox) -> None:
    slow = [endless.prompt(message(f"slow {i}"), 100, "greedy") for i in range(8)]
    for client in ("modest", "other"):
        assert endless.prompt(message("quick"), 100, client).result(60) == "ok"
        assert not any(future.done() for future in slow[2:])


def test_killed_worker_loses_no_job(endless: Sandbox) -> None:
    """A job whose worker is killed externally runs again in another worker."""
    slow = endless.prompt(message("slow"), 100)
    while not (working := workers(endless)):
        time.sleep(0.01)
    for pid in working:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ValueError, match="CPU time"):
        slow.result(60)  # the second attempt finished


def workers(box: Sandbox) -> list[int]:
    """The processes that have used CPU time for a job."""
    assert box._pool._server is not None
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            values = stat.read_text().rsplit(")", 1)[1].split()
            if int(values[1]) == box._pool._server.pid and int(values[11]) >= 5:  # ticks
                found.append(int(stat.parent.name))
    return found


def test_killed_idle_workers_lose_no_job(sandbox: Sandbox) -> None:
    """Whoever ends a worker, such as a system without memory, may end all that are idle."""
    pool = sandbox._pool
    for text in "ab":
        sandbox.grammar(regex(text)).result(60)
    while len(pool._idle[False]) < 3:
        pool._add_idle()
    for worker in pool._idle[False]:
        os.kill(worker.pid, signal.SIGKILL)
    for text in "cdef":
        assert sandbox.grammar(regex(text)).result(60)


def test_killed_fork_server_is_replaced(sandbox: Sandbox) -> None:
    sandbox.grammar(regex("a")).result(60)
    assert sandbox._pool._server is not None
    os.kill(sandbox._pool._server.pid, signal.SIGKILL)
    for text in "bcde":
        assert sandbox.grammar(regex(text)).result(60)


def test_the_cause_is_logged_where_the_process_does_not_start(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    box = Sandbox(tokenizer, tokenizer.vocab_size)
    box._pool._setup = lambda: {"tokenizer": tokenizer.state(), "vocab_size": None}
    try:
        for text in "ab":
            with pytest.raises(RuntimeError, match="could not start a process"):
                box.grammar(regex(text)).result(60)
    finally:
        box.close()
    causes = [record.message for record in caplog.records if "TypeError: int() argument" in record.message]
    assert len(causes) == 1, "once, however many requests fail of it"


def test_identical_grammars_in_flight_share_one_job(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[Work] = []
    monkeypatch.setattr(sandbox._pool, "submit", lambda job, client: submitted.append(job) or job.future)
    first, second, third = (sandbox.grammar(regex("a"), "one") for _ in range(3))
    assert len(submitted) == 1
    assert first.cancel()
    assert not submitted[0].future.cancelled()
    submitted[0].future.set_running_or_notify_cancel()
    submitted[0].future.set_result("grammar")
    assert second.result(1) == third.result(1) == sandbox.grammar(regex("a"), "one").result(1) == "grammar"


def test_work_without_remaining_callers_is_cancelled(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[Work] = []
    monkeypatch.setattr(sandbox._pool, "submit", lambda job, client: submitted.append(job) or job.future)
    futures = [sandbox.grammar(regex("a"), "one") for _ in range(2)]
    for future in futures:
        future.cancel()
    assert submitted[0].future.cancelled()
    sandbox.grammar(regex("a"), "one")
    assert len(submitted) == 2


def test_running_job_without_callers_is_abandoned(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[Work] = []
    monkeypatch.setattr(sandbox._pool, "submit", lambda job, client: submitted.append(job) or job.future)
    first, second = (sandbox.grammar(regex("a"), "one") for _ in range(2))
    (job,) = submitted
    job.future.set_running_or_notify_cancel()
    with subprocess.Popen(["sleep", "60"]) as process:
        job.pid = process.pid
        first.cancel()
        assert not job.abandoned and os.sched_getscheduler(process.pid) != os.SCHED_IDLE
        second.cancel()
        assert job.abandoned and os.sched_getscheduler(process.pid) == os.SCHED_IDLE
        process.kill()
    again = sandbox.grammar(regex("a"), "one")  # a client that tries again gets the verdict
    assert not job.abandoned and len(submitted) == 1
    job.future.set_result("grammar")
    assert again.result(1) == "grammar"


def test_callers_of_one_client_are_bounded(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox._pool, "submit", lambda job, client: job.future)
    callers = [sandbox.grammar(regex("a"), "greedy") for _ in range(1024)]
    with pytest.raises(Busy, match="1024 requests"):
        sandbox.grammar(regex("b"), "greedy")
    sandbox.grammar(regex("b"), "modest")
    callers[0].cancel()
    sandbox.grammar(regex("b"), "greedy")


def test_sandbox_counts_cpu_time(sandbox: Sandbox) -> None:
    sandbox.encode(["x y " * 20_000], client="long").result(60)
    sandbox.encode(["x y " * 200], client="short").result(60)
    seconds = sandbox.seconds()
    assert seconds["long"] > seconds["short"] > 0


def test_closing_terminates_the_children(tokenizer: Tokenizer) -> None:
    box = Sandbox(tokenizer, tokenizer.vocab_size)
    box.grammar(StructuredOutputsParams(regex="a")).result(30)
    server = box._pool._server
    assert server is not None
    box.close()
    assert server._process.poll() is not None
    with pytest.raises(RuntimeError, match="closed"):
        box.grammar(StructuredOutputsParams(regex="b"))
