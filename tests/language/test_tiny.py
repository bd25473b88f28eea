from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError
from guerdon.language.models import load_model
from guerdon.language.tiny import TinyConfig, build_tiny, build_tokenizer, parse_tiny


def test_keys_that_are_left_out_keep_their_defaults():
    assert parse_tiny("tiny:") == TinyConfig()
    assert parse_tiny("tiny:layers=3, style=gpt2") == TinyConfig(layers=3, style="gpt2")
    assert parse_tiny("tiny:layers=1,width=96,heads=6,vocab=word,context=64,style=qwen2") == TinyConfig(
        1, 96, 6, "word", 64, "qwen2"
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tiny:layer=2", "Did you mean 'layers'?"),
        ("tiny:layers=two", "whole number"),
        ("tiny:layers", "whole number"),
        ("tiny:heads=0", "at least 1"),
        ("tiny:style=mamba", "llama, qwen2, gpt2"),
        ("tiny:width=30", "4 heads do not divide a width of 30"),
        ("tiny:width=12,heads=4", "even width"),
    ],
)
def test_a_wrong_configuration_says_what_to_do(name, says):
    with pytest.raises(ConfigError, match="tiny:") as caught:
        parse_tiny(name)
    assert says in str(caught.value)


def test_heads_of_odd_width_are_fine_without_rotary_positions():
    assert parse_tiny("tiny:width=12,heads=4,style=gpt2").width == 12


def test_parsing_imports_nothing_heavy():
    code = (
        "import sys; from guerdon.language.models import check_name; check_name('tiny:width=128');"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("style", ["llama", "qwen2", "gpt2"])
def test_every_style_is_seeded_tied_causal_and_trains(style):
    name = f"tiny:layers=2,width=32,style={style}"
    (model, tokenizer), (again, _), (other, _) = (load_model(name, seed=seed) for seed in (0, 0, 1))
    weights, same, different = ([p.detach() for p in m.parameters()] for m in (model, again, other))
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights, different, strict=True))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = torch.tensor([tokenizer("what is seen").input_ids])
    changed = ids.clone()
    changed[0, -1] += 1
    assert torch.equal(model(ids).logits[:, :-1], model(changed).logits[:, :-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 3.5 and losses[-1] < 0.5


def test_the_seed_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_tiny(TinyConfig(), seed=3)
    assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=60))
def test_decoding_gives_every_known_text_back(text):
    for vocab in ("char", "word"):
        tokenizer = build_tokenizer(TinyConfig(vocab=vocab), [text, "word"])
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_words_marks_and_digits_are_tokens_and_unknown_words_fall_back_on_characters():
    tokenizer = build_tokenizer(TinyConfig(vocab="word"), ["the cat, the dog: 12"])
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("the cat: 21 the cow ☃").input_ids)
    assert pieces == ["<s>", "the", " cat", ":", " ", "2", "1", " the", " ", "c", "o", "w", " ", "<unk>"]


def test_words_need_texts():
    with pytest.raises(ConfigError, match="vocab=char"):
        load_model("tiny:vocab=word")


def test_the_vocabulary_does_not_depend_on_the_order_of_texts():
    texts = ["b b a", "c é", "zebra zebra"]
    vocabularies = [build_tokenizer(TinyConfig(vocab="word"), t).get_vocab() for t in (texts, texts[::-1])]
    assert vocabularies[0] == vocabularies[1] and vocabularies[0]["é"] > 0


def test_the_chat_template_marks_roles_and_ends_turns():
    tokenizer = build_tokenizer(TinyConfig())
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s><|user|>hi</s><|assistant|>yo</s>"
    opening = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert opening == "<s><|user|>hi</s><|assistant|>"
    ids = tokenizer(opening, add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "<|user|>", "h", "i", "</s>", "<|assistant|>"]
