"""How tasks are named, and what a spec that is wrong is told."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.tasks import load_task, parse_task
from guerdon.tasks.base import TaskSpec


def test_specs_are_read_without_importing_anything() -> None:
    assert parse_task("reasoning-gym:chain_sum?min_terms=2&prompt=Q: {question}%0AA%26B=") == TaskSpec(
        "reasoning-gym", "chain_sum", {"min_terms": "2", "prompt": "Q: {question}\nA&B="}
    )
    assert parse_task("data/prompts.jsonl") == TaskSpec("prompts", "data/prompts.jsonl")
    assert parse_task("owner/name:config") == TaskSpec("prompts", "owner/name:config")
    code = "import sys; from guerdon.tasks import parse_task; parse_task('reasoning-gym:x?a=1')\n"
    code += "assert not {'torch', 'reasoning_gym', 'transformers', 'math_verify'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "src"}, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chain_sum", "there is no task 'chain_sum': a task is reasoning-gym:NAME?param=value (perhaps "),
        ("", "there is no task ''"),
        ("reasoning-gym:", "the task 'reasoning-gym:' names no generator"),
        ("reasoning_gym:chain_sum", "no kind of task is called 'reasoning_gym'. Did you mean 'reasoning-gym'?"),
        ("reasoning-gym:chain_sum?min_terms", "'min_terms' has to be param=value."),
        ("reasoning-gym:chain_sum?seed=1&seed=2", "sets 'seed' twice"),
        ("reasoning-gym:chain_sum?prompt=hi", "the prompt 'hi' has to contain {question}."),
        ("reasoning-gym:chain_sum?extract=last", "'extract' has to be one of auto, whole, tag, last-number"),
        ("reasoning-gym:chain_sum?chat=2", "'chat' has to be true or false, not '2'"),
        ("reasoning-gym:chain_sum?test_size=no", "'test_size' has to be a whole number, not 'no'"),
        ("reasoning-gym:chain_sun", "has no generator 'chain_sun'. Did you mean 'chain_sum'? Similar among its 1"),
        ("reasoning-gym:chain_sum?min_term=2", "has no parameter 'min_term'. Did you mean 'min_terms'? Its own are "),
        ("reasoning-gym:chain_sum?seed=2", "chain_sum has no parameter 'seed'."),
        ("reasoning-gym:chain_sum?min_terms=x", "'min_terms' has to be a whole number, not 'x'."),
        ("reasoning-gym:countdown?operators=[1", "'operators' has the value '[1', which is not YAML."),
        ("reasoning-gym:chain_sum?min_terms=5&max_terms=2", "parameters: AssertionError: max_terms must be >= min"),
        ("prompts.jsonl", "the task 'prompts.jsonl' needs a verifier, one of exact, number, math, regex"),
    ],
)
def test_a_wrong_spec_is_one_clear_message(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_task(spec)


def test_other_arguments_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="train_size has to be at least 1, not 0"):
        load_task("reasoning-gym:chain_sum", train_size=0)
    with pytest.raises(ConfigError, match="no verifier is called 'exakt'"):
        load_task("reasoning-gym:chain_sum", verifier="exakt")
    with pytest.raises(DataError, match=r"nofile\.jsonl: no such file"):
        load_task("nofile.jsonl", verifier="exact")


def test_too_few_different_prompts(tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "a", "answer": 1}\n' * 5)
    with pytest.raises(GuerdonError, match="too few different prompts: none is left to be judged by"):
        load_task(str(file), verifier="exact")
