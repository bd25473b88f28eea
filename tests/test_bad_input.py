"""A user who gets everything wrong: each mistake is told once, with where, what and what to do, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import guerdon
from guerdon.cli import main

SOURCE = str(Path(guerdon.__file__).parent.parent)
TINY = "tiny:layers=1,width=16,heads=2"
PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i}"} for i in range(40)]
DEMONSTRATIONS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(40)]
PROMPTS = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(40)]
REWARDS = """
def raises(completion, **columns):
    raise ValueError("no such thing")

def nan(completion, **columns):
    return float("nan")

def short(prompts, completions, **columns):
    return [1.0]

def leaves(completion, **columns):
    raise SystemExit

def strange(x):
    return 1.0

def greedy(completion, gold):
    return 1.0
"""
DPO = ["train", "dpo", "--model", TINY, "--data", "pairs.jsonl", "--batch-size", "8", "--max-updates", "2"]
SFT = ["train", "sft", "--model", TINY, "--batch-size", "8", "--max-updates", "2"]
TASK = ["--task", "prompts.jsonl", "--verifier", "exact"]
EVALUATION = ["--eval-items", "2", "--eval-samples", "2", "--eval-max-new-tokens", "4"]
ROUND = ["--rounds", "1", "--prompts-per-round", "4", "--group-size", "2", "--max-new-tokens", "4", *EVALUATION]
GRPO = ["train", "grpo", "--model", TINY, *ROUND]
COLLECT = ["collect", "--model", TINY, *TASK, "--n", "2", "--prompts", "4", "--max-new-tokens", "4"]
COMPARE = ["compare", "dpo", "--model", TINY, "--seeds", "1"]


def write(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch) -> Path:
    """A directory with good files, where every command runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, value in {"GUERDON_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    write("pairs.jsonl", PAIRS)
    write("demonstrations.jsonl", DEMONSTRATIONS)
    write("prompts.jsonl", PROMPTS)
    return tmp_path


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Run a command that has to fail, and return what it says."""

    def run(*argv: str) -> str:
        try:
            code = main(argv)
        except SystemExit as left:  # a flag's value of the wrong type
            code = left.code
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        assert "Traceback" not in err
        assert err.count("guerdon: ") <= 1
        return err

    return run


@pytest.fixture
def told(refused) -> Callable[..., str]:
    """The one message of a command that is refused before it begins, and so leaves no run behind."""

    def run(*argv: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file() and in_sight(path)}
        err = refused(*argv)
        assert err.startswith("guerdon: ")
        after = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file() and in_sight(path)}
        assert before == after
        return err.removeprefix("guerdon: ")

    return run


def in_sight(path: Path) -> bool:
    return path.parts[0] not in ("cache", "__pycache__")


# Data -----------------------------------------------------------------------------------------------------------------


def parquet(content: slice) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"prompt": ["a"] * 100, "chosen": ["b"] * 100, "rejected": ["c"] * 100})
    parquet.write_table(table, "whole.parquet")
    return Path("whole.parquet").read_bytes()[content]


GOOD, OTHER = json.dumps(PAIRS[0]) + "\n", json.dumps(PAIRS[1]) + "\n"
FILES = {
    "columns.jsonl": ('{"question": "a", "response": "b"}\n' * 3, "found the columns 'question', 'response'"),
    "types.jsonl": (
        GOOD + '{"prompt": "a", "chosen": 5, "rejected": "c"}\n',
        "types.jsonl:2: column 'chosen' is a",
    ),
    "lacks.jsonl": (GOOD + '{"prompt": "a", "chosen": "b"}\n', "lacks.jsonl:2: column 'rejected' is missing"),
    "torn.jsonl": (GOOD + OTHER[:30], "torn.jsonl:2: not JSON"),
    "latin.jsonl": (GOOD.encode() + b'{"prompt": "\xe9"}\n', "latin.jsonl:2: not UTF-8: byte 0xe9"),
    "latin.csv": (b"prompt,chosen,rejected\n\xe9,b,c\n", "latin.csv:2: not UTF-8"),
    "wide.jsonl": (GOOD.encode("utf-16"), "UTF-16, not UTF-8. Convert it: iconv"),
    "cut.parquet": (slice(0, 300), "cut.parquet: not a whole Parquet file"),
    "headless.parquet": (slice(-200, None), "headless.parquet: not a whole Parquet file"),
    "empty.jsonl": ("", "empty.jsonl: the file is empty"),
    "empty.parquet": ("", "empty.parquet: the file is empty"),
    "blank.jsonl": ("\n\n", "blank.jsonl: holds no rows"),
    "header.csv": ("prompt,chosen,rejected\n", "header.csv: holds no rows"),
    "pairs.txt": (GOOD, "files that end in '.txt' cannot be read; known are .jsonl"),
    "one.jsonl": (GOOD, "too few different prompts to hold any out: give --eval-data, or --holdout 0"),
    "texts.jsonl": (
        '{"text": "a"}\n' * 9,
        "dpo learns from preferences or scores, and this is language_modeling",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_data_that_cannot_be_learned_from(name, told):
    content, message = FILES[name]
    content = parquet(content) if isinstance(content, slice) else content
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in told(*DPO, "--data", name)
    assert not Path("run").exists()  # so that the same command works when the file is mended


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "pears.jsonl"], "no such file or directory. Did you mean 'pairs.jsonl'?"),
        (["inspect", "."], "a directory, but not one that `datasets` saved"),
        (["inspect", "pairs.jsonl", "--limit", "0"], "limit is 0: it must be at least 1"),
        (["look", "pairs.jsonl", "--model", TINY, "--records", "0"], "records is 0: it must be at least 1"),
        ([*DPO, "--data", "owner/nothing"], "the Hugging Face hub cannot be reached to look for a dataset"),
        ([*DPO, "--eval-data", "prompts.jsonl"], "holds prompt_only, and answers are what a policy is judged by"),
        ([*DPO, "--eval-data", "none.jsonl"], "none.jsonl: no such file"),
        ([*DPO, "--holdout", "1"], "a holdout of 1 leaves nothing to learn from"),
    ],
)
def test_data_that_is_not_there(argv, message, told):
    assert message in told(*argv)


def test_bad_rows_that_may_be_skipped_are_counted_and_shown(capsys):
    Path("some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS) + "{\n")
    assert main([*DPO, "--data", "some.jsonl", "--skip-bad"]) == 0
    assert "some.jsonl: 1 rows cannot be read and are left out; the first: some.jsonl:41" in capsys.readouterr().err


# Length and templates -------------------------------------------------------------------------------------------------


def test_a_completion_cut_to_nothing(told):
    said = told(*SFT, "--data", "demonstrations.jsonl", "--max-length", "4")
    assert said.startswith("demonstrations.jsonl:")
    assert "its completion would be cut to nothing at the maximum length of 4: raise --max-length" in said
    said = told(*SFT, "--data", "demonstrations.jsonl", "--max-length", "4", "--overlong", "drop")
    assert "nothing is left to learn from: 36 of 36 records are longer than the maximum length" in said


def test_a_held_out_completion_cut_to_nothing_is_told_before_training(told):
    write("held-out.jsonl", [*DEMONSTRATIONS[:3], {"prompt": "1" * 50, "completion": " 1"}])
    argv = [*SFT, "--data", "demonstrations.jsonl", "--eval-data", "held-out.jsonl", "--max-length", "20"]
    assert "held-out.jsonl:4: the prompt has 51 tokens" in told(*argv)
    assert main([*argv, "--overlong", "drop"]) == 0
    judged = json.loads(Path("run/evaluation.json").read_text())["metrics"]["nll"]
    assert [value is None for value in judged] == [False, False, False, True]


def test_a_text_longer_than_the_model_reads(told):
    said = told(*SFT, "--model", f"{TINY},style=gpt2,context=6", "--data", "demonstrations.jsonl")
    assert re.match(r"demonstrations\.jsonl:\d+: \d+ tokens are more than the model reads: give --max-length 6", said)


def chat_model(directory: str, template: str) -> None:
    from guerdon.language.models import load_model, save_model

    model, tokenizer = load_model(TINY)
    tokenizer.chat_template = template
    save_model(model, tokenizer, directory)


REWRITES = "{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
REFUSES = "{{ raise_exception('roles must alternate') }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REWRITES, "chat.jsonl:1: the chat template rewrites earlier turns when later ones follow"),
        (REFUSES, "chat.jsonl:1: the chat template does not take these messages: roles must alternate"),
        (None, "the feedback is conversational, but the model's tokenizer has no chat template"),
    ],
    ids=["rewrites", "refuses", "none"],
)
def test_a_template_that_does_not_work(template, message, told):
    chat_model("model", template)
    asked = [{"role": "user", "content": "1 + 1?"}]
    write("chat.jsonl", [{"prompt": asked, "completion": [{"role": "assistant", "content": "2"}]}] * 20)
    write("many.jsonl", [{"prompt": [{**asked[0], "content": f"{i}?"}], "completion": "2"} for i in range(20)])
    assert message in told(*SFT, "--model", "model", "--data", "chat.jsonl", "--eval-data", "chat.jsonl")


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tarin"], "no command 'tarin'. Did you mean 'train'?"),
        (["train", "dop", "--model", TINY], "no method is called 'dop'. Did you mean 'dpo'?"),
        ([*DPO, "--btea", "0.2"], "train dpo has no flag '--btea'. Did you mean '--beta'?"),
        (
            [*COMPARE, "--bugdet-updates", "2"],
            "no flag '--bugdet-updates'. Did you mean '--budget-updates'?",
        ),
        ([*GRPO, "--task", "reasoning-gym:chian_sum"], "no generator 'chian_sum'. Did you mean 'chain_sum'?"),
        ([*GRPO, "--task", "resoning-gym:chain_sum"], "no kind of task is called 'resoning-gym'. Did you mean"),
        ([*GRPO, "--task", "reasoning-gym:chain_sum?min_term=2"], "no parameter 'min_term'. Did you mean 'min_terms'?"),
        ([*GRPO, "--task", "promts.jsonl", "--verifier", "exact"], "no such file or directory. Did you mean 'prompts"),
        ([*GRPO, "--task", "prompts.jsonl"], "the task 'prompts.jsonl' needs a verifier"),
        (
            [*GRPO, "--task", "prompts.jsonl", "--verifier", "exat"],
            "no verifier is called 'exat'. Did you mean 'exact",
        ),
        ([*GRPO, "--task", "demonstrations.jsonl", "--verifier", "exact"], "needs a column 'answer'; there is nothing"),
        ([*DPO, "--model", "tiny:layer=2"], "there is no option 'layer'. Did you mean 'layers'?"),
        ([*DPO, "--model", "tiny:width=15"], "4 heads do not divide a width of 15"),
        ([*DPO, "--model", "smollm-135m"], "no model 'smollm-135m': it is no directory here"),
        ([*DPO, "--model", "owner/nothing"], "the Hugging Face hub does not give it"),
        ([*DPO, "--model", "here.gguf"], "model 'here.gguf': there is no such file"),
        ([*DPO, "--model", "."], "the directory has no config.json, so there is no saved model in it"),
        ([*DPO, "--log-to", "wnadb"], "--log-to wnadb: known are wandb, mlflow, trackio. Did you mean 'wandb'?"),
        ([*GRPO, *TASK, "--sampler", "vlm"], "no sampler is called 'vlm'. Did you mean 'vllm'?"),
    ],
)
def test_names_that_are_unknown(argv, message, told):
    assert message in told(*argv)


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*DPO, "--task", "prompts.jsonl"], "both data and task are given: give either data or task"),
        (["train", "dpo", "--model", TINY], "nothing to learn from is given: give either data or task"),
        ([*GRPO, "--data", "pairs.jsonl"], "grpo learns from a verifier: give a task instead of data"),
        ([*DPO, "--verifier", "exact"], "a verifier judges answers to a task"),
        ([*DPO, "--max-samples", "100"], "a budget of samples (max_samples) needs a task"),
        ([*GRPO, *TASK, "--eval-data", "pairs.jsonl"], "a task has held-out prompts of its own"),
        ([*DPO, "--lr", "-1"], "lr is -1.0: it must be at least 0."),
        ([*DPO, "--lr", "nan"], "lr is nan: it must be at least 0, and finite."),
        ([*DPO, "--batch-size", "0"], "batch_size is 0: it must be at least 1."),
        ([*DPO, "--epochs", "0"], "epochs is 0"),
        ([*DPO, "--warmup", "2"], "warmup is 2.0: it must be at least 0 and at most 1."),
        ([*DPO, "--adam-beta1", "1"], "adam_beta1 is 1.0: it must be at least 0 and below 1."),
        ([*DPO, "--beta", "0"], "beta is 0.0: it must be above 0"),
        ([*DPO, "--seed", "-1"], "seed is -1"),
        ([*DPO, "--threads", "-1"], "threads is -1"),
        ([*DPO, "--max-tokens", "0"], "max_tokens is 0"),
        ([*DPO, "--eval-items", "0"], "eval_items is 0"),
        ([*DPO, "--holdout", "1.5"], "holdout is 1.5"),
        ([*DPO, "--patience", "2"], "patience counts evaluations, and eval_every is 0"),
        ([*DPO, "--holdout", "0", "--eval-every", "1"], "eval_every is set, but nothing is held out"),
        ([*GRPO, *TASK, "--group-size", "1"], "group_size=1: completions are compared within a group; use at least 2"),
        ([*GRPO, *TASK, "--temperature", "0"], "temperature is 0.0: it must be above 0."),
        ([*GRPO, *TASK, "--top-p", "1.1"], "top_p is 1.1: it must be above 0 and at most 1."),
        ([*GRPO, *TASK, "--max-new-tokens", "0"], "max_new_tokens is 0"),
        ([*GRPO, *TASK, "--rounds", "0"], "rounds is 0"),
        ([*GRPO, *TASK, "--kl-coef", "-1"], "kl_coef is -1.0"),
        ([*GRPO, *TASK, "--max-samples", "7"], "a budget of 7 samples is less than one round of grpo"),
        ([*COMPARE, "--data", "pairs.jsonl", "--task", "prompts.jsonl"], "both data and task are given"),
        (COMPARE, "nothing to learn from is given"),
        ([*COMPARE, "--data", "pairs.jsonl", "--seeds", "0"], "seeds has to be at least 1, not 0"),
        ([*COMPARE, "--data", "pairs.jsonl", "--budget-updates", "-1"], "the budget has to be at least 1 of updates"),
        (
            [*COMPARE, "--data", "pairs.jsonl", "--budget-samples", "64"],
            "a budget of samples (max_samples) needs a task",
        ),
        ([*COMPARE, "--data", "pairs.jsonl", "--holdout", "0"], "nothing is held out to judge by"),
        ([*COMPARE, "--data", "pairs.jsonl", "--max-tokens", "-4"], "max_tokens is -4"),
        ([*COMPARE, "--data", "none.jsonl"], "none.jsonl: no such file"),
        ([*COMPARE, "--data", "demonstrations.jsonl"], "dpo learns from preferences or scores"),
        ([*COMPARE, "--data", "pairs.jsonl", "--model", "none"], "no model 'none'"),
        (
            ["compare", "grpo", *COMPARE[2:], *TASK, "--budget-samples", "9"],
            "a budget of 9 samples is less than one round",
        ),
        (
            ["compare", "dpo", *COMPARE, "--data", "pairs.jsonl"][0:2] + COMPARE[1:] + ["--data", "pairs.jsonl"],
            "two rows",
        ),
        ([*COLLECT, "--out", "pairs.jsonl"], "pairs.jsonl exists already: choose another --out"),
        ([*COLLECT, "--out", "answers.txt"], "written to .jsonl, .ndjson, .parquet, .csv files, not to '.txt'"),
        ([*COLLECT, "--out", "a.jsonl", "--n", "0"], "n is 0: it must be at least 1"),
        ([*COLLECT, "--out", "a.jsonl", "--prompts", "99"], "the task 'prompts.jsonl' has 36 training prompts"),
        ([*COLLECT, "--out", "a.jsonl", "--top-k", "-1"], "top_k is -1"),
        ([*DPO, "--out", "pairs.jsonl"], "pairs.jsonl cannot be written (File exists): choose another --out"),
        ([*DPO, "--out", "."], ". is not empty and holds no run: choose a new directory with --out"),
    ],
)
def test_options_that_cannot_be_meant(argv, message, told):
    assert message in told(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*DPO, "--lr", "much"], "--lr"),
        ([*DPO, "--batch-size", "1.5"], "--batch-size"),
        ([*DPO, "--precision", "fp8"], "'bf16'"),
        ([*DPO[:2], *DPO[4:]], "--model"),
        (["export", "run", "--to", "axolotl"], "'trl'"),
    ],
)
def test_values_of_another_type(argv, message, refused):
    assert message in refused(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: dpo\nmodel: m\n", "recipe recipe.yaml: there is no key 'model'"),
        ("method: dpo\noptions: {btea: 1}\n", "there is no option 'btea'. Did you mean 'beta'?"),
        ("method: dpo\noptions: {beta: [}\n", "recipe recipe.yaml: not YAML: "),
        (b"method: dp\xe9\n", "recipe recipe.yaml: not YAML: "),
        ("", "has to be a mapping with the keys method, options, training"),
        (f"method: dpo\noptions: {{lr: -1}}\ntraining: {{model: '{TINY}', data: pairs.jsonl}}\n", "lr is -1.0"),
    ],
)
def test_recipes(text, message, told):
    Path("recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in told("train", "--recipe", "recipe.yaml")


# Reward functions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def rewards(monkeypatch) -> None:
    Path("bad_rewards.py").write_text(REWARDS)
    monkeypatch.delitem(sys.modules, "bad_rewards", raising=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "raised ValueError: no such thing (bad_rewards.py, line 3); record: prompts.jsonl:"),
        ("nan", "returned nan; record: prompts.jsonl:"),
        ("short", "returned 1 rewards for 2 completions; record: prompts.jsonl:"),
        ("leaves", "raised SystemExit"),
        ("greedy", "asks for 'gold', which is no column of the record (its columns: 'answer')"),
    ],
)
def test_a_reward_function_that_fails(name, message, refused, rewards):
    said = refused(*GRPO, "--task", "prompts.jsonl", "--verifier", f"python:bad_rewards.{name}")
    assert f"the reward function bad_rewards.{name} {message}" in said
    assert "When that is mended, `guerdon resume run` goes on from the last checkpoint." in said


def test_a_run_goes_on_when_its_reward_function_is_mended(refused, rewards):
    refused(*GRPO, "--task", "prompts.jsonl", "--verifier", "python:bad_rewards.raises")
    sys.modules["bad_rewards"].raises = lambda completion: float("1" in completion)
    assert main(["resume", "run"]) == 0
    assert json.loads(Path("run/status.json").read_text())["state"] == "done"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("bad_rewards.strange", "takes (x); it has to take either (prompts, completions, **columns)"),
        ("bad_rewards.rasies", "has no function 'rasies'. Did you mean 'raises'?"),
        ("no_rewards.f", "there is no module 'no_rewards'"),
        ("broken_rewards.f", "the module 'broken_rewards' does not import: SyntaxError"),
    ],
)
def test_a_reward_function_that_cannot_be_had(function, message, told, rewards):
    Path("broken_rewards.py").write_text("def f(:\n")
    assert message in told(*GRPO, "--task", "prompts.jsonl", "--verifier", f"python:{function}")


def test_what_was_collected_before_a_reward_function_failed_is_kept(refused, rewards, capsys):
    collect = ["python:bad_rewards.later" if word == "exact" else word for word in COLLECT] + ["--out", "answers.jsonl"]
    Path("bad_rewards.py").write_text(
        "def later(completion, answer):\n    if answer == '3':\n        raise ValueError('three')\n    return 1.0\n"
    )
    said = refused(*collect)
    assert "bad_rewards.later raised ValueError: three" in said
    assert "What was collected is kept in answers.jsonl.partial.jsonl: the same command goes on." in said
    kept = Path("answers.jsonl.partial.jsonl").read_text().splitlines()[1:]
    assert [json.loads(row)["answer"] for row in kept] == ["1", "2"]
    sys.modules["bad_rewards"].later = lambda completion, answer: 1.0
    assert main([*collect, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] == 2


# Directories ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["resume", "nowhere"], "nowhere holds no run: there is no nowhere/config.json"),
        (["resume", "model"], "model holds no run: model/config.json was not written by `guerdon train`"),
        (["resume", "broken"], "broken/config.json cannot be read"),
        (["evaluate", "nowhere"], "nowhere holds no run that would say what it is judged on: give either data or task"),
        (["evaluate", TINY, "--data", "pairs.jsonl", *TASK], "both data and task are given"),
        (["evaluate", "stopped"], "stopped is not done (killed) and has no policy: `guerdon resume stopped` goes on"),
        (["report", "nowhere"], "nowhere holds no run and no comparison"),
        (["report", "empty"], "empty holds no run and no comparison"),
        (["report", "stopped", "--out", "pairs.jsonl/report.html"], "cannot be written"),
        (["export", "empty"], "empty holds no run"),
        (["export", "stopped"], "export: TRL has no rft. It has dapo, dpo"),
        ([*DPO, "--out", "stopped"], "stopped already holds a run: go on with it by `guerdon resume stopped`"),
        ([*DPO, "--model", "stopped"], "model 'stopped': its config.json says no model_type"),
    ],
)
def test_directories_that_hold_something_else(argv, message, told):
    for name in ("model", "broken", "empty", "stopped"):
        Path(name).mkdir()
    Path("model/config.json").write_text('{"model_type": "llama"}')
    Path("broken/config.json").write_text("{")
    training = {"model": TINY, "task": "prompts.jsonl", "verifier": "exact"}
    Path("stopped/config.json").write_text(json.dumps({"method": "rft", "options": {}, "training": training}))
    Path("stopped/status.json").write_text('{"state": "running"}')
    assert message in told(*argv)


def test_a_policy_that_was_damaged(told, capsys):
    assert main(DPO) == 0
    capsys.readouterr()
    weights = next(Path("run/policy").glob("model*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "run/policy' cannot be loaded: SafetensorError" in told("evaluate", "run")
    assert "model 'run' is a run: its policy is the model 'run/policy'" in told(*DPO, "--model", "run", "--out", "two")


# Interruption ---------------------------------------------------------------------------------------------------------


def start(*argv: str, largest_file: int | None = None) -> subprocess.Popen[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(
        [sys.executable, "-m", "guerdon", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"},
        preexec_fn=limit if largest_file else None,
    )


def rows(run: str) -> list[dict]:
    file = Path(run) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(rows_of: str, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while len(rows(rows_of)) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None and len(rows(rows_of)) >= count


LONG = ["--max-updates", "200", "--epochs", "1000", "--checkpoint-every", "2", "--keep-checkpoints", "1"]


@pytest.mark.slow
def test_ctrl_c_then_a_full_disk_then_the_end(capsys):
    process = start(*DPO, *LONG, "--gradient-checkpointing")
    wait_for("run", 5, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, out) == (130, "")
    assert re.search(r"\nguerdon: stopped at step \d+\. `guerdon resume run` goes on from there\.\n$", err)
    assert all(line.startswith(("step ", "stopping after this update, ", "guerdon: ")) for line in err.splitlines()), (
        err
    )
    (stopped,) = Path("run/checkpoints").iterdir()
    weights = (stopped / "optimizer.safetensors").read_bytes()

    process = start("resume", "run", largest_file=len(weights) // 2)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, out) == (2, "")
    (said,) = re.findall(r"^guerdon: (.*)$", err, re.MULTILINE)
    assert re.match(r"the disk is full: run/checkpoints/step-\d+ needs at least .* MB", said)
    assert f"The last whole checkpoint is {stopped.name}. Free some space, then `guerdon resume run`." in said
    assert "Traceback" not in err
    assert list(Path("run/checkpoints").iterdir()) == [stopped]
    assert (stopped / "optimizer.safetensors").read_bytes() == weights

    assert main(["resume", "run"]) == 0
    assert all(line.startswith("step ") for line in capsys.readouterr().err.splitlines())
    assert [row["step"] for row in rows("run")] == list(range(1, 201))
    assert (Path("run") / "policy" / "config.json").exists()


def test_a_cache_that_cannot_be_written_only_costs_time(monkeypatch, capsys):
    monkeypatch.setenv("GUERDON_CACHE", "/proc/cache")
    assert main(DPO) == 0
    assert all(line.startswith("step ") for line in capsys.readouterr().err.splitlines())


@pytest.mark.slow
def test_a_comparison_goes_on_after_kill_9(capsys):
    Path("sft.yaml").write_text("method: sft\noptions: {epochs: 1000, batch_size: 8}\n")
    argv = ["compare", "sft.yaml", "--model", TINY, "--data", "demonstrations.jsonl", "--seeds", "1", "--json"]
    argv += ["--budget-updates", "200", "--checkpoint-every", "2"]
    process = start(*argv)
    trial = "comparison/trials/sft/seed-0"
    wait_for(trial, 5, process)
    process.kill()
    process.communicate()
    time.sleep(0.2)
    before = len(rows(trial))
    time.sleep(0.2)
    assert len(rows(trial)) == before, "the trial goes on without its comparison"

    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "base:" not in err  # was finished
    assert "sft seed 0: resume" in err
    assert [row["step"] for row in rows(trial)] == list(range(1, 201))
    found = json.loads(out)
    assert [row["label"] for row in found["rows"]] == ["base", "sft"]
