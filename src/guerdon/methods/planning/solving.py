"""Solving puzzles with a heuristic that a run has learned, or with one that needs no learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from guerdon.control.puzzles.domains import make_puzzle
from guerdon.control.puzzles.heuristics import HEURISTICS, make_heuristic
from guerdon.errors import ConfigError, near
from guerdon.fields import check_range
from guerdon.methods.planning.search import Heuristic, a_star, deferred, lookahead, q_star

if TYPE_CHECKING:
    from rich.table import Table

    from guerdon.control.puzzles.networks import CostToGo
    from guerdon.control.puzzles.puzzle import Puzzle

Search = Literal["q-star", "a-star", "deferred"]
MEANS = ("cost", "nodes_generated", "heuristic_calls", "iterations", "node_bytes", "edge_bytes")


def solve(
    policy: str | Path,
    *,
    env: str | None = None,
    search: Sequence[Search] = (),
    instances: int = 10,
    scramble: int = 0,
    weight: float = 0.6,
    batch: int = 100,
    max_nodes: int = 1_000_000,
    seed: int = 0,
    index: int = 0,
) -> dict[str, Any]:
    """Scramble a puzzle and solve it by search; plain data.

    `puzzle`, `heuristic`, `weight`, `batch`; `starts`, the scrambled states; and `searches`, each with its `search`,
    the share that it `solved`, means over what it solved (`cost`, `nodes_generated`, `heuristic_calls`, `iterations`,
    `node_bytes`, `edge_bytes`; None where it solved nothing), `seconds` of all instances together, and `instances`:
    what `guerdon.methods.planning.search.Solution` says of each, and the `moves`, primitive ones by name.

    Args:
        policy: a run directory of `davi` or `qstar`, the policy in it, or a heuristic that needs no learning: gap,
            manhattan or misplaced (`guerdon.control.puzzles.heuristics`).
        env: the puzzle; None is the one that the heuristic was learned for. A learned V goes with any action set.
        search: one or more of q-star, a-star and deferred (A* that orders children by their parent's h). Without any
            it is Q* where the heuristic can say q(s, a), and A* where it cannot. From Q follows h(s) = min_a Q(s, a),
            and from a heuristic without learning q(s, a) = c + h(s').
        instances: how many.
        scramble: moves of each random walk back from the goal; 0 is the puzzle's own number.
        weight, batch, max_nodes: see `guerdon.methods.planning.search.q_star`. Q* search keeps 4 bytes for each edge:
            a million nodes with 1884 actions are 7.5 GB.
        seed: of the scrambles.
        index: which of the run's seeds.

    Raises:
        ConfigError: a policy that is no heuristic or of another puzzle, or Q* without Q.
        DataError: there is no policy.
    """
    check_range({"instances": instances}, "instances", low=1)
    check_range({"scramble": scramble, "seed": seed, "index": index}, "scramble", "seed", "index")
    puzzle, h, q = _heuristics(policy, env, index)
    for each in search:
        if each not in (known := ("q-star", "a-star", "deferred")):
            raise ConfigError(f"no search is called '{each}'.{near(each, known)} There are {', '.join(known)}.")
    if "q-star" in search and q is None:
        raise ConfigError(f"{policy} has learned V, and Q* search needs Q: search by a-star, or train qstar.")
    starts = puzzle.walk(np.full(instances, scramble or puzzle.scramble), np.random.default_rng(seed))
    searches = []
    for each in search or (("q-star",) if q is not None else ("a-star",)):
        run: Any = a_star if each == "a-star" else q_star
        values = {"a-star": h, "q-star": q, "deferred": deferred(puzzle, h, weight)}[each]
        run(puzzle, values, starts, max_nodes=1)  # compiles the search, which is not to count
        found = run(puzzle, values, starts, weight=weight, batch=batch, max_nodes=max_nodes)
        solved = [solution for solution in found if solution.solved]
        searches.append(
            {
                "search": each,
                "solved": len(solved) / instances,
                **{name: float(np.mean([getattr(s, name) for s in solved])) if solved else None for name in MEANS},
                "seconds": max(solution.seconds for solution in found),
                "instances": [
                    dataclasses.asdict(solution)
                    | {"cost": solution.cost if solution.solved else None}
                    | {"moves": [puzzle.names[move] for move in puzzle.primitive(solution.actions)]}
                    for solution in found
                ],
            }
        )
    return {
        "puzzle": puzzle.name,
        "heuristic": str(policy),
        "weight": weight,
        "batch": batch,
        "starts": starts.tolist(),
        "searches": searches,
    }


def _heuristics(policy: str | Path, env: str | None, index: int) -> tuple[Puzzle, Heuristic, Heuristic | None]:
    """The puzzle, h, and q where there is one."""
    if str(policy) in HEURISTICS:
        if env is None:
            raise ConfigError(f"the heuristic '{policy}' was not learned in any puzzle: give --env, pancake10 say.")
        puzzle = make_puzzle(env)
        h = make_heuristic(str(policy), puzzle)
        return puzzle, h, lookahead(puzzle, h)
    network = _learned(policy)
    if index >= network.seeds:
        raise ConfigError(f"index is {index}, and {policy} has {network.seeds} seeds, the first of them 0.")
    puzzle = network.puzzle if env is None else make_puzzle(env)
    alike = puzzle.name.partition("?")[0] == network.puzzle.name.partition("?")[0]
    if not alike or (network.q and puzzle.actions != network.puzzle.actions):
        raise ConfigError(f"{policy} has learned {network.puzzle.name}, which is not {puzzle.name}.")
    values = network.heuristic(index)
    return (puzzle, lambda states: values(states).min(1), values) if network.q else (puzzle, values, None)


def _learned(policy: str | Path) -> CostToGo:
    from guerdon.control.policy import ControlPolicy
    from guerdon.control.puzzles.networks import CostToGo

    if not Path(policy).exists():
        raise ConfigError(
            f"{policy} is neither a run of davi or qstar nor a heuristic ({', '.join(HEURISTICS)})."
            f"{near(str(policy), HEURISTICS)}"
        )
    network: Any = ControlPolicy.load(policy).actor
    if not isinstance(network, CostToGo):
        raise ConfigError(f"{policy} has learned no cost to a goal: solve with a run of davi or qstar.")
    return network


def tables(found: Mapping[str, Any]) -> list[Table]:
    """What `solve` returned: the searches, and then the solutions of each."""
    from rich.table import Table

    how = f"{found['puzzle']} with {found['heuristic']}, weight {found['weight']:g}, batch {found['batch']}"
    summary = Table(title=f"{how}: means over what was solved", box=None, header_style="bold", pad_edge=False)
    for name in ("search", "solved", "cost", "nodes", "evaluated", "node KiB", "edge KiB", "seconds in all"):
        summary.add_column(name, justify="left" if name == "search" else "right")
    for each in found["searches"]:
        means = [each[name] for name in ("cost", "nodes_generated", "heuristic_calls")]
        means += [bytes_ and bytes_ / 1024 for bytes_ in (each["node_bytes"], each["edge_bytes"])]
        shown = ["" if mean is None else f"{mean:,.1f}" for mean in means]
        summary.add_row(each["search"], f"{each['solved']:.0%}", *shown, f"{each['seconds']:.2f}")
    listed = []
    for each in found["searches"]:
        table = Table(title=f"\n{each['search']}", box=None, header_style="bold", pad_edge=False)
        for name in ("instance", "cost", "nodes", "moves"):
            table.add_column(name, justify="left" if name == "moves" else "right")
        for i, one in enumerate(each["instances"]):
            cost = f"{one['cost']:g}" if one["solved"] else "not solved"
            table.add_row(str(i), cost, f"{one['nodes_generated']:,}", " ".join(one["moves"]))
        listed.append(table)
    return [summary, *listed]
