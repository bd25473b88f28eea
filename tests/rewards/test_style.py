"""The joint score of style transfer: its factors by hand, and a search that follows it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import guerdon
from encoders import save_encoder
from guerdon.errors import ConfigError
from guerdon.evaluation.metrics import Evaluation
from guerdon.feedback.records import Record
from guerdon.language.models import load_model, save_model
from guerdon.language.policy import Policy
from guerdon.rewards.style import Classifier, bert_score, style_verifier
from guerdon.training.prompting import likelihood

TEXTS = ["the plot was dull", "the plot was superb", "a film"]
TINY = "tiny:layers=1,width=16,heads=2,vocab=word"


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    paths = [tmp_path_factory.mktemp(name) for name in ("style", "fluency")]
    models = [
        save_encoder(path, "ForSequenceClassification", TEXTS, "Roberta", labels, seed=seed)
        for seed, (path, labels) in enumerate(zip(paths, (("sour", "sweet"), ("odd", "fluent")), strict=True))
    ]
    return paths, models


def test_bert_score_matches_greedily():
    a, b = np.eye(3)[[0, 1]], np.eye(3)[[1]]
    # precision: one of two tokens of a is in b; recall: the token of b is in a
    assert bert_score(a, b) == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert bert_score(b, a) == bert_score(a, b) and bert_score(a, a) == 1
    assert bert_score(a[:0], b) == 0 and bert_score(a, -a) == 0


def test_the_joint_score_is_the_product_of_its_factors(classifiers):
    (style, fluency), ((model, tokenizer), (critic, _)) = classifiers
    judge = style_verifier(f"{style}#sweet", f"{fluency}#fluent", lambda text: 0.5)
    said = judge(Record("rewrite it", [], columns={"answer": TEXTS[0]}), [TEXTS[0], TEXTS[1], ""])
    with torch.no_grad():
        for i, text in enumerate(TEXTS[:2]):
            encoded = tokenizer(text, return_tensors="pt")
            for name, own in (("style", model), ("fluency", critic)):
                p = own(input_ids=encoded.input_ids).logits[0].softmax(-1)[1]
                assert said.parts[name][i] == pytest.approx(float(p), abs=1e-5)
    assert said.parts["content"][0] == pytest.approx(1, abs=1e-5) and 0 <= said.parts["content"][1] < 1
    assert said.parts["content"][2] == said.value[2] == 0
    np.testing.assert_allclose(said.value, said.parts["content"] * said.parts["style"] * said.parts["fluency"])
    plain = style_verifier(f"{style}#sweet", "", lambda text: len(text) / 100)
    assert plain(Record("", [], columns={"answer": "x"}), ["a film"]).parts["fluency"][0] == pytest.approx(0.06)


def test_likelihood_is_the_geometric_mean_of_the_tokens():
    policy = Policy.load(TINY, "fp32", texts=TEXTS)
    ids = policy.tokenizer(TEXTS[0]).input_ids
    with policy.model.plain() as model, torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    own = np.mean([float(logps[i, token]) for i, token in enumerate(ids[1:])])
    assert likelihood(policy, TEXTS[0]) == pytest.approx(np.exp(own), rel=1e-4) and likelihood(policy, "") == 0


def test_what_is_no_classifier_or_no_class_is_told(classifiers):
    (style, _), _ = classifiers
    with pytest.raises(ConfigError, match="has to be MODEL#CLASS"):
        Classifier(str(style))
    with pytest.raises(ConfigError, match=r"has no class 'swet'\. Did you mean 'sweet'"):
        Classifier(f"{style}#swet")


def test_a_search_follows_the_joint_score_with_halving(classifiers, tmp_path):
    (style, _), _ = classifiers
    data = tmp_path / "items.jsonl"
    rows = [{"prompt": f"the plot was dull {i}", "answer": f"the plot was dull {i}"} for i in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = load_model(TINY, texts=[*TEXTS, *(row["prompt"] for row in rows)])
    for p in model.parameters():
        p.data = 8 * p.data  # so that its answers depend on its prompt
    save_model(model, tokenizer, tmp_path / "model")
    how = {
        "model": str(tmp_path / "model"), "data": str(data), "style": f"{style}#sweet",
        "max_new_tokens": 4, "max_samples": 14,
        "search_items": 6, "validation_items": 4, "eval_items": 5, "shots": 2, "precision": "fp32",
    }  # fmt: skip
    run = guerdon.train(
        "promptquine", mode="ssga", initial="random", population=3, reproductions=4, halving=True, **how,
        rerank=20, out=str(tmp_path / "run"),
    )  # fmt: skip
    found = Evaluation.load(run.path / "evaluation.json")
    assert found.primary == "joint" and set(found.metrics) == {"joint", "content", "style", "fluency"}
    m = {name: np.asarray(values) for name, values in found.metrics.items()}
    np.testing.assert_allclose(m["joint"], m["content"] * m["style"] * m["fluency"], atol=1e-6)
    last = run.metrics()[-1]
    factors = [m[name].mean() for name in ("content", "style", "fluency")]
    assert last["eval/gm"] == pytest.approx(np.prod(factors) ** (1 / 3)) and last["eval/score"] == last["eval/joint"]
    history = [json.loads(line) for line in (run.path / "policy" / "history.jsonl").read_text().splitlines()]
    assert all(row["reward"] == pytest.approx(200 * row["accuracy"]) for row in history)
    assert len({row["accuracy"] for row in history}) > 1 and all(0 <= row["accuracy"] < 1 for row in history)
    assert guerdon.evaluate(run.path)[0].means() == pytest.approx(found.means())
    for wrong, said in [({"verifier": "number"}, "by one of them"), ({"style": "", "fluency": "x#y"}, "give style")]:
        with pytest.raises(ConfigError, match=said):
            guerdon.train("icl", **{**how, **wrong}, out=str(tmp_path / "wrong"))
