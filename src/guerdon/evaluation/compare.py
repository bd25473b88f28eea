"""Several methods, several seeds, the same start, data and stated budget: which did it best, and how sure that is.

The last policy of every run is judged, never the best of its checkpoints. "Cannot be told apart" is an answer, and
comes with what would be needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from guerdon.errors import ConfigError, DataError
from guerdon.evaluation.comparison import BASE, Comparison, Row, as_dict, judge
from guerdon.evaluation.metrics import load_evaluations
from guerdon.evaluation.trials import EVALUATION, Launch, Progress, Trial, guerdon_command, locked, run_trials
from guerdon.evaluation.wording import tables, verdict
from guerdon.feedback.readers import Feedback
from guerdon.fields import checked
from guerdon.methods.base import LanguageMethod, check_options, get_method
from guerdon.training.config import FULL_PROMPT, ControlTraining, LanguageTraining, PromptTraining, Training
from guerdon.training.rundir import RunDir

__all__ = ["Comparison", "as_dict", "compare", "load_comparison", "tables"]

BUDGETS = {"updates": "max_updates", "samples": "max_samples"}  # unit -> field of `Training`
RANDOM = "random"  # what `guerdon evaluate` calls the control policy that draws its actions blindly
TOKENS, SAMPLES = "progress/tokens", "progress/samples"  # metrics of a run: both counted from its start


def compare(
    methods: Sequence[str | Mapping[str, Any]],
    *,
    training: Mapping[str, Any],
    seeds: int,
    budget: Mapping[str, int],
    out: str | Path,
    jobs: int = 1,
    check: Callable[[dict[str, Any]], None] = lambda settings: None,
    launch: Launch = guerdon_command,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Train every method with every seed, evaluate, and judge.

    Calling it again with the same settings goes on where it stopped: finished trials are kept, interrupted and failed
    ones resumed. More seeds or more methods may be asked for then; nothing else may differ.

    Args:
        methods: names, or mappings with `name` and, where wanted, `options` (fields of the method) and `label`.
        training: fields of the methods' `training` but `out`, seeds and those of the budget; the same for all.
        seeds: how many; they are 0, 1, ...
        budget: what each trial may spend: `updates`, `samples`, or both. Empty lets each method run to its own end.
        out: directory of the comparison.
        jobs: trials at once; each gets its share of cores and GPUs.
        check: raises where the settings cannot work, before anything is written or started; see `check_sources`.
        launch: the command of a trial's stage.
        command: how to make this comparison again, as typed, for the report.
        say: is told one line about each start and end of a stage.

    Raises:
        ConfigError: unknown or contradictory names and options, other settings than the directory's, a busy directory.
        KeyboardInterrupt: after the trials at work were stopped; its message says how to go on.
    """
    settings = _settings(methods, training, seeds, budget)
    if jobs < 1:
        raise ConfigError(f"compare: jobs has to be at least 1, not {jobs}.")
    check(settings)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another --out.") from error
    with locked(out) as lock:
        looks = _remember(out, settings, command)
        trials = _trials(settings, out, looks)
        try:
            run_trials(trials, launch=launch, jobs=jobs, lock=lock, say=say)
        except KeyboardInterrupt:
            done = sum(Progress.of(trial.directory).state == "done" for trial in trials)
            raise KeyboardInterrupt(
                f"stopped with {done} of {len(trials)} trials finished. The same command goes on from here; "
                f"`guerdon report {out}` shows what there is."
            ) from None
    return load_comparison(out)


def load_comparison(directory: str | Path) -> Comparison:
    """Read and judge what a comparison has brought so far.

    Raises:
        ConfigError: there is no comparison there.
        DataError: trials that were evaluated on different items or by different metrics.
    """
    directory = Path(directory)
    said = _read(directory)
    if said is None:
        raise ConfigError(f"{directory} holds no comparison: there is no {directory / 'comparison.json'}.")
    settings = said["settings"]
    rows = {BASE: Row(BASE, None, {})}
    rows |= {m["label"]: Row(m["label"], m["name"], m["options"]) for m in settings["methods"]}
    for trial in _trials(settings, directory, said["looks"]):
        _add_trial(rows[trial.label], trial)
    primary, pairs = judge(list(rows.values()))
    # pairs go from better to worse, so that their labels come best first
    order = list(dict.fromkeys([label for pair in pairs for label in pair] + list(rows)))
    ranked = sorted(rows.values(), key=lambda row: (row.method is not None, not row.seeds, order.index(row.label)))
    comparison = Comparison(directory, settings, said["command"], said["looks"], primary, ranked, pairs)
    comparison.verdict = verdict(comparison)
    return comparison


def _settings(
    methods: Sequence[str | Mapping[str, Any]], training: Mapping[str, Any], seeds: int, budget: Mapping[str, int]
) -> dict[str, Any]:
    if not methods:
        raise ConfigError("compare: name at least one method; `guerdon methods` lists them.")
    if seeds < 1:
        raise ConfigError(f"compare: seeds has to be at least 1, not {seeds}.")
    rows: dict[str, dict[str, Any]] = {}
    for said in methods:
        entry: dict[str, Any] = {"name": said} if isinstance(said, str) else dict(said)
        if unknown := set(entry) - {"name", "options", "label"}:
            raise ConfigError(f"compare: a method has name, options and label, not '{unknown.pop()}'.")
        cls, label = get_method(entry["name"]), str(entry.get("label") or entry["name"])
        options = checked(cls, entry.get("options") or {}, f"compare: options of {label}")
        if _folder(label) in map(_folder, [*rows, BASE]):
            raise ConfigError(f"compare: two rows would be called '{label}'; give each method a label of its own.")
        rows[label] = {"label": label, "name": entry["name"], "options": options}
    spent = {}
    for unit, amount in budget.items():
        if unit not in BUDGETS:
            raise ConfigError(f"compare: no budget is counted in '{unit}'. It is {' or '.join(BUDGETS)}.")
        if amount < 1:
            raise ConfigError(f"compare: the budget has to be at least 1 of {unit}, not {amount}.")
        spent[unit] = int(amount)
    for name in ("out", "seed", "seeds", *BUDGETS.values()):
        if name in training:
            raise ConfigError(f"compare: '{name}' is set for each trial by the comparison; take it out of `training`.")
    kind = training_of([row["name"] for row in rows.values()])
    fields = checked(kind, {"out": "", **training}, "compare", required=True)
    del fields["out"]
    config = kind(**{**fields, **{BUDGETS[unit]: amount for unit, amount in spent.items()}})
    for row in rows.values():
        check_options(get_method(row["name"])(**row["options"]), config)
    judged_by = ("task", "env", "holdout", "eval_data")
    if isinstance(config, LanguageTraining) and not any(getattr(config, name) for name in judged_by):
        raise ConfigError("compare: nothing is held out to judge by: raise holdout or give eval_data.")
    settings = {"methods": list(rows.values()), "training": fields, "seeds": seeds, "budget": spent}
    for name in ("data", "eval_data"):
        if fields.get(name) and Path(fields[name]).is_file():
            with open(fields[name], "rb") as file:
                settings[f"{name}_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return json.loads(json.dumps(settings))


def training_of(names: Sequence[str]) -> type[Training]:
    """The options of the runner that all these methods share; `ConfigError` where they improve unlike policies."""
    kinds = {get_method(name).policy: name for name in names}
    if len(kinds) > 1:
        said = " and ".join(f"{name} a {kind} policy" for kind, name in kinds.items())
        raise ConfigError(f"compare: {said}: only methods for one kind of policy can be compared.")
    return get_method(names[0]).training


def check_sources(settings: dict[str, Any]) -> None:
    """Read the data or the task of a comparison and find its model, so that what is wrong with them is told once.

    Raises:
        ConfigError, DataError: what every trial would fail with.
    """
    methods = [get_method(m["name"])(**m["options"]) for m in settings["methods"]]
    config = methods[0].training(**settings["training"])
    if isinstance(config, ControlTraining):
        from guerdon.training.control import check_material

        return check_material(config, methods)
    if isinstance(config, PromptTraining):
        from guerdon.language.models import check_name
        from guerdon.training.prompting import material as labelled

        check_name(config.model)
        labelled(config)
        return None
    from guerdon.language.models import check_name
    from guerdon.training.language import material

    assert isinstance(config, LanguageTraining)

    def check(feedback: Feedback) -> None:
        for method in methods:
            if isinstance(method, LanguageMethod):
                method.check_feedback(feedback)

    check_name(config.model)
    _, train, held_out, _ = material(config, check)
    if not (train and (held_out or config.env)):
        raise DataError(f"{config.data}: there are too few different prompts to learn from some and judge by others.")


def _remember(out: Path, settings: dict[str, Any], command: str) -> list[dict[str, Any]]:
    """Write comparison.json, or check that what stands there differs by more seeds or methods alone.

    Returns:
        The looks that were taken before.
    """
    said = _read(out)
    looks: list[dict[str, Any]] = []
    if said is not None:
        old, looks = said["settings"], said["looks"]
        was, now = _flat(old), _flat(settings)
        labels = {m["label"] for m in old["methods"]}
        differing = [
            f"{'.'.join(key)} was {was.get(key)!r} and is {now.get(key)!r} now"
            for key in was | now
            if was.get(key) != now.get(key) and not (key[0] == "methods" and key[1] not in labels)
        ]
        if settings["seeds"] < old["seeds"]:
            differing.append(f"seeds was {old['seeds']} and is {settings['seeds']} now")
        if differing:
            raise ConfigError(
                f"{out} holds a comparison with other settings: {'; '.join(differing)}. "
                "Take those settings, or choose another --out. Only more seeds or methods can be added."
            )
        if (settings["seeds"], len(settings["methods"])) != (old["seeds"], len(labels)):
            looks = [*looks, {"seeds": old["seeds"], "methods": sorted(labels)}]
    content = {"settings": settings, "command": command, "looks": looks}
    draft = out / "comparison.json.tmp"
    draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(draft, out / "comparison.json")
    return looks


def _read(out: Path) -> dict[str, Any] | None:
    try:
        return json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out / 'comparison.json'} cannot be read: {error}") from error


def _flat(settings: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """Path -> value of every setting but the number of seeds; methods go by their labels."""
    flat: dict[tuple[str, ...], Any] = {}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, (*path, key))
        else:
            flat[path] = value

    walk({**settings, "methods": {m["label"]: m for m in settings["methods"]}}, ())
    del flat["seeds",]
    return flat


def _folder(label: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", label.lower()).strip(".-") or "method"


def _trials(settings: dict[str, Any], out: Path, looks: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """The untrained start, then seed by seed, so that what is there early can be compared early.

    A language policy has a trial of its own for each seed. The seeds of a control method are trained together; where
    more were asked for after a look, those are.
    """
    policy = get_method(settings["methods"][0]["name"]).policy
    control, model = policy == "control", settings["training"].get("model")
    start = RANDOM if control else f"{FULL_PROMPT}{model}" if policy == "prompt" else model

    def trial(label: str, method: str | None, options: dict[str, Any], seeds: range, budget: dict[str, int]) -> Trial:
        name = f"seed-{seeds[0]}" if len(seeds) == 1 else f"seeds-{seeds[0]}-{seeds[-1]}"
        directory = out / "trials" / _folder(label) / name
        several = {"seeds": len(seeds)} if control else {}
        training = {**settings["training"], **budget, "seed": seeds[0], **several, "out": str(directory)}
        return Trial(label, method, options, training, start)

    total = settings["seeds"]
    edges = sorted({look["seeds"] for look in looks} | {total}) if control else range(1, total + 1)
    blocks = [range(a, b) for a, b in pairwise([0, *edges])]
    budget = {BUDGETS[unit]: amount for unit, amount in settings["budget"].items()}
    return [trial(BASE, None, {}, range(1), {})] + [
        trial(m["label"], m["name"], m["options"], seeds, budget) for seeds in blocks for m in settings["methods"]
    ]


def _add_trial(row: Row, trial: Trial) -> None:
    progress, seeds = Progress.of(trial.directory), trial.seeds
    row.directories |= dict.fromkeys(seeds, trial.directory)
    if progress.state == "failed":
        row.failed |= dict.fromkeys(seeds, progress.error)
    elif progress.state == "waiting":
        row.waiting += seeds
    else:
        row.seeds += seeds
        row.evaluations += load_evaluations(trial.directory / EVALUATION).values()
        if trial.method is not None:
            last = {name: value for step in RunDir(trial.directory).metrics() for name, value in step.items()}
            each = {"wall": progress.wall / len(seeds), "cpu": progress.cpu / len(seeds)}
            counted = {"tokens": TOKENS, "samples": SAMPLES}
            each |= {name: float(last[key]) for name, key in counted.items() if last.get(key)}
            row.costs += [each | {"memory": float(progress.memory)}] * len(seeds)
