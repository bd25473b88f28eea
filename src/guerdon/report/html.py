"""One self-contained HTML page about a comparison or a run: the verdict first, then what it rests on.

The page asks the network for nothing and runs no script. Whatever a model or a user wrote is text in it, never markup.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from pprint import pformat
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from guerdon import __version__
from guerdon.errors import ConfigError, GuerdonError
from guerdon.evaluation.compare import Comparison, load_comparison
from guerdon.evaluation.comparison import Row
from guerdon.evaluation.metrics import Evaluation, aligned, kind_of, load_evaluations
from guerdon.evaluation.statistics import Interval, score_interval
from guerdon.evaluation.trials import EVALUATION
from guerdon.evaluation.wording import cost_texts, interval_text, number_text, shared_metrics
from guerdon.report.plots import COLOURS, Band, IntervalPlot, line_chart
from guerdon.training.rundir import RunDir

PROMPTS = 6  # shown side by side
COMPLETIONS = 4  # of each prompt
START = "untrained start"

# What a curve shows, for those that need a word.
CURVES = {
    "loss/total": "the loss that is minimised",
    "reward/mean": "mean reward of the sampled completions",
    "reward/std": "spread of the rewards; near zero there is nothing left to learn from",
    "reward/chosen": "implicit reward of the better answer",
    "reward/rejected": "implicit reward of the worse answer",
    "preference/accuracy": "share of training pairs in the right order",
    "preference/margin": "reward of the better minus that of the worse answer",
    "policy/kl": "distance from the start, in nats",
    "policy/entropy": "how undecided the policy is, in nats per token",
    "policy/clip_share": "share of tokens whose ratio is clipped",
    "policy/ratio": "new over old probability; 1 where they agree",
    "policy/informative_share": "share of prompts whose answers differ in reward",
    "policy/repetition": "share of repeated 4-grams",
    "policy/logp_chosen": "log-prob of the better answer",
    "policy/logp_rejected": "log-prob of the worse answer",
    "length/mean": "tokens per completion",
    "length/truncated_share": "share of completions cut at the limit",
    "optim/grad_norm": "gradient norm before clipping",
    "search/best": "best fitness on the items of the search, which is no result",
    "search/best_accuracy": "accuracy of that prompt on the items of the search, which is no result",
    "search/mean": "mean fitness of the prompts at hand",
    "search/length": "mean tokens of the prompts at hand",
    "search/distinct": "different prompts tried",
}
GROUPS = (
    ("Learning", ("eval/", "episode/", "reward/", "preference/", "loss/", "search/"), True),
    ("Health", ("policy/", "length/", "value/"), True),
    ("Optimiser", ("optim/",), False),
)


@dataclass
class _Trained:
    """The finished and unfinished runs of one row, for curves and samples."""

    label: str
    colour: int
    metrics: list[list[dict[str, Any]]] = field(default_factory=list)  # one list of rows per seed
    samples: list[dict[str, Any]] = field(default_factory=list)  # of the first seed that has any

    def add(self, directory: Path) -> None:
        run = RunDir(directory)
        if run.metrics():
            self.metrics += [run.metrics(seed) for seed in range(run.config["training"].get("seeds", 1))]
        if not self.samples:
            self.samples = _samples(directory / "samples.jsonl")


def write_report(directory: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a comparison's or a run's directory, `report.html` in it unless `out` says otherwise.

    Raises:
        ConfigError: the directory holds neither, or the page cannot be written.
        DataError: evaluations that cannot be read or compared.
    """
    directory = Path(directory)
    if (directory / "comparison.json").exists():
        page = _comparison_page(load_comparison(directory))
    elif (directory / "config.json").exists():
        page = _run_page(RunDir.open(directory))
    else:
        raise ConfigError(
            f"{directory} holds no run and no comparison: give the --out of `guerdon train` or `compare`."
        )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = datetime.now().astimezone().isoformat(" ", "seconds")
    html = environment.get_template("page.html").render(**page, version=__version__, made=made)
    target = Path(out) if out is not None else directory / "report.html"
    draft = target.with_name(target.name + ".tmp")
    try:
        draft.write_text(html, encoding="utf-8", errors="replace")
        os.replace(draft, target)
    except OSError as error:
        raise ConfigError(f"the report {target} cannot be written: {error.strerror}.") from error
    return target


def _comparison_page(c: Comparison) -> dict[str, Any]:
    settings = c.settings
    colours = {m["label"]: i % COLOURS for i, m in enumerate(settings["methods"])}
    trained = []
    for row in sorted((r for r in c.rows if r.method is not None), key=lambda r: list(colours).index(r.label)):
        trained.append(_Trained(row.label, colours[row.label]))
        for directory in dict.fromkeys(row.directories.values()):
            trained[-1].add(directory)
    start = {f"eval/{name}": interval.value for name, interval in c.rows[0].metrics.items()}
    names = list(colours)
    training = settings["training"]
    items = max((row.scores.shape[1] for row in c.rows if row.seeds), default=0)
    return {
        "title": f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0],
        "subtitle": "a comparison",
        "verdict": c.verdict,
        "chips": [
            *_chips(training, settings["budget"]),
            ("seeds", str(settings["seeds"])),
            ("held-out items", f"{items:,}"),
        ],
        "metrics": [],
        "results": _results(c, colours),
        "pairs": _pairs(c),
        "costs": [
            {"label": row.label, "colour": colours[row.label], "values": cost_texts(row.cost)} for row in c.methods
        ],
        "groups": _chart_groups(trained, start),
        "legend": [{"label": t.label, "colour": t.colour} for t in trained],
        "band": any(len(t.metrics) > 1 for t in trained),
        "samples": _side_by_side(trained),
        "films": [film for row in c.methods for film in _films(row.label, next(iter(row.directories.values())))],
        "failures": [
            {"label": START if row.method is None else row.label, "seed": seed, "error": error}
            for row in c.rows
            for seed, error in row.failed.items()
        ],
        "facts": _facts(c.directory, settings, [d for row in c.rows for d in dict.fromkeys(row.directories.values())]),
        "reproduce": c.command or _python_call(c),
    }


def _run_page(run: RunDir) -> dict[str, Any]:
    config, status, rows = run.config, run.status, run.metrics()
    shown = _Trained(config["method"], 0)
    shown.add(run.path)
    evaluations = list(load_evaluations(run.path / EVALUATION).values()) if (run.path / EVALUATION).exists() else []
    steps = rows[-1]["step"] if rows else 0
    states = {"done": "finished", "failed": "failed", "stopped": "was stopped", "killed": "was killed"}
    training = config["training"]
    unit = "environment steps" if training.get("env") and not training["data"] else "updates"
    verdict = [f"{config['method']} {states.get(status['state'], 'is under way')} after {steps:,} {unit}."]
    metrics: dict[str, Interval] = {}
    if evaluations:
        first = evaluations[0]
        for name in first.metrics:
            values = aligned(evaluations, name)[0]
            if values.size:
                metrics[name] = score_interval(values, span=kind_of(name).span)
        label, items = kind_of(first.primary).label, f"{len(first.items):,} held-out items"
        if len(evaluations) == 1:
            of, covers = (
                "Its policy reaches",
                "One run is no result about the method: the interval covers the choice of items only.",
            )
        else:
            of, covers = f"The policies of its {len(evaluations)} seeds reach", "The interval covers seeds and items."
        verdict.append(f"{of} {label} {interval_text(metrics[first.primary])} on {items}. {covers}")
    else:
        verdict.append("It has not been evaluated: `guerdon evaluate` does that.")
    error = status.get("error")
    first_seed, seeds = training.get("seed", 0), training.get("seeds", 1)
    seed = ("seeds", f"{first_seed} to {first_seed + seeds - 1}") if seeds > 1 else ("seed", str(first_seed))
    return {
        "title": config["method"],
        "subtitle": "a run",
        "verdict": verdict,
        "chips": [*_chips(training, {}), seed],
        "results": None,
        "metrics": [(kind_of(name).label, interval_text(interval)) for name, interval in metrics.items()],
        "pairs": None,
        "costs": [],
        "groups": _chart_groups([shown], {}),
        "legend": [],
        "band": False,
        "samples": _over_time(shown),
        "films": _films(config["method"], run.path),
        "failures": [{"label": config["method"], "seed": first_seed, "error": error}] if error else [],
        "facts": _facts(run.path, config, [run.path]),
        "reproduce": _python_train(config),
    }


# Tables ---------------------------------------------------------------------------------------------------------------


def _results(c: Comparison, colours: Mapping[str, int]) -> dict[str, Any] | None:
    scored = [row for row in c.rows if row.seeds]
    if not scored:
        return None
    primary, sign = c.primary, c.kind.better or 1
    others = [name for name in shared_metrics(c) if name != primary]
    ordered = sorted(scored, key=lambda row: -sign * row.metrics[primary].value)
    seeds = {row.label: row.scores.mean(1).tolist() for row in scored}
    start = c.rows[0].metrics.get(primary)
    plot = IntervalPlot(
        [row.metrics[primary] for row in scored],
        [value for values in seeds.values() for value in values],
        reference=start.value if start else None,
    )
    best = c.methods[0].label if c.methods else ""

    def line(row: Row) -> dict[str, Any]:
        gap = c.pairs.get((best, row.label))
        return {
            "label": START if row.method is None else row.label,
            "colour": colours.get(row.label),
            "seeds": f"{len(row.seeds)} of {len(row.seeds) + len(row.failed)}" if row.failed else str(len(row.seeds)),
            "score": interval_text(row.metrics[primary]),
            "iqm": number_text(row.iqm.value) if row.iqm else "",
            "plot": plot.row(
                row.metrics[primary], colours.get(row.label), seeds[row.label] if len(row.seeds) > 1 else ()
            ),
            "gap": "" if gap is None else interval_text(gap.difference),
            "open": gap is not None and not gap.distinguishable,
            "others": [number_text(row.metrics[name].value) if name in row.metrics else "" for name in others],
        }

    return {
        "metric": c.kind.label,
        "others": [kind_of(name).label for name in others],
        "rows": [line(row) for row in ordered],
        "scale": plot.scale(),
        "open": any(line(row)["open"] for row in ordered),
    }


def _pairs(c: Comparison) -> dict[str, Any] | None:
    if not c.pairs:
        return None

    def interval(difference: Any) -> Interval:
        return Interval(difference.value, difference.low, difference.high)

    plot = IntervalPlot([interval(a.difference) for a in c.pairs.values()], reference=0.0)
    rows = []
    for (better, worse), against in c.pairs.items():
        would_do = against.needed
        rows.append(
            {
                "better": START if better == "base" else better,
                "worse": START if worse == "base" else worse,
                "difference": interval_text(against.difference),
                "plot": plot.row(interval(against.difference), None),
                "p": "< 0.001" if against.p < 0.001 else f"{against.p:.3f}",
                "above": number_text(against.above.value),
                "verdict": "apart" if against.distinguishable else "cannot be told apart",
                "needed": ""
                if would_do is None
                else " or ".join(
                    f"{n:,} {what}" for n, what in ((would_do.seeds, "seeds"), (would_do.items, "items")) if n
                )
                or "no feasible number",
            }
        )
    return {"rows": rows, "scale": plot.scale(), "open": any(row["needed"] for row in rows)}


def _chips(training: Mapping[str, Any], budget: Mapping[str, int]) -> list[tuple[str, str]]:
    chips = [(name, str(training[name])) for name in ("model", "data", "task", "env") if training.get(name)]
    spent = ", ".join(f"{amount:,} {unit}" for unit, amount in budget.items())
    return [*chips, ("budget per trial", spent)] if spent else chips


# Curves ---------------------------------------------------------------------------------------------------------------


def _chart_groups(trained: Sequence[_Trained], start: Mapping[str, float]) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for t in trained for rows in t.metrics for row in rows for name in row)
    groups = []
    for title, prefixes, unfolded in GROUPS:
        chosen = [name for prefix in prefixes for name in names if name.startswith(prefix) and name != "eval/score"]
        charts = [chart for name in chosen if (chart := _chart(name, trained, start.get(name)))]
        if charts:
            notes = _falling_together(trained) if title == "Learning" else []
            groups.append({"title": title, "open": unfolded, "charts": charts, "notes": notes})
    return groups


def _chart(name: str, trained: Sequence[_Trained], reference: float | None) -> dict[str, Any] | None:
    def drawn(x_of: Callable[[dict[str, Any]], Any]) -> Markup | None:
        bands = []
        for t in trained:
            curves = []
            for rows in t.metrics:
                known = [(x_of(r), r[name]) for r in rows if name in r and x_of(r) is not None and np.isfinite(r[name])]
                if known:
                    x, y = np.array(known, float).T
                    curves.append((x, y))
            if curves:
                bands.append(Band.of(t.label, t.colour, curves))
        several = any(len(band.x) > 1 for band in bands)
        return line_chart(bands, reference=reference, name=name) if several else None

    by_step = drawn(lambda row: row["step"])
    if by_step is None:
        return None
    by_samples = drawn(lambda row: row.get("progress/samples") or None)
    lost = sum(1 for t in trained for rows in t.metrics for row in rows if name in row and not np.isfinite(row[name]))
    return {
        "name": name,
        "about": CURVES.get(name, kind_of(name.removeprefix("eval/")).label + ", held out" if "eval/" in name else ""),
        "by_step": by_step,
        "by_samples": by_samples or by_step,
        "lost": lost,
    }


def _falling_together(trained: Sequence[_Trained]) -> list[str]:
    """The question that DPO users ask most, answered where it arises."""
    notes = []
    for t in trained:
        changes = {}
        for name in ("policy/logp_chosen", "preference/margin"):
            values = [[row[name] for row in rows if name in row] for rows in t.metrics]
            ends = [
                np.mean(v[-max(1, len(v) // 10) :]) - np.mean(v[: max(1, len(v) // 10)]) for v in values if len(v) > 1
            ]
            changes[name] = float(np.mean(ends)) if ends else 0.0
        if changes["policy/logp_chosen"] < 0 < changes["preference/margin"]:
            notes.append(
                f"{t.label}: the log-prob of the better answers falls while the margin rises. That is how preference "
                "losses work, not a defect: they see the difference of the two log-probs alone, and the worse answers "
                "fall faster. The probability goes to answers outside the data, so look at held-out scores, the length "
                "and the samples; an added SFT term on the better answers holds them up."
            )
    return notes


# Samples --------------------------------------------------------------------------------------------------------------


def _samples(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # a line torn by a kill
            continue
        rows.append(row | {"prompt": _as_text(row["prompt"]), "completions": [_as_text(x) for x in row["completions"]]})
    return rows


def _side_by_side(trained: Sequence[_Trained]) -> list[dict[str, Any]]:
    """The last samples of every method that samples, for prompts that they share as far as they share any."""
    latest = [(t, {row["prompt"]: row for row in t.samples}) for t in trained if t.samples]
    if not latest:
        return []
    shared = [p for p in latest[0][1] if all(p in rows for _, rows in latest)]
    shown = []
    for prompt in shared[-PROMPTS:]:
        columns = [_column(t.label, t.colour, rows[prompt]) for t, rows in latest]
        first = next(row for row in latest[0][0].samples if row["prompt"] == prompt)
        if first["step"] == 0 and any(column["step"] for column in columns):
            columns.insert(0, _column(START, None, first))
        shown.append({"prompt": prompt, "columns": columns})
    if shown:
        return shown
    return [
        {"prompt": row["prompt"], "columns": [_column(t.label, t.colour, row)]}
        for t, rows in latest
        for row in list(rows.values())[-2:]
    ]


def _over_time(run: _Trained) -> list[dict[str, Any]]:
    """What the policy answered at the beginning, half-way and at the end."""
    steps = sorted({row["step"] for row in run.samples})
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    shown: dict[str, list[dict[str, Any]]] = {}
    for step in chosen:
        for row in [row for row in run.samples if row["step"] == step][:PROMPTS]:
            shown.setdefault(row["prompt"], []).append(_column(run.label, run.colour, row))
    return [{"prompt": prompt, "columns": columns} for prompt, columns in shown.items()]


def _column(label: str, colour: int | None, row: Mapping[str, Any]) -> dict[str, Any]:
    rewards = row.get("rewards") or [None] * len(row["completions"])
    answers = list(zip(row["completions"], rewards, strict=False))
    texts = [(text, None if reward is None else f"{reward:.3g}") for text, reward in answers[:COMPLETIONS]]
    return {"label": label, "colour": colour, "step": row["step"], "answers": texts, "more": len(answers) - len(texts)}


def _as_text(value: Any) -> str:
    """A prompt or completion as text; messages with their roles."""
    if isinstance(value, list):
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in value)
    return str(value)


def _films(label: str, directory: Path) -> list[dict[str, Any]]:
    """An episode of a run's control policy as a strip of stills: of its first seed, not of its best."""
    from guerdon.control.policy import ControlPolicy

    if not ControlPolicy.is_at(directory / "policy"):
        return []
    from guerdon.control.rollout import film

    policy = ControlPolicy.load(directory / "policy")
    if policy.env is None:
        return []
    try:
        shown = film(policy, policy.env)
    except GuerdonError as error:  # the environment may be missing here
        return [{"image": "", "told": f"{label}: no episode can be shown: {error}"}]
    told = f"{label}, seed {policy.seeds[0]}: an episode of {shown.length:,} steps with return {shown.ret:.4g}"
    return [{"image": base64.b64encode(shown.data).decode(), "told": ". ".join(filter(None, [told, shown.note]))}]


# Facts ----------------------------------------------------------------------------------------------------------------


def _facts(directory: Path, settings: Mapping[str, Any], runs: Sequence[Path]) -> list[dict[str, Any]]:
    facts = [{"title": "Settings", "rows": _rows(settings)}]
    evaluated = next((run for run in runs if (run / EVALUATION).exists()), None)
    if evaluated:
        how = Evaluation.load(evaluated / EVALUATION)
        facts.append(
            {"title": "Evaluation", "rows": [("items", f"{len(how.items):,}"), *_rows(how.settings)]},
        )
    machines: dict[str, list[tuple[str, str]]] = {}
    for run in runs:
        if (run / "environment.json").exists():
            told = {k: v for k, v in RunDir(run).environment.items() if k not in ("id", "created")}
            machines.setdefault(json.dumps(told, sort_keys=True), _rows(told))
    for i, rows in enumerate(machines.values()):
        facts.append({"title": "Machine" if len(machines) == 1 else f"Machine {i + 1}", "rows": rows})
    facts.append({"title": "Directory", "rows": [("path", str(directory.resolve()))]})
    return facts


def _rows(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            rows += _rows(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for entry in value:
                rows += _rows(entry, f"{prefix}{key}.{entry.get('label', '')}.")
        elif value not in (None, "", [], {}):
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def _python_call(c: Comparison) -> str:
    s = c.settings
    methods = [{k: v for k, v in m.items() if v not in ({}, m["name"]) or k == "name"} for m in s["methods"]]
    arguments = {"seeds": s["seeds"], "budget": s["budget"], "out": str(c.directory), **s["training"]}
    arguments = {k: v for k, v in arguments.items() if v not in (None, {})}
    return (
        "guerdon.compare(\n    " + pformat(methods) + "".join(f",\n    {k}={v!r}" for k, v in arguments.items()) + "\n)"
    )


def _python_train(config: Mapping[str, Any]) -> str:
    arguments = {**config["options"], **{k: v for k, v in config["training"].items() if v not in (None, "", [])}}
    return (
        f"guerdon.train(\n    {config['method']!r}" + "".join(f",\n    {k}={v!r}" for k, v in arguments.items()) + "\n)"
    )
