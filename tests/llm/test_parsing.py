"""Structured replies are read as they are meant, or counted as failures; never guessed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import DataError
from guerdon.llm.parsing import Parser, find_json

CASES: list[tuple[str, Any]] = [
    ('{"a": 1}', {"a": 1}),
    ('Sure! Here it is:\n```json\n{"a": [1, 2.5, null]}\n```\nI hope this helps {smile}.', {"a": [1, 2.5, None]}),
    ('```\n{"a": 1}\n```\nor better\n```json\n{"a": 2}\n```', {"a": 2}),
    ('I weigh {x} against {y}. {"a": 1} first, then {"a": 2}.', {"a": 2}),
    ("{'a': 'it's', 'b': True, 'c': None}", {"a": "it's", "b": True, "c": None}),
    ('{a: 1, b_2: "x",}', {"a": 1, "b_2": "x"}),
    ('{"a": 1, // the first\n "b": [1, 2,], /* and */ "c": -1e3}', {"a": 1, "b": [1, 2], "c": -1000.0}),
    ('{"a": "two\nlines", "b": "she said "no" to it"}', {"a": "two\nlines", "b": 'she said "no" to it'}),
    ("{“a”: “b”}", {"a": "b"}),
    (r"{'a': 'x\ny é \'q\' \frac{1}{2}'}", {"a": "x\ny é 'q' \x0crac{1}{2}"}),
    (r"{'a': '\d+ \\d'}", {"a": r"\d+ \d"}),
    ('[{"a": 1}]', {"a": 1}),
    ('{"a": {"b": {}}}', {"a": {"b": {}}}),
    ('{"a": "http://x.y/z"}', {"a": "http://x.y/z"}),
]


@pytest.mark.parametrize(("text", "value"), CASES)
def test_replies_that_are_read(text: str, value: Any) -> None:
    assert find_json(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "", "no JSON", "{", '{"a": 1', '{"a": "cut off in the mid', '{"a": [1, 2', "{1, 2, 3}", "{a}", '{"a": b}',
        '{"a" 1}', '{"a": 1 "b": 2}', "[1, 2]", "```json\n{'a': \n```", '{"text": "say "yes", please"}',
        '{"a": ' * 500, "[" * 3000,
    ],
)  # fmt: skip
def test_replies_that_cannot_be_read_for_certain(text: str) -> None:
    with pytest.raises(DataError, match="the reply holds no object"):
        find_json(text)


def test_what_is_wanted_is_looked_for() -> None:
    assert find_json('{"a": [1, 2]} and [3]', list) == [3]
    text = '{"action": "go", "score": 1} {"score": 2}'
    assert find_json(text, keys=("action",)) == {"action": "go", "score": 1}
    with pytest.raises(DataError, match="holds no object with action, reason"):
        find_json(text, keys=("action", "reason"))


def test_failures_are_counted() -> None:
    parse = Parser(keys=("a",))
    assert parse.failure_rate == 0
    assert [parse(text) for text in ('{"a": 1}', "none", '{"b": 1}', "{'a': 2}")] == [{"a": 1}, None, None, {"a": 2}]
    assert (parse.read, parse.failed, parse.failure_rate) == (2, 2, 0.5)
    assert parse.failures == ["none", '{"b": 1}']


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), plain), st.booleans())
def test_all_json_is_read_exactly(value: dict[str, Any], ascii_only: bool) -> None:
    assert find_json(f"So:\n{json.dumps(value, ensure_ascii=ascii_only)}\nDone.") == value


simple = st.text(alphabet=st.characters(codec="ascii", exclude_characters="'\"\\\n\r"), max_size=10)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(simple, simple | st.integers() | st.booleans() | st.none() | st.lists(simple)))
def test_all_simple_python_is_read_exactly(value: dict[str, Any]) -> None:
    assert find_json(f"So: {value!r} Done.") == value


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="{}[]:,'\"` \n\\a1/*", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with pytest.raises(DataError):
        raise DataError(str(find_json(text)))


def test_long_nonsense_is_given_up() -> None:
    """What took a time quadratic in the length would take minutes here."""
    parse = Parser()
    for text in ("{" * 5000, '{"' * 5000, "{'a': [" * 2000, "/*" * 5000, '{"a": "' + '"x' * 5000):
        assert parse(text) is None
