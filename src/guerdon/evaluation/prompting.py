"""Judging prompt policies: on test items that no search and no choice has seen."""

from __future__ import annotations

import json
from pathlib import Path

from guerdon.errors import ConfigError
from guerdon.evaluation.evaluate import _keys
from guerdon.evaluation.metrics import EVALUATION, Evaluation
from guerdon.feedback.records import Record
from guerdon.language.prompting import Answerer, Prompt, PromptPolicy
from guerdon.training.config import FULL_PROMPT, PromptTraining
from guerdon.training.prompting import (
    Material,
    PromptRun,
    full_prompt,
    item_gaps,
    load_answerer,
    margin_reward,
    material,
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
        return _evaluation(answerer, full_prompt(said, answerer), said, config)
    judged = PromptPolicy.load(policy, config.precision)
    prompt, kind = judged.prompt, judged.answerer.kind
    columns = said.test[0].columns
    if kind != said.labelled.kind or not {prompt.tokens[i] for i in prompt.slots} <= set(columns):
        slots = ", ".join(f"{{{prompt.tokens[i]}}}" for i in sorted(prompt.slots))
        raise ConfigError(
            f"{policy} is a prompt for {kind} with the slots {slots}, and {config.data} holds items for "
            f"{said.labelled.kind} with {', '.join(columns)}."
        )
    return _evaluation(judged.answerer, prompt, said, config)


def evaluate_chosen(run: PromptRun) -> Evaluation:
    """Judge the prompt that validation chose on the test items."""
    tried, _, _ = run.selected()
    return _evaluation(run.answerer, run.prompt.keep(tried.kept), run.material, run.config)


def evaluate_prompt_run(run: PromptRun) -> dict[str, float]:
    """Judge the prompt that validation chose and write `evaluation.json`; the means, `eval/...`.

    Beside them `selection/` says what the same prompt had reached in the search and in validation, and among how many
    it was chosen: neither number is a result.
    """
    tried, validation, count = run.selected()
    found = evaluate_chosen(run)
    found.save(run.directory / EVALUATION)
    means = found.means()
    return {
        **{f"eval/{name}": value for name, value in means.items()},
        "eval/score": means[found.primary],
        "selection/search_accuracy": tried.score.accuracy,
        "selection/validation_accuracy": validation.accuracy,
        "selection/candidates": count,
        "selection/tokens": len(tried.kept),
    }


def _evaluation(answerer: Answerer, prompt: Prompt, said: Material, config: PromptTraining) -> Evaluation:
    gaps = item_gaps(answerer, [prompt], said.test, config.verifier)[0]
    items = [Record(json.dumps(i.columns), list(i.choices), columns={"answer": i.answer}) for i in said.test]
    metrics = {"accuracy": (gaps > 0).astype(float)}
    if answerer.kind != "generation":
        metrics["reward"] = margin_reward(gaps)
    dtype = str(answerer.policy.model.dtype)
    return Evaluation(_keys(items), metrics, "accuracy", {"tokens": len(prompt), "dtype": dtype})
