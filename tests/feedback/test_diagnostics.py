"""Findings against feedback made by hand, in which what is odd is known by row."""

from __future__ import annotations

import itertools
import random

import pytest

from guerdon.feedback import diagnostics as d
from guerdon.feedback.readers import Feedback
from guerdon.feedback.records import Record


def view(kind: str, *records: tuple) -> d.View:
    """(prompt, completions, scores or None, columns) each, standing at 1, 2, ..."""
    made = [Record(r[0], list(r[1]), *r[2:], where=str(i)) for i, r in enumerate(records, 1)]
    return d.View.of(Feedback(kind, made, "a"))


def pairs(*triples: str) -> d.View:
    """Preferences 'prompt better worse', standing at 1, 2, ..."""
    return view("preference", *[(p, [b, w], [1.0, 0.0]) for p, b, w in map(str.split, triples)])


def told(findings: list[d.Finding]) -> list[tuple[str, int, list[str]]]:
    return [(f["what"], f["count"], f["examples"]) for f in findings]


def test_a_finding_has_a_share_and_few_examples():
    (finding,) = d.found("info", "x", [str(i) for i in range(8)], 32, "y")
    assert finding == {
        "level": "info",
        "what": "x",
        "count": 8,
        "share": 0.25,
        "examples": ["0", "1", "2", "3", "4"],
        "advice": "y",
    }
    assert d.found("info", "x", [], 0, "y") == []


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 100, 0.7222, 0.8749), (0, 0, 0.0, 1.0)],
)
def test_wilson(successes, n, low, high):
    assert d.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for successes, n in [(3, 17), (0, 4), (250, 251)]:
        theirs = stats.binomtest(successes, n).proportion_ci(0.95, "wilson")
        assert d.wilson(successes, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_repeated_rows_and_prompts():
    made = view(
        "prompt_completion",
        ("What is it?", ["a"]),
        ("What is it?", ["a"]),
        ("What is it?", ["b"]),
        ("what  is it? ", ["a"]),
        ("Else", ["a"]),
        ("What is it?", ["a"]),
    )
    assert told(d.repeated(made)) == [
        ("rows that repeat an earlier row", 2, ["2", "6"]),
        ("rows with an earlier row's prompt", 1, ["3"]),
        ("rows whose prompt differs from an earlier one in case or spacing only", 1, ["4"]),
    ]


def test_the_same_answer_with_another_judgement_is_no_repetition():
    made = view("unpaired_preference", ("p", ["a"], [1.0]), ("p", ["a"], [0.0]), ("p", ["a"], [1.0]))
    assert told(d.repeated(made)) == [
        ("rows that repeat an earlier row", 1, ["3"]),
        ("rows with an earlier row's prompt", 1, ["2"]),
    ]
    made = view("language_modeling", (None, ["a"]), (None, ["b"]), (None, ["a"]))
    assert told(d.repeated(made)) == [("rows that repeat an earlier row", 1, ["3"])]


def test_conversations_are_compared_by_role_and_content():
    user, other = [{"role": "user", "content": "a"}], [{"content": "a", "role": "user"}]
    system = [{"role": "system", "content": "a"}]
    answer = [{"role": "assistant", "content": "b"}]
    made = view("prompt_completion", (user, [answer]), (system, [answer]), (other, [answer]))
    assert told(d.repeated(made)) == [("rows that repeat an earlier row", 1, ["3"])]


def test_identical_pairs():
    made = view(
        "preference",
        ("p", ["a", "a"], [1.0, 0.0]),
        ("p", ["a", " a\n"], [1.0, 0.0]),
        ("p", ["a", "A"], [1.0, 0.0]),
        ("p", [[{"role": "assistant", "content": "a "}], [{"role": "assistant", "content": "a"}]], [1.0, 0.0]),
    )
    assert told(d.identical_pairs(made)) == [
        ("pairs whose chosen and rejected answers are identical", 3, ["1", "2", "4"])
    ]


def test_contradictory_pairs():
    made = pairs("p A B", "p B A", "p A C", "q B A", "p A B", "q C C")
    ((what, count, examples),) = told(d.contradictions(made))
    assert (what, count, examples) == ("pairs of answers that are preferred both ways round", 1, ["1 and 2 and 5"])


def test_contradictory_labels_and_scores():
    labels = view("unpaired_preference", ("p", ["a"], [1.0]), ("p", ["a"], [0.0]), ("q", ["a"], [0.0]))
    assert told(d.contradictions(labels)) == [
        ("answers that are liked in one row and disliked in another", 1, ["1 and 2"])
    ]
    scores = view("scored", ("p", ["a", "b"], [1.0, 0.5]), ("p", ["b", "a"], [0.5, 2.0]), ("q", ["c", "c"], [1.0, 2.0]))
    assert told(d.contradictions(scores)) == [
        ("answers with different scores for the same prompt", 2, ["1 and 2", "3"])
    ]


def test_cycles():
    what = "prompts with a preference cycle (A over B over C over A)"
    assert told(d.cycles(pairs("p A B", "p B C", "p C A"))) == [(what, 1, ["1, 2, 3"])]
    assert d.cycles(pairs("p A B", "p B C", "p A C", "q C A")) == []  # a ranking, and another prompt
    assert d.cycles(pairs("p A B", "p B A", "p B C", "p C B")) == []  # contradictions, told as such
    ((_, count, (example,)),) = told(d.cycles(pairs("p A B", "p B A", "p B C", "p C A", "q A B")))
    assert count == 1 and set(example.split(", ")) == {"1", "3", "4"}
    assert d.cycles(pairs("p A B", "p B C", "p C A", "q A B"))[0]["share"] == 0.5


def test_cycles_are_found_exactly_where_no_ranking_agrees():
    rng = random.Random(0)
    for _ in range(200):
        names = "ABCDE"[: rng.randint(3, 5)]
        # One preference at most between two answers, so that every cycle has three or more.
        edges = [rng.sample(pair, 2) for pair in itertools.combinations(names, 2) if rng.random() < 0.7]
        made = pairs(*(f"p {better} {worse}" for better, worse in edges)) if edges else None
        rankings = itertools.permutations(names)
        agrees = any(all(r.index(b) < r.index(w) for b, w in edges) for r in rankings)
        found = d.cycles(made) if made else []
        assert (not found) == agrees
        for finding in found:
            rows = [edges[int(where) - 1] for where in finding["examples"][0].split(", ")]
            assert len(rows) >= 3
            assert all(a[1] == b[0] for a, b in zip(rows, rows[1:] + rows[:1], strict=True))


def test_components_need_no_recursion():
    n = 5000
    ring = {str(i): {str((i + 1) % n): ""} for i in range(n)}
    assert [len(part) for part in d.components(ring)] == [n]
    two = {"a": {"b": ""}, "b": {"a": "", "c": ""}, "c": {"d": ""}, "d": {"c": ""}, "e": {"a": ""}}
    assert sorted(sorted(part) for part in d.components(two)) == [["a", "b"], ["c", "d"]]
    chain = {str(i): {str(i + 1): ""} for i in range(n)}
    assert d.components(chain) == []


def test_length_bias_of_preferences():
    made = pairs(*[f"p{i} a b" for i in range(10)])
    lengths = [[5, 3]] * 7 + [[3, 4]] + [[2, 2]] * 2
    bias, findings = d.length_bias(made, lengths)
    assert (bias["pairs"], bias["of_different_length"], bias["better_is_longer"]) == (10, 8, 7 / 8)
    assert bias["mean_difference"] == pytest.approx(1.3)
    # Within pairs: sum of d / sqrt(n * sum of d squared) for differences d.
    assert bias["correlation"] == pytest.approx(13 / (10 * 29) ** 0.5)
    assert bias["interval"] == pytest.approx(list(d.wilson(7, 8)))
    (finding,) = findings
    assert finding["what"].startswith("the better answer is the longer one in 88% of the pairs of different length")
    assert finding["count"] == 7 and finding["share"] == 0.7


def test_length_bias_towards_short_answers_and_none():
    made = pairs(*[f"p{i} a b" for i in range(20)])
    _, (finding,) = d.length_bias(made, [[1, 9]] * 18 + [[9, 1]] * 2)
    low, high = d.wilson(18, 20)
    assert "is the shorter one in 90%" in finding["what"] and f"{low:.0%} to {high:.0%}" in finding["what"]
    bias, findings = d.length_bias(made, [[1, 2], [2, 1]] * 10)
    assert findings == [] and bias["correlation"] == 0.0
    bias, findings = d.length_bias(made, [[3, 3]] * 20)
    assert findings == [] and bias["better_is_longer"] is None and bias["correlation"] is None


def test_length_bias_of_scores_takes_the_best_against_the_worst():
    made = view("scored", ("p", "abc", [1.0, 3.0, 2.0]), ("q", "ab", [1.0, 1.0]), ("r", "ab", [0.0, 5.0]))
    bias, _ = d.length_bias(made, [[4, 10, 7], [1, 50], [8, 6]])
    assert (bias["pairs"], bias["better_is_longer"], bias["mean_difference"]) == (2, 0.5, 2.0)
    xy, xx, yy = 6 + (-1 * 2.5 * 2), 18 + 2, 2 + 12.5
    assert bias["correlation"] == pytest.approx(xy / (xx * yy) ** 0.5)


def test_margins():
    rows = [{"score_chosen": 1, "score_rejected": 2}, {"scores": [3, 3]}, {"scores": [3, 1]}, {}, {"score_chosen": 1}]
    made = view("preference", *[("p", ["a", "b"], [1.0, 0.0], columns) for columns in rows])
    assert told(d.margins(made)) == [
        ("pairs whose rejected answer has the higher score", 1, ["1"]),
        ("pairs whose two answers have the same score", 1, ["2"]),
    ]


def test_ties():
    made = view(
        "scored", ("p", "ab", [1.0, 1.0]), ("q", "abc", [2.0, 2.0, 0.0]), ("r", "a", [1.0]), ("s", "ab", [1.0, 0.0])
    )
    findings = d.ties(made)
    assert told(findings) == [
        ("prompts whose answers all have the same score", 1, ["1"]),
        ("prompts with one answer only", 1, ["3"]),
        ("prompts whose best score several answers share", 1, ["2"]),
    ]
    assert findings[0]["level"] == "info"
    assert d.ties(view("scored", ("p", "ab", [1.0, 1.0]), ("r", "a", [1.0])))[0]["level"] == "error"


def test_label_balance():
    made = view("unpaired_preference", *[(f"p{i}", ["a"], [float(i > 0)]) for i in range(20)])
    balance, findings = d.label_balance(made)
    assert balance == {"liked": 19, "disliked": 1}
    assert told(findings) == [("labels 'disliked', the rarer kind", 1, ["1"])]
    balance, findings = d.label_balance(view("unpaired_preference", ("p", ["a"], [1.0]), ("q", ["a"], [1.0])))
    assert balance == {"liked": 2, "disliked": 0}
    assert told(findings) == [("every label is 'liked'", 2, ["1", "2"])] and findings[0]["level"] == "error"
    steps = view("stepwise_supervision", ("p", ["a\nb"], None, {"steps": ["a", "b"], "labels": [True, False]}))
    assert d.label_balance(steps) == ({"right": 1, "wrong": 1}, [])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hello", "latin"),
        ("naïve café", "latin"),
        ("Привет, world", "cyrillic"),
        ("你好", "cjk"),
        ("日本語です", "japanese"),
        ("مرحبا", "arabic"),
        ("안녕하세요", "hangul"),
        ("12 + 3 = 15 \N{WHITE HEAVY CHECK MARK}", ""),
        ("", ""),
    ],
)
def test_script(text, name):
    assert d.script(text) == name


def test_scripts():
    made = view("prompt_completion", ("hello", ["hi"]), ("hello", ["привет"]), ("привет", ["привет"]), ("1+1", ["2"]))
    shares, findings = d.scripts(made)
    assert shares == {"latin": 0.5, "cyrillic": 0.25, "no letters": 0.25}
    assert told(findings) == [
        ("rows in cyrillic script", 1, ["3"]),
        ("rows without letters", 1, ["4"]),
        ("answers in another script than their prompt", 1, ["2"]),
    ]


@pytest.mark.parametrize("text", ["café", "naïve", "Müller’s “quote” — €5", "Ça va? Âge, MÃE", "São Tomé", "ÅÄÖ â ð ï"])
def test_mojibake_is_what_wrong_decoding_makes(text):
    garbled = text.encode("utf-8").decode("cp1252", errors="replace")
    made = view("language_modeling", (None, [text]), (None, [garbled]), (None, ["plain"]))
    assert told(d.mojibake(made)) == [("rows with wrongly decoded characters", 1, ["2"])]


def test_odd_answers():
    prompt = "What is the meaning of all this?"
    call = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    made = view(
        "scored",
        (prompt, ["fine", " "], [1.0, 0.0]),
        (prompt, [prompt + " Nothing."], [1.0]),
        ("Hi", ["Hi there"], [1.0]),
        ([{"role": "user", "content": prompt}], [call, [{"role": "user", "content": "x"}]], [1.0, 0.0]),
    )
    assert told(d.odd_answers(made)) == [
        ("empty answers", 1, ["1"]),
        ("answers that begin with their whole prompt", 1, ["2"]),
        ("conversations without an assistant message", 1, ["4"]),
    ]


def test_missing_columns():
    made = view("prompt_only", ("p", [], None, {"answer": "1"}), ("q", [], None, {"answer": None, "id": 0}))
    assert told(d.missing_columns(made)) == [
        ("rows without the column 'answer'", 1, ["2"]),
        ("rows without the column 'id'", 1, ["1"]),
    ]
