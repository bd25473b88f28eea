"""Solving puzzles with a heuristic that a run has learned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from guerdon.control.puzzles.domains import make_puzzle
from guerdon.errors import ConfigError
from guerdon.fields import check_range
from guerdon.methods.planning.search import a_star, q_star


def solve(
    policy: str | Path,
    *,
    env: str | None = None,
    search: Literal["auto", "a-star", "q-star"] = "auto",
    instances: int = 10,
    scramble: int = 0,
    weight: float = 0.6,
    batch: int = 100,
    max_nodes: int = 1_000_000,
    seed: int = 0,
    index: int = 0,
) -> dict[str, Any]:
    """Scramble a puzzle and solve it by search with a learned heuristic; plain data.

    `puzzle`, `search`, means over the instances under `solved`, and over the solved ones under `cost`,
    `nodes_generated`, `heuristic_calls`, `seconds` (None where none is); `instances`, each with its `start`, the
    `moves` (primitive ones) that solve it, and what `guerdon.methods.planning.search.Solution` says of the search.

    Args:
        policy: a run directory of `davi` or `qstar`, or the policy in it.
        env: the puzzle; None is the one that the heuristic was learned for.
        search: "auto" is Q* where Q was learned, and A* where V was. A* with Q takes h(s) = min over a of Q(s, a).
        instances: how many.
        scramble: moves of each random walk back from the goal; 0 is the puzzle's own number.
        weight, batch, max_nodes: see `guerdon.methods.planning.search.q_star`.
        seed: of the scrambles.
        index: which of the run's seeds.

    Raises:
        ConfigError: a policy that is no heuristic or of another puzzle, or Q* without Q.
        DataError: there is no policy.
    """
    from guerdon.control.policy import ControlPolicy
    from guerdon.control.puzzles.networks import CostToGo

    check_range({"instances": instances}, "instances", low=1)
    check_range({"scramble": scramble, "index": index}, "scramble", "index")
    path = Path(policy)
    loaded = ControlPolicy.load(path / "policy" if (path / "policy").is_dir() else path)
    network: Any = loaded.actor
    if not isinstance(network, CostToGo):
        raise ConfigError(f"{policy} has learned no cost to a goal: solve with a run of davi or qstar.")
    puzzle = network.puzzle if env is None else make_puzzle(env)
    if (puzzle.goal.tolist(), puzzle.actions) != (network.puzzle.goal.tolist(), network.puzzle.actions):
        raise ConfigError(f"{policy} has learned {network.puzzle.name}, which is not {puzzle.name}.")
    if index >= network.seeds:
        raise ConfigError(f"index is {index}, and {policy} has {network.seeds} seeds, the first of them 0.")
    if search == "auto":
        search = "q-star" if network.q else "a-star"
    elif search == "q-star" and not network.q:
        raise ConfigError(f"{policy} has learned V, and Q* search needs Q: search by a-star, or train qstar.")
    rng = np.random.default_rng(seed)
    starts = puzzle.walk(np.full(instances, scramble or puzzle.scramble), rng)
    values = network.heuristic(index)
    if search == "q-star":
        found = q_star(puzzle, values, starts, weight=weight, batch=batch, max_nodes=max_nodes)
    else:
        h = (lambda states: values(states).min(1)) if network.q else values
        found = a_star(puzzle, h, starts, weight=weight, batch=batch, max_nodes=max_nodes)
    solved = [solution for solution in found if solution.solved]
    measures = ("cost", "nodes_generated", "heuristic_calls", "seconds")
    return {
        "puzzle": puzzle.name,
        "search": search,
        "solved": len(solved) / instances,
        **{name: float(np.mean([getattr(s, name) for s in solved])) if solved else None for name in measures},
        "instances": [
            {"start": start.tolist(), "moves": puzzle.primitive(solution.actions)} | dataclasses.asdict(solution)
            for start, solution in zip(starts, found, strict=True)
        ],
    }
