"""Masked models as answerers: each prompt and item alone, at the mask of the template."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import guerdon
from encoders import save_encoder
from guerdon.errors import ConfigError
from guerdon.feedback.labelled import Item
from guerdon.feedback.sentiment import templated_sentiment
from guerdon.language.masked import MaskedAnswerer
from guerdon.language.models import load_other
from guerdon.language.prompting import Prompt, few_shot, parse_template
from guerdon.training.rundir import RunDir

ROWS = templated_sentiment()[:120]
TEXTS = [row["text"] for row in ROWS] + ["It was good. It was bad."]
WORDS = {"negative": "bad", "positive": "good"}
TEMPLATE = "{text} It was {mask}."


@pytest.fixture(scope="module", params=["Roberta", "Bert"])
def saved(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("masked")
    save_encoder(path, "ForMaskedLM", TEXTS, request.param)
    return path


def test_the_answer_stands_in_the_mask():
    template = parse_template(TEMPLATE, ["text"], "x")
    shown = [Item({"text": "a dull plot."}, "negative", tuple(WORDS))]
    parts = few_shot(template, shown, WORDS)
    assert "".join(f"<{t}>" if slot else t for t, slot in parts) == (
        "a dull plot. It was bad.\n\n<text> It was <mask>."
    )
    with pytest.raises(ConfigError, match=r"several slots \{mask\}"):
        parse_template("{text} {mask} {mask}", ["text"], "x")
    with pytest.raises(ConfigError, match="has no slot"):
        parse_template("It was {mask}.", ["text"], "x")


def test_probabilities_are_those_of_each_prompt_and_item_alone(saved):
    reader = MaskedAnswerer.load(str(saved), "fp32", WORDS, max_tokens=40)  # several batches, and padding in them
    tokenizer, model = reader.policy.tokenizer, reader.policy.model
    shown = [Item({"text": TEXTS[3]}, "negative", tuple(WORDS))]
    full = Prompt.of(few_shot(parse_template(TEMPLATE, ["text"], "x"), shown, WORDS), tokenizer)
    assert full.masked and full.columns == ["text"] and len(full.slots) == 2
    pruned = full.keep([i for i in range(len(full)) if i not in (0, 1, 5, len(full) - 1)])
    items = [
        Item({"text": t}, "positive", tuple(WORDS)) for t in (TEXTS[0], "the plot", f"a {tokenizer.mask_token} of")
    ]
    found = reader.probabilities([full, pruned], items)
    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in WORDS.values()]
    for prompt, row in zip((full, pruned), found, strict=True):
        for item, p in zip(items, row, strict=True):
            text = prompt.fill({**item.columns, "mask": tokenizer.mask_token})
            encoded = tokenizer(text, return_tensors="pt")
            at = (encoded.input_ids[0] == tokenizer.mask_token_id).nonzero()[-1, 0]  # the template's is the last one
            with torch.no_grad():
                own = model(input_ids=encoded.input_ids).logits[0, at][ids].softmax(-1)
            np.testing.assert_allclose(p, own.numpy(), atol=1e-5)
    assert reader.answers(full, items) == [items[0].choices[int(p.argmax())] for p in found[0]]


def test_a_masked_model_is_searched_with_and_predicts(saved, tmp_path):
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    how = {
        "model": str(saved), "data": str(data), "template": TEMPLATE, "precision": "fp32", "max_samples": 15,
        "verbalizers": ("negative=bad", "positive=good"), "search_items": 6, "validation_items": 8, "eval_items": 10,
    }  # fmt: skip
    run = guerdon.train("promptquine", population=3, reproductions=4, **how, out=str(tmp_path / "run"))
    history = [json.loads(line) for line in (run.path / "policy" / "history.jsonl").read_text().splitlines()]
    assert len(history) > 8 and all("{text}" in row["prompt"] and "{mask}" in row["prompt"] for row in history)
    policy = guerdon.load_policy(run.path)
    said = policy.probabilities(["the film was good.", {"text": "dull"}])
    assert [set(p) for p in said] == [set(WORDS)] * 2 and policy.predict(["x"])[0] in WORDS
    assert guerdon.evaluate(run.path)[0].means()["accuracy"] == RunDir(run.path).metrics()[-1]["eval/score"]

    for method, said_ in [
        ("evoprompt", "--llm"),
        ("rlprompt", "--proposer"),
        ("information-pruning", "another method"),
    ]:
        with pytest.raises(ConfigError, match=said_):
            guerdon.train(method, **how, out=str(tmp_path / method))
    written = guerdon.train("ape", llm="tiny:vocab=char,context=2048", write_tokens=6, **how, out=str(tmp_path / "ape"))
    assert written.metrics()[-1]["llm/requests"] == 14
    with pytest.raises(ConfigError, match=r"has \d+ tokens, and the model reads 200: give fewer --shots"):
        guerdon.train("icl", **{**how, "shots": 20}, out=str(tmp_path / "long"))


def test_models_of_another_kind_are_refused(saved, tmp_path):
    with pytest.raises(ConfigError, match="is none ForSequenceClassification: it lacks the weights "):
        load_other("ForSequenceClassification", str(saved))
    with pytest.raises(ConfigError, match="'tiny:' is a causal one"):
        load_other("ForMaskedLM", "tiny:")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_other("ForMaskedLM", str(tmp_path))
