"""Verifiers by name: what counts as right, the traps of published ones, and every error message."""

from __future__ import annotations

import logging
import re
import threading
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guerdon.errors import ConfigError, DataError
from guerdon.feedback.records import Record
from guerdon.rewards import verifiers
from guerdon.rewards.isolation import Isolated
from guerdon.rewards.verifiers import get_verifier, last_number


def judge(spec: str, completion: str, **columns: object) -> float:
    verdict = get_verifier(spec)(Record("p", [], columns=columns, where="f.jsonl:3"), [completion])
    assert verdict.value.dtype == np.float32 and verdict.value.shape == (1,)
    return float(verdict.value[0])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-5", "-5"),
        ("the answer is -5", "-5"),
        ("x=-5", "-5"),
        ("(-5)", "-5"),
        ("\\boxed{-5}", "-5"),
        ("−5", "-5"),  # U+2212
        ("3 - 8 = -5.", "-5"),
        ("10-5", "5"),
        ("10 - 5", "5"),
        ("f(x)-5", "5"),
        ("$1,234,567.50.", "1234567.50"),
        ("-$5", "-5"),
        ("+7", "7"),
        ("**7**", "7"),
        ("1, 2", "2"),
        ("1,2345", "2345"),
        (".5", ".5"),
        ("1.5e+3", "1.5e3"),
        ("答案是7", "7"),
        ("7, found in 2 minutes", "2"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_the_sign_that_the_published_pattern_drops() -> None:
    published = re.findall(r"[-+]?\d*\.\d+|\d+", "It is -5")[-1]
    assert published == "5"
    assert judge("number", "It is -5", answer="-5") == 1
    assert judge("number", "It is 5", answer="-5") == 0
    assert judge("number", "It is -5", answer="5") == 0


@given(
    st.decimals(min_value=-(10**12), max_value=10**12, allow_nan=False, places=3) | st.integers(-(10**15), 10**15),
    st.sampled_from(["{}", "The answer is {}.", "3 + 4 = {}", "#### {}", "\\boxed{{{}}}", "x={}\n", "**{}**"]),
    st.booleans(),
)
def test_a_number_is_read_back_as_it_was_written(number: Decimal | int, frame: str, thousands: bool) -> None:
    written = format(number, ",f" if isinstance(number, Decimal) else ",d") if thousands else str(number)
    found = last_number(frame.format(written))
    assert found is not None and Decimal(found) == Decimal(number)


@given(st.text())
def test_no_text_breaks_the_number_verifier(text: str) -> None:
    assert judge("number", text, answer=3) in (0, 1)


def test_number_compares_values_and_reads_worked_answers() -> None:
    assert judge("number", "so 3.50", answer=3.5) == 1
    assert judge("number", "1000", answer="Two steps: 4 * 250.\n#### 1,000") == 1
    assert judge("number", "1e99999999999999999999", answer=1) == 0
    with pytest.raises(DataError, match=r"f\.jsonl:3: .* finds no number in the answer 'seven'"):
        judge("number", "7", answer="seven")


def test_exact_ignores_white_space_alone() -> None:
    assert judge("exact", "  the\n cat ", answer="the cat") == 1
    assert judge("exact", "The cat", answer="the cat") == 0
    assert judge("exact", "7", answer=7) == 1


def test_regex() -> None:
    assert judge("regex", "Answer: 7\nbye", pattern=r"Answer: (\d+)", answer=7) == 1
    assert judge("regex", "Answer: 8", pattern=r"Answer: (\d+)", answer=7) == 0
    assert judge("regex", "yes, sir", pattern=r"\byes\b") == 1
    assert judge("regex", "no", pattern=r"\byes\b") == 0
    assert judge(r"regex:A: (\w+)", "A: b", answer="b") == 1
    assert judge("regex:a:b", "see a:b") == 1  # only the first colon separates
    assert get_verifier("regex:yes").columns == ()


def test_format_is_the_whole_completion() -> None:
    spec = r"format:<think>.*</think>\s*<answer>.*</answer>"
    assert judge(spec, " <think>a\nb</think>\n<answer>7</answer>\n") == 1
    assert judge(spec, "well, <think>a</think><answer>7</answer>") == 0


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("1/2", "0.5", True),
        ("0.5", "The answer is \\boxed{\\frac{1}{2}}", True),
        ("\\frac12", "$\\dfrac{1}{2}$", True),
        ("$\\frac{1}{2}$", "so 1/2", True),
        ("\\boxed{2\\sqrt{2}}", "$\\sqrt{8}$", True),
        ("x^2+2x+1", "$(x+1)^2$", True),
        ("-5", "\\boxed{-5}", True),
        ("-5", "\\boxed{5}", False),
        ("1,000", "It is 1000.", True),
        ("(1,2)", "$(1, 2)$", True),
        ("7", "4 + 3 = 7.", True),
        ("7", "", False),
        ("7", "I do not know", False),
        (7, "\\boxed{8}", False),
    ],
)
def test_math(answer: object, completion: str, right: bool) -> None:
    assert judge("math", completion, answer=answer) == right


def test_math_works_off_the_main_thread() -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(judge("math", "$\\frac12$", answer="0.5")))
    thread.start()
    thread.join()
    assert found == [1]


def test_math_that_takes_too_long_is_wrong_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Isolated("builtins.eval", "lambda answer, text: 10 ** 10 ** 99 if 'hard' in text else True", seconds=0.2)
    monkeypatch.setattr(verifiers, "_math_worker", lambda: slow)
    verifier = get_verifier("math")
    with caplog.at_level(logging.WARNING):
        verdict = verifier(Record("p", [], columns={"answer": "1"}, where="f.jsonl:9"), ["a", "hard one", "b"])
    assert verdict.value.tolist() == [1, 0, 1]
    assert "f.jsonl:9: math-verify took more than 0.2 s of CPU time on 'hard one'; it counts as wrong" in caplog.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exakt", "no verifier is called 'exakt'. Did you mean 'exact'? There are exact, number, math, regex, format"),
        ("format", "the verifier 'format' needs an argument: format:PATTERN."),
        ("python:", "the verifier 'python' needs an argument: python:module.function."),
        ("exact:yes", "the verifier 'exact' takes no argument; 'exact:yes' gives it 'yes'."),
        ("regex:(", "the verifier 'regex:(': '(' is not a regular expression: missing ), unterminated subpattern"),
    ],
)
def test_a_wrong_spec_is_one_clear_message(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_verifier(spec)


@pytest.mark.parametrize(
    ("spec", "columns", "message"),
    [
        ("exact", {"label": 1}, "f.jsonl:3: the verifier 'exact' needs a column 'answer'; there is 'label' beside"),
        ("math", {"answer": None}, "f.jsonl:3: the verifier 'math' needs a column 'answer'"),
        ("regex", {}, "f.jsonl:3: the verifier 'regex' needs a column 'pattern'; there is nothing beside"),
        ("regex", {"pattern": "["}, "f.jsonl:3, column 'pattern': '[' is not a regular expression"),
        ("regex", {"pattern": "(a)"}, "f.jsonl:3: pattern '(a)' has a group, but there is no column 'answer'."),
        ("regex:(a)", {}, "f.jsonl:3: the verifier 'regex' needs a column 'answer'"),
    ],
)
def test_a_record_without_what_is_needed_is_named(spec: str, columns: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        judge(spec, "a", **columns)
