"""The verbs: what the command line does, as functions that return values and raise `GuerdonError`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guerdon.control.datasets import is_control_source
from guerdon.errors import ConfigError, GuerdonError, near
from guerdon.exporting import export
from guerdon.feedback.readers import read_feedback
from guerdon.feedback.records import Record, texts
from guerdon.feedback.writers import check_target, write_feedback
from guerdon.fields import build, check_range
from guerdon.methods.base import (
    Method,
    all_methods,
    can_learn,
    check_options,
    check_sampling,
    get_method,
)
from guerdon.methods.planning.mcts import MCTS
from guerdon.methods.planning.solving import solve
from guerdon.training.config import Training

if TYPE_CHECKING:
    from guerdon.control.policy import ControlPolicy
    from guerdon.evaluation.comparison import Comparison
    from guerdon.evaluation.metrics import Evaluation
    from guerdon.language.policy import Policy
    from guerdon.language.prompting import PromptPolicy
    from guerdon.papers.advice import Advice
    from guerdon.training.progress import Progress
    from guerdon.training.rundir import RunDir

__all__ = [
    "GuerdonError",
    "advise",
    "all_methods",
    "claims",
    "collect",
    "collect_episodes",
    "collect_trajectories",
    "collect_trees",
    "compare",
    "evaluate",
    "export",
    "get_method",
    "inspect",
    "load_policy",
    "look",
    "read_feedback",
    "reproduce",
    "resume",
    "serve",
    "solve",
    "train",
    "train_chain",
    "write_feedback",
    "write_report",
]


def configure(method: str | Method, options: dict[str, Any], where: str) -> tuple[Method, Training]:
    """A method and the runner's options from plain names and values, checked before anything is loaded.

    Args:
        method: its name, or the method itself, in which case `options` are the runner's alone.
        options: fields of the method and of its `training`, together.
        where: where the options come from, for messages about them.

    Raises:
        ConfigError: an unknown method or option (with the nearest name), a wrong type, or options that contradict
            each other.
    """
    cls = get_method(method) if isinstance(method, str) else type(method)
    names = {f.name for f in dataclasses.fields(cls.training)}
    own = {f.name for f in dataclasses.fields(cls)} if isinstance(method, str) else set()
    for name in options:
        if name not in names | own:
            raise ConfigError(f"{where}: there is no option '{name}'.{near(name, names | own)}")
    training = build(cls.training, {k: v for k, v in options.items() if k in names}, where)
    if isinstance(method, str):
        method = build(cls, {k: v for k, v in options.items() if k in own}, where)
    check_options(method, training)
    return method, training


def inspect(
    source: str,
    *,
    model: str | None = None,
    max_length: int = 2048,
    split: str = "train",
    skip_bad: bool = False,
    limit: int | None = None,
    against: str | None = None,
) -> dict[str, Any]:
    """What feedback or logged transitions hold, what is odd in them, and which methods can learn from them.

    As plain data: beside what `guerdon.feedback.inspect.inspect_feedback` returns (or, of transitions,
    `guerdon.control.diagnostics.inspect_transitions`) there are `methods`, by name, and `methods_as_task`,
    those that need a verifier and can have one here, because the file says what the right answers are.

    Args:
        source: feedback: file, saved dataset directory or hub id; transitions: minari:ID, an .npz or .hdf5 file. What
            follows is for feedback.
        model: whose tokenizer counts the lengths; without one they are counted in words.
        max_length: tokens of a prompt with one completion, beyond which it would be cut.
        split: of a dataset that has several.
        skip_bad: go on past rows that cannot be read; they are counted and listed.
        limit: read at most this many rows.
        against: feedback that policies will be tested on, whose prompts should not be among these.

    Raises:
        DataError: what cannot be read, with file, line and column.
    """
    from guerdon.feedback.inspect import inspect_feedback

    if is_control_source(source):
        return _inspect_transitions(source)
    check_range({"max_length": max_length, "limit": 1 if limit is None else limit}, "max_length", "limit", low=1)
    feedback = read_feedback(source, skip_bad=skip_bad, limit=limit, split=split)
    count = None
    if model is not None:
        tokenizer = _tokenizer(model, feedback.records)

        def count(texts: list[str]) -> list[int]:
            return [len(ids) for ids in tokenizer(texts).input_ids]

    test = None if against is None else read_feedback(against, skip_bad=skip_bad)
    found = inspect_feedback(feedback, count, max_length, test)
    methods, says = all_methods(), feedback.says()
    found["methods"] = [name for name, cls in methods.items() if can_learn(cls.learns_from, says)]
    verified = [name for name, cls in methods.items() if cls.learns_from == "verifier"]
    found["methods_as_task"] = verified if "answers" in says else []
    return found


def _inspect_transitions(source: str) -> dict[str, Any]:
    from guerdon.control.datasets import read_transitions
    from guerdon.control.diagnostics import inspect_transitions
    from guerdon.methods.control import ControlMethod

    transitions = read_transitions(source, finite=False)
    found = inspect_transitions(transitions)
    acting = "discrete" if transitions.spec.discrete else "continuous"
    found["methods"] = [
        name
        for name, cls in all_methods().items()
        if issubclass(cls, ControlMethod) and cls.learns_from == "transitions" and cls.actions in ("any", acting)
    ]
    return found


def advise(source: str, *, model: str = "smollm2-135m", env: str | None = None, verifier: str | None = None) -> Advice:
    """Which methods fit feedback, transitions or an environment, and how to compare the most promising.

    See `guerdon.papers.advice.advise`.
    """
    from guerdon.papers.advice import advise

    return advise(source, model=model, env=env, verifier=verifier)


def look(
    source: str,
    *,
    model: str,
    records: int = 3,
    max_length: int = 2048,
    split: str = "train",
    skip_bad: bool = False,
    credit: bool = False,
) -> dict[str, Any]:
    """The first records as the loss sees them, as plain data; see `guerdon.language.look.look`.

    Args:
        source: file, saved dataset directory or hub id.
        model: whose tokenizer and chat template render them.
        records: how many.
        max_length: tokens of a prompt with one completion, beyond which it would be cut.
        split: of a dataset that has several.
        skip_bad: go on past rows that cannot be read.
        credit: what each token earns by the implicit reward of `model`, the run of a language method: beta (1 where the
            method has none) times its log-ratio to the run's start.

    Raises:
        DataError: what cannot be read, with file, line and column.
    """
    from guerdon.language.look import look

    check_range({"max_length": max_length, "records": records}, "max_length", "records", low=1)
    feedback = read_feedback(source, skip_bad=skip_bad, split=split)
    if not credit:
        return look(feedback.records, _tokenizer(model, feedback.records), records, max_length=max_length)
    from guerdon.methods.preferences.token_q import credits_of

    policy, of_group = credits_of(model)
    return look(feedback.records, policy.tokenizer, records, max_length=max_length, credit=of_group)


def collect(
    task: str,
    *,
    model: str,
    out: str | Path,
    n: int = 8,
    prompts: int = 100,
    verifier: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sampler: str = "local",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Sample n completions for each of a task's training prompts, verify them, and write them as scored feedback.

    A killed collection goes on where it stopped; see `guerdon.tasks.collect.collect`, also for what is returned.
    """
    from guerdon.language.models import fingerprint
    from guerdon.language.policy import Policy
    from guerdon.language.sampling import make_sampler
    from guerdon.language.sampling.base import Sampling
    from guerdon.language.templates import stop_ids
    from guerdon.tasks import load_task
    from guerdon.tasks.collect import collect

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    check_sampling(vars(sampling))
    check_range({"n": n, "prompts": prompts}, "n", "prompts", low=1)
    check_target(out)
    if Path(out).exists():
        raise ConfigError(f"{out} exists already: choose another --out, or delete it to collect again.")
    loaded = load_task(task, verifier=verifier, seed=0)
    policy = Policy.load(model, texts=texts(loaded.train + loaded.test))
    tokenizer = policy.tokenizer
    return collect(
        loaded,
        make_sampler(sampler, policy.model, tokenizer, stop_ids(tokenizer, policy.model.model)),
        tokenizer,
        n=n,
        prompts=prompts,
        sampling=sampling,
        seed=seed,
        out=out,
        policy=fingerprint(policy.model.model),
        progress=progress,
    )


def collect_episodes(
    env: str,
    *,
    policy: Sequence[str] = ("random",),
    out: str,
    episodes: int = 100,
    noise: Sequence[float] = (0.0,),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Act in an environment and write the episodes as a Minari dataset; see `guerdon.control.collect.collect`.

    Args:
        out: `minari:NAME-v0`, or a directory.
    """
    from guerdon.control.collect import collect

    check_range({"episodes": episodes, "seed": seed}, "episodes", "seed")
    check_range({"episodes": episodes}, "episodes", low=1)
    return collect(env, policies=policy, out=out, episodes=episodes, noises=noise, seed=seed, progress=progress)


def collect_trajectories(
    env: str,
    *,
    policy: Sequence[str] = ("random",),
    out: str | Path,
    episodes: int = 100,
    n: int = 1,
    split: str = "train",
    noise: float = 0.0,
    thoughts: bool = False,
    feedback: Sequence[str] = (),
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sampler: str = "local",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Act in an environment in words and keep the episodes; see `guerdon.tasks.text.collect.collect`.

    Args:
        env: as `guerdon.tasks.text.make_text` takes it, with or without `text:` before it.
    """
    from guerdon.language.sampling.base import Sampling
    from guerdon.tasks.text.collect import collect

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    check_sampling(vars(sampling))
    check_range({"episodes": episodes, "n": n}, "episodes", "n", low=1)
    check_range({"seed": seed}, "seed")
    return collect(
        env.removeprefix("text:"),
        policies=policy,
        out=out,
        episodes=episodes,
        n=n,
        split=split,
        noise=noise,
        thoughts=thoughts,
        feedback=feedback,
        sampling=sampling,
        sampler=sampler,
        seed=seed,
        progress=progress,
    )


def collect_trees(
    env: str,
    *,
    policy: str = "random",
    out: str | Path,
    trees: int = 100,
    how: MCTS | None = None,
    max_length: int = 2048,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Search the tasks of an environment in words; see `guerdon.methods.planning.trees.collect_trees`.

    Args:
        env: as `guerdon.tasks.text.make_text` takes it, with or without `text:` before it.
        how: of the search.
        **options: `split`, `chosen`, `min_gap`, `thoughts`, `sampler`, `progress`.
    """
    from guerdon.language.sampling.base import Sampling
    from guerdon.methods.planning.trees import collect_trees

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    check_sampling(vars(sampling))
    check_range({"trees": trees, "max_length": max_length}, "trees", "max_length", low=1)
    check_range({"seed": seed}, "seed")
    given = {"trees": trees, "how": how, "max_length": max_length, "seed": seed, **options}
    return collect_trees(env.removeprefix("text:"), policy=policy, out=out, sampling=sampling, **given)


def train(method: str | Method, *, progress: Progress | None = None, **options: Any) -> RunDir:
    """Improve a policy with one method; the run directory that comes back can be evaluated, resumed and exported.

    Args:
        method: a name that `guerdon methods` lists, or a method.
        progress: shows the run to a person, `guerdon.training.progress.Terminal()` for one.
        **options: fields of the method (only where it is named) and of the runner: of `LanguageTraining` in
            `guerdon.training.config`, where `model` and either `data` or `task` have to be given, or of
            `ControlTraining`, where `data` or `env` has to be.

    Raises:
        ConfigError: see `configure`.
        DataError: feedback that cannot be read or learned from.
        InvariantError: numbers that could not be trusted; the offending batch is saved in the run directory.
    """
    built, training = configure(method, options, "train")
    from guerdon.runs import start

    return start(built, training, progress)


def train_chain(recipe: str | Path, *, progress: Progress | None = None, **training: Any) -> RunDir:
    """Improve a policy with the stages of a recipe, one after the other; the run of the last one comes back.

    Called again it goes on where it stopped. See `guerdon.chains` for what such a recipe says.

    Args:
        **training: fields of `guerdon.training.config.LanguageTraining` that override the recipe in every stage;
            `model` is where the chain starts, `out` its directory.
    """
    from guerdon.chains import start

    return start(recipe, training, progress)


def resume(run: str | Path, *, progress: Progress | None = None) -> RunDir:
    """Go on with an interrupted run, or with a chain of them, exactly where its last checkpoint stands."""
    from guerdon import chains, runs

    go_on = chains.resume if (Path(run) / chains.CHAIN).is_file() else runs.resume
    return go_on(run, progress)


def evaluate(policy: str | Path, *, max_length: int = 2048, **training: Any) -> dict[int, Evaluation]:
    """Judge a policy on held-out items, and write `evaluation.json` into its run directory, or into `out`.

    Args:
        policy: a run directory, any model that `LanguageTraining.model` takes, `random`, the control policy that
            draws its actions blindly, or `full-prompt:MODEL`, the few-shot prompt of a model.
        max_length: with feedback: tokens of a prompt with one completion; longer ones are cut.
        **training: fields of `LanguageTraining` (`data`, `task`, `eval_samples`, `seed`, ...) or `ControlTraining`
            (`env`, `eval_episodes`, ...); a run's own where they are not given.

    Returns:
        seed -> evaluation; a run of several seeds has several.
    """
    from guerdon.evaluation.metrics import save_evaluations
    from guerdon.runs import evaluate
    from guerdon.training.config import FULL_PROMPT, TEXT, ControlTraining, LanguageTraining, PromptTraining
    from guerdon.training.rundir import RunDir

    check_range({"max_length": max_length}, "max_length", low=1)
    if RunDir.is_at(policy):
        run = RunDir.open(policy)
        if not (run.path / "policy").is_dir():
            raise ConfigError(
                f"{policy} is not done ({run.status['state']}) and has no policy: `guerdon resume {policy}` goes on."
            )
        own, cls = run.config["training"], get_method(run.config["method"]).training
        if cls is LanguageTraining and {"data", "task"} & set(training):
            own["env"] = None
            own |= {"data": None, "eval_data": None, "task": None, "verifier": None, "max_samples": 0}
        config: Training = build(cls, {**own, "out": str(policy), **training}, "evaluate")
        out: Path | None = Path(config.out)
    elif str(training.get("env") or "").startswith(TEXT):
        config = build(LanguageTraining, {"model": str(policy), **training}, "evaluate")
        out = Path(config.out) if "out" in training else None
    elif str(policy) == "random" or "env" in training:
        config = build(ControlTraining, training, "evaluate")
        out = Path(config.out) if "out" in training else None
    elif str(policy).startswith(FULL_PROMPT):
        model = str(policy).removeprefix(FULL_PROMPT)
        config = build(PromptTraining, {"model": model, **training}, "evaluate")
        out = Path(config.out) if "out" in training else None
    elif {"data", "task"} & set(training):
        config = build(LanguageTraining, {"model": str(policy), **training}, "evaluate")
        out = Path(config.out) if "out" in training else None
    else:
        raise ConfigError(f"{policy} holds no run that would say what it is judged on: give either data or task.")
    config.check()
    found = evaluate(policy, config, max_length)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        save_evaluations(out / "evaluation.json", found)
    return found


def compare(
    methods: Sequence[str | Method | Mapping[str, Any]],
    *,
    seeds: int = 3,
    budget: Mapping[str, int] | None = None,
    out: str | Path = "comparison",
    jobs: int = 1,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
    **training: Any,
) -> Comparison:
    """Train several methods on the same data with the same budget and seeds, and judge what can be told apart.

    Args:
        methods: names, methods, or mappings with `name` and, where wanted, `options` and `label`.
        seeds: trials of each method.
        budget: what each seed may spend, `updates` or `samples`; without one each method runs to its own end.
        out: directory; the same call goes on with what stands in it.
        jobs: trials at the same time.
        command: how to make this comparison again, for the report.
        say: is told one line about each start and end of a stage.
        **training: fields of the methods' `training`, the same for all of them.
    """
    from guerdon.evaluation.compare import check_sources
    from guerdon.evaluation.compare import compare as run

    return run(
        [{"name": m.name, "options": m.options()} if isinstance(m, Method) else m for m in methods],
        training=training,
        seeds=seeds,
        budget=budget or {},
        out=out,
        jobs=jobs,
        check=check_sources,
        command=command,
        say=say,
    )


def claims() -> list[dict[str, Any]]:
    """Every claim as plain data: what is said, how it is tried, and what its full version gave (None: never run)."""
    from guerdon.claims import all_claims
    from guerdon.claims.running import describe

    return [describe(claim) for claim in all_claims().values()]


def reproduce(
    papers: Sequence[int | str],
    *,
    quick: bool = False,
    seeds: int | None = None,
    jobs: int = 1,
    ray: bool = False,
    out: str | Path = "reproduction",
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Try the claims of papers, one after the other; the results as plain data, see `guerdon.claims.running.reproduce`.

    Args:
        papers: ids.
        quick: small versions, which show that everything runs.
        seeds: of each claim; its own number where not given.
        jobs: trials at the same time.
        ray: run the trials as Ray tasks.
        out: directory; the same call goes on with what stands in it.
        say: is told a line about each trial that finishes.
    """
    from guerdon.claims import get_claim
    from guerdon.claims.running import reproduce

    if not papers:
        raise ConfigError("reproduce: name at least one paper by its id; `guerdon claims` lists them.")
    return [
        reproduce(claim, out=out, quick=quick, seeds=seeds, jobs=jobs, ray=ray, say=say)
        for claim in [get_claim(paper) for paper in papers]
    ]


def write_report(directory: str | Path, out: str | Path | None = None) -> Path:
    """Write a comparison or a run as one self-contained HTML page; `report.html` in its directory without `out`."""
    from guerdon.report.html import write_report

    return write_report(directory, out)


def load_policy(path: str | Path, *, precision: str = "auto") -> Policy | ControlPolicy | PromptPolicy:
    """The policy of a run directory, or of any model that `LanguageTraining.model` takes.

    A language policy answers, and rates with its head; a control policy acts, one of its seeds as all of them; a prompt
    policy answers items.

    Args:
        precision: auto, fp32 or bf16, of a language model's matmuls.
    """
    from guerdon.control.policy import ControlPolicy
    from guerdon.language.prompting import PromptPolicy

    if ControlPolicy.is_at(path):
        return ControlPolicy.load(path)
    if PromptPolicy.is_at(path):
        return PromptPolicy.load(path, precision)
    from guerdon.language.policy import Policy

    return Policy.load(path, precision)


def serve(
    policy: str | Path,
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    precision: str = "auto",
    say: Callable[[str], None] = print,
) -> None:
    """Serve a language policy behind an OpenAI-compatible address until Ctrl-C; see `guerdon.llm.serving`.

    Args:
        policy: a run directory, or any model that `LanguageTraining.model` takes.
        name: by which requests call it; without one the last part of `policy`.
        host: where it listens; anything but this machine lets everybody in who can reach it.
        port: 0 takes one that is free.
        precision: auto, fp32 or bf16, of the model's matmuls.
        say: is told the address once the server listens.

    Raises:
        ConfigError: no such model, one of a control policy, or a port that cannot be had.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"serve needs the package {error.name}: `pip install 'guerdon[serve]'` brings it.") from error
    from guerdon.language.policy import Policy
    from guerdon.llm.serving import serve

    loaded = load_policy(policy, precision=precision)
    if not isinstance(loaded, Policy):
        raise ConfigError(f"{policy} is a control policy: only language policies can be served.")
    serve(loaded, name=name or _name_of(str(policy)), host=host, port=port, say=say)


def _name_of(policy: str) -> str:
    return policy if policy.startswith("tiny:") else policy.rstrip("/").rpartition("/")[2]


def _tokenizer(model: str, records: Sequence[Record]) -> Any:
    from guerdon.language.models import load_model

    return load_model(model, texts=texts(records))[1]
