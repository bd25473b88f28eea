"""Overlap of test items with training texts, by hand-counted examples."""

from __future__ import annotations

import json

import numpy as np
import pytest

import guerdon
from guerdon.cli import main
from guerdon.feedback.decontaminate import contamination, exact_copies


def test_the_share_of_covered_tokens_in_one_training_text() -> None:
    # "a b c d e" shares trigram abc (3 of 5 tokens) with the first text and cde (3 of 5) with the second; covering
    # all five together would need both texts, which does not count. The third holds abc and bcd: 4 of 5.
    found = contamination(["x a b c", "c d e", "a b c d", "a b d e"], ["A b  c d e", "p q r s"], n=3)
    assert found.score.tolist() == [0.8, 0.0]
    assert found.source.tolist() == [2, -1]
    assert found.flagged().tolist() == [True, False]


def test_overlapping_and_repeated_ngrams_count_each_token_once() -> None:
    found = contamination(["a a a a a a"], ["a a a a b b b b"], n=2)
    assert found.score.tolist() == [0.5]
    assert found.flagged().tolist() == [False]  # the threshold itself is not above it
    assert found.flagged(0.4).tolist() == [True]


def test_eight_words_by_default_and_punctuation_counts_as_tokens() -> None:
    question = "Ann has 3 red apples, and Bob has 12."
    assert contamination([f"Well: {question.upper()} Why?"], [question]).score.tolist() == [1]
    assert contamination(["Ann has 3 red apples , and Tom has 12."], [question]).score.tolist() == [0]


def test_items_shorter_than_an_ngram_need_the_exact_comparison() -> None:
    train, test = ["4 + 3 =", "what is it"], ["4  + 3 =", "4 + 3", "WHAT is it", ""]
    assert contamination(train, test).score.tolist() == [0, 0, 0, 0]
    assert exact_copies(train, test).tolist() == [True, False, True, False]


def test_a_long_list_of_texts_equals_the_plain_definition() -> None:
    rng = np.random.default_rng(0)
    train = [" ".join(rng.choice(list("abcd"), 12)) for _ in range(40)]
    test = [" ".join(rng.choice(list("abcd"), 10)) for _ in range(20)]
    n = 4

    def plain(item: str, text: str) -> float:
        a, b = item.split(), text.split()
        inside = [a[i : i + n] in [b[j : j + n] for j in range(len(b) - n + 1)] for i in range(len(a) - n + 1)]
        covered = {i + k for i, hit in enumerate(inside) if hit for k in range(n)}
        return len(covered) / len(a)

    table = np.array([[plain(item, text) for text in train] for item in test])
    found = contamination(iter(train), test, n=n)
    np.testing.assert_allclose(found.score, table.max(1))
    assert table.max() > 0.5 > table.max(1).min()
    assert all(found.source[i] == (table[i].argmax() if table[i].max() else -1) for i in range(len(test)))


def test_inspect_finds_test_prompts_among_the_feedback(tmp_path, capsys):
    question = "a train leaves the station at noon and travels for two hours at ninety"
    rows = [{"prompt": question, "completion": "x"}, {"prompt": "What is 2 + 2?", "completion": "4"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tests = [f"{question}. How far?", "what is 2 + 2?", "What is 2 + 3?"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in tests))
    found = guerdon.inspect(str(tmp_path / "train.jsonl"), against=str(tmp_path / "test.jsonl"))
    (finding,) = [f for f in found["findings"] if "that stand here" in f["what"]]
    assert (finding["level"], finding["count"]) == ("error", 2) and finding["share"] == pytest.approx(2 / 3)
    assert finding["examples"][0].endswith("train.jsonl:1")
    assert main(["inspect", str(tmp_path / "train.jsonl"), "--against", str(tmp_path / "test.jsonl")]) == 0
    assert "that stand here, too" in " ".join(capsys.readouterr().out.split())
