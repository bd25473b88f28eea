"""A run's data and configuration for another trainer, for the methods that it has too.

What comes out is what that trainer would be given by hand: a YAML file for its command line, the same training rows,
and the verifier as a reward function. An option that the other trainer cannot express is refused, never dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from guerdon.errors import ConfigError
from guerdon.fields import build
from guerdon.methods.base import LanguageMethod, get_method
from guerdon.training.config import LanguageTraining

if TYPE_CHECKING:
    from guerdon.feedback.records import Record

HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
PER_DEVICE = 8  # rows of a micro-batch, at most; the rest of a batch is accumulated


def export(source: str | Path, *, to: Literal["trl"] = "trl", out: str | Path = "export") -> Path:
    """Write data and configuration so that `trl COMMAND --config COMMAND.yaml` in `out` repeats a run.

    Args:
        source: directory of a run, or of a comparison, whose best method is taken.
        to: the trainer; TRL's command line, version 1.16 or later.
        out: directory to write.

    Returns:
        The configuration file.

    Raises:
        ConfigError: TRL lacks the method, or one of the options that were set.
    """
    if to != "trl":
        raise ConfigError(f"export: there is no exporter for '{to}', only for trl.")
    name, options, training = _settings(Path(source))
    if name not in TRL:
        raise ConfigError(f"export: TRL has no {name}. It has {', '.join(sorted(TRL))}.")
    method = build(get_method(name), options, f"{source}: options of {name}")
    assert isinstance(method, LanguageMethod)
    target = TRL[name]
    for option, can in target.only.items():
        value = getattr(method, option)
        if value not in can:
            raise ConfigError(f"export: TRL's {target.command} cannot have {option}={value}, only {_either(can)}.")
    if (training.task is None) == target.online:
        need = "samples from a task" if target.online else "reads feedback: `guerdon collect` writes a task's"
        raise ConfigError(f"export: TRL's {target.command} {need}.")
    config = {**_trainer(method, training), **target.config(method)}
    write = _write_task if target.online else _write_feedback
    file = Path(out) / f"{target.command}.yaml"
    try:
        (file.parent / "data").mkdir(parents=True, exist_ok=True)
        config |= write(method, training, file.parent)
        _write_yaml(file, target.command, config)
    except OSError as error:
        raise ConfigError(f"export: {out} cannot be written ({error.strerror}): choose another --out.") from error
    return file


@dataclass(frozen=True)
class Target:
    """How TRL calls a method.

    Attributes:
        command: `trl COMMAND`.
        config: the method's options in TRL's words.
        only: options that TRL does not vary, with the values that it has.
        online: whether it samples from a task.
    """

    command: str
    config: Callable[[Any], dict[str, Any]]
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    online: bool = False


def _offline(method: LanguageMethod) -> dict[str, Any]:
    per_device = max(n for n in range(1, PER_DEVICE + 1) if method.batch_size % n == 0)
    return {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": method.batch_size // per_device,
        "num_train_epochs": method.epochs,
        "max_length": method.max_length,
    }


def _sft(method: Any) -> dict[str, Any]:
    return _offline(method)


def _dpo(method: Any) -> dict[str, Any]:
    if method.loss_type in ("sigmoid", "sigmoid_norm") and method.label_smoothing:
        raise ConfigError(
            f"export: TRL's {method.loss_type} loss has no label_smoothing; its robust and exo_pair have."
        )
    losses = {"loss_type": [method.loss_type]}
    if method.sft_coef:
        losses = {"loss_type": [method.loss_type, "sft"], "loss_weights": [1.0, method.sft_coef]}
    return {
        **_offline(method),
        **losses,
        "beta": method.beta,
        "label_smoothing": method.label_smoothing,
        "f_divergence_type": method.divergence,
        "f_alpha_divergence_coef": 1 - method.alpha,
    }


def _reward_model(method: Any) -> dict[str, Any]:
    return {**_offline(method), "center_rewards_coefficient": method.center_coef or None}


def _policy_gradient(method: Any) -> dict[str, Any]:
    prompts = min(method.batch_size, method.prompts_per_round)
    if method.prompts_per_round % prompts:
        raise ConfigError(
            f"export: TRL cannot cut {method.prompts_per_round} prompts into updates of {prompts}: "
            "prompts_per_round has to be a multiple of batch_size."
        )
    return {
        "per_device_train_batch_size": method.group_size,
        "gradient_accumulation_steps": prompts,
        "generation_batch_size": method.prompts_per_round * method.group_size,
        "num_generations": method.group_size,
        "num_iterations": method.epochs,
        "max_steps": method.rounds * method.epochs * (method.prompts_per_round // prompts),
        "max_completion_length": method.max_new_tokens,
        "temperature": method.temperature,
        "top_p": method.top_p,
        "top_k": method.top_k,
        "beta": method.kl_coef,
        "epsilon": method.clip_low,
        "epsilon_high": method.clip_high,
    }


def _grpo(method: Any) -> dict[str, Any]:
    if method.kl_coef and method.kl != "k3":
        raise ConfigError(f"export: TRL's grpo estimates the KL by k3, not by {method.kl}.")
    how = {"loss_type": {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}[method.aggregate]}
    if method.surrogate == "cispo":
        if method.aggregate != "token" or method.clip_low != 1:
            raise ConfigError("export: TRL's cispo has aggregate=token and clip_low=1.")
        how = {"loss_type": "cispo", "epsilon_high": 1 + method.clip_high}
    return {
        **_policy_gradient(method),
        **how,
        "scale_rewards": {"std": "group", "none": "none"}[method.scale],
        "delta": method.dual_clip or None,
        "importance_sampling_level": method.ratio,
        "entropy_coef": method.entropy_coef,
        "use_bias_correction_kl": False,
    }


def _rloo(method: Any) -> dict[str, Any]:
    return {**_policy_gradient(method), "normalize_advantages": method.normalize_advantages}


_ONLINE = {"max_draws": (1,)}
_GRPO = Target(
    "grpo",
    _grpo,
    _ONLINE | {"scale": ("std", "none"), "advantage_eps": (1e-4,), "truncated": ("keep",), "sampler_cap": (0.0,)},
    online=True,
)
_DPO = Target("dpo", _dpo, {"reference_free": (False,), "target_margin": (0.0,), "weighted": (False,)})
TRL: dict[str, Target] = {
    "sft": Target("sft", _sft, {"average": ("tokens",)}),
    "dpo": _DPO,
    "dpo-norm": _DPO,
    "reward-model": Target("reward", _reward_model),
    "grpo": _GRPO,
    "dr-grpo": _GRPO,
    "dapo": _GRPO,
    "rloo": Target("rloo", _rloo, _ONLINE, online=True),
}


def _settings(source: Path) -> tuple[str, dict[str, Any], LanguageTraining]:
    """Method, options and training of a run, or of a comparison's best row."""
    if (source / "comparison.json").exists():
        from guerdon.evaluation.compare import BUDGETS, load_comparison

        comparison = load_comparison(source)
        if not comparison.methods:
            raise ConfigError(f"{source}: no trial has finished, so there is no best method to export.")
        best, said = comparison.methods[0], comparison.settings
        spent = {BUDGETS[unit]: amount for unit, amount in said["budget"].items()}
        assert best.method is not None
        return best.method, best.options, build(LanguageTraining, {**said["training"], **spent}, str(source))
    from guerdon.training.rundir import RunDir

    config = RunDir.open(source).config
    if (cls := get_method(config["method"])).policy != "language":
        raise ConfigError(f"export: TRL has no methods for {cls.policy} policies, such as {cls.name}.")
    return config["method"], config["options"], build(LanguageTraining, config["training"], str(source))


def _trainer(method: LanguageMethod, training: LanguageTraining) -> dict[str, Any]:
    """The options that every trainer of TRL has."""
    name = HUB_NAMES.get(training.model) or _absolute(training.model)
    if name.startswith("tiny:") or name.endswith(".gguf"):
        raise ConfigError(f"export: TRL cannot load '{name}'; it takes hub ids and transformers directories.")
    warm = "constant_with_warmup" if method.schedule == "constant" and method.warmup else method.schedule
    config = {
        "model_name_or_path": name,
        "learning_rate": method.lr,
        "lr_scheduler_type": warm,
        "warmup_steps": method.warmup,
        "weight_decay": method.weight_decay,
        "adam_beta1": method.adam_beta1,
        "adam_beta2": method.adam_beta2,
        "adam_epsilon": method.adam_eps,
        "max_grad_norm": method.max_grad_norm,
        "gradient_checkpointing": training.gradient_checkpointing,
        "seed": training.seed,
        "output_dir": "model",
    }
    if training.precision != "auto":
        config["bf16"] = training.precision == "bf16"
    if training.lora_rank:
        config |= {
            "use_peft": True,
            "lora_r": training.lora_rank,
            "lora_alpha": training.lora_alpha,
            "lora_dropout": 0.0,
            "lora_target_modules": "all-linear",
        }
    return config


def _write_feedback(method: LanguageMethod, training: LanguageTraining, out: Path) -> dict[str, Any]:
    """The rows that the method would learn from, its own choice of completions and pairs made."""
    from guerdon.feedback.readers import read_feedback
    from guerdon.feedback.writers import write_feedback

    feedback = read_feedback(str(training.data), skip_bad=training.skip_bad)
    train, test = feedback.split(0.0 if training.eval_data else training.holdout)
    if training.eval_data:
        test = read_feedback(training.eval_data, skip_bad=training.skip_bad)
    for name, part in (("train", train), ("test", test)):
        rows = list(_chosen(method, part.records, training.seed))
        if rows:
            write_feedback(out / "data" / f"{name}.jsonl", rows)
    return {"dataset_name": "data"} | ({"max_steps": training.max_updates} if training.max_updates else {})


def _chosen(method: LanguageMethod, records: list[Record], seed: int) -> Iterator[dict[str, Any]]:
    """Rows in TRL's columns: what `credit` keeps of each record, as pairs where it compares."""
    from guerdon.language.groups import Group

    groups = []
    for number, record in enumerate(records):
        bytes_ = [list(repr(text).encode()) for text in record.completions]  # credit compares completions by tokens
        values = {"index": np.arange(len(bytes_), dtype=np.float32)}
        if record.scores is not None:
            values["score"] = np.asarray(record.scores, dtype=np.float32)
        groups.append(
            Group.of([0], bytes_, values=values, columns={**record.columns, "number": number}, key=record.where)
        )
    for group in method.credit(groups, np.random.default_rng([seed, 0])):
        record = records[group.columns["number"]]
        texts = [record.completions[int(i)] for i in group.values["index"]]
        margin = {"margin": record.columns["margin"]} if "margin" in group.values else {}
        for better, worse in group.pairs:
            yield {"prompt": record.prompt, "chosen": texts[better], "rejected": texts[worse], **margin}
        for text in texts if not group.pairs else []:
            if record.prompt is not None:
                yield {"prompt": record.prompt, "completion": text}
            else:
                yield {"text": text} if isinstance(text, str) else {"messages": text}


def _write_task(method: LanguageMethod, training: LanguageTraining, out: Path) -> dict[str, Any]:
    """The prompts, and the verifier as a reward function in `rewards.py`."""
    from guerdon.feedback.writers import write_feedback
    from guerdon.tasks import load_task

    assert training.task is not None
    task = load_task(training.task, verifier=training.verifier, seed=0)
    rows = ({"prompt": record.prompt, "item": item} for item, record in enumerate(task.train))
    write_feedback(out / "data" / "train.jsonl", rows)
    arguments = f"{_absolute(training.task)!r}, verifier={training.verifier!r}, seed=0"
    (out / "rewards.py").write_text(REWARDS.format(arguments=arguments), encoding="utf-8")
    config: dict[str, Any] = {"dataset_name": "data", "reward_funcs": ["rewards.reward"]}
    steps = [_policy_gradient(method)["max_steps"]]
    if training.max_updates:
        steps.append(training.max_updates)
    if training.max_samples:
        rounds = math.ceil(training.max_samples / (method.prompts_per_round * method.group_size))
        steps.append(steps[0] // method.rounds * rounds)
    return config | {"max_steps": min(steps)}


REWARDS = '''"""The verifier as a reward function for TRL. Run `trl` in this directory, where guerdon is installed."""

from guerdon.tasks import load_task

TASK = load_task({arguments})


def reward(completions, item, **_):
    """One reward for each completion; `item` is the column of the data that says which prompt it answers."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(TASK.score(TASK.train[i], [text])["reward"][0]) for i, text in zip(item, texts)]
'''


def _absolute(name: str) -> str:
    """A local path from the root on, as TRL is run elsewhere; any other name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _write_yaml(file: Path, command: str, config: dict[str, Any]) -> None:
    import yaml

    text = yaml.safe_dump({k: v for k, v in config.items() if v is not None}, sort_keys=False)
    file.write_text(f"# trl {command} --config {file.name}\n{text}", encoding="utf-8")


def _either(values: tuple[Any, ...]) -> str:
    return " or ".join(map(str, values))
