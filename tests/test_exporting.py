"""Exports are what the installed TRL takes: every key a field of its configurations, every value one it accepts."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from guerdon.errors import ConfigError
from guerdon.exporting import TRL, export
from guerdon.feedback.readers import read_feedback
from guerdon.methods.base import get_method
from guerdon.training.config import LanguageTraining
from guerdon.training.rundir import RunDir

GYM = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"


@pytest.fixture
def run(tmp_path: Path):
    """Makes the directory of a run that has not begun."""

    def make(name: str, options: dict[str, Any] | None = None, **training: Any) -> Path:
        method = get_method(name)(**(options or {}))
        config = LanguageTraining(model="smollm2-135m", out=str(tmp_path / "run"), **training)
        RunDir.create(config.out, name, method.options(), vars(config))
        return Path(config.out)

    return make


@pytest.fixture
def scored(tmp_path: Path) -> str:
    rows = [
        {"prompt": f"{i} + 1 =", "completions": [f" {i + 1}", " no", f" {i}"], "scores": [1, 0, 0.5]} for i in range(20)
    ]
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def accepted(command: str, config: dict[str, Any]) -> Any:
    """TRL's own configuration object from the file, as its command line would make it; fails on any unknown key."""
    import trl
    from trl.scripts import grpo, rloo

    names = {
        "sft": "SFTConfig",
        "dpo": "DPOConfig",
        "reward": "RewardConfig",
        "grpo": "GRPOConfig",
        "rloo": "RLOOConfig",
    }
    kind = getattr(trl, names[command])
    script = {"grpo": grpo.GRPOScriptArguments, "rloo": rloo.RLOOScriptArguments}.get(command, trl.ScriptArguments)
    fields = [{f.name for f in dataclasses.fields(c)} for c in (kind, script, trl.ModelConfig)]
    assert set(config) <= set().union(*fields)
    own = {name: value for name, value in config.items() if name in fields[0]}
    return kind(**own | {"bf16": False, "report_to": "none"})


def rows(out: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "data" / f"{split}.jsonl").read_text().splitlines()]


def test_dpo_with_its_options(run, scored, tmp_path):
    options = {
        "beta": 0.05,
        "loss_type": "ipo",
        "sft_coef": 0.2,
        "batch_size": 12,
        "divergence": "reverse_kl",
        "alpha": 0.3,
    }
    source = run("dpo", options, data=scored, lora_rank=4, max_updates=7)
    file = export(source, out=tmp_path / "out")
    assert file.read_text().startswith("# trl dpo --config dpo.yaml\n")
    config = yaml.safe_load(file.read_text())
    made = accepted("dpo", config)
    assert (made.beta, made.loss_type, made.loss_weights) == (0.05, ["ipo", "sft"], [1.0, 0.2])
    assert made.per_device_train_batch_size * made.gradient_accumulation_steps == 12
    assert made.f_alpha_divergence_coef == pytest.approx(0.7)
    assert (made.learning_rate, made.warmup_steps, made.max_steps) == (1e-6, 0.1, 7)
    assert made.lr_scheduler_type == "constant_with_warmup"
    assert config["model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (config["use_peft"], config["lora_r"]) == (True, 4)
    train, test = rows(tmp_path / "out"), rows(tmp_path / "out", "test")
    assert (len(train), len(test)) == (18, 2)
    assert set(train[0]) == {"prompt", "chosen", "rejected"}
    number = int(train[0]["prompt"].split()[0])
    assert (train[0]["chosen"], train[0]["rejected"]) == (f" {number + 1}", " no")
    assert read_feedback(str(tmp_path / "out" / "data" / "train.jsonl")).kind == "preference"


@pytest.mark.parametrize(("how", "pairs"), [("best-worst", 1), ("all", 3)])
def test_pairs_are_those_of_the_method(how, pairs, run, scored, tmp_path):
    export(run("dpo-norm", {"pairs": how}, data=scored), out=tmp_path / "out")
    assert len(rows(tmp_path / "out")) == 18 * pairs


def test_sft_keeps_what_the_method_imitates(run, scored, tmp_path):
    config = yaml.safe_load(export(run("sft", {"min_score": 0.5}, data=scored), out=tmp_path / "out").read_text())
    made = accepted("sft", config)
    assert (made.num_train_epochs, made.max_length) == (2, 4096)
    found = rows(tmp_path / "out")
    assert len(found) == 36
    assert not any(row["completion"] == " no" for row in found)


def test_sft_of_plain_text(run, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(10)))
    export(run("sft", data=str(path), holdout=0.2), out=tmp_path / "out")
    assert {row["text"] for part in ("train", "test") for row in rows(tmp_path / "out", part)} == {
        f"line {i}" for i in range(10)
    }


def test_reward_model(run, scored, tmp_path):
    source = run("reward-model", {"center_coef": 0.01}, data=scored)
    made = accepted("reward", yaml.safe_load(export(source, out=tmp_path / "out").read_text()))
    assert made.center_rewards_coefficient == 0.01


@pytest.mark.parametrize(("name", "loss"), [("grpo", "grpo"), ("dr-grpo", "dr_grpo"), ("rloo", None)])
def test_policy_gradients_with_their_verifier(name, loss, run, tmp_path):
    options = {"prompts_per_round": 16, "batch_size": 4, "group_size": 4, "rounds": 5, "epochs": 2, "max_new_tokens": 9}
    file = export(run(name, options, task=GYM, max_samples=3 * 64), out=tmp_path / "out")
    command = TRL[name].command
    config = yaml.safe_load(file.read_text())
    made = accepted(command, config)
    assert (made.num_generations, made.max_completion_length, made.num_iterations) == (4, 9, 2)
    assert made.per_device_train_batch_size * made.gradient_accumulation_steps == 4 * 4
    assert made.generation_batch_size == 16 * 4
    assert made.max_steps == 3 * 4 * 2
    if loss:
        assert (made.loss_type, made.epsilon, made.use_bias_correction_kl) == (loss, 0.2, False)
    assert config["reward_funcs"] == ["rewards.reward"]

    source = (tmp_path / "out" / "rewards.py").read_text()
    ast.parse(source)
    scope: dict[str, Any] = {}
    exec(compile(source, "rewards.py", "exec"), scope)
    row = rows(tmp_path / "out")[3]
    answer = scope["TASK"].train[row["item"]].columns["answer"]
    assert scope["TASK"].train[row["item"]].prompt == row["prompt"]
    completions = [[{"role": "assistant", "content": answer}], "no idea"]
    assert scope["reward"](completions=completions, item=[3, 3], prompts=[], trainer_state=None) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"surrogate": "cispo", "aggregate": "token", "clip_low": 1.0, "clip_high": 4.0}, ("cispo", 5.0, None)),
        ({"dual_clip": 3.0}, ("grpo", 0.2, 3.0)),
    ],
)
def test_other_surrogates(options, expected, run, tmp_path):
    made = accepted("grpo", yaml.safe_load(export(run("grpo", options, task=GYM), out=tmp_path / "out").read_text()))
    assert (made.loss_type, made.epsilon_high, made.delta) == expected


@pytest.mark.parametrize(
    ("name", "options", "training", "message"),
    [
        ("nft", {}, {"task": GYM}, "TRL has no nft. It has dapo, dpo, dpo-norm"),
        ("dapo", {}, {"task": GYM}, "cannot have max_draws=10, only 1"),
        ("dpo", {"reference_free": True}, {"data": "d"}, "cannot have reference_free=True, only False"),
        ("dpo", {"label_smoothing": 0.1}, {"data": "d"}, "sigmoid loss has no label_smoothing"),
        ("grpo", {"surrogate": "cispo"}, {"task": GYM}, "cispo has aggregate=token and clip_low=1"),
        ("grpo", {"sampler_cap": 2.0}, {"task": GYM}, "cannot have sampler_cap=2.0, only 0.0"),
        ("grpo", {"kl": "k1"}, {"task": GYM}, "estimates the KL by k3, not by k1"),
        ("grpo", {"batch_size": 5}, {"task": GYM}, "prompts_per_round has to be a multiple of batch_size"),
        ("grpo", {}, {"data": "d"}, "samples from a task"),
        ("sft", {}, {"task": GYM}, "reads feedback: `guerdon collect` writes a task's"),
    ],
)
def test_what_trl_lacks_is_refused(name, options, training, message, run, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export(run(name, options, **training), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_trl_cannot_load(tmp_path):
    config = LanguageTraining(model="tiny:layers=1", data="d", out=str(tmp_path / "run"))
    RunDir.create(config.out, "dpo", get_method("dpo")().options(), vars(config))
    with pytest.raises(ConfigError, match="TRL cannot load 'tiny:layers=1'"):
        export(config.out, out=tmp_path / "out")
