"""Tools that measure a server: GuideLLM, the harness of lm-eval, AIPerf. Runs without their packages."""

import json
import os
import subprocess
from pathlib import Path

from common import HELLO, PLAIN, run

CLIENT = Path(os.environ["CLIENT"])
TOKENIZER = str(Path(os.environ["PYTHONPATH"]) / "src" / "farthing" / "assets" / "mite")
ITEMS = 4
TASK = f"""\
task: hello
dataset_path: json
dataset_kwargs: {{data_files: {{test: hello.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{asked}}}}"
doc_to_target: "{HELLO}"
generation_kwargs: {{until: ["<end>"], max_gen_toks: 64, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def tool(name, *arguments):
    """Run a program of the client. AIPerf takes folders of tokenizers only if it may look online."""
    quiet = {} if name == "aiperf" else {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [str(CLIENT / "bin" / name), *arguments]
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def questions(**more):
    """A file with the same question in every line."""
    line = json.dumps({"asked": PLAIN, "text": PLAIN} | more) + "\n"
    Path("hello.jsonl").write_text(line * ITEMS)
    return "hello.jsonl"


def guidellm(url):
    tool(
        "guidellm", "run", "--disable-console-interactive",
        "--backend", f"kind=openai_http,target={url},model=tiny",
        "--profile", "kind=synchronous", "--constraint", f"kind=max_requests,count={ITEMS}",
        "--tokenizer", f"kind=hf_auto,model={TOKENIZER}",
        "--data", f"kind=json_file,path={questions()}", "--output", "kind=json,path=guidellm.json",
    )  # fmt: skip
    (benchmark,) = json.loads(Path("guidellm.json").read_text())["benchmarks"]
    made = benchmark["requests"]
    assert len(made["successful"]) == ITEMS and not made["errored"], {k: len(v) for k, v in made.items()}
    (said,) = {each["output"] for each in made["successful"]}
    return said


def lm_eval(kind, path):
    def ask(url):
        questions()
        Path("hello.yaml").write_text(TASK)
        more = ["--apply_chat_template"] if "chat" in kind else []
        tool(
            "lm-eval", "run", "--model", kind, "--tasks", "hello.yaml", "--output_path", "results", *more,
            "--model_args", f"model=tiny,base_url={url}{path},tokenizer_backend=None,num_concurrent=2",
        )  # fmt: skip
        newest = max(Path("results").rglob("results_*.json"), key=lambda file: file.stat().st_mtime)
        (result,) = json.loads(newest.read_text())["results"].values()
        return HELLO if result["exact_match,none"] == 1.0 else result

    return ask


def aiperf(*streaming):
    def ask(url):
        folder = Path("aiperf-stream" if streaming else "aiperf")
        tool(
            "aiperf", "profile", "--model", "tiny", "--url", url, "--endpoint-type", "chat", *streaming,
            "--tokenizer", TOKENIZER, "--input-file", questions(), "--custom-dataset-type", "single_turn",
            "--request-count", str(ITEMS), "--concurrency", "2", "--output-artifact-dir", str(folder),
            "--export-outputs-json", "--ui", "none",
        )  # fmt: skip
        summary = json.loads((folder / "profile_export_aiperf.json").read_text())
        assert summary["request_count"]["avg"] == ITEMS and not summary.get("error_summary"), summary
        return HELLO

    return ask


CHECKS = {
    "guidellm": {"stream": guidellm},
    "lm-eval": {
        "answer": lm_eval("local-chat-completions", "/v1/chat/completions"),
        "answer (completions)": lm_eval("local-completions", "/v1/completions"),
    },
    "aiperf": {"answer": aiperf(), "stream": aiperf("--streaming")},
}
run(CHECKS[CLIENT.name])
