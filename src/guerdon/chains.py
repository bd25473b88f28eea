"""Chains: methods one after the other, each from the policy that the one before it left, written down in one recipe.

training:            # of every stage, unless the stage says otherwise; `model` is where the chain starts
  model: smollm2-135m
stages:
  - {name: sft, method: sft, training: {data: demonstrations.jsonl}}
  - {name: samples, method: collect, options: {n: 8}, training: {task: prompts.jsonl, verifier: number}}
  - {name: dpo, method: dpo-norm, options: {beta: 1.0}, training: {data: {stage: samples}}}

A stage starts from the last policy before it. What takes a model or a file of feedback (`model`, `data`, a method's
`value_model` and `reward_model`, the `models` and the `judge` of `collect`, `eval_agent`) can name a stage before it in
its place, as `{stage: NAME}`.

    chain.json              what was asked for
    1-sft/, 3-dpo/          the stages' run directories; `merged/` holds the whole weights of a LoRA run
    2-samples/              feedback.jsonl, what was collected; of a stage `mcts` trees.jsonl and trees.KIND.jsonl
    policy                  when all is done, a link to the last policy
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from guerdon import __version__, runs
from guerdon.api import collect, collect_trees, configure
from guerdon.errors import ConfigError, DataError, GuerdonError, near
from guerdon.feedback.readers import Feedback
from guerdon.feedback.records import Record
from guerdon.feedback.writers import write_feedback
from guerdon.fields import build, check_range, checked
from guerdon.methods.base import LanguageMethod, check_sampling, get_method
from guerdon.methods.planning.mcts import MCTS
from guerdon.recipes import read_mapping
from guerdon.tasks.text import make_text
from guerdon.training.config import TEXT, LanguageTraining
from guerdon.training.progress import Progress, Silent
from guerdon.training.rundir import RunDir

if TYPE_CHECKING:
    from guerdon.training.distributed import Distribution

CHAIN = "chain.json"
KEYS = ("stages", "training")
STAGE_KEYS = ("name", "method", "options", "training")
# What a `{stage: NAME}` may stand for, by the option it is given to.
TAKES = {
    "data": ("feedback",),
    "judge": ("reward model",),
    "reward_model": ("reward model",),
    "value_model": ("policy", "reward model"),
}


@dataclass(kw_only=True)
class Collect:
    """Options of the stage `collect`: answers to a task's prompts, sampled and scored, for later stages to learn from.

    With a verifier a completion that does not end by itself counts as wrong whatever it says: a pair made of it would
    teach where to break off.
    """

    models: tuple[str, ...] = ()  # who answers; the last policy where nobody is named
    n: int = 4  # completions per prompt of each of them
    prompts: int = 1000  # prompts, from the task's training share
    judge: str | None = None  # reward model that scores the completions; none: the task's verifier
    max_new_tokens: int = 256  # tokens a completion may have
    temperature: float = 1.0  # sampling temperature
    top_k: int = 0  # sample among the k likeliest tokens; 0 among all
    top_p: float = 1.0  # sample among the likeliest tokens that hold this probability

    name: ClassVar[str] = "collect"


@dataclass(frozen=True, kw_only=True)
class Search(MCTS):
    """Options of the stage `mcts`: trees of the tasks in `env`, searched with what the last policy proposes.

    They give feedback of three kinds, of which later stages take one.
    """

    feedback: Literal["step-preference", "preference", "sft"] = "step-preference"  # what later stages learn from
    trees: int = 100  # how many; each training task in turn
    chosen: Literal["argmax", "path"] = "argmax"  # of a step's actions: the best one, or the one on the best way
    min_gap: float = 0.0  # step pairs whose values differ by no more are left out
    max_length: int = 2048  # tokens of a history with a step; the oldest turns of longer ones are left out
    thoughts: bool = False  # ask for a thought before each action
    max_new_tokens: int = 64  # tokens a reply may have
    temperature: float = 1.0  # sampling temperature
    top_k: int = 0  # sample among the k likeliest tokens; 0 among all
    top_p: float = 1.0  # sample among the likeliest tokens that hold this probability

    name: ClassVar[str] = "mcts"


@dataclass(frozen=True)
class Stage:
    """One stage, checked, with paths in the place of stages' names."""

    name: str
    work: LanguageMethod | Collect | Search
    training: LanguageTraining

    @property
    def directory(self) -> Path:
        return Path(self.training.out)

    @property
    def gives(self) -> str:
        """What later stages can take from it."""
        if not isinstance(self.work, LanguageMethod):
            return "feedback"
        return "reward model" if "scores" in self.work.wants else "policy"

    @property
    def result(self) -> Path:
        if isinstance(self.work, Collect):
            return self.directory / "feedback.jsonl"
        if isinstance(self.work, Search):
            return self.directory / f"trees.{self.work.feedback}.jsonl"
        return self.directory / ("merged" if self.training.lora_rank else "policy")

    @property
    def done(self) -> bool:
        run = isinstance(self.work, LanguageMethod)
        return self.result.exists() and (not run or RunDir.open(self.directory).status["state"] == "done")


def read_chain(path: str | Path) -> dict[str, Any]:
    """The `training` and the `stages` of a recipe; what the stages say is checked by `plan`.

    Raises:
        ConfigError: not a file of this form, an unknown key or option, or stages that cannot be told apart.
    """
    where = f"recipe {path}"
    said = read_mapping(path)
    _check_keys(said, KEYS, where)
    stages = said.get("stages")
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"{where}: 'stages' has to be a list of stages.")
    names: set[str] = set()
    for number, stage in enumerate(stages, 1):
        here = f"{where}, stage {number}"
        if not isinstance(stage, dict):
            raise ConfigError(f"{here}: has to be a mapping with the keys {', '.join(STAGE_KEYS)}.")
        _check_keys(stage, STAGE_KEYS, here)
        for key in ("name", "method"):
            if not isinstance(stage.get(key), str):
                raise ConfigError(f"{here}: '{key}' has to be text.")
        if not re.fullmatch(r"[\w.-]+", stage["name"]):
            raise ConfigError(f"{here}: '{stage['name']}' cannot name a directory; use letters, digits and - . _")
        if stage["name"] in names:
            raise ConfigError(f"{here}: another stage is called '{stage['name']}', too; rename one of them.")
        names.add(stage["name"])
    return {"training": checked(LanguageTraining, said.get("training", {}), f"{where}: training"), "stages": stages}


def plan(said: Mapping[str, Any], out: str | Path, where: str) -> list[Stage]:
    """The stages of a chain, every name and value of them checked; nothing is loaded.

    Args:
        said: `training` and `stages` as in the recipe, and `given`, fields of `LanguageTraining` that override it in
            every stage; its `model` is where the chain starts.
        out: directory of the chain.
        where: where it all comes from, for messages.

    Raises:
        ConfigError: naming the stage: what cannot be, or a stage that is named but does not come before.
    """
    stages: list[Stage] = []
    for number, stage in enumerate(said["stages"], 1):
        with _named(f"{where}, stage '{stage['name']}'"):
            directory = Path(out).absolute() / f"{number}-{stage['name']}"
            stages.append(_stage(stage, said["training"], said["given"], stages, directory))
    if not any(stage.gives == "policy" for stage in stages):
        raise ConfigError(f"{where}: no stage trains a policy.")
    return stages


def _stage(
    said: Mapping[str, Any], shared: Mapping[str, Any], given: Mapping[str, Any], before: list[Stage], directory: Path
) -> Stage:
    own = _filled(said.get("training", {}), before)
    training = {**shared, **own, **given, "out": str(directory)}
    policies = [stage for stage in before if stage.gives == "policy"]
    if policies:
        training["model"] = own.get("model", str(policies[-1].result))
    options, name = _filled(said.get("options", {}), before), said["method"]
    if name not in (Collect.name, Search.name):
        method = build(get_method(name), options, f"options of {name}")
        method, configured = configure(method, training, "training")
        if not (isinstance(method, LanguageMethod) and isinstance(configured, LanguageTraining)):
            raise ConfigError(f"{name} improves a {method.policy} policy, and the stages of a chain a language policy.")
        return Stage(said["name"], method, configured)
    config = build(LanguageTraining, training, "training")
    if name == Search.name:
        return Stage(said["name"], _search_of(options, config), config)
    if config.task is None or config.data is not None:
        raise ConfigError("training: collect answers the prompts of a task: give a task, and no data.")
    config.check()
    work = build(Collect, options, f"options of {name}")
    check_sampling(vars(work))
    check_range(vars(work), "n", "prompts", low=1)
    return Stage(said["name"], work, config)


def _search_of(options: Mapping[str, Any], config: LanguageTraining) -> Search:
    if config.env is None or config.task is not None or config.data is not None:
        raise ConfigError("training: mcts searches the tasks of an environment: give env, and neither task nor data.")
    config.check()
    work = build(Search, options, f"options of {Search.name}")
    work.check()
    check_sampling(vars(work))
    check_range(vars(work), "trees", "max_length", low=1)
    return work


def _filled(values: Mapping[str, Any], before: Sequence[Stage]) -> dict[str, Any]:
    """`values` with what a stage gives in the place of each `{stage: NAME}`."""

    def fill(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [fill(name, item) for item in value]
        if not isinstance(value, dict) or list(value) != ["stage"]:
            return value
        found = {stage.name: stage for stage in before}
        wanted = value["stage"]
        if wanted not in found:
            raise ConfigError(f"'{name}': no stage before it is called '{wanted}'.{near(str(wanted), found)}")
        takes = TAKES.get(name, ("policy",))
        if found[wanted].gives not in takes:
            raise ConfigError(
                f"'{name}' takes {' or '.join(takes)}, and the stage '{wanted}' gives {found[wanted].gives}."
            )
        return str(found[wanted].result)

    return {name: fill(name, value) for name, value in values.items()}


def start(recipe: str | Path, given: Mapping[str, Any], progress: Progress | None = None) -> RunDir:
    """Run the chain of a recipe, or go on with it where it was begun before.

    Args:
        given: fields of `LanguageTraining` that override the recipe in every stage. `model` is where the chain starts,
            and `out` its directory.

    Returns:
        The run that trained the last policy.

    Raises:
        ConfigError: what `read_chain` and `plan` refuse, or a directory that holds something else.
        GuerdonError: whatever stops a stage, under the stage's name.
        KeyboardInterrupt: Ctrl-C; what stands in `out` can be gone on with.
    """
    from guerdon.training.distributed import Distribution

    where = f"recipe {recipe}"
    said = read_chain(recipe)
    said["given"] = checked(LanguageTraining, given, where)
    out = Path({"out": "run", **said["training"], **said["given"]}["out"])
    said["given"].pop("out", None)
    stages = plan(said, out, where)
    said = json.loads(json.dumps(said))  # as it is read again
    _check_out(said, out, where)
    _check_sources(stages, where)
    if Distribution.start().is_main and not (out / CHAIN).exists():
        _write(said, out)
    return _go(stages, out, progress or Silent())


def resume(out: str | Path, progress: Progress | None = None) -> RunDir:
    """Go on with the chain that was begun in `out`; see `start`."""
    said = json.loads((Path(out) / CHAIN).read_text(encoding="utf-8"))
    stages = plan(said, out, f"{out}/{CHAIN}")
    _check_sources(stages, f"{out}/{CHAIN}")
    return _go(stages, Path(out), progress or Silent())


def _check_out(said: Mapping[str, Any], out: Path, where: str) -> None:
    """The directory is new, or holds what is asked for now."""
    if (out / CHAIN).exists():
        begun = json.loads((out / CHAIN).read_text(encoding="utf-8"))
        told = {"training": "training options", "stages": "stages", "given": "flags"}
        if other := [told[key] for key in said if said[key] != begun[key]]:
            raise ConfigError(
                f"{out} holds a chain that was begun with other {' and '.join(other)}: `guerdon resume {out}` goes on "
                f"with it as it was begun, another --out begins anew with {where}."
            )
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no chain: choose a new directory with --out.")


def _write(said: Mapping[str, Any], out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        draft = out.with_name(f".{out.name}.{CHAIN}")  # beside `out`, which stays empty if this is killed
        draft.write_text(json.dumps({"guerdon": __version__, **said}, indent=2) + "\n", encoding="utf-8")
        draft.replace(out / CHAIN)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another --out.") from error


def _go(stages: Sequence[Stage], out: Path, progress: Progress) -> RunDir:
    from guerdon.training.distributed import Distribution
    from guerdon.training.runner import Stopped

    distribution = Distribution.start()
    for number, stage in enumerate(stages, 1):
        if distribution.any(distribution.is_main and stage.done):
            continue
        if distribution.is_main:
            progress.note(f"stage {number} of {len(stages)}, {stage.name}: {stage.work.name}")
        try:
            with _named(f"stage '{stage.name}'"):
                if isinstance(stage.work, LanguageMethod):
                    _train(stage, stage.work, distribution, progress)
                if distribution.is_main:
                    _finish(stage, progress)
        except KeyboardInterrupt:
            raise Stopped(f"stopped in stage '{stage.name}'. `guerdon resume {out}` goes on from there.") from None
        gc.collect()  # a run refers to itself, and the next one needs its memory
        distribution.barrier()
    last = [stage for stage in stages if stage.gives == "policy"][-1]
    if distribution.is_main:
        link = out / ".policy"
        link.unlink(missing_ok=True)
        link.symlink_to(last.result.relative_to(out.absolute()))
        link.replace(out / "policy")
    return RunDir.open(last.directory)


def _train(stage: Stage, method: LanguageMethod, distribution: Distribution, progress: Progress) -> None:
    if distribution.any(distribution.is_main and (stage.directory / "config.json").exists()):
        runs.resume(stage.directory, progress)
    else:
        runs.start(method, stage.training, progress)


def _check_sources(stages: Sequence[Stage], where: str) -> None:
    """Read the data and the tasks of all stages that are not done, while no model has been loaded yet."""
    from guerdon.language.models import check_name

    made = {str(stage.result) for stage in stages}
    for stage in stages:
        if not stage.done:
            with _named(f"{where}, stage '{stage.name}'"):
                if stage.training.model not in made:
                    check_name(stage.training.model)
                _check_source(stage, made)


def _check_source(stage: Stage, made: set[str]) -> None:
    from guerdon.tasks import load_task
    from guerdon.training.language import material

    work, config = stage.work, stage.training
    if isinstance(work, Collect):
        prompts = len(load_task(str(config.task), verifier=config.verifier).train)
        if work.prompts > prompts:
            raise ConfigError(f"'prompts' is {work.prompts}, and {config.task} has {prompts} to train on.")
    elif isinstance(work, Search):
        make_text(str(config.env).removeprefix(TEXT)).tasks("train")
    elif config.data in made:
        rated = Record("", ["", ""], [1.0, 0.0])
        work.check_feedback(Feedback("scored", [rated], str(config.data)))
    else:
        material(config, work.check_feedback)


def _finish(stage: Stage, progress: Progress) -> None:
    """Make what later stages take, where the run itself has not made it."""
    if isinstance(stage.work, Collect):
        _collect(stage, stage.work, progress)
    elif isinstance(stage.work, Search):
        _search(stage, stage.work, progress)
    elif stage.result.name == "merged":
        RunDir.open(stage.directory).write_directory(stage.result, partial(_merge, stage.directory / "policy"))


def _collect(stage: Stage, work: Collect, progress: Progress) -> None:
    config, parts = stage.training, []
    for number, model in enumerate(work.models or (config.model,), 1):
        part = stage.directory / f"answers-{number}.jsonl"
        if not part.exists():
            collect(
                str(config.task),
                model=model,
                out=part,
                verifier=config.verifier,
                sampler=config.sampler,
                seed=config.seed,
                progress=lambda done, total: progress.note(f"{done} of {total} prompts"),
                **{name: value for name, value in vars(work).items() if name not in ("models", "judge")},
            )
        parts.append([json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()])
    rows = [_joined(answers) for answers in zip(*parts, strict=True)]
    for row, scores in zip(rows, _scores(rows, work.judge, config), strict=True):
        row["scores"] = scores
    write_feedback(stage.result, rows)


def _search(stage: Stage, work: Search, progress: Progress) -> None:
    search = {f.name for f in fields(MCTS)}
    collect_trees(
        str(stage.training.env),
        policy=stage.training.model,
        out=stage.directory / "trees.jsonl",
        how=MCTS(**{name: getattr(work, name) for name in search}),
        sampler=stage.training.sampler,
        seed=stage.training.seed,
        progress=lambda done, total: progress.note(f"{done} of {total} trees"),
        **{name: value for name, value in vars(work).items() if name not in search | {"feedback"}},
    )
    if not stage.result.exists():
        raise DataError(f"the trees in {stage.directory} give no {work.feedback}: search more, or by a better policy.")


def _joined(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answers of several policies to one prompt, as one row."""
    every = {name: [x for row in answers for x in row[name]] for name in ("completions", "scores", "finished")}
    rewards = {name: [x for row in answers for x in row["rewards"][name]] for name in answers[0]["rewards"]}
    return {**answers[0], **every, "rewards": rewards}


def _scores(rows: Sequence[dict[str, Any]], judge: str | None, config: LanguageTraining) -> list[list[float]]:
    if judge is None:
        ended = [zip(row["scores"], row["finished"], strict=True) for row in rows]
        return [[score if finished else min(score, 0.0) for score, finished in row] for row in ended]
    from guerdon.language.policy import Policy
    from guerdon.language.templates import render_all

    policy = Policy.load(judge, config.precision)
    if not hasattr(policy.model, "head"):
        raise ConfigError(f"{judge} is no reward model: it has no head that scores completions.")
    records = [Record(row["prompt"], row["completions"]) for row in rows]
    return policy.rewards(render_all(records, policy.tokenizer, max_length=sys.maxsize)[0], config.max_tokens)


def _merge(adapter: Path, into: Path) -> None:
    """The whole weights of a LoRA policy: a later stage has this policy as its reference, not the model below it."""
    from guerdon.language.models import load_model, save_model
    from guerdon.language.policy import HEAD

    model, tokenizer = load_model(str(adapter))
    save_model(model.merge_and_unload(), tokenizer, into)
    if (adapter / HEAD).is_file():
        shutil.copy(adapter / HEAD, into / HEAD)


def _check_keys(said: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key, value in said.items():
        if key not in keys:
            raise ConfigError(f"{where}: there is no key '{key}'.{near(str(key), keys)} Keys: {', '.join(keys)}.")
        if key in ("options", "training") and not isinstance(value, dict):
            raise ConfigError(f"{where}: '{key}' has to be a mapping of option names to values.")


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Whatever the user can mend is told with the place where it stands."""
    try:
        yield
    except GuerdonError as error:
        raise type(error)(f"{where}: {error}") from error
