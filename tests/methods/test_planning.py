"""Search against its plain form and against exact distances; what the heuristics learn, save and take up again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import guerdon
from guerdon.control.policy import ControlPolicy
from guerdon.control.puzzles.domains import make_puzzle
from guerdon.control.puzzles.heuristics import make_heuristic
from guerdon.control.puzzles.networks import BatchNorm, CostToGo
from guerdon.control.puzzles.puzzle import Distances, Puzzle, Tables
from guerdon.control.spaces import Spec
from guerdon.errors import ConfigError, DataError, InvariantError
from guerdon.exact.mdp import shortest_paths
from guerdon.methods.base import get_method
from guerdon.methods.planning import a_star, deferred, lookahead, q_star, solve
from guerdon.training.config import ControlTraining
from guerdon.training.control import ControlRun
from guerdon.training.distributed import Distribution
from search_reference import graph_puzzle, node_states, reference

SMALL = {"hidden": (32,), "blocks": 1, "batch_size": 64, "copy_every": 10, "copy_below": 0.0}


def noise(puzzle: Puzzle, states: np.ndarray, width: int) -> np.ndarray:
    """Numbers that are a function of the state alone, with many ties."""
    keys = puzzle.keys(states)[:, None] >> np.arange(0, 3 * width, 3, dtype=np.uint64) % np.uint64(60)
    return (keys % np.uint64(9)).astype(np.float64) / 2


# The search


@pytest.mark.parametrize("name", ["pancake7", "pancake7?meta=2", "puzzle8", "lightsout3", "cube2"])
@pytest.mark.parametrize("weight", [1.0, 0.6, 0.0])
def test_search_is_its_plain_form(name, weight):
    """Costs, actions, nodes, calls and rounds, whatever the heuristic, with ties and re-opened nodes."""
    puzzle, rng = make_puzzle(name), np.random.default_rng(0)
    starts = puzzle.walk(rng.integers(0, 6, 5), rng)
    h = lambda states: noise(puzzle, states, 1)[:, 0]  # noqa: E731
    q = lambda states: puzzle.costs + noise(puzzle, states, puzzle.actions)  # noqa: E731
    for batch, stop in ((1, "bound"), (7, "bound"), (7, "first")):
        how = {"weight": weight, "batch": batch, "stop": stop, "max_nodes": 300}
        for edges, found in ((False, a_star(puzzle, h, starts, **how)), (True, q_star(puzzle, q, starts, **how))):
            for start, got in zip(starts, found, strict=True):
                plain = reference(puzzle, q if edges else h, start, edges, **how)
                assert {name: getattr(got, name) for name in plain} == plain


def test_instances_together_are_instances_alone():
    puzzle, rng = make_puzzle("puzzle8"), np.random.default_rng(1)
    starts = puzzle.walk(np.full(6, 15), rng)
    starts[4] = starts[1]  # the same state twice is two instances
    q = lambda states: 1 + noise(puzzle, states, 4)  # noqa: E731
    together = q_star(puzzle, q, starts, batch=3)
    for start, found in zip(starts, together, strict=True):
        alone = q_star(puzzle, q, start[None], batch=3)[0]
        assert (found.actions, found.nodes_generated, found.lower) == (
            alone.actions,
            alone.nodes_generated,
            alone.lower,
        )


def random_graph(seed: int, nodes: int = 40, actions: int = 4) -> tuple[Puzzle, np.ndarray]:
    """A graph with moves of different costs, and the exact costs (S,) to node 0."""
    rng = np.random.default_rng(seed)
    targets, costs = rng.integers(0, nodes, (nodes, actions)), rng.integers(1, 6, actions).astype(float)
    edges = np.full((nodes, nodes), np.inf)
    np.minimum.at(edges, (np.arange(nodes)[:, None], targets), costs)
    return graph_puzzle(targets, costs.tolist(), goal=0), shortest_paths(edges)[:, 0]


@pytest.mark.parametrize("seed", range(12))
def test_what_never_overestimates_finds_shortest_paths(seed):
    """h <= h*, and q <= c + h*: optimal at any batch. With c <= q too, the first goal is the best at batch 1."""
    puzzle, exact = random_graph(seed)
    nodes, rng = len(exact), np.random.default_rng(seed)
    starts, solvable = node_states(nodes, range(nodes)), np.isfinite(exact)
    known = np.where(solvable, exact, 50.0)
    beyond = known[(puzzle.expand(starts) == 0).argmax(-1)]  # (S, A) h* of where each action leads
    share = rng.random((nodes, puzzle.actions))
    h = share[:, 0] * known
    tables = {"below": share * (puzzle.costs + beyond), "between": puzzle.costs + share * beyond}
    tables = {name: np.floor(q * 8) / 8 for name, q in tables.items()}  # float32 holds them as they are

    def at(values):
        return lambda states: values[(states == 0).argmax(1)]

    for batch in (1, 3, 50):
        for found in (
            a_star(puzzle, at(h), starts, batch=batch),
            q_star(puzzle, at(tables["below"]), starts, batch=batch),
        ):
            np.testing.assert_allclose([s.cost for s in found], exact)
            assert [s.solved for s in found] == solvable.tolist()
            assert all(s.lower <= cost + 1e-9 for s, cost in zip(found, exact, strict=True))
    for found in (
        a_star(puzzle, at(h), starts, stop="first"),
        q_star(puzzle, at(tables["between"]), starts, stop="first"),
    ):
        np.testing.assert_allclose([s.cost for s in found], exact)
    for weight in (0.3, 0.7):  # a path that costs at most 1 / weight times the shortest one
        for found in (
            a_star(puzzle, at(h), starts, weight=weight),
            q_star(puzzle, at(tables["below"]), starts, weight=weight),
        ):
            assert all(s.cost <= cost / weight + 1e-9 for s, cost in zip(found, exact, strict=True) if s.solved)


def test_the_first_goal_may_be_worse_below_the_costs():
    """The condition of the test above is needed: some graph shows a worse path where q may lie below c."""
    worse = 0
    for seed in range(12):
        puzzle, exact = random_graph(seed)
        starts = node_states(len(exact), np.flatnonzero(np.isfinite(exact)))
        q = lambda states: np.zeros((len(states), 4))  # noqa: E731
        found = q_star(puzzle, q, starts, stop="first")
        worse += sum(s.cost > cost for s, cost in zip(found, exact[np.isfinite(exact)], strict=True))
        assert [s.cost for s in q_star(puzzle, q, starts)] == exact[np.isfinite(exact)].tolist()
    assert worse > 0


@pytest.mark.parametrize("name", ["puzzle8", "pancake7", "lightsout3", "pancake7?meta=2"])
def test_every_instance_small_enough_for_breadth_first_search(name):
    puzzle, rng = make_puzzle(name), np.random.default_rng(0)
    distances = Distances(make_puzzle(name.partition("?")[0]))
    starts = puzzle.walk(np.full(12, 60), rng)
    h = lambda states: distances.of(states) // 2  # noqa: E731
    for batch in (1, 20):
        for search, values in ((a_star, h), (q_star, lookahead(puzzle, h)), (q_star, deferred(puzzle, h))):
            found = search(puzzle, values, starts, batch=batch)
            assert [s.cost for s in found] == distances.of(starts).tolist()
            for start, solution in zip(starts, found, strict=True):
                state = start[None]
                for move in puzzle.primitive(solution.actions):
                    state = puzzle.next(state, np.array([move]))
                assert puzzle.solved(state)[0] and solution.cost == puzzle.costs[solution.actions].sum()


@pytest.mark.parametrize(
    ("name", "heuristic"),
    [("pancake7", "gap"), ("puzzle8", "manhattan"), ("puzzle8", "misplaced"),
     ("lightsout3", "misplaced"), ("cube2", "misplaced")],
)  # fmt: skip
def test_heuristics_without_learning_never_overestimate(name, heuristic):
    puzzle = make_puzzle(name)
    distances = Distances(puzzle, 6)
    states = puzzle.walk(np.random.default_rng(0).integers(0, 7, 4000), np.random.default_rng(1))
    d, h = distances.of(states), make_heuristic(heuristic, puzzle)(states)
    assert (h <= d).all() and h.max() > 1 and (h[d == 0] == 0).all()
    # and are consistent: a move that costs 1 takes away 1 at most
    children = make_heuristic(heuristic, puzzle)(puzzle.expand(states).reshape(-1, puzzle.places))
    assert (h[:, None] <= 1 + children.reshape(len(states), -1)).all()


def test_states_are_told_apart_where_their_keys_are_not():
    """All keys alike, or all but a few: the same search, node for node."""
    apart, together = (make_puzzle.__wrapped__("pancake6") for _ in range(2))
    vars(together)["zobrist"] = together.zobrist & np.uint64(1 << 20)
    states = np.unique(apart.walk(np.full(400, 9), np.random.default_rng(0)), axis=0)
    assert len(np.unique(together.keys(states))) <= 2 and len(np.unique(apart.keys(states))) == len(states)
    starts = states[:6]
    h = make_heuristic("misplaced", apart)
    for search, values in ((a_star, h), (q_star, lookahead(apart, h))):
        for one, other in zip(search(apart, values, starts), search(together, values, starts), strict=True):
            assert (one.actions, one.nodes_generated, one.node_bytes) == (
                other.actions,
                other.nodes_generated,
                other.node_bytes,
            )


def test_memory_is_that_of_nodes_and_of_edges():
    puzzle = make_puzzle("pancake6?meta=2")
    start = puzzle.walk(np.array([6]), np.random.default_rng(1))
    h = make_heuristic("gap", puzzle)
    nodes, edges = a_star(puzzle, h, start)[0], q_star(puzzle, lookahead(puzzle, h), start)[0]
    assert nodes.edge_bytes == 0 and edges.edge_bytes > 0
    kept, one = edges.edge_bytes / (4 * puzzle.actions), 6 + 49  # bytes of a node: its places and what is said of it
    assert kept == edges.heuristic_calls + 1  # the goal is kept too, and is not evaluated
    assert edges.node_bytes == one * kept and nodes.node_bytes >= one * (nodes.heuristic_calls + 1)


def test_an_action_of_infinite_cost_is_not_taken_and_nan_is_refused():
    puzzle = make_puzzle("pancake5")
    start = puzzle.walk(np.array([9]), np.random.default_rng(0))
    q = lambda states: np.where(np.arange(4) == 3, np.inf, np.ones((len(states), 4)))  # noqa: E731
    found = q_star(puzzle, q, start)[0]
    assert 3 not in found.actions and q_star(puzzle, lambda s: np.ones((len(s), 4)), start)[0].cost <= found.cost
    for search, shape in ((a_star, ()), (q_star, (4,))):
        with pytest.raises(InvariantError, match="nan"):
            search(puzzle, lambda states, shape=shape: np.full((len(states), *shape), np.nan), start)


def test_the_pool_grows_without_a_trace():
    """More nodes than there is room for at first, several times over."""
    puzzle = make_puzzle("puzzle8")
    start = puzzle.walk(np.array([200]), np.random.default_rng(0))
    found = q_star(puzzle, lambda states: np.ones((len(states), 4)), start, batch=50)[0]
    assert found.heuristic_calls > 20_000 and found.cost == Distances(puzzle).of(start)[0]


def test_giving_up_and_nothing_to_do():
    puzzle = make_puzzle("puzzle15")
    starts = np.stack([puzzle.goal, puzzle.walk(np.array([200]), np.random.default_rng(0))[0]])
    done, given_up = a_star(puzzle, lambda states: np.zeros(len(states)), starts, max_nodes=1000)
    assert (done.cost, done.actions, done.nodes_generated, done.heuristic_calls) == (0.0, [], 1, 0)
    assert not given_up.solved and given_up.actions == [] and 1000 <= given_up.nodes_generated < 1010
    assert given_up.cost == np.inf


def test_search_refuses_what_it_cannot_mean():
    puzzle = make_puzzle("puzzle8")
    with pytest.raises(DataError, match=r"uint8 \(N, 9\)"):
        a_star(puzzle, len, np.zeros((1, 16), np.uint8))
    with pytest.raises(ConfigError, match="weight"):
        a_star(puzzle, len, puzzle.goal[None], weight=1.5)


# The network


def network(q: bool, **options) -> CostToGo:
    from guerdon.control.networks import initialise

    puzzle = make_puzzle("pancake6")
    spec = Spec((36,), False, True, puzzle.actions, (), ())
    found = CostToGo(2, spec, "pancake6", q, (24, 16), blocks=2, **options)
    initialise(found, [3, 4])
    found.head.weight.data.mul_(20)
    return found


@pytest.mark.parametrize("q", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_folded_network_is_the_network(q, batch_norm):
    net, puzzle = network(q, batch_norm=batch_norm), make_puzzle("pancake6")
    states = torch.from_numpy(puzzle.walk(np.full(60, 9), np.random.default_rng(0))).view(2, 30, 6)
    with torch.no_grad():
        for _ in range(3):
            net(states)  # in training: moves the running statistics
        whole = net.eval()(states).clamp(min=0)
    assert whole.std() > 0.1
    for k in range(2):
        torch.testing.assert_close(net.inference(k)(states[k]), whole[k], atol=1e-5, rtol=1e-5)
        values = net.heuristic(k)
        for few in (1, 5, 30):  # compiled, or in torch
            found = torch.from_numpy(values(states[k, :few].numpy()))
            torch.testing.assert_close(found, whole[k, :few], atol=1e-5, rtol=1e-5)


def test_a_network_that_diverged_is_refused():
    puzzle = make_puzzle("pancake6")
    start = puzzle.walk(np.array([9]), np.random.default_rng(0))
    for part in ("layers.0", "blocks.1"):
        net = network(True).eval()
        net.get_parameter(f"{part}.linear.weight").data[0, 3] = torch.nan
        with pytest.raises(InvariantError, match="nan"):
            q_star(puzzle, net.heuristic(0), start)


def test_batch_norm_is_that_of_torch_seed_by_seed():
    ours, x = BatchNorm(2, 5), torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    theirs = [torch.nn.BatchNorm1d(5) for _ in range(2)]
    for _ in range(2):
        found = ours(x)
        torch.testing.assert_close(found, torch.stack([t(x[k]) for k, t in enumerate(theirs)]))
    ours.eval()
    torch.testing.assert_close(ours(x), torch.stack([t.eval()(x[k]) for k, t in enumerate(theirs)]))


def test_as_a_policy_it_takes_the_cheapest_action():
    puzzle = make_puzzle("pancake6")
    states = puzzle.walk(np.full(20, 9), np.random.default_rng(0))
    obs = torch.from_numpy(np.eye(6, dtype=np.float32)[states].reshape(1, 20, 36)).expand(2, -1, -1)
    q, v = network(True).eval(), network(False).eval()
    with torch.no_grad():
        of_q = q(torch.from_numpy(states).expand(2, -1, -1)).argmin(-1)
        children = torch.from_numpy(puzzle.expand(states))
        after = (
            v(children.flatten(0, 1).expand(2, -1, -1))
            .view(2, 20, 5)
            .masked_fill(torch.from_numpy(puzzle.solved(children.numpy())), 0.0)
        )
        assert (q.act(obs) == of_q).all() and (v.act(obs) == (1 + after).argmin(-1)).all()


# What learns it


def prepared(name: str, seeds: int = 1, seed: int = 0, env: str = "puzzle:pancake6", **options):
    """A method after setup, and its run."""
    method = get_method(name)(**{**SMALL, **options})
    config = ControlTraining(env=env, seeds=seeds, seed=seed, max_samples=64 * 40, log_every=20)
    run = ControlRun(method, config, Distribution(), Path())
    method.setup(run)
    return method, run


@pytest.mark.parametrize("name", ["davi", "qstar"])
def test_targets_are_the_published_ones(name):
    """min_a c + V(s'), or c + min_a' Q(s', a'), with 0 at the goal; before the first copy all that follows is 0."""
    method, _ = prepared(name, seeds=2, env="puzzle:pancake5?meta=2")
    method.follow()
    puzzle, states = method.puzzle, method.scrambled()
    values = method.network(states)
    with torch.no_grad():
        _, target = method.backup(states, values)
    assert set(target.ravel().tolist()) <= {1.0, 2.0}  # the costs alone
    method.copy(torch.zeros(2))
    before = method.streams.state_dict()
    learned, target = method.backup(states, values)
    for k in range(2):
        children = puzzle.expand(states[k].numpy())
        after = method.network.heuristic(k)(children.reshape(-1, 5))
        after = after.reshape(64, puzzle.actions, -1).min(-1) * ~puzzle.solved(children)
        full = puzzle.costs + after
        if name == "davi":
            np.testing.assert_allclose(target[k], full.min(1), rtol=1e-5)
            np.testing.assert_array_equal(learned[k].detach(), values[k].detach())
        else:
            method.streams.load_state_dict(before)
            drawn = method.streams.uniform("action", 64)[k].numpy()
            shares = np.exp(-3 * values[k].detach().numpy())
            actions = (np.cumsum(shares / shares.sum(1, keepdims=True), 1) < drawn[:, None]).sum(1)
            np.testing.assert_allclose(target[k], full[np.arange(64), actions], rtol=1e-5)
            np.testing.assert_array_equal(learned[k].detach(), values[k].detach()[np.arange(64), actions])


def test_the_target_follows_where_the_loss_is_low():
    method, _ = prepared("davi", seeds=2, copy_below=0.5)
    method.follow()
    method.update(method.scrambled())
    before = {name: value.clone() for name, value in method.target.state_dict().items()}
    method.copy(torch.tensor([0.4, 0.6]))
    for name, value in method.network.state_dict().items():
        torch.testing.assert_close(method.target.state_dict()[name][0], value[0])
        torch.testing.assert_close(method.target.state_dict()[name][1], before[name][1])
    assert method.followed.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["davi", "qstar"])
def test_a_seed_is_the_same_alone_and_beside_others(name):
    both, alone = prepared(name, seeds=2, seed=4), prepared(name, seed=5)
    rows = [list(method.learn(run)) for method, run in (both, alone)]
    for together, single in zip(*rows, strict=True):
        for metric, values in single.items():
            assert values[0] == pytest.approx(together[metric][1], rel=1e-3), metric


@pytest.mark.parametrize("name", ["davi", "qstar"])
def test_a_run_goes_on_bit_for_bit(name, tmp_path):
    method, run = prepared(name)
    learning = method.learn(run)
    next(learning)
    run.save(tmp_path)
    rest = list(learning)
    again, other = prepared(name)
    other.restore(tmp_path)
    assert list(again.learn(other)) == rest
    for key, value in method.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[key]), key


@pytest.mark.parametrize("name", ["davi", "qstar"])
def test_values_approach_the_distances(name, tmp_path):
    """From training to solving: pancakes of 5, with which every start is solved by as few flips as can be."""
    guerdon.train(
        name, env="puzzle:pancake5", hidden=(64,), blocks=1, batch_size=128, copy_every=40, copy_below=0.0,
        max_samples=128 * 800, log_every=100, eval_episodes=20, seeds=2, out=str(tmp_path / "run"),
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval/success"] == [1.0, 1.0] and rows[-1]["value/copies"][0] > 10
    puzzle = make_puzzle("pancake5")
    distances = Distances(puzzle)
    states = np.unique(puzzle.walk(np.full(2000, 8), np.random.default_rng(0)), axis=0)
    policy = ControlPolicy.load(tmp_path / "run" / "policy")
    for k in range(2):
        values = policy.actor.heuristic(k)(states)
        values = values if name == "davi" else values.min(1)
        unsolved = ~puzzle.solved(states)
        assert np.abs(values - distances.of(states))[unsolved].mean() < 0.3
        found = solve(tmp_path / "run", index=k, instances=30, weight=1.0, batch=1, scramble=8)
        (search,) = found["searches"]
        assert search["search"] == {"davi": "a-star", "qstar": "q-star"}[name] and search["solved"] == 1.0
        assert search["cost"] <= 1.05 * distances.of(np.array(found["starts"], np.uint8)).mean()
    assert guerdon.evaluate(tmp_path / "run")[0].means()["success"] == 1.0


def solves(found: dict) -> None:
    """Every search's moves, by name, lead from the start to the goal at the cost that is said."""
    puzzle = make_puzzle(found["puzzle"])
    for search in found["searches"]:
        for start, row in zip(found["starts"], search["instances"], strict=True):
            state = np.array([start], np.uint8)
            for move in row["moves"]:
                state = puzzle.next(state, np.array([puzzle.names.index(move)]))
            assert puzzle.solved(state)[0] and len(row["moves"]) == row["cost"]


def test_solving_with_meta_actions_and_refusals(tmp_path):
    _, run = prepared("davi", env="puzzle:pancake5?meta=2")
    run.export(tmp_path / "v")
    found = solve(tmp_path / "v", instances=3, scramble=4)
    assert found["puzzle"] == "pancake5?meta=2" and found["searches"][0]["solved"] == 1.0
    solves(json.loads(json.dumps(found)))
    solves(solve(tmp_path / "v", env="pancake5", instances=3, search=["a-star", "deferred"]))  # V needs no action set
    _, run = prepared("qstar", env="puzzle:pancake5")
    run.export(tmp_path / "q")
    found = solve(tmp_path / "q", instances=3, search=["q-star", "a-star", "deferred"])
    assert [search["search"] for search in found["searches"]] == ["q-star", "a-star", "deferred"]
    solves(found)
    for options, message in (
        ({"policy": "v", "search": ["q-star"]}, "needs Q"),
        ({"policy": "v", "env": "pancake6"}, "which is not pancake6"),
        ({"policy": "q", "env": "pancake5?meta=2"}, "which is not pancake5"),
        ({"policy": "v", "index": 1}, "has 1 seeds"),
        ({"policy": "q", "search": ["qstar"]}, "Did you mean 'q-star'"),
        ({"policy": "q", "instances": 0}, "instances is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            solve(**{**options, "policy": tmp_path / options["policy"]})


def test_solving_without_learning(tmp_path):
    found = guerdon.solve(
        "gap", env="pancake8?meta=2", instances=4, search=["q-star", "a-star"], weight=1.0, batch=1, seed=3
    )
    solves(found)
    (edges, nodes), distances = found["searches"], Distances(make_puzzle("pancake8"))
    assert edges["cost"] == nodes["cost"] == distances.of(np.array(found["starts"], np.uint8)).mean()
    assert edges["nodes_generated"] < nodes["nodes_generated"] / 5
    given_up = solve("manhattan", env="puzzle15", instances=2, max_nodes=200, search=["a-star"])["searches"][0]
    assert given_up["solved"] == 0.0 and given_up["cost"] is None and given_up["instances"][0]["cost"] is None
    for policy, env, message in (
        ("gap", None, "give --env"),
        ("gap", "puzzle8", "heuristic of pancakeN, not of puzzle8"),
        ("gab", "pancake8", "Did you mean 'gap'"),
    ):
        with pytest.raises(ConfigError, match=message):
            solve(policy, env=env)


def test_solving_from_the_command_line(capsys):
    from guerdon.cli import main

    argv = ["solve", "gap", "--env", "pancake6", "--instances", "2", "--search", "q-star", "a-star"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "pancake6 with gap, weight 0.6, batch 100" in said and said.count("100%") == 2
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    solves(found)
    assert main(["solve", "nothing"]) == 2
    assert "nothing is neither a run of davi or qstar nor a heuristic" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": "CartPole-v1"}, "CartPole-v1 is none"),
        ({"env": "puzzle:cube3", "temperature": 0}, "temperature"),
        ({"env": "puzzle:qube3"}, "Did you mean 'cube3'"),
    ],
)
def test_what_cannot_be_learned(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        guerdon.train("qstar", out=str(tmp_path / "run"), **options)


def test_tables_of_the_run_are_those_of_the_puzzle():
    method, run = prepared("qstar", env="puzzle:puzzle8?meta=2")
    assert isinstance(method.tables, Tables) and run.spec.actions == method.puzzle.actions == 20
