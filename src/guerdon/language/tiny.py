"""Tiny decoders from a configuration string, for experiments that take seconds.

`tiny:layers=2,width=64,heads=4,vocab=char,context=256,style=llama` names a randomly initialised model of 0.1 to 5
million parameters; its tokenizer is built from the texts it will see. Parsing the string imports nothing heavy.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from guerdon.errors import ConfigError
from guerdon.fields import build
from guerdon.lazy import torch

CONTROL = ["<pad>", "<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
PIECES = {"char": r"[\s\S]", "word": r"\d| ?[^\W\d]+|\s|[^\w\s]"}  # digits stay apart, so that numbers generalise
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """A decoder from scratch: as many layers, and so wide, as a laptop trains in seconds."""

    layers: int = 2  # transformer blocks
    width: int = 64  # hidden size
    heads: int = 4  # attention heads
    vocab: Literal["char", "word"] = "char"  # one token per character, or per word, digit and mark
    context: int = 256  # positions
    style: Literal["llama", "qwen2", "gpt2"] = "llama"  # architecture


def parse_tiny(name: str) -> TinyConfig:
    """The configuration that a name `tiny:key=value,...` stands for; keys that are left out keep their defaults.

    Raises:
        ConfigError: an unknown key (with the nearest one), a value that it cannot take, or heads that do not
            divide the width.
    """
    where, values = f"model '{name}'", {}
    for item in filter(None, name.removeprefix("tiny:").split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        values[key] = int(value) if value.isascii() and value.isdigit() else value
    config = build(TinyConfig, values, where)
    for key in ("layers", "width", "heads", "context"):
        if getattr(config, key) < 1:
            raise ConfigError(f"{where}: '{key}' has to be at least 1.")
    if config.width % config.heads or (config.style != "gpt2" and config.width // config.heads % 2):
        even = "" if config.style == "gpt2" else " into parts of even width (rotary positions pair them up)"
        raise ConfigError(
            f"{where}: {config.heads} heads do not divide a width of {config.width}{even}; "
            f"take width={config.heads * 16}, for example."
        )
    return config


def build_tiny(config: TinyConfig, texts: Iterable[str] = (), seed: int = 0) -> tuple[Any, Any]:
    """A seeded, randomly initialised decoder with tied embeddings and without dropout, and its tokenizer.

    Raises:
        ConfigError: vocab=word without texts to take the words from.
    """
    import transformers

    tokenizer = build_tokenizer(config, texts)
    common = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    if config.style == "gpt2":
        settings: Any = transformers.GPT2Config(
            n_layer=config.layers,
            n_embd=config.width,
            n_head=config.heads,
            n_positions=config.context,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    else:
        kind = transformers.LlamaConfig if config.style == "llama" else transformers.Qwen2Config
        settings = kind(
            num_hidden_layers=config.layers,
            hidden_size=config.width,
            intermediate_size=-(-config.width * 8 // 24) * 8,  # 8/3 of the width, up to a multiple of 8
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.context,
            **common,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(settings)
    return model, tokenizer


def build_tokenizer(config: TinyConfig, texts: Iterable[str] = ()) -> Any:
    """A tokenizer of characters, or of words that falls back on characters, whose decoding gives the text back.

    It knows printable ASCII and every character of the texts; any other becomes `<unk>`, which rendering counts. Plain
    text begins with `<s>`; conversations use one marker per role and end each turn with `</s>`.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(tokenizers.Regex(PIECES[config.vocab]), "isolated")
    characters, words = set(string.printable), Counter[str]()
    for text in texts:
        characters.update(text)
        if config.vocab == "word":
            words.update(word for word, _ in split.pre_tokenize_str(text) if len(word) > 1)
    if config.vocab == "word" and not words:
        raise ConfigError(
            "a tiny model with vocab=word takes its words from the data, and there is none: use vocab=char."
        )
    frequent = sorted(words, key=lambda word: (-words[word], word))
    vocabulary = {token: index for index, token in enumerate([*CONTROL, *sorted(characters), *frequent])}
    longest = max(map(len, vocabulary))
    backend = tokenizers.Tokenizer(
        models.WordPiece(
            vocabulary, unk_token="<unk>", continuing_subword_prefix="", max_input_chars_per_word=max(longest, 100)
        )
    )
    backend.pre_tokenizer = split
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=CONTROL[4:],
        model_max_length=config.context,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
