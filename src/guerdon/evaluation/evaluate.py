"""A policy judged on held-out items: by a verifier where there is a task, by held-out feedback where there is none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.evaluation.metrics import EVALUATION, Evaluation, completion_metrics, kl_to_start, nll, preference_metrics
from guerdon.evaluation.text import agent_of, judge_agent
from guerdon.feedback.records import Record
from guerdon.language.groups import Group
from guerdon.language.policy import Policy
from guerdon.language.sampling.base import Sampling
from guerdon.language.templates import prompt_ids, render_each
from guerdon.methods.base import pairs_from_scores
from guerdon.methods.planning.choose import choose, reward_scorer
from guerdon.methods.preferences.token_q import Shift, decode
from guerdon.tasks import Task
from guerdon.training.config import LanguageTraining
from guerdon.training.rundir import RunDir

if TYPE_CHECKING:
    from guerdon.training.language import LanguageRun

Annotate = Callable[[Sequence[Group], str], None]  # sets per-token log-probs in groups under a name


def evaluate_policy(
    policy: Policy,
    start: Annotate,
    held_out: Sequence[Record],
    task: Task | None,
    how: LanguageTraining,
    max_length: int = 2048,
) -> Evaluation:
    """Judge a policy on held-out records.

    With a task: pass@1 (primary) and unbiased pass@k of sampled completions where the verifier is binary, else the mean
    reward (primary); every reward component, length, truncated share and KL to the start. With feedback: accuracy and
    margin of the reward (of the head of a reward model, else the implicit one) on preferences (primary where there are
    any), held-out NLL per token of what a demonstration or the better answer says.

    Args:
        start: sets the log-probs of the policy that training started from.
        how: its `eval_` options; samples are drawn with the same seeds for every policy.
        max_length: with feedback: tokens of a prompt with one completion; `how.overlong` says what longer ones meet.
            Items that are left out have no value (nan) in any metric.

    Raises:
        DataError: there is nothing to judge by.
    """
    records = list(held_out[: how.eval_items])
    if not records:
        raise DataError("there are no held-out items to evaluate on: raise the held-out share or give --eval-data.")
    keys = _keys(records)
    if task is not None:
        metrics, primary = _by_task(policy, start, records, task, how)
    else:
        metrics, primary = _by_feedback(policy, start, records, how, max_length)
    settings = {name: value for name, value in vars(how).items() if name.startswith("eval_")}
    return Evaluation(keys, metrics, primary, settings | {"dtype": str(policy.model.dtype)})


def evaluate_run(run: LanguageRun) -> dict[str, float]:
    """Judge a run's policy and write `evaluation.json` into its directory: on held-out items, or in `env` where given.

    What the held-out items say is then told beside it.

    Returns:
        The means, `eval/...`, and under `eval/score` the primary one (higher is better).
    """
    start, config, longest = run.start_logps, run.config, run.method.max_length
    judged = []
    if config.env is not None:
        judged.append(judge_agent(agent_of(run.policy, start, config, longest), config))
    if run.held_out:
        judged.append(evaluate_policy(run.policy, start, run.held_out, run.task, config, longest))
    found = judged[0]
    if run.distribution.is_main:
        found.save(run.directory / EVALUATION)
    means = {name: value for each in reversed(judged) for name, value in each.means().items()}
    score = -means["nll"] if found.primary == "nll" else means[found.primary]
    return {f"eval/{name}": value for name, value in means.items()} | {"eval/score": score}


def _by_task(
    policy: Policy, start: Annotate, records: list[Record], task: Task, how: LanguageTraining
) -> tuple[dict[str, np.ndarray], str]:
    sampling = Sampling(max_new_tokens=how.eval_max_new_tokens, temperature=how.eval_temperature)
    prompts = [r.prompt or "" for r in records]
    if how.eval_beams or how.eval_proxy:
        answers = decode(policy, prompts, sampling, n=how.eval_samples, beams=how.eval_beams, shift=_shift(how))
    elif how.eval_choose != "no":
        answers = choose(policy, prompts, how.eval_samples, sampling, **_choice(how))
    else:
        answers = policy.answer(prompts, how.eval_samples, sampling)
    scored = [task.score(r, [c.text for c in cs]) for r, cs in zip(records, answers, strict=True)]
    rewards = {name: np.stack([s[name] for s in scored]) for name in scored[0]}
    lengths = np.array([[len(c.tokens) for c in cs] for cs in answers])
    finished = np.array([[c.finished for c in cs] for cs in answers])
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= len(answers[0])]
    metrics, primary = completion_metrics(rewards, lengths, finished, ks=ks, binary=task.binary), _primary(task)
    if how.eval_choose != "no" or how.eval_beams or how.eval_proxy:  # no samples, from which a KL could be estimated
        return metrics, primary
    groups = [
        Group.of(prompt_ids(p, policy.tokenizer), [c.tokens for c in cs])
        for p, cs in zip(prompts, answers, strict=True)
    ]
    policy.annotate(groups, "logps")
    start(groups, "start")
    logps, ref = ([_per_completion(g, name) for g in groups] for name in ("logps", "start"))
    return metrics | kl_to_start(logps, ref), primary


def _primary(task: Task) -> str:
    return "pass@1" if task.binary else "reward"


def _choice(how: LanguageTraining) -> dict[str, Any]:
    """The options of `choose`."""
    judge = how.eval_scorer and reward_scorer(Policy.load(how.eval_scorer, how.precision), how.eval_scorer)
    return {"how": how.eval_choose, "candidates": how.eval_candidates, "scorer": judge}


def _shift(how: LanguageTraining) -> Shift | None:
    """How the run that `eval_proxy` names has moved from its start."""
    if how.eval_proxy is None:
        return None
    if not RunDir.is_at(how.eval_proxy):
        raise ConfigError(f"eval_proxy: {how.eval_proxy} holds no run that would say what its policy started from.")
    start = RunDir(how.eval_proxy).config["training"]["model"]
    proxy, reference = Policy.load(how.eval_proxy, how.precision), Policy.load(start, how.precision, seed=how.seed)
    return Shift(proxy, reference, how.eval_strength)


def _by_feedback(
    policy: Policy, start: Annotate, records: list[Record], how: LanguageTraining, max_length: int
) -> tuple[dict[str, np.ndarray], str]:
    rendered = render_each(
        records, policy.tokenizer, max_length=max_length, overlong=how.overlong, skip_bad=how.skip_bad
    )
    groups = [group for group in rendered if group is not None]
    if not groups:
        raise DataError(f"no held-out item fits into {max_length} tokens: raise --max-length.")
    metrics, primary = _judge(policy, start, groups)
    for name, values in metrics.items():
        metrics[name] = np.full(len(records), np.nan)
        metrics[name][[group is not None for group in rendered]] = values
    return metrics, primary


def _judge(policy: Policy, start: Annotate, groups: list[Group]) -> tuple[dict[str, np.ndarray], str]:
    pairs = [_best_and_worst(g) for g in groups]
    compared = [g.subset(list(p)) if p else g.subset([0]) for g, p in zip(groups, pairs, strict=True)]
    policy.annotate(compared, "logps")
    own = [[float(x.sum()) for x in _per_completion(g, "logps")] for g in compared]
    tokens = np.array([g.lengths()[0] for g in compared])
    metrics = nll(np.array([sums[0] for sums in own]), tokens)
    if not any(pairs):
        return metrics, "nll"
    some = np.array([bool(p) for p in pairs])
    if hasattr(policy.model, "head"):
        margin = np.array([s[0] - s[1] for s, p in zip(policy.rewards(compared), pairs, strict=True) if p])
        values = {"preference/accuracy": (margin > 0) + 0.5 * (margin == 0), "preference/margin": margin}
        metrics = {}
    else:
        start(compared, "start")
        ref = [[float(x.sum()) for x in _per_completion(g, "start")] for g in compared]
        chosen, rejected, ref_chosen, ref_rejected = (
            np.array([sums[i] for sums, p in zip(rows, pairs, strict=True) if p]) for rows in (own, ref) for i in (0, 1)
        )
        values = preference_metrics(chosen, rejected, ref_chosen, ref_rejected)
    for name, of_pairs in values.items():
        metrics[name] = np.full(len(groups), np.nan)
        metrics[name][some] = of_pairs
    return metrics, "preference/accuracy"


def _best_and_worst(group: Group) -> tuple[int, int] | None:
    if "score" not in group.values:
        return None
    return next(iter(pairs_from_scores(group.values["score"], "best-worst", np.random.default_rng(0))), None)


def _per_completion(group: Group, name: str) -> list[np.ndarray]:
    """A per-token value of each completion's learned tokens, along its path."""
    return [
        np.concatenate([s.values[name][s.learn] for s in (group.segments[i] for i in group.path(c)) if s.learn.any()])
        for c in range(len(group))
    ]


def _keys(records: Sequence[Record]) -> list[str]:
    """One key per record by its content; the same content again gets a number."""
    seen: dict[str, int] = {}
    keys = []
    for record in records:
        content: Any = [record.prompt, record.completions, record.scores, record.columns.get("answer")]
        key = hashlib.blake2b(json.dumps(content, default=str).encode(), digest_size=8).hexdigest()
        seen[key] = seen.get(key, 0) + 1
        keys.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return keys
