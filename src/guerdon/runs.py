"""Runs from their two dataclasses: start one, go on with one."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from guerdon.errors import GuerdonError
from guerdon.feedback.records import texts
from guerdon.fields import build
from guerdon.lazy import torch
from guerdon.methods.base import Method, get_method
from guerdon.training.config import ControlTraining, LanguageTraining, PromptTraining, Training
from guerdon.training.rundir import RunDir

if TYPE_CHECKING:
    from guerdon.evaluation.metrics import Evaluation
    from guerdon.training.control import ControlRun
    from guerdon.training.distributed import Distribution
    from guerdon.training.language import LanguageRun
    from guerdon.training.progress import Progress
    from guerdon.training.prompting import PromptRun
    from guerdon.training.runner import Evaluate


def start(method: Method, config: Training, progress: Progress | None = None) -> RunDir:
    """Train a policy from its start; the run directory `config.out` must be new.

    Where data, task or model turn out to be unusable there is no run, and its directory is removed.
    """
    from guerdon.training.distributed import Distribution

    distribution = Distribution.start()
    if distribution.is_main:
        rundir = RunDir.create(config.out, method.name, method.options(), vars(config))
    distribution.barrier()
    rundir = RunDir.open(config.out)
    try:
        run = _prepare(rundir, method, config, distribution)
    except GuerdonError:
        if distribution.is_main:
            rundir.remove()
        raise
    return _go(run, rundir, progress)


def resume(path: str | Path, progress: Progress | None = None) -> RunDir:
    """Go on with an interrupted run from its last checkpoint; a finished one is returned as it is."""
    from guerdon.training.distributed import Distribution

    rundir = RunDir.open(path)
    if rundir.status["state"] == "done":
        return rundir
    saved = rundir.config
    method = build(get_method(saved["method"]), saved["options"], f"{path}/config.json")
    config = build(method.training, {**saved["training"], "out": str(path)}, f"{path}/config.json")
    return _go(_prepare(rundir, method, config, Distribution.start()), rundir, progress)


def evaluate(policy: str | Path, config: Training, max_length: int = 2048) -> dict[int, Evaluation]:
    """Judge a policy: seed -> evaluation, where a run of several seeds has several.

    A language policy is judged on the held-out items of `config`'s task or data, against the start `config.model`, or
    as an agent in `config.env`; a control policy on episodes in `config.env`; a prompt on test items.

    Args:
        policy: a run directory, any model that `LanguageTraining.model` takes, `random`, the control policy that
            draws its actions blindly, or `full-prompt:MODEL`, the few-shot prompt of a model.
    """
    if isinstance(config, PromptTraining):
        from guerdon.evaluation.prompting import evaluate_prompt

        return {config.seed: evaluate_prompt(policy, config)}
    if isinstance(config, ControlTraining):
        from guerdon.evaluation.control import evaluate_control

        return evaluate_control(policy, config)
    assert isinstance(config, LanguageTraining)
    return {config.seed: _evaluate_language(policy, config, max_length)}


def _evaluate_language(policy: str | Path, config: LanguageTraining, max_length: int) -> Evaluation:
    from guerdon.evaluation.evaluate import evaluate_policy
    from guerdon.evaluation.text import agent_of, judge_agent, other_agent_of
    from guerdon.language.policy import Policy
    from guerdon.training.language import material

    if config.env is not None and (agent := other_agent_of(str(policy), config)) is not None:
        return judge_agent(agent, config)
    task, records, held_out, _ = material(config)
    how = {"seed": config.seed, "texts": list(texts(records + held_out))}
    judged = Policy.load(policy, config.precision, **how)
    compared = str(policy) != config.model and (config.env is None or config.eval_agent is not None)
    start = judged if not compared else Policy.load(config.model, config.precision, **how)
    if config.env is not None:
        return judge_agent(agent_of(judged, start.annotate, config, max_length), config)
    return evaluate_policy(judged, start.annotate, held_out, task, config, max_length)


def _prepare(
    rundir: RunDir, method: Method, config: Training, distribution: Distribution
) -> LanguageRun | ControlRun | PromptRun:
    """Read the data, load the model, make the environments."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if isinstance(config, ControlTraining):
        from guerdon.methods.control import ControlMethod
        from guerdon.training.control import ControlRun

        assert isinstance(method, ControlMethod)
        run = ControlRun(method, config, distribution, rundir.path)
        method.setup(run)
        return run
    if isinstance(config, PromptTraining):
        from guerdon.methods.prompting.base import PromptMethod
        from guerdon.training.prompting import PromptRun

        assert isinstance(method, PromptMethod)
        search = PromptRun(method, config, distribution, rundir.path)
        method.setup(search)
        return search
    from guerdon.methods.base import LanguageMethod
    from guerdon.training.language import LanguageRun

    assert isinstance(method, LanguageMethod) and isinstance(config, LanguageTraining)
    language = LanguageRun(method, config, distribution, rundir.path)
    method.setup(language)
    if rundir.latest_checkpoint() is None:
        language.forget_samples(0)  # of a run that was killed before its first checkpoint
    return language


def _go(run: LanguageRun | ControlRun | PromptRun, rundir: RunDir, progress: Progress | None) -> RunDir:
    from guerdon.evaluation.control import evaluate_control_run
    from guerdon.evaluation.evaluate import evaluate_run
    from guerdon.evaluation.prompting import evaluate_prompt_run
    from guerdon.training.control import ControlRun
    from guerdon.training.loggers import open_sinks
    from guerdon.training.prompting import PromptRun
    from guerdon.training.runner import run_loop

    main = run.distribution.is_main
    evaluate: Evaluate | None
    if isinstance(run, ControlRun):
        evaluate = evaluate_control_run if run.env else None
    elif isinstance(run, PromptRun):
        evaluate = evaluate_prompt_run
    else:
        evaluate = evaluate_run if run.held_out or run.config.env else None
    with run.threads() if isinstance(run, ControlRun) else nullcontext():
        run_loop(
            run,
            run.method,
            rundir,
            run.config,
            evaluate=evaluate,
            sinks=open_sinks(rundir, run.config.log_to) if main else [],
            progress=progress,
        )
    return rundir
