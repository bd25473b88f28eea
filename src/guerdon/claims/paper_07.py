"""Q* search (Agostinelli et al. 2021, arXiv 2102.04518): what more actions cost, in pancakes and on Rubik's cube.

Q is learned for each action set, all seeds in one run. A* takes h(s) = min_a Q(s, a) of the primitive moves, for any
action set, as the cost to go is the same; so it is spared the wide head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.claims.base import Above, Claim, NotBelow
from guerdon.claims.training import one_thread, shared, trained
from guerdon.control.policy import ControlPolicy
from guerdon.control.puzzles.domains import PREFIX, make_puzzle
from guerdon.control.puzzles.puzzle import Distances, Puzzle
from guerdon.evaluation.metrics import Evaluation
from guerdon.methods.planning.search import Heuristic, a_star, lookahead, q_star


def trial(
    arm: Mapping[str, Any], seeds: Sequence[int], settings: Mapping[str, Any], directory: Path
) -> dict[int, Evaluation]:
    """One search in all action sets; each seed has instances of its own.

    `growth` is the base-2 logarithm of the nodes in the last action set over those in the first. With the number of
    actions behind the slash there are means over instances: `cost` over the shortest path's, `nodes` generated, states
    `evaluated`, `MiB` of nodes and edges, CPU `seconds`, and the share that was `solved`.
    """
    puzzles = [make_puzzle(name) for name in settings["puzzles"]]
    distances = Distances(puzzles[0], settings["scramble"])
    found = {}
    for k, seed in enumerate(seeds):
        rng = np.random.default_rng([7, seed])
        starts = puzzles[0].walk(np.full(settings["instances"], settings["scramble"]), rng)
        starts[puzzles[0].solved(starts)] = puzzles[0].expand(starts[:1])[0, 0]
        metrics: dict[str, float] = {}
        for puzzle in puzzles:
            with one_thread():
                values = heuristic(arm, puzzle, distances, seeds, k, settings, directory)
                metrics |= searched(arm, puzzle, values, starts, distances.of(starts), settings)
        first, last = (metrics[f"nodes/{puzzle.actions}"] for puzzle in (puzzles[0], puzzles[-1]))
        metrics = {"growth": math.log2(last / first), **metrics}
        found[seed] = Evaluation(["instances"], {name: np.array([x]) for name, x in metrics.items()}, "growth")
    return found


def heuristic(
    arm: Mapping[str, Any],
    puzzle: Puzzle,
    distances: Distances,
    seeds: Sequence[int],
    k: int,
    settings: Mapping[str, Any],
    directory: Path,
) -> Heuristic:
    """What guides the search of the k-th of the seeds."""
    if arm["learned"] is False:
        beyond = len(distances.counts)  # at least, where the table of distances ends
        return lookahead(puzzle, lambda states: np.where((d := distances.of(states)) < 0, beyond, d).astype(float))
    name = puzzle.name if arm["search"] == "q-star" else settings["puzzles"][0]
    options = {**settings["options"], "scramble": settings["scramble"]}
    samples = settings["updates"] * options["batch_size"]
    training = {"env": PREFIX + name, "seed": seeds[0], "seeds": len(seeds), "max_samples": samples}
    with shared(directory, options=options, training=training) as place:
        run = trained("qstar", options, training | {"log_every": 500, "eval_episodes": 1}, place / "qstar")
    network: Any = ControlPolicy.load(run.path / "policy").actor
    values = network.heuristic(k)
    return values if arm["search"] == "q-star" else lambda states: values(states).min(1)


def searched(
    arm: Mapping[str, Any],
    puzzle: Puzzle,
    values: Heuristic,
    starts: np.ndarray,
    shortest: np.ndarray,
    settings: Mapping[str, Any],
) -> dict[str, float]:
    """The metrics of one action set."""
    search = q_star if arm["search"] == "q-star" else a_star
    how = {"weight": settings["weight"], "max_nodes": settings["max_nodes"]}
    search(puzzle, values, starts[:1], weight=0.0, max_nodes=10)  # compiles
    began = time.process_time()
    solutions = search(puzzle, values, starts, **how)
    seconds = time.process_time() - began
    costs = [s.cost / least for s, least in zip(solutions, shortest, strict=True) if s.solved]
    named = {
        "cost": np.mean(costs) if costs else math.nan,
        "nodes": np.mean([s.nodes_generated for s in solutions]),
        "evaluated": np.mean([s.heuristic_calls for s in solutions]),
        "MiB": np.mean([s.node_bytes + s.edge_bytes for s in solutions]) / 2**20,
        "seconds": seconds / len(solutions),
        "solved": len(costs) / len(solutions),
    }
    return {f"{name}/{puzzle.actions}": float(value) for name, value in named.items()}


LEARNING = {
    "hidden": [256, 256],
    "blocks": 0,
    "batch_norm": False,
    "batch_size": 512,
    "copy_every": 150,
    "copy_below": 0.0,
}
PANCAKES: dict[str, Any] = {
    "puzzles": ["pancake8", "pancake8?meta=2"],
    "scramble": 11,
    "instances": 50,
    "max_nodes": 100_000,
    "updates": 6000,
    "options": {**LEARNING, "backed_up": "uniform", "lr_decay": 1.0},
}
CUBE: dict[str, Any] = {
    "puzzles": ["cube3", "cube3?meta=3"],
    "scramble": 5,
    "instances": 20,
    "max_nodes": 300_000,
    "updates": 2000,
    "options": {**LEARNING, "backed_up": "boltzmann", "lr_decay": 0.9985},
}

CLAIM = Claim(
    paper=7,
    says=(
        "Where actions become many, A* search generates nodes in proportion, and Q* search, which generates the child "
        "of an edge only when that edge is the best, hardly more than before, at a small cost in path length."
    ),
    measures="doublings of the generated nodes, from the primitive moves to the largest action set",
    arms={
        "q-star": {"search": "q-star", "learned": True},
        "a-star": {"search": "a-star", "learned": True},
        "exact": {"search": "q-star", "learned": False},
    },
    settings={
        "pancake8": {**PANCAKES, "weight": 1.0},
        "pancake8-weighted": {**PANCAKES, "weight": 0.6},
        "cube3-156": {**CUBE, "puzzles": ["cube3", "cube3?meta=2"], "weight": 1.0},
        "cube3": {**CUBE, "weight": 1.0},
        "cube3-weighted": {**CUBE, "weight": 0.6},
    },
    trial=trial,
    criteria=(
        *(
            criterion
            for where in ("pancake8", "pancake8-weighted")
            for criterion in (
                Above("q-star", "a-star", 1.0, where),  # half the growth
                *(Above("q-star", "a-star", 0.0, where, f"nodes/{actions}") for actions in (7, 49)),
                *(NotBelow("q-star", "exact", 0.1, where, f"cost/{actions}") for actions in (7, 49)),
            )
        ),
        Above("q-star", "a-star", 1.0, "cube3-156"),
        Above("q-star", "a-star", 0.0, "cube3-156", "nodes/156"),
        Above("q-star", "a-star", 1.0, "cube3"),
        *(Above("q-star", "a-star", 0.0, "cube3", f"nodes/{actions}") for actions in (12, 1884)),
    ),
    seeds=8,
    together=8,
    minutes=25,
    quick={"updates": 300, "instances": 5, "max_nodes": 5000},
    quick_seeds=2,
)
