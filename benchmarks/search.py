"""A* and Q* search of Rubik's cube against deepxube: nodes per second with the same puzzle, network and batch.

The puzzle's table is read from deepxube's own cube, so that states, moves and their order are the same, and the network
is built of deepxube's parts with our weights. Its head is scaled so that all estimates lie between 0 and 1: both sides
must then return shortest paths. deepxube looks whether it is done one round later, which is why it generates more.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common

BAR = 10.0
NETWORKS = {"small": ((64, 64), 1), "published": ((5000, 1000), 4)}  # layers, residual blocks
WORK = {
    "small": (5, 5, 100, 4),
    "one by one": (5, 1, 1, 3),
    "published": (2, 2, 100, 3),
}  # instances, at once, popped at once, moves of the scrambles


def cube() -> Any:
    """deepxube's cube as one of our puzzles, and deepxube's own."""
    from deepxube.utils.command_line_utils import get_domain_from_arg

    from guerdon.control.puzzles.puzzle import Puzzle

    theirs, _ = get_domain_from_arg("cube3")
    moves = np.tile(np.arange(theirs.num_stickers), (len(theirs.atomic_actions), 1))
    for a, name in enumerate(theirs.atomic_actions):
        moves[a, theirs.rotate_idxs_new[name]] = theirs.rotate_idxs_old[name]
    return Puzzle.of("cube3", theirs.goal_colors, moves[None], [a ^ 1 for a in range(len(moves))], 30), theirs


def network(puzzle: Any, q: bool, size: str, precision: str) -> Any:
    import torch

    from guerdon.control.networks import initialise
    from guerdon.control.puzzles.networks import CostToGo
    from guerdon.control.spaces import Spec

    hidden, blocks = NETWORKS[size]
    spec = Spec((puzzle.places * puzzle.values,), False, True, puzzle.actions, (), ())
    net = CostToGo(1, spec, "cube3", q, hidden, blocks=blocks, batch_norm=False, precision=precision)  # type: ignore[arg-type]
    initialise(net, [0])
    net.eval()
    seen = torch.from_numpy(puzzle.walk(np.full(1000, 20), np.random.default_rng(1)))[None]
    with torch.no_grad():
        net.head.bias.zero_()
        net.head.weight.div_(10 * net(seen).std())
        net.head.bias.add_(0.5 - net(seen).mean())
    return net


def starts(puzzle: Any, instances: int, depth: int) -> np.ndarray:
    return puzzle.walk(np.full(instances, depth), np.random.default_rng(0))


def ours(
    precision: str, q: bool, size: str, instances: int, together: int, batch: int, depth: int
) -> Callable[[], Any]:
    from guerdon.methods.planning import a_star, q_star

    puzzle, _ = cube()
    values = network(puzzle, q, size, precision).heuristic()
    states, search = starts(puzzle, instances, depth), q_star if q else a_star

    def step() -> dict[str, Any]:
        found = []
        for i in range(0, instances, together):
            found += search(puzzle, values, states[i : i + together], batch=batch)
        return {"costs": [s.cost for s in found], "nodes": sum(s.nodes_generated for s in found)}

    return step


def deepxube(q: bool, size: str, instances: int, together: int, batch: int, depth: int) -> Callable[[], Any]:
    import torch
    from deepxube.domains.cube3 import Cube3Goal, Cube3State
    from deepxube.factories.heuristic_factory import build_heur_nnet_par, heuristic_factory
    from deepxube.factories.pathfinding_factory import get_pathfind_functions
    from deepxube.heuristics.resnet_fc import ResnetFCHeur
    from deepxube.nnet.pytorch_models import FullyConnectedModel, ResnetModel
    from deepxube.utils.command_line_utils import get_pathfind_from_arg

    puzzle, domain = cube()
    net = network(puzzle, q, size, "fp32")
    widths, blocks = NETWORKS[size]

    @heuristic_factory.register_class("same")
    class Same(ResnetFCHeur):
        def __init__(self, nnet_input: Any, out_dim: int, q_fix: bool):
            super().__init__(nnet_input, out_dim, q_fix, res_dim=widths[-1], num_blocks=blocks)
            stem = FullyConnectedModel(puzzle.places * puzzle.values, list(widths), ["RELU"] * len(widths))
            block = lambda: FullyConnectedModel(widths[-1], [widths[-1]] * 2, ["RELU", "LINEAR"])  # noqa: E731
            head = torch.nn.Linear(widths[-1], out_dim)
            self.heur = torch.nn.Sequential(stem, ResnetModel(block, blocks, "RELU"), head)

    build = build_heur_nnet_par(domain, "cube3", "same", {}, "QFix" if q else "V")
    same = build.get_nnet()
    layers = [m for m in same.modules() if isinstance(m, torch.nn.Linear)]
    for layer, own in zip(layers, [m.linear for m in (*net.layers, *net.blocks)] + [net.head], strict=True):
        layer.weight.data.copy_(own.weight[0])
        layer.bias.data.copy_(own.bias[0])
    values = build.get_nnet_fn(same, None, torch.device("cpu"), None)
    name = f"graph_{'q' if q else 'v'}.{batch}B_1.0W"
    functions = get_pathfind_functions(name.partition(".")[0], values, None)
    states, goal = [Cube3State(state) for state in starts(puzzle, instances, depth)], Cube3Goal(domain.goal_colors)

    @torch.inference_mode()
    def step() -> dict[str, Any]:
        found = []
        for i in range(0, instances, together):
            search, _ = get_pathfind_from_arg(domain, functions, name)
            search.add_instances(search.make_instances(states[i : i + together], [goal] * together))
            while not all(instance.finished() for instance in search.instances):
                search.step()
            found += search.instances
        return {"costs": [i.path_cost() for i in found], "nodes": sum(i.num_nodes_generated for i in found)}

    return step


def measure(work: str, q: bool, threads: int, repeats: int) -> dict[str, Any]:
    """Steps of both sides in turn, and the ratio of their nodes per second; path costs have to be equal."""
    size = work if work in NETWORKS else "small"
    what = q, size, *WORK[work]
    said = zip(("instances", "together", "batch", "scramble"), WORK[work], strict=True)
    found: dict[str, Any] = {**dict(said), "network": size}
    clock = "cpu" if threads == 1 else "wall"
    for precision in ("fp32", "bf16") if size == "published" else ("fp32",):
        with common.Side(threads, ours, precision, *what) as a, common.Side(threads, deepxube, *what) as b:
            own, peer = common.alternate(a, b, repeats)
        if own[0].result["costs"] != peer[0].result["costs"]:
            raise SystemExit(f"path costs differ: ours {own[0].result['costs']}, deepxube {peer[0].result['costs']}")
        per_node = own[0].result["nodes"] / peer[0].result["nodes"]
        times = common.ratio(peer, own, clock)
        found[precision] = {
            "ours": common.summary(own) | {"nodes": own[0].result["nodes"]},
            "deepxube": common.summary(peer) | {"nodes": peer[0].result["nodes"]},
            "ratio of nodes per second": {name: value * per_node for name, value in times.items()},
            "ratio of times to the same paths": times,
        }
    return found


def show(name: str, found: dict[str, Any], threads: int) -> None:
    clock = "cpu" if threads == 1 else "wall"
    for precision in set(found) & {"fp32", "bf16"}:
        row = found[precision]
        rates = [row[side]["nodes"] / row[side][clock]["median"] for side in ("ours", "deepxube")]
        r, t = row["ratio of nodes per second"], row["ratio of times to the same paths"]
        print(
            f"{name}, {precision}: {rates[0]:,.0f} nodes/s {clock} against {rates[1]:,.0f}: {r['median']:.1f}x "
            f"[{r['low']:.1f}, {r['high']:.1f}], bar {BAR:g}x; the same paths {t['median']:.1f}x sooner",
            flush=True,
        )


def main() -> None:
    options = common.arguments(__doc__ or "")
    rows: dict[str, Any] = {"bar": BAR, "deepxube": importlib.metadata.version("deepxube")}
    for work in WORK:
        for q in (True, False):
            name = f"{'Q*' if q else 'A*'} {work}"
            rows[name] = measure(work, q, **vars(options))
            show(name, rows[name], options.threads)
            common.save("search", options.threads, rows)


if __name__ == "__main__":
    main()
