from __future__ import annotations

import json
import shutil
import time

import pytest
import torch

from guerdon.errors import ConfigError
from guerdon.language.models import add_lora, check_name, fingerprint, load_model, save_model

TINY = "tiny:layers=2,width=32"
IDS = torch.tensor([[5, 17, 40, 33, 29]])


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The hub is not asked, on a machine with a network either."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, style):
    model, tokenizer = load_model(f"{TINY},style={style},vocab=word", texts=["some words, here"])
    save_model(model, tokenizer, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    again, tokens = load_model(str(tmp_path / "model"))
    assert torch.equal(logits(model), logits(again)) and fingerprint(model) == fingerprint(again)
    text = "some words & <s>here</s>"
    assert tokens(text).input_ids == tokenizer(text).input_ids
    assert tokens.chat_template == tokenizer.chat_template and tokens.eos_token == "</s>"
    assert all(p.requires_grad for p in again.parameters())


def test_dtype_of_the_weights():
    model, _ = load_model(TINY, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="Did you mean 'float32'"):
        load_model(TINY, dtype="float23")


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_lora_starts_unchanged_trains_alone_and_finds_its_base_again(tmp_path, style):
    model, tokenizer = load_model(f"{TINY},style={style}", seed=3)
    before = logits(model)
    adapted = add_lora(model, rank=4, alpha=8)
    assert torch.equal(before, logits(adapted))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    layers = {name.split(".lora_")[0] for name in trained}
    assert len(layers) == (2 * 7 if style == "llama" else 2 * 4)  # every linear layer of both blocks, not the head
    adapted(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p -= 0.5 * p.grad
    assert not torch.equal(before, logits(adapted))
    save_model(adapted, tokenizer, tmp_path / "first")
    again, _ = load_model(str(tmp_path / "first"))
    assert torch.allclose(logits(again), logits(adapted), atol=1e-6)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    save_model(again, tokenizer, tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    moved, _ = load_model(str(shutil.move(tmp_path / "second", tmp_path / "third")))
    assert torch.allclose(logits(moved), logits(adapted), atol=1e-6)
    with moved.disable_adapter():
        assert torch.allclose(logits(moved), before, atol=1e-6)


def test_lora_is_seeded_and_refuses_rank_zero():
    prints = [fingerprint(add_lora(load_model(TINY)[0], 2, 4, seed=seed)) for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    with pytest.raises(ConfigError, match="rank"):
        add_lora(load_model(TINY)[0], 0, 4)


def test_an_adapter_on_a_saved_base_names_it(tmp_path):
    model, tokenizer = load_model(TINY)
    save_model(model, tokenizer, tmp_path / "base-model")
    base, _ = load_model(str(tmp_path / "base-model"))
    save_model(add_lora(base, 2, 4), tokenizer, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base-model")
    assert not (tmp_path / "adapter" / "base").exists()
    assert torch.equal(logits(load_model(str(tmp_path / "adapter"))[0]), logits(model))
    shutil.rmtree(tmp_path / "base-model")
    with pytest.raises(ConfigError, match=r"adapter.*base-model"):
        load_model(str(tmp_path / "adapter"))


def test_the_fingerprint_sees_one_changed_bit_in_one_weight():
    model, _ = load_model(TINY)
    before = fingerprint(model)
    assert before == fingerprint(load_model(TINY)[0]) != fingerprint(load_model(TINY, dtype="bfloat16")[0])
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.view(torch.int32)[3, 7] ^= 1
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2-135", "Did you mean 'smollm2-135m'?"),
        ("nobody/nothing", "no directory here, and the Hugging Face hub does not give it"),
        ("not a model!", "a GGUF file, a directory, or a hub id"),
    ],
)
def test_what_is_no_model_is_said_at_once(name, says):
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_model(name)
    assert name in str(caught.value) and says in str(caught.value)
    assert time.monotonic() - started < 15


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "policy").mkdir()
    with pytest.raises(ConfigError, match=f"Did you mean '{tmp_path / 'policy'}'"):
        load_model(str(tmp_path / "polcy"))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model(str(tmp_path / "policy"))
    (tmp_path / "weights.gguf").write_bytes(b"GGUF but nothing else")
    with pytest.raises(ConfigError, match=r"no such file.*Did you mean .*weights\.gguf"):
        check_name(str(tmp_path / "weigths.gguf"))


def test_a_broken_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights.gguf").write_bytes(b"GGUF but nothing else")
    with pytest.raises(ConfigError, match=r"weights\.gguf"):
        load_model(str(tmp_path / "weights.gguf"))
    assert not list((tmp_path / "cache" / "models").iterdir())
    model, tokenizer = load_model(TINY)
    save_model(model, tokenizer, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(str(tmp_path / "model"))


def test_a_gguf_file_is_converted_once_and_trains(tmp_path, monkeypatch):
    gguf = write_gguf(tmp_path / "tiny-llama.gguf")
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_model(str(gguf))
    assert tokenizer.convert_ids_to_tokens(tokenizer("abcd").input_ids) == ["a", "b", "cd"]
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    (kept,) = (tmp_path / "cache" / "models").iterdir()
    assert kept.name.startswith("tiny-llama-")
    written = (kept / "model.safetensors").stat().st_mtime_ns
    again, _ = load_model(str(gguf))
    assert fingerprint(again) == fingerprint(model)
    assert (kept / "model.safetensors").stat().st_mtime_ns == written


def write_gguf(path):
    """A Llama of one layer, with random weights and the vocabulary of single bytes."""
    import gguf
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    rng = np.random.default_rng(0)
    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "cd"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (len(tokens), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
def test_smollm2_answers_in_english_and_can_be_trained(smollm2):
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = torch.tensor([tokenizer(text).input_ids])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(answer[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"
    loss = model(ids, labels=ids).loss
    (gradient,) = torch.autograd.grad(loss, [model.model.layers[0].self_attn.q_proj.weight])
    assert gradient.abs().sum() > 0


def test_smollm2_splits_numbers_into_digits_as_it_was_trained_to(smollm2):
    _, tokenizer = smollm2
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a +  12 3").input_ids)
    assert pieces == ["a", "Ġ+", "ĠĠ", "1", "2", "Ġ", "3"]
