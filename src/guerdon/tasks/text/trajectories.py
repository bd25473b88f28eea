"""What agents did, kept as feedback: a store of episodes, one JSON object per line, and the records that it makes.

A line is a demonstration as `guerdon.feedback` reads it: `prompt` is the first observation, `completion` the replies of
the agent with what it saw after each but the last. A reply that is not the agent's own has the weight 0, as OpenAI's
fine-tuning format has it, and is no more learned than an observation is. The other columns say what came of each step.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guerdon.errors import ConfigError, DataError, near
from guerdon.feedback.records import Message

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of an episode.

    Attributes:
        observation: what was put to the agent, word for word.
        said: its reply.
        action: what of the reply was done.
        reward: what that brought.
        speaker: whose reply it was.
        learn: whether it is learned; False where another spoke in the agent's place.
        admissible: whether the action was one of those that there were, or these are not known.
    """

    observation: str
    said: str
    action: str
    reward: float
    speaker: str
    learn: bool = True
    admissible: bool = True


@dataclass(frozen=True)
class Trajectory:
    """One episode.

    Attributes:
        env: spec of the environment.
        task, split, seed: of the reset.
        policy: name of the agent.
        steps: at least one.
        final: what was seen last.
        terminated, truncated, success: how it ended.
        index: number within its collection.
        collection: identity of the collection.
    """

    env: str
    task: str
    split: str
    seed: int
    policy: str
    steps: tuple[Step, ...]
    final: str
    terminated: bool
    truncated: bool
    success: bool
    index: int = 0
    collection: str = ""

    @property
    def total(self) -> float:
        """The undiscounted return."""
        return sum(step.reward for step in self.steps)

    def messages(self, steps: int) -> list[Message]:
        """The conversation before step `steps`, which ends with what was seen then."""
        told: list[Message] = []
        for step in self.steps[:steps]:
            told += [_seen(step), _said(step)]
        return [*told, _seen(self.steps[steps])]

    @property
    def prompt(self) -> list[Message]:
        return self.messages(0)

    @property
    def completion(self) -> list[Message]:
        return [*self.messages(len(self.steps) - 1), _said(self.steps[-1])][1:]

    def row(self) -> Row:
        """The line that `Store` keeps; `of_row` reads it back."""
        each = {name: [getattr(step, name) for step in self.steps] for name in _COLUMNS}
        whole = {name: getattr(self, name) for name in _FIELDS}
        return {"prompt": self.prompt, "completion": self.completion, **each, **whole, "return": self.total}

    @classmethod
    def of_row(cls, row: Row) -> Trajectory:
        messages = [*row["prompt"], *row["completion"]]
        steps = [
            Step(
                seen["content"],
                said["content"],
                learn=said.get("weight", 1) != 0,
                **dict(zip(_COLUMNS, rest, strict=True)),
            )
            for seen, said, *rest in zip(messages[::2], messages[1::2], *(row[name] for name in _COLUMNS), strict=True)
        ]
        return cls(steps=tuple(steps), **{name: row[name] for name in _FIELDS})


_COLUMNS = ("action", "reward", "speaker", "admissible")  # of a step, as lists in a row
_FIELDS = (
    "env", "task", "split", "seed", "policy", "final", "terminated", "truncated", "success", "index", "collection",
)  # fmt: skip


def _seen(step: Step) -> Message:
    return {"role": "user", "content": step.observation}


def _said(step: Step) -> Message:
    weight = {} if step.learn else {"weight": 0}
    return {"role": "assistant", "content": step.said, **weight}


class Store:
    """Trajectories in a JSON Lines file that only grows; several processes may append to it at once.

    An episode is there whole or not at all: it is written with one call and synced to disk, and a line that a kill cut
    off is not read and gives way to the next one.
    """

    read: Callable[[Row], Any] = staticmethod(Trajectory.of_row)

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix not in (".jsonl", ".ndjson"):
            raise ConfigError(f"{path}: trajectories are kept in a .jsonl file.")

    def append(self, trajectory: Any) -> None:
        """Add an episode; it is on disk when this returns. `OSError` where it cannot be written whole."""
        line = json.dumps(trajectory.row()).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            _cut_torn_line(file)
            if os.write(file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
        finally:
            os.close(file)

    def __iter__(self) -> Iterator[Any]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield self.read(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    what = f"{self.path}:{number}: not a trajectory ({type(error).__name__}: {error})"
                    raise DataError(f"{what}: choose another file, or mend this one.") from error


def _cut_torn_line(file: int) -> None:
    """End an open file after its last whole line."""
    size = end = os.fstat(file).st_size
    while end and os.pread(file, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        os.ftruncate(file, end)


def sft(trajectories: Iterable[Trajectory]) -> list[Row]:
    """Every success as a demonstration: the loss is on the agent's own replies, all of them."""
    return [{"prompt": t.prompt, "completion": t.completion, **_about(t)} for t in _spoken(trajectories) if t.success]


def sft_each(trajectories: Iterable[Trajectory]) -> list[Row]:
    """Every reply of every success as a demonstration of its own, for chat templates that rewrite earlier turns."""
    return [
        {"prompt": t.messages(i), "completion": [_said(step)], **_about(t), "step": i}
        for t in trajectories
        if t.success
        for i, step in enumerate(t.steps)
        if step.learn
    ]


def preference(trajectories: Iterable[Trajectory], min_gap: float = 0.0) -> list[Row]:
    """Of each task the whole episode with the highest return against the lowest, as in ETO (arXiv 2403.02502).

    Episodes are of one task where they begin with the same words. `min_gap` is how much better the return has to be.
    """
    rows = []
    for same in _alike(_spoken(trajectories)):
        best, worst = max(same, key=_total), min(same, key=_total)
        if best.total - worst.total > min_gap:
            pair = {"chosen": best.completion, "rejected": worst.completion}
            scores = {"score_chosen": best.total, "score_rejected": worst.total}
            rows.append({"prompt": best.prompt, **pair, **scores, **_about(best)})
    return rows


def step_preference(trajectories: Iterable[Trajectory], min_gap: float = 0.0) -> list[Row]:
    """Of each history that several episodes share the best next reply against the worst.

    An action is worth the mean return of the episodes that took it there; where replies with different words led to
    the same action, the reply of the best of them stands for it. What nobody learns is on neither side.
    """
    branches: dict[str, list[tuple[Trajectory, int]]] = {}
    for t in trajectories:
        for i, step in enumerate(t.steps):
            if step.learn:
                branches.setdefault(json.dumps([t.env, t.messages(i)]), []).append((t, i))
    rows = []
    for branch in branches.values():
        actions: dict[str, list[tuple[Trajectory, int]]] = {}
        for t, i in branch:
            actions.setdefault(t.steps[i].action, []).append((t, i))
        worth = {action: sum(t.total for t, _ in took) / len(took) for action, took in actions.items()}
        best, worst = max(worth, key=worth.__getitem__), min(worth, key=worth.__getitem__)
        if worth[best] - worth[worst] > min_gap:
            (chosen, i), (rejected, _) = (max(actions[a], key=lambda at: at[0].total) for a in (best, worst))
            pair = {"chosen": [_said(chosen.steps[i])], "rejected": [_said(rejected.steps[i])]}
            scores = {"score_chosen": worth[best], "score_rejected": worth[worst]}
            rows.append({"prompt": chosen.messages(i), **pair, **scores, **_about(chosen), "step": i})
    return rows


def unpaired(trajectories: Iterable[Trajectory]) -> list[Row]:
    """Every episode with the label whether it succeeded."""
    return [
        {"prompt": t.prompt, "completion": t.completion, "label": t.success, **_about(t)} for t in _spoken(trajectories)
    ]


def scored(trajectories: Iterable[Trajectory]) -> list[Row]:
    """Of each task all its episodes, with their returns as scores."""
    rows = []
    for same in _alike(_spoken(trajectories)):
        completions, scores = [t.completion for t in same], [t.total for t in same]
        rows.append({"prompt": same[0].prompt, "completions": completions, "scores": scores, **_about(same[0])})
    return rows


FEEDBACK: dict[str, Callable[[Iterable[Trajectory]], list[Row]]] = {
    "sft": sft,
    "sft-each": sft_each,
    "preference": preference,
    "step-preference": step_preference,
    "unpaired": unpaired,
    "scored": scored,
}


def collection_of(*identity: Any) -> str:
    """The name of a collection, by all that its content depends on, as plain data."""
    return hashlib.blake2b(json.dumps(identity, default=str).encode(), digest_size=6).hexdigest()


def check_kinds(kinds: Iterable[str]) -> None:
    """`ConfigError` where one of these is no kind of `FEEDBACK`."""
    for kind in kinds:
        if kind not in FEEDBACK:
            raise ConfigError(
                f"trajectories make no feedback '{kind}'.{near(kind, FEEDBACK)} Use {', '.join(FEEDBACK)}."
            )


def _spoken(trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
    """Those in which the agent said something that is learned."""
    return (t for t in trajectories if any(step.learn for step in t.steps))


def _alike(trajectories: Iterable[Trajectory]) -> list[list[Trajectory]]:
    """Trajectories of one task together: those of one environment that begin with the same words."""
    found: dict[str, list[Trajectory]] = {}
    for t in trajectories:
        found.setdefault(json.dumps([t.env, t.prompt]), []).append(t)
    return list(found.values())


def _total(trajectory: Trajectory) -> float:
    return trajectory.total


def _about(t: Trajectory) -> Row:
    return {"env": t.env, "task": t.task}
