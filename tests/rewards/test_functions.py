"""Reward functions of the user: both signatures, and what is said when one goes wrong."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.feedback.records import Record
from guerdon.rewards.verifiers import get_verifier

SOURCE = """
import numpy, torch

def lengths(prompts, completions, **columns):
    return [len(c) + len(p) for p, c in zip(prompts, completions)]

def chat(prompts, completions, answer, **kwargs):
    assert all(p == prompts[0] for p in prompts)
    return [float(c[0]["content"] == a) for c, a in zip(completions, answer)]

def one(prompt, completion, answer):
    return completion == answer

def typed(completion: str) -> bool:
    return completion == "yes"

def parts(prompt, completion, **columns):
    return {"right": completion == columns["answer"], "short": 0.5 * (len(completion) < 3)}

def array(completions): return numpy.arange(len(completions)) / 2
def tensor(completions): return torch.arange(len(completions))

def raises(prompt, completion):
    return 1 / (completion != "bad")

def together_raises(completions, **columns): raise ValueError("no\\nway")
def nan(completions): return [0.0, float("nan")]
def infinite(completion): return -float("inf")
def huge(completion): return 1e300
def none(completion): return None
def pair(completion): return (completion == "x", "detail")
def fewer(completions): return [1.0]
def text(completions): return "ok"
def words(completions): return ["a", "b"]
def empty(completion): return {}
def changing(completion): return {completion: 1}
def needs(completion, solution): return 1
def neither(text): return 1
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    Path("my_rewards.py").write_text(SOURCE)
    return "python:my_rewards"


RECORD = Record("pp", [], columns={"answer": "yes", "other": 1}, where="f.jsonl:3")


def test_trls_signature(module: str) -> None:
    assert get_verifier(f"{module}.lengths")(RECORD, ["a", "bcd"]).value.tolist() == [3, 5]
    record = Record([{"role": "user", "content": "?"}], [], columns={"answer": "yes"})
    assert get_verifier(f"{module}.chat")(record, ["yes", "no"]).value.tolist() == [1, 0]


def test_a_reward_of_trl_itself() -> None:
    record = Record([{"role": "user", "content": "?"}], [])
    completions = ["<think>a</think>b", "b"]
    assert get_verifier("python:trl.rewards.think_format_reward")(record, completions).value.tolist() == [1, 0]


def test_the_simple_signature(module: str) -> None:
    verdict = get_verifier(f"{module}.one")(RECORD, ["yes", "no"])
    assert verdict.value.tolist() == [1, 0] and verdict.value.dtype == np.float32 and not verdict.parts


def test_components_are_logged_and_summed(module: str) -> None:
    verdict = get_verifier(f"{module}.parts")(RECORD, ["yes", "no"])
    assert {name: part.tolist() for name, part in verdict.parts.items()} == {"right": [1, 0], "short": [0, 0.5]}
    assert verdict.value.tolist() == [1, 0.5]


def test_arrays_and_tensors_are_numbers_too(module: str) -> None:
    assert get_verifier(f"{module}.array")(RECORD, ["a", "b"]).value.tolist() == [0, 0.5]
    assert get_verifier(f"{module}.tensor")(RECORD, ["a", "b"]).value.tolist() == [0, 1]
    assert torch.is_tensor(sys.modules["my_rewards"].tensor(["a"]))


def test_an_annotation_tells_a_binary_reward(module: str) -> None:
    assert get_verifier(f"{module}.typed").binary
    assert not get_verifier(f"{module}.one").binary


@pytest.mark.parametrize(
    ("name", "what", "completion"),
    [
        ("raises", "raised ZeroDivisionError: division by zero (my_rewards.py, line 24)", "bad"),
        ("together_raises", "raised ValueError: no way (my_rewards.py, line 26)", "bad"),
        ("nan", "returned nan", "good"),
        ("infinite", "returned -inf", "bad"),
        ("huge", "returned 1e+300", "bad"),
        ("none", "returned None where a number has to be", "bad"),
        ("pair", "returned tuple (False, 'detail') where a number has to be", "bad"),
        ("fewer", "returned 1 rewards for 2 completions", "bad"),
        ("text", "returned str 'ok' where a list of 2 numbers has to be", "bad"),
        ("words", "returned str 'a' where a number has to be", "bad"),
        ("empty", "returned an empty dict", "bad"),
        ("changing", "returned the components good after bad", "good"),
    ],
)
def test_a_function_that_fails_is_named_with_the_record_and_the_completion(
    module: str, name: str, what: str, completion: str
) -> None:
    with pytest.raises(GuerdonError) as caught:
        get_verifier(f"{module}.{name}")(RECORD, ["bad", "good"])
    assert str(caught.value) == (
        f"the reward function my_rewards.{name} {what}; record: f.jsonl:3, completion: '{completion}'."
    )


def test_a_column_that_is_not_there(module: str) -> None:
    message = "f.jsonl:3: the reward function my_rewards.needs asks for 'solution', which is no column of the record"
    with pytest.raises(DataError, match=re.escape(message)):
        get_verifier(f"{module}.needs")(RECORD, ["a"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rewards_of_nobody.f", "python:rewards_of_nobody.f: there is no module 'rewards_of_nobody' in /"),
        ("my_rewards.lenghts", "my_rewards.py has no function 'lenghts'. Did you mean 'lengths'?"),
        ("my_rewards.number", "my_rewards.py has no function 'number'."),
        ("my_rewards.neither", "takes (text); it has to take either (prompts, completions, **columns) or (prompt, "),
        ("lengths", "'python:lengths' has to be python:module.function."),
        ("broken.f", "python:broken.f: the module 'broken' does not import: SyntaxError: "),
        ("needy.f", "the module 'needy' does not import: ModuleNotFoundError: No module named 'nobody_has_this'"),
    ],
)
def test_a_function_that_cannot_be_had(module: str, path: str, message: str) -> None:
    Path("broken.py").write_text("def f(:\n")
    Path("needy.py").write_text("import nobody_has_this\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_verifier(f"python:{path}")
