"""Judging prompt policies: on test items that no search and no choice has seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from guerdon.errors import ConfigError
from guerdon.evaluation.evaluate import _keys
from guerdon.evaluation.metrics import EVALUATION, Evaluation
from guerdon.feedback.records import Record
from guerdon.language.prompting import Answerer, Prompt, PromptPolicy
from guerdon.rewards.style import STYLE
from guerdon.rewards.verifiers import Verifier
from guerdon.training.config import FULL_PROMPT, PromptTraining
from guerdon.training.prompting import (
    Material,
    PromptRun,
    full_prompt,
    item_gaps,
    load_answerer,
    load_judge,
    margin_reward,
    material,
    value,
    verdicts,
)


def evaluate_prompt(policy: str | Path, config: PromptTraining) -> Evaluation:
    """Judge a run's prompt, or the full few-shot prompt of `config`'s data and seed, on the test items.

    Args:
        policy: a run directory, the directory of a prompt policy, or `full-prompt:MODEL`.

    Raises:
        ConfigError: the prompt has slots that the items do not fill, or answers of another kind.
    """
    said = material(config)
    if str(policy).startswith(FULL_PROMPT):
        answerer = load_answerer(config, said)
        return _evaluation(answerer, full_prompt(said, answerer), said, load_judge(config, answerer))
    judged = PromptPolicy.load(policy, config.precision)
    prompt, kind = judged.prompt, judged.answerer.kind
    columns = said.test[0].columns
    if kind != said.labelled.kind or not set(prompt.columns) <= set(columns):
        slots = ", ".join(f"{{{column}}}" for column in prompt.columns)
        raise ConfigError(
            f"{policy} is a prompt for {kind} with the slots {slots}, and {config.data} holds items for "
            f"{said.labelled.kind} with {', '.join(columns)}."
        )
    return _evaluation(judged.answerer, prompt, said, load_judge(config, judged.answerer))


def evaluate_chosen(run: PromptRun) -> Evaluation:
    """Judge the prompt that validation chose on the test items."""
    tried, _, _ = run.selected()
    return _evaluation(run.answerer, tried.prompt, run.material, run.verifier)


def evaluate_prompt_run(run: PromptRun) -> dict[str, float]:
    """Judge the prompt that validation chose and write `evaluation.json`; the means, `eval/...`.

    Beside them `selection/` says what the same prompt had reached in the search and in validation, and among how many
    it was chosen: neither number is a result.
    """
    tried, validation, count = run.selected()
    found = evaluate_chosen(run)
    found.save(run.directory / EVALUATION)
    means = found.means()
    factors = [means[name] for name in ("content", "style", "fluency") if name in means]
    return {
        **{f"eval/{name}": value for name, value in means.items()},
        **({"eval/gm": float(np.prod(factors) ** (1 / 3))} if factors else {}),
        "eval/score": means[found.primary],
        "selection/search_accuracy": tried.score.accuracy,
        "selection/validation_accuracy": validation.accuracy,
        "selection/candidates": count,
        "selection/tokens": len(tried.prompt),
    }


def _evaluation(answerer: Answerer, prompt: Prompt, said: Material, judge: Verifier) -> Evaluation:
    items = [Record(json.dumps(i.columns), list(i.choices), columns={"answer": i.answer}) for i in said.test]
    primary = "joint" if judge.name == STYLE else "accuracy"
    if answerer.kind == "generation":
        (found,) = verdicts(answerer, [prompt], said.test, judge)
        metrics = {primary: np.array([value(verdict, judge) for verdict in found])}
        if primary == "joint":
            metrics |= {name: np.array([float(v.parts[name][0]) for v in found]) for name in found[0].parts}
    else:
        (gaps,) = item_gaps(answerer, [prompt], said.test, judge)
        metrics = {primary: (gaps > 0).astype(float), "reward": margin_reward(gaps)}
    dtype = str(answerer.policy.model.dtype)
    return Evaluation(_keys(items), metrics, primary, {"tokens": len(prompt), "dtype": dtype})
