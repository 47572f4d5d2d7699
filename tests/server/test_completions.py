"""/v1/completions with the real client and the real engine."""

from __future__ import annotations

import httpx
import openai
import pytest
from openai import OpenAI

from tests.server.harness import Running, events, running, tiny_engine, tokenizer


def test_models(tiny: Running, client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "farthing")
    extra = client.models.retrieve("tiny").model_extra or {}
    assert extra.items() >= {"root": "tiny", "max_model_len": 2048}.items()
    with pytest.raises(openai.NotFoundError, match="'other'; expected one of 'tiny'"):
        client.models.retrieve("other")
    for path in ("/health", "/ready", "/version"):
        assert httpx.get(tiny.url + path).status_code == 200


def test_whole_and_streamed_agree(client: OpenAI) -> None:
    options = {"model": "tiny", "prompt": "def f(", "max_tokens": 24, "temperature": 0.0, "seed": 1}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    usage, streamed = whole.usage, chunks[-1].usage
    assert usage and streamed
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        7,
        24,
        31,
    )  # BOS and 6 bytes
    assert (streamed.prompt_tokens, streamed.completion_tokens) == (7, 24)
    assert streamed.prompt_tokens_details and streamed.prompt_tokens_details.cached_tokens == 4
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "text_completion"


def test_text_tokens_and_lists_are_the_same_prompt(client: OpenAI) -> None:
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0.0}
    ids = tokenizer().encode("def")
    text = client.completions.create(prompt="def", **options).choices[0].text
    assert client.completions.create(prompt=ids, **options).choices[0].text == text
    both = client.completions.create(prompt=["def", "x = "], n=2, **options | {"temperature": 1.0, "seed": 3})
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    many = client.completions.create(prompt=[ids, ids], **options)
    assert [choice.text for choice in many.choices] == [text, text]
    assert many.usage and many.usage.prompt_tokens == 2 * len(ids)


def test_streams_of_many_choices(client: OpenAI) -> None:
    options = {"model": "tiny", "max_tokens": 6, "seed": 5, "prompt": ["a", "b", "c"], "n": 2}
    whole = client.completions.create(**options)
    texts = dict.fromkeys(range(6), "")
    reasons: dict[int, str] = {}
    for chunk in client.completions.create(**options, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert [texts[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert len(reasons) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_echo_and_logprobs(client: OpenAI, stream: bool) -> None:
    options = {
        "model": "tiny",
        "prompt": "abc",
        "max_tokens": 5,
        "echo": True,
        "logprobs": 2,
        "temperature": 0.0,
    }
    if stream:
        choices = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
    else:
        choices = client.completions.create(**options).choices
    text = "".join(choice.text for choice in choices)
    assert text.startswith("abc")
    logprobs = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [token for part in logprobs for token in part.tokens or []]
    values = [value for part in logprobs for value in part.token_logprobs or []]
    top = [best for part in logprobs for best in part.top_logprobs or []]
    offsets = [offset for part in logprobs for offset in part.text_offset or []]
    assert len(tokens) == len(values) == len(top) == len(offsets) == 9
    assert values[0] is None and all(value <= 0 for value in values[1:])
    assert tokens[1:4] == ["a", "b", "c"] and offsets == sorted(offsets)
    for token, value, best in list(zip(tokens, values, top, strict=True))[4:]:
        assert len(best) <= 2 and best[token] == value == max(best.values())  # greedy


def test_scoring_a_prompt_generates_no_tokens(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == "abc" and answer.usage and answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.tokens) == 4


def test_stop_strings_and_bias(client: OpenAI) -> None:
    letter = tokenizer().encode("Q", add_special_tokens=False)[0]
    options = {"model": "tiny", "prompt": "a", "max_tokens": 9, "logit_bias": {str(letter): 100}}
    assert client.completions.create(**options).choices[0].text == "Q" * 9
    stopped = client.completions.create(**options, stop=["QQQ"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == ("", "stop")
    kept = client.completions.create(**options, stop="QQ", extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == "QQ"


@pytest.mark.parametrize(
    ("extra", "accepts"),
    [
        ({"guided_choice": ["red", "green"]}, ("red", "green")),
        ({"guided_regex": "[0-9]{3}"}, None),
        ({"structured_outputs": {"choice": ["red", "green"]}}, ("red", "green")),
    ],
)
def test_guided_options(client: OpenAI, extra: dict[str, object], accepts: tuple[str, ...] | None) -> None:
    text = (
        client.completions.create(model="tiny", prompt="a", max_tokens=20, extra_body=extra).choices[0].text
    )
    assert text in accepts if accepts else text.isdigit() and len(text) == 3


def test_chunks_are_one_line_of_json_each(tiny: Running) -> None:
    body = {"prompt": 'quote " and \\ and \n é', "max_tokens": 20, "stream": True, "echo": True}
    answer = httpx.post(f"{tiny.url}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    documents = events(answer.text)
    assert documents[-1] == "[DONE]"
    text = "".join(document["choices"][0]["text"] for document in documents[:-1])
    assert text.startswith(body["prompt"])


def test_tokenize_and_detokenize(tiny: Running) -> None:
    tokens = httpx.post(
        f"{tiny.url}/tokenize", json={"prompt": "aé<think>", "return_token_strs": True}
    ).json()
    assert tokens["count"] == len(tokens["tokens"]) == 5 and tokens["max_model_len"] == 2048
    assert tokens["token_strs"][1] == "a"
    long = httpx.post(f"{tiny.url}/detokenize", json={"tokens": [5] * 2049})
    assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"
    text = httpx.post(f"{tiny.url}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert text == {"prompt": "<｜begin▁of▁sentence｜>aé<think>"}
    turn = {"messages": [{"role": "user", "content": "hi"}]}
    chat = httpx.post(f"{tiny.url}/tokenize", json=turn).json()
    text = httpx.post(f"{tiny.url}/detokenize", json={"tokens": chat["tokens"]}).json()
    assert text == {"prompt": "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [319, 5000]}, None),
        ({"prompt": "a", "max_tokens": -2}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**9}, "max_tokens"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": 3}, "temperature"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "logprobs": 99}, "logprobs"),
        ({"prompt": "a", "suffix": "z"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "stop": [""]}, "stop[0]"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, None),
        ({"prompt": "a", "logit_bias": {"99999": 1}}, None),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, None),
        ({"prompt": "a", "min_tokens": 30}, "min_tokens"),
        ({"prompt": "a", "guided_regex": "("}, None),
        ({"prompt": "a", "guided_regex": "a", "guided_choice": ["b"]}, "structured_outputs"),
        ({"prompt": "a", "structured_outputs": {}}, "structured_outputs"),
        (
            {"prompt": "a", "structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag",
        ),
        ({"prompt": "a", "response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"prompt": "a", "seed": 2**70}, "seed"),
    ],
)
def test_errors_name_bad_fields(tiny: Running, body: dict[str, object], param: str | None) -> None:
    answer = httpx.post(f"{tiny.url}/v1/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["type"] == "invalid_request_error" and error["message"]
    if param is not None:
        assert error["param"] == param, error
        assert param in error["message"]


def test_minus_one_is_no_limit(tiny: Running) -> None:
    more = {"min_tokens": 20, "stop_token_ids": list(range(256)), "seed": 1}  # 16 is the default of texts
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for path, body in (
        ("completions", {"prompt": "a", "max_tokens": -1}),
        ("chat/completions", chat | {"max_tokens": -1}),
        ("chat/completions", chat | {"max_completion_tokens": -1}),
    ):
        answer = httpx.post(f"{tiny.url}/v1/{path}", json=body | more)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] >= 20


def test_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="gpt-4", prompt="a")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_streams_of_many_choices_with_echo_and_logprobs(client: OpenAI) -> None:
    options = {"model": "tiny", "prompt": ["abc", "de"], "n": 3, "max_tokens": 4, "echo": True, "logprobs": 1}
    texts = dict.fromkeys(range(6), "")
    tokens: dict[int, list[str]] = {index: [] for index in range(6)}
    for chunk in client.completions.create(**options, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.logprobs:
            tokens[choice.index] += choice.logprobs.tokens or []
    assert all(texts[index].startswith("abc" if index < 3 else "de") for index in range(6))
    assert [len(tokens[index]) for index in range(6)] == [8, 8, 8, 7, 7, 7]


def test_unknown_fields_are_counted_or_rejected(
    tiny: Running, client: OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"prompt": "a", "max_tokens": 1, "stream": True, "max_token": 3, "stream_options": {"shape": 1}}
    for _ in range(2):
        assert httpx.post(f"{tiny.url}/v1/completions", json=body).status_code == 200
    metrics = httpx.get(f"{tiny.url}/metrics").text
    for name in ("max_token", "stream_options.shape"):
        assert f'farthing:unknown_request_fields_total{{field="{name}"}} 2.0' in metrics
        assert sum(repr(name) in record.getMessage() for record in caplog.records) == 1
    with running(tiny_engine(), strict_fields=True) as strict:
        refused = httpx.post(f"{strict.url}/v1/completions", json=body)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "unknown_parameter", "max_token")


def test_hostile_field_names_do_not_grow_the_metric(tiny: Running) -> None:
    for start in (0, 100):
        body = {"prompt": "a", "max_tokens": 1} | {f"x{i}": 1 for i in range(start, start + 100)}
        assert httpx.post(f"{tiny.url}/v1/completions", json=body).status_code == 200
    assert len(tiny.service.unknown_fields.counts) <= 65


def test_refusals_say_what_to_do_instead(client: OpenAI) -> None:
    tag = {"type": "structural_tag", "structures": [], "triggers": []}
    for extra, advice in (
        ({"best_of": 3}, "answers are not ranked; request more with n and logprobs"),
        ({"response_format": tag}, "structural tags are not supported; use tools"),
        ({"structured_outputs": {"json": {}, "structural_tag": "{}"}}, "structural tags are not supported"),
    ):
        with pytest.raises(openai.BadRequestError, match=advice):
            client.completions.create(model="tiny", prompt="a", extra_body=extra)
    assert client.completions.create(model="tiny", prompt="a", n=2, best_of=2).choices[1].index == 1
