"""Step-level Q-value models (arXiv 2409.09345): what a search finds out about steps, for an agent that is three lines.

Tasks are those of `keys:`, two keys to be pressed in turn, rewarded at the end only. The agent presses the right key
with a weight of 9 against 1 for each of the others, and never learns. Q is a network of two layers, which sees the
task, the keys pressed before and the step.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.claims.base import Above, Claim
from guerdon.claims.training import one_thread, shared
from guerdon.evaluation.metrics import Evaluation
from guerdon.lazy import torch
from guerdon.methods.planning.mcts import MCTS, Ask, Node, search, together
from guerdon.methods.planning.step_q import best_end, step_pairs, trajectory_pair
from guerdon.methods.preferences.dpo import implicit_rewards, preference_loss
from guerdon.tasks.text import make_text

EMBEDDING, WIDTH = 16, 64
LR, BETA = 1e-3, 0.1
CANDIDATES = 5
EPISODES = 400  # by which a policy is judged
HELD_OUT_TREES = 40  # for the accuracy on pairs

Settings = Mapping[str, Any]
Row = tuple[str, tuple[int, ...], int]  # task, keys pressed before, key
Pair = tuple[list[Row], list[Row]]  # chosen and rejected


class World:
    """`keys:` and what is known of its tasks.

    With the rule "copy" Q sees the two keys themselves. With "sums" it sees x and y, and the keys are x + y and x + 2y
    modulo their number, which a network does not guess from a few of them.
    """

    def __init__(self, settings: Settings) -> None:
        self.depth, self.actions, self.rule = settings["depth"], settings["actions"], settings["rule"]
        self.env = make_text(f"keys:?depth={self.depth}&actions={self.actions}")
        splits = {split: self.env.tasks(split) for split in ("train", "valid", "test")}  # type: ignore[arg-type]
        every = [task for tasks in splits.values() for task in tasks]
        self.tasks = splits if settings["unseen"] else dict.fromkeys(splits, every)

    def drawn(self, split: str, count: int, seed: int) -> list[str]:
        """Tasks drawn at random: from all there are, or, where those to be judged by are `unseen`, from their split."""
        rng = np.random.default_rng([seed, *split.encode()])
        return rng.choice(self.tasks[split], count).tolist()

    def policy(self, task: str, step: int, weight: float) -> np.ndarray:
        """The agent's probabilities of the keys."""
        p = np.ones(self.actions)
        p[int(task.split("-")[step % 2])] = weight
        return p / p.sum()

    def inputs(self, task: str, pressed: Sequence[int]) -> list[int]:
        """What Q sees, as numbers of embeddings: the task, the keys pressed before (or none yet), the step."""
        first, second = map(int, task.split("-"))
        if self.rule == "sums":
            first, second = (2 * first - second) % self.actions, (second - first) % self.actions
        seen = [first, second, *pressed, *[self.actions] * (self.depth - 1 - len(pressed))]
        return [
            *(i * (self.actions + 1) + key for i, key in enumerate(seen)),
            len(seen) * (self.actions + 1) + len(pressed),
        ]


def trial(arm: Mapping[str, Any], seeds: Sequence[int], settings: Settings, directory: Path) -> dict[int, Evaluation]:
    """Success, which is the return, beside what was learned from and the share of held-out pairs ordered rightly."""
    with one_thread():
        found = {seed: judged(arm, seed, settings, directory) for seed in seeds}
    return {
        seed: Evaluation(["world"], {name: np.array([value]) for name, value in metrics.items()}, "return")
        for seed, metrics in found.items()
    }


def judged(arm: Mapping[str, Any], seed: int, settings: Settings, directory: Path) -> dict[str, float]:
    """The metrics of one arm with one seed."""
    world = World(settings)
    if "learns" not in arm:
        return {"return": success(world, arm, None, settings, seed)}
    said = searched(world, settings, seed, directory)
    pairs = said["trajectory pairs" if arm["learns"] == "trajectory-dpo" else "step pairs"]
    learned = Learned(world, settings["weight"] if arm["learns"] == "sft" else None, seed)
    if pairs and arm["learns"] == "sft":
        learned.imitate(said["best"], settings["updates"])
    elif pairs:
        learned.prefer(pairs, settings["updates"])
    unknown = said["held-out pairs"]
    return {
        "return": success(world, arm, learned, settings, seed),
        "solved": float(said["solved"]),
        "pairs": float(len(pairs)),
        "pair accuracy": float((learned.margins(unknown) > 0).double().mean()) if unknown else math.nan,
    }


# Searching


def searched(world: World, settings: Settings, seed: int, directory: Path) -> dict[str, Any]:
    """What trees say, which the arms share: rows and pairs to learn from, and held-out pairs."""
    told = {name: value for name, value in settings.items() if name not in ("acts", "updates")}
    with shared(directory, seed=seed, **told) as place:
        file = place / "trees.json"
        if not file.exists():
            trees = grown(world, "train", settings["tasks"], settings, seed)
            said = {
                "solved": sum(best_end(tree) is not None for tree in trees.values()),
                "step pairs": pairs_of(trees),
                "trajectory pairs": trajectory_pairs(trees),
                "best": best_rows(trees),
                "held-out pairs": pairs_of(grown(world, "valid", HELD_OUT_TREES, settings, seed)),
            }
            draft = place / "draft.json"
            draft.write_text(json.dumps(said))
            draft.replace(file)
        return json.loads(file.read_text())


def grown(world: World, split: str, count: int, settings: Settings, seed: int) -> dict[str, Node]:
    """Trees of drawn tasks."""
    how = MCTS(iterations=settings["iterations"], candidates=CANDIDATES, max_depth=world.depth)
    trees = {}
    for i, task in enumerate(world.drawn(split, count, seed)):
        observation, _ = world.env.reset(seed=0, options={"task": task})
        begun = search(world.env, observation, how, seed * 10_000 + i)
        ((_, trees[f"{task} {i}"]),) = together([begun], proposer(world, task, settings["weight"]))
    return trees


def proposer(world: World, task: str, weight: float) -> Callable[[list[Ask]], list[list[str]]]:
    """The agent in a search: different keys, drawn one after the other."""

    def propose(asks: list[Ask]) -> list[list[str]]:
        found = []
        for node, n, seed, _ in asks:
            p = world.policy(task, node.depth, weight)
            drawn = np.random.default_rng(seed).choice(world.actions, n, replace=False, p=p)
            found.append([f"press {key}" for key in drawn])
        return found

    return propose


# Learning


def rows_of(name: str, path: Sequence[Node]) -> list[Row]:
    """All steps of a path from a root."""
    keys = tuple(int(node.action.split()[1]) for node in path[1:])
    return [(name.split()[0], keys[:i], key) for i, key in enumerate(keys)]


def pairs_of(trees: Mapping[str, Node]) -> list[Pair]:
    """The last steps alone of the paths that each step pair compares."""
    return [
        (rows_of(name, pair.chosen.path)[-1:], rows_of(name, pair.rejected.path)[-1:])
        for name, tree in trees.items()
        for pair in step_pairs(tree)
    ]


def trajectory_pairs(trees: Mapping[str, Node]) -> list[Pair]:
    found = {name: trajectory_pair(tree) for name, tree in trees.items()}
    return [(rows_of(name, pair[0].path), rows_of(name, pair[1].path)) for name, pair in found.items() if pair]


def best_rows(trees: Mapping[str, Node]) -> list[Row]:
    ends = {name: best_end(tree) for name, tree in trees.items()}
    return [row for name, end in ends.items() if end for row in rows_of(name, end.path)]


class Learned:
    """log pi(key | task, keys before) of a network with one hidden layer, and of its start.

    Where `weight` is given it is the agent itself that is fine-tuned: the network adds to its logits, at first nothing.
    """

    def __init__(self, world: World, weight: float | None, seed: int) -> None:
        self.world, self.weight = world, weight
        places = world.depth + 2  # of the inputs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            embedding = torch.nn.Embedding((places - 1) * (world.actions + 1) + world.depth, EMBEDDING)
            hidden, out = torch.nn.Linear(places * EMBEDDING, WIDTH), torch.nn.Linear(WIDTH, world.actions)
        if weight is not None:
            torch.nn.init.zeros_(out.weight)
            torch.nn.init.zeros_(out.bias)
        self.network = torch.nn.Sequential(embedding, torch.nn.Flatten(), hidden, torch.nn.ReLU(), out)
        self.start = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LR)

    def inputs(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the network sees (rows, places), and the agent's own logits (rows, keys)."""
        seen = torch.tensor([self.world.inputs(task, before) for task, before, _ in rows])
        own = torch.zeros(len(rows), self.world.actions)
        if self.weight is not None:
            p = [self.world.policy(task, len(before), self.weight) for task, before, _ in rows]
            own = torch.from_numpy(np.log(p)).float()
        return seen, own

    def logps(self, network: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        seen, own = inputs
        return (network(seen) + own).log_softmax(-1)

    def log_ratios(self, sides: Sequence[Sequence[Row]]) -> Callable[[], torch.Tensor]:
        """The sum over each side's rows of log pi - log pi_ref: (sides,), as the network is when asked."""
        rows = [row for side in sides for row in side]
        owner = torch.tensor([i for i, side in enumerate(sides) for _ in side])
        key, inputs = torch.tensor([[key] for *_, key in rows]), self.inputs(rows)
        ref = self.logps(self.start, inputs).gather(1, key)[:, 0]

        def now() -> torch.Tensor:
            ratio = self.logps(self.network, inputs).gather(1, key)[:, 0] - ref
            return torch.zeros(len(sides)).index_add(0, owner, ratio)

        return now

    def prefer(self, pairs: Sequence[Pair], updates: int) -> None:
        """DPO on all pairs at each update."""
        chosen, rejected = (self.log_ratios(sides) for sides in zip(*pairs, strict=True))
        length = torch.ones(len(pairs))
        for _ in range(updates):
            better, worse = (implicit_rewards(side(), length, beta=BETA) for side in (chosen, rejected))
            self.step(preference_loss(better, worse, beta=BETA).mean())

    def imitate(self, rows: Sequence[Row], updates: int) -> None:
        """The log-likelihood of all rows at each update."""
        ratios = self.log_ratios([[row] for row in rows])
        for _ in range(updates):
            self.step(-ratios().mean())

    def step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def q(self, states: Sequence[tuple[str, tuple[int, ...]]]) -> np.ndarray:
        """log pi - log pi_ref of every key: (states, keys)."""
        inputs = self.inputs([(*state, 0) for state in states])
        with torch.no_grad():
            return (self.logps(self.network, inputs) - self.logps(self.start, inputs)).double().numpy()

    def margins(self, pairs: Sequence[Pair]) -> torch.Tensor:
        with torch.no_grad():
            chosen, rejected = (self.log_ratios(sides)() for sides in zip(*pairs, strict=True))
            return chosen - rejected


# Acting


def success(world: World, arm: Mapping[str, Any], learned: Learned | None, settings: Settings, seed: int) -> float:
    """Share of the episodes that succeed; all arms meet the same tasks."""
    rng, tasks = np.random.default_rng([seed, 1]), world.drawn("test", EPISODES, seed)
    pressed: list[tuple[int, ...]] = [()] * EPISODES
    for step in range(world.depth):
        states = list(zip(tasks, pressed, strict=True))
        q = np.zeros((EPISODES, world.actions)) if learned is None else learned.q(states)
        p = np.stack([world.policy(task, step, settings["acts"]) for task in tasks])
        if arm.get("learns") == "sft":
            p = p * np.exp(q)
            p /= p.sum(1, keepdims=True)
        pressed = [(*pressed[i], pick(arm, p[i], q[i], rng)) for i in range(EPISODES)]
    return float(np.mean([opens(world, *episode) for episode in zip(tasks, pressed, strict=True)]))


def pick(arm: Mapping[str, Any], p: np.ndarray, q: np.ndarray, rng: np.random.Generator) -> int:
    """The key that an arm presses, of some candidates that are drawn from p."""
    drawn = rng.choice(len(p), arm["candidates"], replace=not arm.get("distinct", False), p=p).tolist()
    if arm["choice"] == "vote":
        return Counter(drawn).most_common(1)[0][0]
    return max(drawn, key=lambda key: q[key])


def opens(world: World, task: str, pressed: Sequence[int]) -> bool:
    world.env.reset(seed=0, options={"task": task})
    for key in pressed:
        world.env.step(f"press {key}")
    return world.env.total > 0


STATED = {
    "rule": "copy",
    "depth": 3,
    "actions": 8,
    "weight": 9,  # of the agent that proposes in the search
    "acts": 9,  # of the one that acts
    "tasks": 200,
    "unseen": False,
    "iterations": 40,
    "updates": 600,
}

CLAIM = Claim(
    paper=12,
    says=(
        "On tasks like those that were searched, a Q-value model of single steps at least doubles the success of the "
        "agent that it chooses for, beats the same loss on whole episodes and a vote over as many samples, and helps a "
        "stronger agent."
    ),
    measures="return, which is 1 for success; trees solved, pairs, share of held-out pairs that are ordered rightly",
    arms={
        "no-q": {"candidates": 1, "choice": "vote"},
        "vote": {"candidates": 5, "choice": "vote"},
        "step-q": {"learns": "step-dpo", "candidates": 5, "distinct": True, "choice": "q"},
        "step-q-equal-samples": {"learns": "step-dpo", "candidates": 5, "choice": "q"},
        "trajectory-dpo": {
            "learns": "trajectory-dpo",
            "candidates": 5,
            "distinct": True,
            "choice": "q",
            "where": ["keys", "unseen-keys"],
        },
        "best-sft-vote": {"learns": "sft", "candidates": 5, "choice": "vote", "where": ["keys", "unseen-keys"]},
    },
    settings={
        "keys": STATED,
        "stronger-agent": {**STATED, "acts": 20},
        "unseen-keys": {**STATED, "unseen": True},
        "few-solved": {**STATED, "depth": 4, "actions": 12, "weight": 2, "acts": 2, "tasks": 400},
        "wrong-q": {**STATED, "depth": 4, "actions": 12, "weight": 12, "acts": 12, "rule": "sums"},
        "weak-agent": {**STATED, "depth": 4, "weight": 6, "acts": 6},
    },
    trial=trial,
    criteria=(
        Above("step-q", "no-q", 0.178, where="keys"),  # that is (9 / 16)^3, so that it doubles
        Above("step-q", "trajectory-dpo", where="keys"),
        Above("step-q-equal-samples", "vote", where="keys"),
        Above("step-q", "no-q", where="stronger-agent"),
    ),
    seeds=8,
    minutes=10,
    quick={"tasks": 30, "updates": 100},
)
