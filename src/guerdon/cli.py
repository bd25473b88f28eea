"""The command line: `guerdon COMMAND ...`, every command a dataclass whose fields are its flags.

Flags, recipes and method names are all checked before torch is imported, so that a slip is answered at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import tyro
from tyro.conf import Positional

from guerdon.errors import ConfigError, GuerdonError, near

if TYPE_CHECKING:
    from rich.console import Console

    from guerdon.fields import Option
    from guerdon.methods.base import Method
    from guerdon.recipes import Recipe
    from guerdon.training.config import Training


@dataclass
class Methods:
    """List the methods, or show one with its options."""

    name: Positional[str | None] = None  # a method, to see its description and options
    json: bool = False  # print JSON

    def run(self) -> None:
        from guerdon.methods.base import all_methods, get_method

        if self.name is not None:
            cls = get_method(self.name)
            _print_json(_card(cls, options=True)) if self.json else _show_method(cls)
        elif self.json:
            _print_json([_card(cls, options=False) for cls in all_methods().values()])
        else:
            _show_methods(all_methods())


@dataclass
class Inspect:
    """Say what feedback or logged transitions hold, what is odd in them, and which methods can learn from them."""

    data: Positional[str]  # file, saved dataset directory or hub id; minari:ID, .npz or .hdf5 for transitions
    model: str | None = None  # count lengths with this model's tokenizer; in words without it
    max_length: int = 2048  # tokens of a prompt with one completion, beyond which it would be cut
    split: str = "train"  # of a dataset that has several
    skip_bad: bool = False  # go on past rows that cannot be read; they are counted and listed
    limit: int | None = None  # read at most this many rows
    against: str | None = None  # feedback for tests, whose prompts should not be among these: overlaps are found
    json: bool = False  # print JSON

    def run(self) -> None:
        from guerdon.api import inspect

        found = inspect(self.data, **_without(self, "data", "json"))
        if self.json:
            _print_json(found)
        else:
            from guerdon.control.datasets import is_control_source

            if is_control_source(self.data):
                from guerdon.control.diagnostics import render
            else:
                from guerdon.feedback.inspect import render

            _console().print(render(found))
            print(f"methods that can learn from it: {', '.join(found['methods']) or 'none by itself'}")
            if found.get("methods_as_task"):
                print(f"and as prompts with answers, by --task and --verifier: {', '.join(found['methods_as_task'])}")


@dataclass
class Advise:
    """Say which methods fit feedback, logged transitions or an environment, and how to compare the most promising."""

    source: Positional[str]  # feedback or transitions as `inspect` takes them, a Gymnasium id, or reasoning-gym:NAME
    model: str = "smollm2-135m"  # that is to be trained, for the command
    env: str | None = None  # where policies are judged, of transitions that do not say it
    verifier: str | None = None  # of answers to prompts; without it one that fits the answers in the feedback
    json: bool = False  # print JSON

    def run(self) -> None:
        from guerdon.papers.advice import advise, render

        advice = advise(**_without(self, "json"))
        if self.json:
            _print_json(advice.as_dict())
        else:
            _console().print(render(advice), highlight=False)
            for command in advice.commands:
                print(f"\n{command}")


@dataclass
class Look:
    """Show records as the loss sees them: the rendered template, what is learned, what would be cut."""

    data: Positional[str]  # file, saved dataset directory or hub id
    model: str  # whose tokenizer and chat template render them
    records: int = 3  # how many, from the first on
    credit: bool = False  # show what each token earns by the implicit reward of the run that --model names
    max_length: int = 2048  # tokens of a prompt with one completion
    split: str = "train"  # of a dataset that has several
    skip_bad: bool = False  # go on past rows that cannot be read; they are counted and listed
    json: bool = False  # print JSON

    def run(self) -> None:
        from guerdon.api import look

        seen = look(self.data, **_without(self, "data", "json"))
        if self.json:
            _print_json(seen)
        else:
            from guerdon.language.look import render

            _console().print(render(seen))


@dataclass
class Collect:
    """Sample completions of a task's prompts, verify them, and write them as feedback."""

    task: str  # reasoning-gym:NAME?param=value, or a prompt file with a verifier
    model: str  # that answers: hub id, local directory, GGUF file, smollm2-135m, or tiny:...
    out: str  # .jsonl or .parquet file to write
    n: int = 8  # completions per prompt
    prompts: int = 100  # prompts, from the task's training share
    verifier: str | None = None  # for a prompt file: exact, regex, math, or python:module.function
    max_new_tokens: int = 256  # tokens a completion may have
    temperature: float = 1.0  # sampling temperature
    top_k: int = 0  # sample among the k likeliest tokens; 0 among all
    top_p: float = 1.0  # sample among the likeliest tokens that hold this probability
    sampler: str = "local"  # local, vllm, or the address of an OpenAI-compatible server
    seed: int = 0  # of the task and the samples
    json: bool = False  # print JSON

    def run(self) -> None:
        from guerdon.api import collect

        def progress(done: int, total: int) -> None:
            print(f"{done} of {total} prompts", file=sys.stderr)

        try:
            summary = collect(**_without(self, "json"), progress=progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted. The same command goes on with what was collected.") from None
        if self.json:
            _print_json(summary)
        else:
            count = f"{summary['completions']} completions of {summary['prompts']} prompts"
            print(f"{self.out}: {count}, mean reward {summary['reward']:.3f}")


@dataclass
class CollectEpisodes:
    """Act in an environment and write the episodes as a Minari dataset."""

    env: str  # Gymnasium id
    out: str  # minari:NAME-v0, or a directory
    policy: tuple[str, ...] = ("random",)  # random, run directories, or python:module.function; several share equally
    noise: tuple[float, ...] = (0.0,)  # chance of a random action at each step: one for all policies, or one for each
    episodes: int = 100  # of all policies together
    seed: int = 0  # of environments and actions
    json: bool = False  # print JSON

    def run(self) -> None:
        from guerdon.api import collect_episodes

        def progress(done: int, total: int) -> None:
            print(f"{done} of {total} episodes", file=sys.stderr)

        summary = collect_episodes(**_without(self, "json"), progress=progress)
        if self.json:
            _print_json(summary)
        else:
            count = f"{summary['steps']:,} steps in {summary['episodes']:,} episodes"
            print(f"{self.out}: {count}, mean return {summary['return']:.4g}")


@dataclass
class CollectTrajectories:
    """Act in an environment in words and keep the episodes, from which feedback of every kind can be made."""

    env: str  # text:KIND:NAME?param=value, for example text:bandit:bernoulli, text:textworld:coin, text:babyai:GoToObj
    out: str  # .jsonl file to which episodes are added
    policy: tuple[str, ...] = ("random",)  # random, scripted, python:module.function, or models; several take turns
    episodes: int = 100  # of all policies together
    n: int = 1  # episodes of each policy and task
    split: Literal["train", "valid", "test"] = "train"  # whose tasks
    noise: float = 0.0  # chance of a random action at each step; it is not learned
    thoughts: bool = False  # ask for a thought before each action
    feedback: tuple[str, ...] = ()  # write beside it: sft, sft-each, preference, step-preference, unpaired, scored
    max_new_tokens: int = 64  # tokens a reply may have
    temperature: float = 1.0  # sampling temperature
    top_k: int = 0  # sample among the k likeliest tokens; 0 among all
    top_p: float = 1.0  # sample among the likeliest tokens that hold this probability
    sampler: str = "local"  # local, vllm, or the address of an OpenAI-compatible server
    seed: int = 0  # of environments and replies
    json: bool = False  # print JSON

    def run(self) -> None:
        from guerdon.api import collect_trajectories

        def progress(done: int, total: int) -> None:
            print(f"{done} of {total} episodes", file=sys.stderr)

        try:
            summary = collect_trajectories(**_without(self, "json"), progress=progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted. The same command goes on with what was collected.") from None
        if self.json:
            _print_json(summary)
            return
        for name, found in summary["policies"].items():
            print(f"{name}: success {found['success']:.1%}, mean return {found['return']:.4g}")
        others = f" beside {summary['others']:,} that were there" * bool(summary["others"])
        print(f"{self.out}: {summary['episodes']:,} episodes{others}")
        for file, rows in summary["feedback"].items():
            print(f"{file}: {rows:,} rows")


@dataclass
class Trees:
    """What is searched."""

    env: str  # text:KIND:NAME?param=value, for example text:keys:, text:textworld:coin, text:reasoning:chain_sum
    out: str  # .jsonl file to which trees are added; NAME.KIND.jsonl beside it: step-preference, preference, sft
    policy: str = "random"  # who proposes: a model, an address of one (http://...), random, or python:module.function
    search: Literal["mcts"] = "mcts"  # Monte Carlo tree search
    trees: int = 100  # how many; each task of the split in turn
    split: Literal["train", "valid", "test"] = "train"  # whose tasks
    chosen: Literal["argmax", "path"] = "argmax"  # of a step's actions: the best one, or the one on the best way
    min_gap: float = 0.0  # step pairs whose values differ by no more are left out
    max_length: int = 2048  # tokens of a history with a step; the oldest turns of longer ones are left out
    thoughts: bool = False  # ask for a thought before each action
    max_new_tokens: int = 64  # tokens a reply may have
    temperature: float = 1.0  # sampling temperature
    top_k: int = 0  # sample among the k likeliest tokens; 0 among all
    top_p: float = 1.0  # sample among the likeliest tokens that hold this probability
    sampler: str = "local"  # local, vllm, or the address of an OpenAI-compatible server
    seed: int = 0  # of environments, replies and searches
    json: bool = False  # print JSON


def _collect(argv: list[str]) -> None:
    """Make feedback: sample and verify completions of a task (--task), or act in an environment (--env)."""
    acting = CollectTrajectories if _in_words(argv) else CollectEpisodes
    command = acting if "--env" in _typed(argv) else Collect
    if "--search" in _typed(argv):
        return _collect_trees(argv)
    _parse(command, argv, "collect", command.__doc__).run()


def _collect_trees(argv: list[str]) -> None:
    """Search the tasks of an environment in words, keep the trees, and write the preferences that they give."""
    from guerdon.fields import options
    from guerdon.methods.planning.mcts import MCTS

    search = _section(MCTS, options(MCTS), {})
    command = make_dataclass("CollectTrees", [("trees", Trees), ("search", search)])
    start = command(Trees(tyro.MISSING, tyro.MISSING), search())
    parsed = _parse(command, argv, "collect", _collect_trees.__doc__, start)
    from guerdon.api import collect_trees

    def progress(done: int, total: int) -> None:
        print(f"{done} of {total} trees", file=sys.stderr)

    trees: Trees = parsed.trees
    try:
        summary = collect_trees(**_without(trees, "search", "json"), how=MCTS(**vars(parsed.search)), progress=progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted. The same command goes on with what was collected.") from None
    if trees.json:
        _print_json(summary)
        return
    print(f"{trees.out}: {summary['trees']:,} trees, {summary['solved']:.1%} of them solved")
    for file, rows in summary["feedback"].items():
        print(f"{file}: {rows:,} rows")


@dataclass
class Resume:
    """Go on with an interrupted run, or a chain of them, exactly where it stopped."""

    run_directory: Positional[str]  # of `guerdon train`

    def run(self) -> None:
        from guerdon.api import resume
        from guerdon.training.progress import Terminal

        with _resumable(self.run_directory):
            resume(self.run_directory, progress=Terminal())
        print(self.run_directory)


@dataclass
class Judged:
    """What is judged."""

    policy: Positional[str]  # run, model as for `train --model`, `random` (with --env), or full-prompt:MODEL
    max_length: int = 2048  # with feedback: tokens of a prompt with one completion; longer ones are cut
    json: bool = False  # print JSON


@dataclass
class Solve:
    """Puzzles that are scrambled, and searches that solve them."""

    policy: Positional[str]  # run directory of davi or qstar, or gap, manhattan or misplaced, which are not learned
    env: str | None = None  # puzzle: cube3, puzzle15, lightsout7, pancake8, ...; with meta-actions cube3?meta=3
    search: tuple[Literal["q-star", "a-star", "deferred"], ...] = ()  # searches to compare; Q* where there is a Q
    instances: int = 10  # scrambled puzzles
    scramble: int = 0  # moves of each scramble; 0 is the puzzle's own number
    weight: float = 0.6  # of the path's cost: 1 is A* proper, 0 greedy
    batch: int = 100  # nodes, or edges, that leave the queue together
    max_nodes: int = 1_000_000  # give an instance up after so many generated nodes; 0 never does
    seed: int = 0  # of the scrambles
    index: int = 0  # which of the run's seeds, counted from 0
    json: bool = False  # print JSON

    def run(self) -> None:
        from guerdon.methods.planning.solving import solve, tables

        found = solve(self.policy, **_without(self, "policy", "json"))
        if self.json:
            _print_json(found)
        else:
            _console().print(*tables(found), sep="\n")


@dataclass
class Played:
    """What is played."""

    policy: Positional[Literal["random"]]  # what takes the actions beyond those that a search tries
    env: str  # Gymnasium id, puzzle:NAME, ALE/..., MiniGrid-...; its actions are discrete
    search: Literal["mcts"] = "mcts"  # Monte Carlo tree search
    instances: int = 10  # episodes
    steps: int = 1000  # of an episode, at most
    seed: int = 0  # of the first episode; the next one has the next seed
    json: bool = False  # print JSON


def _solve(argv: list[str]) -> None:
    """Solve scrambled puzzles by A* or Q* search, or play any environment by tree search (--search mcts)."""
    if "--search=mcts" in argv or ("--search", "mcts") in itertools.pairwise(argv):
        return _play(argv)
    _parse(Solve, argv, "solve", _solve.__doc__).run()


def _play(argv: list[str]) -> None:
    """Play episodes of an environment that can be brought back, with a tree search (UCT) before every action."""
    from guerdon.fields import check_range, options
    from guerdon.methods.planning.mcts import MCTS

    usual = {"iterations": 100, "max_depth": 50, "goal": math.inf, "unfinished": None}
    tried = _section(MCTS, [o for o in options(MCTS) if o.name != "candidates"], usual)
    command = make_dataclass("Play", [("played", Played), ("search", tried)])
    parsed = _parse(command, argv, "solve", _play.__doc__, command(Played(tyro.MISSING, tyro.MISSING), tried()))
    from guerdon.methods.planning.simulator import Simulator, play

    played, how = parsed.played, MCTS(**vars(parsed.search))
    check_range(vars(played), "instances", "steps", low=1)
    check_range(vars(played), "seed")
    episodes = []
    for seed in range(played.seed, played.seed + played.instances):
        with contextlib.closing(Simulator(played.env, seed)) as simulator:
            episode = play(simulator, how, steps=played.steps, seed=seed)
        episodes.append(episode)
        if not played.json:
            print(f"seed {seed}: return {episode.ret:g}, {len(episode.actions)} steps{', ended' * episode.terminated}")
    mean = sum(episode.ret for episode in episodes) / len(episodes)
    if played.json:
        _print_json({"env": played.env, "return": mean, "episodes": [episode._asdict() for episode in episodes]})
    else:
        print(f"mean return {mean:g}")


@dataclass
class Serve:
    """Serve a language policy behind an OpenAI-compatible address, until Ctrl-C."""

    policy: Positional[str]  # run directory, or any model that `train --model` takes
    name: str | None = None  # by which requests call it; the last part of the policy without it
    host: str = "127.0.0.1"  # where to listen; with another host everybody who can reach it may use the model
    port: int = 8000  # 0 takes one that is free
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the model's matmuls

    def run(self) -> None:
        from guerdon.api import serve

        serve(**vars(self), say=lambda line: print(line, flush=True))


@dataclass
class Report:
    """Write a comparison or a run as one self-contained HTML page."""

    directory: Positional[str]  # of `guerdon compare` or `guerdon train`
    out: str | None = None  # HTML file; report.html in the directory without it

    def run(self) -> None:
        from guerdon.api import write_report

        print(write_report(self.directory, out=self.out))


@dataclass
class Papers:
    """Find papers by words and tags: what they bring, what guerdon has of them, whether their claims held."""

    query: Positional[tuple[str, ...]] = ()  # words; or one id, to see its entry in full
    tag: tuple[str, ...] = ()  # only papers that have it; several: all of them
    tags: bool = False  # list the tags instead
    json: bool = False  # print JSON

    def run(self) -> None:
        from guerdon.papers import finding, showing

        query = " ".join(self.query)
        found = finding.search(query, tags=self.tag)
        if self.tags:
            from guerdon.papers import tags

            listed = [dataclasses.asdict(tag) for tag in tags().values()]
            _print_json(listed) if self.json else _console().print(showing.all_tags(found))
        elif self.json:
            _print_json([paper.as_dict() for paper in found])
        elif not found:
            print(f"No paper was found for '{query}'.{finding.nearest(query)} `guerdon papers --tags` lists the tags.")
        elif len(found) == 1:
            _console().print(showing.entry(found[0]), highlight=False)
        else:
            _console().print(showing.overview(found), highlight=False)


@dataclass
class Claims:
    """List what papers claim of their methods, and whether it held when it was tried."""

    json: bool = False  # print JSON

    def run(self) -> None:
        from guerdon.api import claims

        if self.json:
            _print_json(claims())
        else:
            from guerdon.claims.showing import overview

            _console().print(overview(claims()))


@dataclass
class Reproduce:
    """Try the claims of papers: train all arms, judge them, and say whether the claims hold."""

    papers: Positional[tuple[str, ...]]  # ids, as `guerdon claims` lists them
    quick: bool = False  # small versions, which show that everything runs and prove nothing
    seeds: int | None = None  # of each claim; its own number without it
    jobs: int = 1  # trials at the same time
    ray: bool = False  # run the trials as Ray tasks, on the cluster of RAY_ADDRESS or on this machine
    out: str = "reproduction"  # directory; the same command goes on with what stands in it
    json: bool = False  # print JSON

    def run(self) -> None:
        from guerdon.api import reproduce
        from guerdon.claims.showing import tables

        try:
            results = reproduce(**_without(self, "json"), say=lambda line: print(line, file=sys.stderr))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted. The same command goes on with the trials that finished.") from None
        if self.json:
            _print_json(results)
        for result in [] if self.json else results:
            _console().print(*tables(result), sep="\n")
            for sentence in result["sentences"]:
                _console().print(sentence, markup=False, highlight=False)


@dataclass
class Export:
    """Write the data and the configuration of a run, or of a comparison's winner, for another trainer."""

    source: Positional[str]  # directory of `guerdon train` or `guerdon compare`
    to: Literal["trl"] = "trl"  # the trainer
    out: str = "export"  # directory to write

    def run(self) -> None:
        from guerdon.exporting import export

        print(export(self.source, to=self.to, out=self.out))


@dataclass
class Plugins:
    """What every command takes."""

    plugin: tuple[str, ...] = ()  # Python file that registers methods; may be given more than once


@dataclass
class Files(Plugins):
    """Beside the flags."""

    recipe: str | None = None  # YAML file with the keys method (or stages), options and training; flags override it


@dataclass
class Trials:
    """What a comparison runs."""

    methods: Positional[tuple[str, ...]]  # names, or recipes (.yaml) where a method has other options than its own
    seeds: int = 3  # trials of each method
    budget_updates: int = 0  # updates that each trial may make; 0 lets each method run to its own end
    budget_samples: int = 0  # with a task or an environment: samples or steps that each trial may take; 0 as above
    jobs: int = 1  # trials at the same time
    out: str = "comparison"  # directory; the same command goes on with what stands in it
    json: bool = False  # print JSON


def _train(argv: list[str]) -> None:
    """Improve a policy with one method."""
    argv, paths = _take(argv, "--recipe")
    if paths and _has_stages(paths[-1]):
        return _train_chain(paths[-1], argv)
    recipe = _read(paths[-1]) if paths else None
    name, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    if recipe is not None and name not in (None, recipe.method):
        raise ConfigError(f"recipe {paths[-1]} is for {recipe.method}, not {name}.")
    name = recipe.method if recipe is not None else name
    if name is None:
        if not {"-h", "--help"} & set(argv):
            raise ConfigError("train needs a method: `guerdon train NAME ...`. `guerdon methods` lists them.")
        about = "Improve a policy with one method. `guerdon train METHOD --help` shows its options, too."
        from guerdon.training.config import LanguageTraining

        sections = [("training", _training_section(LanguageTraining)), ("files", Files)]
        _parse(make_dataclass("Train", sections), argv, "train METHOD", about)
    from guerdon.methods.base import get_method

    method, training = _flags(get_method(str(name)), recipe, argv)
    from guerdon.api import train
    from guerdon.training.progress import Terminal

    with _resumable(training["out"]):
        train(method, progress=Terminal(), **training)
    print(training["out"])


def _train_chain(path: str, argv: list[str]) -> None:
    """Improve a policy with the stages of a recipe, one after the other; flags override it in every stage."""
    if argv and not argv[0].startswith("-"):
        raise ConfigError(f"recipe {path} has stages with methods of their own, so that '{argv[0]}' cannot be one.")
    from guerdon.chains import read_chain
    from guerdon.training.config import LanguageTraining

    training = _training_section(LanguageTraining, said={"model": "", **read_chain(path)["training"]})
    command = make_dataclass("Train", [("training", training), ("files", Files)])
    parsed = _parse(command, argv, "train", _train_chain.__doc__, command(training(), Files()))
    from guerdon.api import train_chain
    from guerdon.training.progress import Terminal

    with _resumable(parsed.training.out):
        train_chain(path, progress=Terminal(), **_said(parsed.training, argv))
    print(parsed.training.out)


def _flags(cls: type[Method], recipe: Recipe | None, argv: list[str]) -> tuple[Method, dict[str, Any]]:
    """Method and runner options from a recipe, with the flags over it."""
    from guerdon.fields import options

    names = {f.name for f in dataclasses.fields(cls.training)}
    if clash := [o.name for o in options(cls) if o.name in names]:
        raise ConfigError(
            f"{cls.name}: its option '{clash[0]}' is also one of the runner's; call the method's otherwise."
        )
    said = recipe.options if recipe else {}
    shared = ("guerdon.methods.base", "guerdon.methods.control", "guerdon.methods.prompting.base")
    own = _section(cls, [o for o in options(cls) if o.owner.__module__ not in shared], said)
    loop = _section(cls, [o for o in options(cls) if o.owner.__module__ in shared], said)
    training = _training_section(cls.training, said=recipe.training if recipe else {})
    command = make_dataclass("Train", [("method", own), ("loop", loop), ("training", training), ("files", Files)])
    parsed = _parse(command, argv, f"train {cls.name}", _gist(cls), command(own(), loop(), training(), Files()))
    return cls(**vars(parsed.method), **vars(parsed.loop)), vars(parsed.training)


def _section(cls: type, chosen: list[Option], said: Mapping[str, Any]) -> type:
    """A dataclass of some fields of another one, with their comments as help and `said` as defaults."""
    kinds = get_type_hints(cls)
    values = {o.name: tyro.MISSING if o.default is dataclasses.MISSING else o.default for o in chosen} | dict(said)
    fields = [
        (o.name, Annotated[kinds[o.name], tyro.conf.arg(help=o.help)], dataclasses.field(default=values[o.name]))
        for o in chosen
    ]
    return make_dataclass(cls.__name__, fields, kw_only=True, namespace={"__doc__": ""})


def _training_section(cls: type[Training], *without: str, said: Mapping[str, Any] = MappingProxyType({})) -> type:
    from guerdon.fields import options

    return _section(cls, [o for o in options(cls) if o.name not in without], said)


def _evaluate(argv: list[str]) -> None:
    """Measure a run's policy, or any model, on held-out items; a control policy in episodes of its environment."""
    training = _training_section(_training_of_policy(argv), "model")
    command = make_dataclass("Evaluate", [("judged", Judged), ("training", training), ("plugins", Plugins)])
    start = command(Judged(tyro.MISSING), training(), Plugins())
    parsed = _parse(command, argv, "evaluate", _evaluate.__doc__, start)
    from guerdon.api import evaluate

    # A run knows its own data, task and seed: only what was typed departs from them.
    said = _said(parsed.training, argv)
    found = evaluate(parsed.judged.policy, **_without(parsed.judged, "policy", "json"), **said)
    means = [evaluation.means() for evaluation in found.values()]
    mean = {name: sum(each[name] for each in means) / len(means) for name in means[0]}
    seeds = {"seeds": {str(seed): each for seed, each in zip(found, means, strict=True)}} if len(means) > 1 else {}
    _print_json(mean | seeds) if parsed.judged.json else _show_metrics(mean)


def _training_of_policy(argv: list[str]) -> type[Training]:
    """The options of the runner that go with the policy to be judged."""
    from guerdon.methods.base import get_method
    from guerdon.training.config import FULL_PROMPT, ControlTraining, LanguageTraining, PromptTraining
    from guerdon.training.rundir import RunDir

    if run := next(filter(RunDir.is_at, argv), None):
        return get_method(RunDir(run).config["method"]).training
    if any(word.startswith(FULL_PROMPT) for word in argv):
        return PromptTraining
    if _in_words(argv):
        return LanguageTraining
    return ControlTraining if "random" in argv or "--env" in _typed(argv) else LanguageTraining


def _in_words(argv: list[str]) -> bool:
    """Whether an environment in words is named."""
    return any(word.removeprefix("--env=").startswith("text:") for word in argv)


def _compare(argv: list[str]) -> int:
    """Train several methods on the same data with the same budget and seeds, and say what can be told apart."""
    from guerdon.evaluation.compare import training_of
    from guerdon.training.config import LanguageTraining

    named = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    names = [_recipe_method(m)["name"] if m.endswith((".yaml", ".yml")) else m for m in named]
    options_of = training_of(names) if names else LanguageTraining
    training = _training_section(options_of, "out", "seed", "seeds", "max_updates", "max_samples")
    command = make_dataclass("Compare", [("trials", Trials), ("training", training), ("plugins", Plugins)])
    parsed = _parse(command, argv, "compare", _compare.__doc__, command(Trials(tyro.MISSING), training(), Plugins()))
    trials: Trials = parsed.trials
    methods = [_recipe_method(m) if m.endswith((".yaml", ".yml")) else m for m in trials.methods]
    from guerdon.api import compare
    from guerdon.evaluation.comparison import as_dict
    from guerdon.evaluation.wording import tables

    found = compare(
        methods,
        seeds=trials.seeds,
        budget={unit: n for unit, n in (("updates", trials.budget_updates), ("samples", trials.budget_samples)) if n},
        jobs=trials.jobs,
        out=trials.out,
        command=shlex.join(["guerdon", "compare", *argv]),
        say=lambda line: print(line, file=sys.stderr),
        **vars(parsed.training),
    )
    if trials.json:
        _print_json(as_dict(found))
    else:
        console = _console()
        console.print(*tables(found), sep="\n")
        for sentence in found.verdict:
            console.print(sentence, markup=False, highlight=False)
    return int(any(row.failed for row in found.rows))


def _recipe_method(path: str) -> dict[str, Any]:
    recipe = _read(path)
    if recipe.training:
        names = ", ".join(recipe.training)
        raise ConfigError(f"recipe {path} sets {names}: in a comparison give them as flags, the same for all.")
    return {"name": recipe.method, "options": recipe.options, "label": Path(path).stem}


def _has_stages(path: str) -> bool:
    from guerdon.recipes import read_mapping

    return "stages" in read_mapping(path)


def _read(path: str) -> Recipe:
    from guerdon.recipes import read_recipe

    return read_recipe(path)


LIBRARIES = r"(accelerate|datasets|huggingface_hub|peft|safetensors|tokenizers|torch|transformers)(\.|$)"

COMMANDS: dict[str, type | Callable[[list[str]], int | None]] = {
    "methods": Methods,
    "inspect": Inspect,
    "advise": Advise,
    "look": Look,
    "collect": _collect,
    "train": _train,
    "resume": Resume,
    "evaluate": _evaluate,
    "compare": _compare,
    "solve": _solve,
    "serve": Serve,
    "report": Report,
    "papers": Papers,
    "claims": Claims,
    "reproduce": Reproduce,
    "export": Export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 where a trial failed, 2 for what the user can mend, 130 after Ctrl-C."""
    _quiet()
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except GuerdonError as error:
        print(f"guerdon: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"guerdon: {str(stop) or 'interrupted.'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains on its way out
        return 1


def _quiet() -> None:
    """Keep what libraries say of themselves out of the terminal, errors aside; who has set their variables is heard."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        for kind in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=kind, module=LIBRARIES)


def _dispatch(argv: list[str]) -> int:
    argv, plugins = _take(argv, "--plugin")
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        from guerdon import __version__

        print(f"guerdon {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise ConfigError(f"there is no command '{name}'.{near(name, COMMANDS)} `guerdon --help` lists them all.")
    for plugin in plugins:
        from guerdon.plugins import add_plugin

        add_plugin(plugin)
    command = COMMANDS[name]
    if isinstance(command, type):
        _parse(command, rest, name, command.__doc__).run()
        return 0
    return command(rest) or 0


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {_gist(command)}" for name, command in COMMANDS.items())
    return (
        "guerdon: any feedback becomes a better policy, and the methods that do it are compared fairly.\n\n"
        f"usage: guerdon COMMAND ...\n\n{lines}\n\n"
        "`guerdon COMMAND --help` shows a command's flags, `guerdon train METHOD --help` a method's options.\n"
        "`--plugin FILE.py` before or after any command registers methods of your own."
    )


def _parse(command: type, argv: list[str], name: str, about: str | None, start: Any = None) -> Any:
    """Fill a dataclass from flags; what is required and what is a default can be changed by an instance, `start`."""
    flags = {"--help", *_flag_names(command)}
    for flag in (name.replace("_", "-") for name in _typed(argv)):
        if flag.replace("--no-", "--") not in flags:
            help_ = f"`guerdon {name} --help` shows them all."
            raise ConfigError(f"{name} has no flag '{flag}'.{near(flag, flags)} {help_}")
    return tyro.cli(
        command,
        prog=f"guerdon {name}",
        description=about,
        args=argv,
        default=tyro.MISSING_NONPROP if start is None else start,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.DisallowNone,
            *([tyro.conf.FlagCreatePairsOff] if start is None else []),
        ),
    )


def _typed(argv: list[str]) -> list[str]:
    """The flags in `argv`, with underscores."""
    return [word.split("=")[0].replace("-", "_").replace("__", "--", 1) for word in argv if word.startswith("--")]


def _said(section: Any, argv: list[str]) -> dict[str, Any]:
    """Those fields of a parsed section whose flags were typed."""
    typed = _typed(argv)
    return {k: v for k, v in vars(section).items() if f"--{k}" in typed or f"--no_{k}" in typed}


def _flag_names(command: type[Any]) -> Iterator[str]:
    for field in dataclasses.fields(command):
        if dataclasses.is_dataclass(field.type) and isinstance(field.type, type):
            yield from _flag_names(field.type)
        else:
            yield "--" + field.name.replace("_", "-")


def _take(argv: list[str], flag: str) -> tuple[list[str], list[str]]:
    """`argv` without each `flag VALUE` or `flag=VALUE`, and the values."""
    rest, values = [], []
    words = iter(argv)
    for word in words:
        if word == flag:
            value = next(words, None)
            if value is None:
                raise ConfigError(f"{flag} needs a file.")
            values.append(value)
        elif word.startswith(f"{flag}="):
            values.append(word.removeprefix(f"{flag}="))
        else:
            rest.append(word)
    return rest, values


def _without(command: Any, *names: str) -> dict[str, Any]:
    return {f.name: getattr(command, f.name) for f in dataclasses.fields(command) if f.name not in names}


@contextlib.contextmanager
def _resumable(directory: str) -> Iterator[None]:
    """Ctrl-C leaves with the command that goes on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        begun = any((Path(directory) / name).exists() for name in ("config.json", "chain.json"))
        again = f"`guerdon resume {directory}` goes on from the last checkpoint." if begun else "Nothing had begun."
        raise KeyboardInterrupt(str(stop) or f"interrupted. {again}") from None


def _gist(documented: Any) -> str:
    return documented.__doc__.strip().splitlines()[0]


def _card(cls: type[Method], options: bool) -> dict[str, Any]:
    from guerdon.fields import options as options_of

    card: dict[str, Any] = {
        "name": cls.name,
        "papers": list(cls.papers),
        "learns_from": cls.learns_from,
        "policy": cls.policy,
        "gist": _gist(cls),
    }
    if options:
        card["options"] = [
            {"name": o.name, "type": o.kind, "default": o.default, "help": o.help} for o in options_of(cls)
        ]
    return card


def _show_methods(methods: dict[str, type[Method]]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("method", "learns from", "paper", "what it does"):
        table.add_column(column, overflow="fold", no_wrap=column in ("method", "learns from"))
    for name, cls in methods.items():
        table.add_row(name, cls.learns_from, ", ".join(map(str, cls.papers)), _gist(cls))
    _console().print(table)


def _show_method(cls: type[Method]) -> None:
    import inspect

    from rich.table import Table

    from guerdon.fields import options

    console = _console()
    print(f"{cls.name}: {inspect.getdoc(cls)}\n")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("option", "default", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "option")
    owner: type = cls
    for option in options(cls):
        if option.owner != owner:
            table.add_section()
            owner = option.owner
        table.add_row(option.name, str(option.default), option.help)
    console.print(table, markup=False)


def _show_metrics(metrics: dict[str, float]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    _console().print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _console() -> Console:
    from rich.console import Console

    return Console()
