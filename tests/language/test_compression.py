"""What a token classifier would keep, carried over to the tokens of a prompt; and the search along it."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

import guerdon
from encoders import save_encoder
from guerdon.errors import ConfigError
from guerdon.feedback.sentiment import templated_sentiment
from guerdon.language.compression import keep_probabilities
from guerdon.language.models import load_model
from guerdon.language.prompting import Prompt

TINY = "tiny:layers=1,width=16,heads=2,vocab=char"
TEXT = "Review: the plot was dull.\nSentiment: bad"


@pytest.fixture(scope="module")
def compressor(tmp_path_factory):
    path = tmp_path_factory.mktemp("compressor")
    return path, *save_encoder(path, "ForTokenClassification", [TEXT], "Bert")


def test_characters_have_the_probability_of_the_word_around_them(compressor):
    path, model, tokenizer = compressor
    prompt = Prompt.of([(TEXT[:12], False), ("text", True), (TEXT[12:], False)], load_model(TINY, texts=[TEXT])[1])
    found = keep_probabilities(prompt, str(path))
    encoded = tokenizer(TEXT, return_offsets_mapping=True)
    with torch.no_grad():
        p = model(torch.tensor([encoded.input_ids])).logits[0].softmax(-1)[:, 1].numpy()
    own = np.zeros(len(TEXT))
    for (a, b), value in zip(encoded.offset_mapping, p, strict=True):
        own[a:b] = value
    assert found[12] == 1  # the slot
    np.testing.assert_allclose(np.delete(found, 12), own, atol=1e-6)


def test_words_have_the_mean_over_their_pieces(compressor):
    path, *_ = compressor
    whole = Prompt.of([(TEXT, False), ("text", True)], load_model(f"{TINY[:-4]}word", texts=[TEXT.replace(":", "")])[1])
    one = Prompt((TEXT, "text"), ((0,), ()), frozenset({1}))
    weights = [len(token) for token in whole.tokens[:-1]]
    parts = keep_probabilities(whole, str(path))[:-1]
    assert keep_probabilities(one, str(path))[0] == pytest.approx(np.average(parts, weights=weights), abs=1e-6)


def test_other_classes_are_refused(tmp_path):
    save_encoder(tmp_path, "ForTokenClassification", [TEXT], "Bert", labels=("a", "b", "c"))
    with pytest.raises(ConfigError, match="tells 3 classes of tokens apart"):
        keep_probabilities(Prompt((TEXT,), ((0,),), frozenset()), str(tmp_path))


def test_long_prompts_are_read_in_windows(compressor):
    path, *_ = compressor
    long = Prompt.of([(TEXT * 20, False), ("text", True)], load_model(TINY, texts=[TEXT])[1])
    found = keep_probabilities(long, str(path))
    assert len(found) == len(TEXT) * 20 + 1 and (found[:-1] < 1).all()


def test_the_tokens_least_worth_keeping_go_first(compressor, tmp_path):
    path, *_ = compressor
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in templated_sentiment()[:120]))
    run = guerdon.train(
        "llmlingua-2", compressor=str(path), model=TINY.replace("char", "word"), data=str(data), max_samples=12,
        verbalizers=("negative=bad", "positive=good"), search_items=4, validation_items=4, eval_items=4,
        precision="fp32", out=str(tmp_path / "run"),
    )  # fmt: skip
    history = [json.loads(line) for line in (run.path / "policy" / "history.jsonl").read_text().splitlines()]
    assert len(history) == 12
    kept = sorted((set(row["kept"]) for row in history), key=len)
    assert all(a < b for a, b in pairwise(kept))
    with pytest.raises(ConfigError, match=r"llmlingua-2 needs a token classifier .* --compressor"):
        guerdon.train("llmlingua-2", model=TINY, data=str(data), out=str(tmp_path / "other"))
