"""`guerdon inspect` for logged trajectories: what they hold, how far they reach, and what is odd in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.control.datasets import read_transitions
from guerdon.control.flat_files import unchained
from guerdon.control.transitions import Transitions, blocks, not_finite
from guerdon.feedback.diagnostics import Finding, found
from guerdon.feedback.inspect import LEVELS, findings_table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_QUANTILES = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1.0}
_EXAMPLES = 5
_BINS = 20  # along each of the first two principal axes
_SAMPLE = 2000  # rows by which coverage is told
_SAMPLED_NUMBERS = 20_000_000  # in them at most: fewer rows where a row is large
_OUTLIER = 10.0  # robust standard deviations
_AT_BOUND = 0.01  # of half an action's range: closer than this to a bound is at the bound
_SHOWN = 10  # action dimensions, or actions, that are printed


def inspect_transitions(source: str | Transitions) -> dict[str, Any]:
    """What logged trajectories hold and what is odd in them, as plain data.

    Args:
        source: as `read_transitions` takes it, NaN and infinities allowed; or transitions themselves.

    Returns:
        `source`, `env`, `spec`, `digest`, `notes`, `transitions`, `episodes` and `findings`, the gravest first, each
        with `level`, `what`, `count`, `share`, `examples`, `advice`;

        - `ends`: episodes that end `terminated`, `truncated` (alone), or with neither mark (`open`).
        - `lengths`: mean and quantiles.

        and, of the rows without NaN and infinities,

        - `returns`, `rewards`: mean and quantiles; of the rewards also `zero`, their share at 0.
        - `actions`: for discrete ones the `shares` of each; else `low` and `high` (smallest and largest), `mean`,
          `std` and `saturated` (share at a bound) of each dimension.
        - `coverage`: see `coverage`.
        - `mixture`: for each quarter of the episodes, in order of return, its `episodes`, `steps`, mean `return`,
          mean `length` and the `spread` of its actions (std, averaged over dimensions; entropy in nats if discrete).

    Raises:
        DataError: the source cannot be read.
    """
    data = read_transitions(source, finite=False) if isinstance(source, str) else source
    last = _last(data)
    terminated, truncated = data.terminated[last], data.truncated[last]
    report: dict[str, Any] = {
        "source": data.source,
        "env": data.env,
        "spec": asdict(data.spec),
        "digest": data.digest,
        "notes": list(data.notes),
        "transitions": len(data),
        "episodes": len(data.starts),
        "ends": {
            "terminated": int(terminated.sum()),
            "truncated": int((truncated & ~terminated).sum()),
            "open": int((~truncated & ~terminated).sum()),
        },
        "lengths": _quantiles(data.lengths()),
    }
    findings: list[Finding] = []
    broken = np.zeros(len(data), bool)
    for name, rows in not_finite(data).items():
        broken[rows] = True
        advice = "No network learns from NaN or infinities: mend or leave out these episodes."
        findings += _at(data, "error", f"rows with '{name}' that are not finite", rows, advice)
    findings += _ends(data) + _chains(data, broken) + _repeated(data)
    finite = data.subset(~broken) if broken.any() else data
    if len(finite):
        report |= {
            "returns": _quantiles(finite.returns()),
            "rewards": {**_quantiles(finite.rewards), "zero": float(np.mean(finite.rewards == 0))},
            "actions": _actions(finite),
            "coverage": coverage(finite),
            "mixture": _mixture(finite),
        }
        findings += [finding for check in _CHECKS for finding in check(finite)]
    report["findings"] = sorted(findings, key=lambda finding: list(LEVELS).index(finding["level"]))
    return report


def coverage(data: Transitions, seed: int = 0) -> dict[str, float]:
    """How far the observations reach, by a random sample of rows, each coordinate standardised.

    Returns:
        `dimensions`: coordinates that vary. `effective_rank`: exp of the entropy of the eigenvalues of the correlation
        matrix, divided by their sum; 1 on a line, `dimensions` where all directions vary alike. `occupied`: share of a
        grid of 20 x 20 bins over the first two principal axes (20 bins over a single one) that holds a row.
        `nearest`: median distance of a row to its nearest other, over the median distance of two rows; 0 where rows
        repeat, towards 1 where each stands alone.
    """
    width = int(np.prod(data.spec.observation))
    count = min(len(data), _SAMPLE, max(2, _SAMPLED_NUMBERS // width))
    rows = np.random.default_rng(seed).choice(len(data), count, replace=False)
    x = data.observations[np.sort(rows)].reshape(count, -1).astype(np.float64)
    std = x.std(axis=0)
    x = (x[:, std > 0] - x[:, std > 0].mean(axis=0)) / std[std > 0]
    if not x.size:
        return {"dimensions": 0, "effective_rank": 0.0, "occupied": 0.0, "nearest": 0.0}
    left, singular, _ = np.linalg.svd(x, full_matrices=False)
    share = singular**2 / np.sum(singular**2)
    axes = (left * singular)[:, singular > 1e-6 * singular[0]][:, :2]
    counts = np.histogramdd(axes, bins=_BINS)[0]
    squares = np.sum(x**2, axis=1)
    distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0))
    typical = np.median(distance[np.triu_indices(count, 1)])
    np.fill_diagonal(distance, np.inf)
    return {
        "dimensions": x.shape[1],
        "effective_rank": float(np.exp(-np.sum(share * np.log(np.maximum(share, 1e-300))))),
        "occupied": float(np.mean(counts > 0)),
        "nearest": float(np.median(distance.min(axis=1)) / typical) if typical > 0 else 0.0,
    }


def _last(data: Transitions) -> np.ndarray:
    """(N,) bool: the last row of each episode."""
    last = np.zeros(len(data), bool)
    last[np.append(data.starts[1:], len(data)) - 1] = True
    return last


def _quantiles(values: np.ndarray) -> dict[str, float]:
    quantiles = np.quantile(values, list(_QUANTILES.values())).tolist()
    return {"mean": float(np.mean(values, dtype=np.float64)), **dict(zip(_QUANTILES, quantiles, strict=True))}


def _actions(data: Transitions) -> dict[str, list[float]]:
    actions = data.actions
    if data.spec.discrete:
        return {"shares": (np.bincount(actions, minlength=data.spec.actions) / len(data)).tolist()}
    return {
        "low": actions.min(axis=0).tolist(),
        "high": actions.max(axis=0).tolist(),
        "mean": actions.mean(axis=0, dtype=np.float64).tolist(),
        "std": actions.std(axis=0, dtype=np.float64).tolist(),
        "saturated": _at_bound(data).mean(axis=0).tolist(),
    }


def _at_bound(data: Transitions) -> np.ndarray:
    """(N, A) bool; infinite bounds are never reached."""
    low, high = np.asarray(data.spec.low), np.asarray(data.spec.high)
    near = _AT_BOUND * np.where(np.isfinite(high - low), high - low, 0) / 2
    return (data.actions <= low + near) | (data.actions >= high - near)


def _mixture(data: Transitions) -> list[dict[str, float]]:
    returns, lengths = data.returns(), data.lengths()
    number = np.repeat(np.arange(len(returns)), lengths)
    parts = []
    for episodes in np.array_split(np.argsort(returns, kind="stable"), min(4, len(returns))):
        actions = data.actions[np.isin(number, episodes)]
        if data.spec.discrete:
            shares = np.bincount(actions) / len(actions)
            spread = -np.sum(shares[shares > 0] * np.log(shares[shares > 0]))
        else:
            spread = actions.std(axis=0, dtype=np.float64).mean()
        parts.append(
            {
                "episodes": len(episodes),
                "steps": int(lengths[episodes].sum()),
                "return": float(returns[episodes].mean()),
                "length": float(lengths[episodes].mean()),
                "spread": float(spread),
            }
        )
    return parts


def _counted(level: str, what: str, examples: list[str], count: int, total: int, advice: str) -> list[Finding]:
    return [
        finding | {"count": int(count), "share": count / total}
        for finding in found(level, what, examples[:count], total, advice)
    ]


def _at(data: Transitions, level: str, what: str, rows: np.ndarray, advice: str) -> list[Finding]:
    """One finding about these rows, or none where there are none."""
    examples = [data.where(int(row)) for row in rows[:_EXAMPLES]]
    return _counted(level, what, examples, len(rows), len(data), advice)


def _of_episodes(data: Transitions, level: str, what: str, numbers: np.ndarray, advice: str) -> list[Finding]:
    """The same about the episodes at these places."""
    examples = [f"episode {data.episode[data.starts[number]]}" for number in numbers[:_EXAMPLES]]
    return _counted(level, what, examples, len(numbers), len(data.starts), advice)


def _ends(data: Transitions) -> list[Finding]:
    """Whether `terminated` and `truncated` can mean what they say."""
    last = _last(data)
    terminated, truncated, lengths = data.terminated[last], data.truncated[last], data.lengths()
    longest = np.flatnonzero(lengths == lengths.max())
    suspicious = longest if len(longest) > 2 and terminated[longest].all() and lengths.max() > 1 else longest[:0]
    whose = "all" if len(suspicious) == len(lengths) else "the longest"
    every = np.arange(len(lengths))
    return [
        *_of_episodes(
            data,
            "warning",
            f"episodes, {whose} of them, that end terminated after exactly {lengths.max():,} steps",
            suspicious,
            "This looks like a time limit stored as a terminal state: values after it are then cut to 0. Mark such "
            "ends truncated.",
        ),
        *_of_episodes(
            data,
            "warning",
            "episodes that end neither terminated nor truncated",
            np.flatnonzero(~terminated & ~truncated),
            "Their last next observation is used as if the episode went on.",
        ),
        *_of_episodes(
            data,
            "info",
            "episodes, all of them, that end terminated; none was truncated",
            every if terminated.all() and not truncated.any() and not len(suspicious) else every[:0],
            "Right where the task always ends by itself; else time limits were stored as terminal states.",
        ),
        *_of_episodes(
            data,
            "info",
            "episodes, all of them, that are truncated; nothing terminates",
            every if not data.terminated.any() else every[:0],
            "Right where the task never ends by itself; else terminal states were lost, and values are too high.",
        ),
        *_of_episodes(
            data,
            "info",
            "episodes that end both terminated and truncated",
            np.flatnonzero(terminated & truncated),
            "Terminated counts: nothing is worth anything after them.",
        ),
        *_at(
            data,
            "info",
            "rows that are terminated, and whose episode goes on",
            np.flatnonzero(data.terminated & ~last),
            "Values end there, trajectories do not: usual where a recording passes through a goal.",
        ),
        *_at(
            data,
            "warning",
            "rows that are truncated, and whose episode goes on",
            np.flatnonzero(data.truncated & ~last),
            "Number the episodes so that each ends where it was cut.",
        ),
    ]


def _chains(data: Transitions, broken: np.ndarray) -> list[Finding]:
    inside = (np.diff(data.episode) == 0) & ~broken[:-1] & ~broken[1:]
    rows = np.flatnonzero(inside & unchained(data.observations, data.next_observations))
    advice = "Multi-step returns and sequences across them are wrong: use one-step methods, or mend the order."
    return _at(data, "warning", "rows whose next observation is not the following observation", rows, advice)


def _repeated(data: Transitions) -> list[Finding]:
    prints = _fingerprints(data)
    first = np.unique(prints, return_index=True)[1]
    again = np.ones(len(data), bool)
    again[first] = False
    episodes = [part.tobytes() for part in np.split(prints, data.starts[1:])]
    earliest = {whole: number for number, whole in reversed(list(enumerate(episodes)))}
    copies = np.array([number for number, whole in enumerate(episodes) if earliest[whole] < number], np.int64)
    return [
        *_of_episodes(
            data,
            "warning",
            "episodes that repeat an earlier episode row for row",
            copies,
            "They weigh more than others and may stand on both sides when a share is held out: leave them out.",
        ),
        *_at(
            data,
            "info",
            "rows that repeat an earlier row",
            np.flatnonzero(again),
            "Usual with few states and actions; elsewhere a sign that data were joined twice.",
        ),
    ]


def _fingerprints(data: Transitions) -> np.ndarray:
    """(N,) int64, equal for equal rows: observation, action, reward, next observation, terminated."""
    prints = np.empty(len(data), np.int64)
    for rows in blocks(data.observations):
        parts = (data.observations, data.actions, data.rewards, data.next_observations, data.terminated)
        flat = [np.ascontiguousarray(part[rows]).reshape(len(part[rows]), -1).view(np.uint8) for part in parts]
        prints[rows] = [hash(row.tobytes()) for row in np.concatenate(flat, axis=1)]
    return prints


def _outliers(data: Transitions) -> list[Finding]:
    """Values further than 10 robust standard deviations (1.4826 times the median distance) from their median.

    A coordinate of which more than half is one value has no robust standard deviation and is left alone.
    """
    findings = []
    advice = "Look at some: a broken sensor, a unit mixed up, or a corrupted row. RIQL is made for such data."
    names = ("rewards",) if data.spec.image else ("observations", "next_observations", "rewards")
    for name in names:
        x = getattr(data, name).reshape(len(data), -1)
        median = np.median(x, axis=0)
        distance = np.abs(x - median)
        scale = 1.4826 * np.median(distance, axis=0)
        rows = np.flatnonzero(((distance > _OUTLIER * scale) & (scale > 0)).any(axis=1))
        findings += _at(
            data, "info", f"rows with '{name}' further than {_OUTLIER:g} robust deviations out", rows, advice
        )
    return findings


def _constants(data: Transitions) -> list[Finding]:
    findings: list[Finding] = []
    if not data.spec.image:
        constant = np.flatnonzero(np.ptp(data.observations, axis=0) == 0)
        findings += _counted(
            "info",
            "dimensions of the observations that never change",
            [f"dimension {at}: {data.observations[0, at]:g}" for at in constant[:_EXAMPLES]],
            len(constant),
            data.observations.shape[1],
            "Normalised, they are 0 here, and a thousand times any change that comes later.",
        )
    if np.ptp(data.rewards) == 0:
        advice = "No value can be learned from one reward for everything; imitation and goals can do without."
        what = f"rows, all of them, with a reward of {data.rewards[0]:g}"
        findings += _at(data, "warning", what, np.arange(len(data)), advice)
    return findings


def _odd_actions(data: Transitions) -> list[Finding]:
    if data.spec.discrete:
        never = np.flatnonzero(np.bincount(data.actions, minlength=data.spec.actions) == 0)
        advice = "What they are worth is a guess: offline methods have to stay away from them."
        examples = [f"action {action}" for action in never[:_EXAMPLES]]
        return _counted("info", "actions that are never taken", examples, len(never), data.spec.actions, advice)
    low, high = np.asarray(data.spec.low), np.asarray(data.spec.high)
    slack = 1e-5 * np.where(np.isfinite(high - low), high - low, 0)
    beyond = np.flatnonzero(((data.actions < low - slack) | (data.actions > high + slack)).any(axis=1))
    saturated = np.flatnonzero(_at_bound(data).all(axis=1))
    return [
        *_at(
            data,
            "warning",
            "rows with actions outside their bounds",
            beyond,
            "A policy with bounded actions cannot repeat them: clip them if the environment did.",
        ),
        *_at(
            data,
            "info",
            "rows whose action is at a bound in every dimension",
            saturated if len(saturated) > len(data) / 2 else saturated[:0],
            "The behaviour is nearly bang-bang: squashed Gaussian policies have trouble imitating it.",
        ),
    ]


_CHECKS: tuple[Callable[[Transitions], list[Finding]], ...] = (_outliers, _constants, _odd_actions)


def render(report: dict[str, Any]) -> Group:
    """What `inspect_transitions` returned, for `rich.console.Console.print`."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    spec = report["spec"]
    shape = " x ".join(map(str, spec["observation"]))
    kind = f"one of {spec['actions']}" if spec["discrete"] else f"{spec['actions']} continuous"
    told = {
        "environment": report["env"] or "",
        "observations": f"{shape} {'images' if spec['image'] else 'numbers'}",
        "actions": kind,
        "transitions": f"{report['transitions']:,} in {report['episodes']:,} episodes",
        "ends": ", ".join(f"{count:,} {name}" for name, count in report["ends"].items() if count),
        "digest": report["digest"][:16],
    }
    parts: list[Any] = []
    if "returns" in report:
        told["rewards"] = f"{report['rewards']['zero']:.1%} are 0"
        reach = report["coverage"]
        told["coverage"] = (
            f"effective rank {reach['effective_rank']:.1f} of {reach['dimensions']}; {reach['occupied']:.0%} of the "
            f"bins occupied; nearest other at {reach['nearest']:.2f} of the typical distance"
        )
        parts = [_quantile_table(report), "", _action_table(report["actions"]), "", _mixture_table(report), ""]
    facts = Table.grid(padding=(0, 2))
    for name, value in told.items():
        if value:
            facts.add_row(Text(name, style="dim"), Text(value))
    for note in report["notes"]:
        facts.add_row(Text("note", style="dim"), Text(note))
    return Group(Text(report["source"], style="bold"), facts, "", *parts, findings_table(report["findings"]))


def _quantile_table(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("")
    for name in ("mean", *_QUANTILES):
        table.add_column(name, justify="right")
    for row in ("returns", "lengths", "rewards"):
        table.add_row(row, *(f"{report[row][name]:,.4g}" for name in ("mean", *_QUANTILES)))
    return table


def _action_table(actions: dict[str, list[float]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    columns = {name: values[:_SHOWN] for name, values in actions.items()}
    total = len(next(iter(actions.values())))
    table = Table(title=Text("actions" + (f", the first {_SHOWN} of {total}" if total > _SHOWN else "")))
    table.title_justify = "left"
    table.add_column("")
    for name in columns:
        table.add_column({"shares": "share"}.get(name, name), justify="right")
    for at, row in enumerate(zip(*columns.values(), strict=True)):
        cells = zip(columns, row, strict=True)
        table.add_row(str(at), *(f"{v:.1%}" if name in ("shares", "saturated") else f"{v:,.3g}" for name, v in cells))
    return table


def _mixture_table(report: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    spread = "entropy of actions" if report["spec"]["discrete"] else "std of actions"
    table = Table(title=Text("episodes in order of return"), title_justify="left")
    for name in ("", "episodes", "steps", "return", "length", spread):
        table.add_column(name, justify="right" if name else "left")
    for number, part in enumerate(report["mixture"], 1):
        table.add_row(
            f"{number} of {len(report['mixture'])}",
            f"{part['episodes']:,}",
            f"{part['steps']:,}",
            f"{part['return']:,.4g}",
            f"{part['length']:,.4g}",
            f"{part['spread']:,.3g}",
        )
    return table
