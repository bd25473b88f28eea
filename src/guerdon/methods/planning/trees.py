"""Trees of searches in environments in words: an agent proposes, the trees are kept, and feedback is made of them.

A line of the store is one tree as JSON. Beside it stands what can be learned from all of them, one file for each kind:
`step-preference` (single steps after a common history), `preference` (whole episodes) and `sft` (the best ones).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.control.streams import generator_of
from guerdon.errors import DataError
from guerdon.feedback.records import Message
from guerdon.feedback.writers import write_feedback
from guerdon.language.sampling.base import Sampling, completion_seeds
from guerdon.methods.planning.mcts import MCTS, Ask, Node, Search, search, together
from guerdon.methods.planning.step_q import Chosen, best_end, shortened, step_pairs, trajectory_pair
from guerdon.tasks.collect import kept
from guerdon.tasks.text.agent import NOTHING, Agent, Turn, opening, parse_action
from guerdon.tasks.text.trajectories import Store, collection_of

if TYPE_CHECKING:
    from guerdon.tasks.text.base import TextEnv

Row = dict[str, Any]


@dataclass(frozen=True)
class Tree:
    """What a search in a task has found.

    Attributes:
        env: spec of the environment.
        task, seed: of the reset.
        policy: name of the agent.
        opening: what it was told first.
        root: where the task begins; actions are replies, word for word.
        index: number within its collection.
        collection: identity of the collection.
    """

    env: str
    task: str
    seed: int
    policy: str
    opening: Message
    root: Node
    index: int = 0
    collection: str = ""

    def row(self) -> Row:
        """The line that the store keeps; `of_row` reads it back."""
        return {name: getattr(self, name) for name in _FIELDS} | {"root": self.root.as_dict()}

    @classmethod
    def of_row(cls, row: Row) -> Tree:
        return cls(**{name: row[name] for name in _FIELDS}, root=Node.from_dict(row["root"]))

    def messages(self, node: Node) -> list[Message]:
        """The conversation up to a node, which ends with what is seen there."""
        return conversation(self.opening, node)


_FIELDS = ("env", "task", "seed", "policy", "opening", "index", "collection")


def conversation(opening: Message, node: Node) -> list[Message]:
    """The steps to a node as turns after the opening."""
    turns = [
        {"role": role, "content": content}
        for step in node.path[1:]
        for role, content in (("assistant", step.action), ("user", step.observation))
    ]
    return [opening, *turns]


def grow(
    make: Callable[[], TextEnv],
    agent: Agent,
    numbers: Iterable[int],
    how: MCTS,
    *,
    split: str = "train",
    thoughts: bool = False,
    seed: int = 0,
    collection: str = "",
) -> Iterator[Tree]:
    """Search the tasks of a split, with the proposals of an agent; the trees, as they are finished.

    Args:
        make: makes an environment; each search has its own.
        numbers: of the searches. Tasks come in an order that the seed says; after the last one the first comes again,
            searched otherwise.
        thoughts: whether replies are to hold thoughts.
        seed: of everything; a tree depends on its number and the other arguments, not on what is searched beside it.
        collection: goes into the trees.
    """
    begun: list[tuple[int, TextEnv, int, Message]] = []

    def searches() -> Iterator[Search]:
        for index in numbers:
            env, reset = make(), completion_seeds(1, "tree", seed, index)[0] >> 32
            tasks = env.tasks(split)  # type: ignore[arg-type]
            drawn = generator_of(seed, "tasks").permutation(len(tasks))
            observation, info = env.reset(seed=reset, options={"task": tasks[drawn[index % len(tasks)]]})
            begun.append((index, env, reset, opening(env, observation, thoughts)))
            act = lambda node, reply: parse_action(reply, node.info.get("actions"))  # noqa: E731
            yield search(env, observation, how, reset, info=info, act=act)

    for number, root in together(searches(), _proposer(agent, thoughts)):
        index, env, reset, first = begun[number]
        yield Tree(env.name, env.task, reset, agent.name, first, root, index, collection)


def _proposer(agent: Agent, thoughts: bool) -> Callable[[list[Ask]], list[list[str]]]:
    def propose(asks: list[Ask]) -> list[list[str]]:
        turns = []
        for node, _, seed, env in asks:
            first = opening(env, node.path[0].observation, thoughts)  # type: ignore[arg-type]
            actions = node.info.get("actions")
            turns.append(Turn(conversation(first, node), env, actions, seed, thoughts))  # type: ignore[arg-type]
        replies: dict[int, list[str]] = {}
        for n in {ask.n for ask in asks}:
            which = [i for i, ask in enumerate(asks) if ask.n == n]
            replies |= zip(which, agent.propose([turns[i] for i in which], n), strict=True)
        return [[reply if reply.strip() else NOTHING for reply in replies[i]] for i in range(len(asks))]

    return propose


class Trees(Store):
    """`Store` of trees."""

    read = staticmethod(Tree.of_row)


def step_preference(trees: Iterable[Tree], *, chosen: Chosen = "argmax", min_gap: float = 0.0) -> list[Row]:
    """The pairs of `step_pairs`, each after its history: only the tokens of the step itself are learned."""
    return [
        {
            "prompt": tree.messages(pair.node),
            "chosen": [_said(pair.chosen)],
            "rejected": [_said(pair.rejected)],
            "score_chosen": pair.chosen.value,
            "score_rejected": pair.rejected.value,
            **_about(tree),
            "step": pair.node.depth,
        }
        for tree in trees
        for pair in step_pairs(tree.root, chosen=chosen, min_gap=min_gap)
        if NOTHING not in (pair.chosen.action, pair.rejected.action)
    ]


def preference(trees: Iterable[Tree]) -> list[Row]:
    """The pairs of `trajectory_pair`: all replies of both episodes are learned."""
    rows = []
    for tree in trees:
        pair = trajectory_pair(tree.root)
        if pair is not None:
            sides = {"chosen": _episode(tree, pair[0]), "rejected": _episode(tree, pair[1])}
            scores = {"score_chosen": pair[0].reward, "score_rejected": pair[1].reward}
            rows.append({"prompt": [tree.opening], **sides, **scores, **_about(tree)})
    return rows


def sft(trees: Iterable[Tree]) -> list[Row]:
    """The best episode of each tree, where it is a success, as a demonstration."""
    ends = [(tree, best_end(tree.root)) for tree in trees]
    return [{"prompt": [tree.opening], "completion": _episode(tree, end), **_about(tree)} for tree, end in ends if end]


def _said(node: Node) -> Message:
    return {"role": "assistant", "content": node.action}


def _episode(tree: Tree, end: Node) -> list[Message]:
    """All turns but the opening and what was seen last."""
    return tree.messages(end)[1:-1]


def _about(tree: Tree) -> Row:
    return {"env": tree.env, "task": tree.task}


def collect_trees(
    env: str,
    *,
    policy: str,
    out: str | Path,
    trees: int = 100,
    split: str = "train",
    how: MCTS | None = None,
    chosen: Chosen = "argmax",
    min_gap: float = 0.0,
    max_length: int = 2048,
    thoughts: bool = False,
    sampling: Sampling,
    sampler: str = "local",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Row:
    """Search tasks of an environment in words, keep the trees in `out`, and write feedback beside it.

    Called again with the same arguments after it was killed, it goes on where it stopped. Feedback of each kind is
    written to `NAME.KIND.jsonl` where there is any.

    Args:
        env: spec of the environment, see `guerdon.tasks.text.make_text`.
        policy: who proposes, see `guerdon.tasks.text.collect.make_agent`.
        trees: how many; each task of the split in turn.
        chosen, min_gap: see `step_pairs`.
        max_length: tokens of a history with one step, where the policy has a tokenizer: of longer histories the oldest
            turns are left out of step preferences, so that `dpo` with this `max_length` cuts no step.

    Returns:
        Plain data: `trees`, `resumed` (found in the store), `solved` (share with a success), `nodes` (mean), `feedback`
        (file -> rows).

    Raises:
        ConfigError: an environment, policy or option that there is not.
        DataError: a store that cannot be read or was begun with other arguments, or a tree without a single pair.
    """
    from guerdon.tasks.text import make_text
    from guerdon.tasks.text.collect import make_agent

    how = how or MCTS()
    how.check()
    store, first = Trees(out), make_text(env)
    first.tasks(split)  # type: ignore[arg-type]
    agent = make_agent(policy, sampling, sampler)
    collection = collection_of(env, split, agent.identity, asdict(how), thoughts, seed)
    found = list(store)
    if any(tree.collection != collection for tree in found):
        raise DataError(f"{out} holds trees that were searched otherwise: choose another --out, or delete it.")
    there, made = {tree.index for tree in found}, iter([first])
    progress(len(there), trees)
    with kept(store.path):
        for tree in grow(
            lambda: next(made, None) or make_text(env),
            agent,
            [index for index in range(trees) if index not in there],
            how,
            split=split,
            thoughts=thoughts,
            seed=seed,
            collection=collection,
        ):
            store.append(tree)
            found.append(tree)
            progress(len(found), trees)
    found = sorted((tree for tree in found if tree.index < trees), key=lambda tree: tree.index)
    rows = step_preference(found, chosen=chosen, min_gap=min_gap)
    if (tokenizer := getattr(agent, "tokenizer", None)) is not None:
        for row in rows:
            steps = [row[side][0]["content"] for side in ("chosen", "rejected")]
            row["prompt"] = shortened(row["prompt"], steps, tokenizer, max_length)
    kinds = {"step-preference": rows, "preference": preference(found), "sft": sft(found)}
    files = {str(store.path.with_name(f"{store.path.stem}.{kind}.jsonl")): made for kind, made in kinds.items() if made}
    return {
        "trees": len(found),
        "resumed": len(there),
        "solved": float(np.mean([best_end(tree.root) is not None for tree in found])),
        "nodes": float(np.mean([sum(1 for _ in tree.root.walk()) for tree in found])),
        "feedback": {file: write_feedback(file, rows) for file, rows in files.items()},
    }
