"""Acting in words: the history becomes a conversation, the reply becomes an action, many episodes at once.

An agent is whoever answers conversations (`Agent`): a language policy, blind chance, the environment's own expert. What
is said before, how replies are read and how episodes go on is written here alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from guerdon.control.streams import generator_of
from guerdon.errors import ConfigError, DataError
from guerdon.feedback.records import Message
from guerdon.language.sampling.base import Sampler, Sampling, completion_seeds
from guerdon.language.templates import prompt_ids
from guerdon.tasks.text.trajectories import Step, Trajectory

if TYPE_CHECKING:
    from guerdon.tasks.text.base import TextEnv

PLAIN = "Reply with the action alone."
THOUGHTS = "Reply with two lines: 'Thought: ' and what you think, then 'Action: ' and the action."
AT_ONCE = 32
_TAG = re.compile(r"^[\s*#>]*(thought|action|observation)s?(?:\s+\d+)?[\s*]*:[ \t*]*", re.IGNORECASE | re.MULTILINE)
NOTHING = "(nothing)"  # written where an agent said nothing, which no chat can hold


@dataclass(frozen=True)
class Turn:
    """What an agent is to answer.

    Attributes:
        messages: the conversation so far; the last message is what it sees.
        env: where it acts, for agents that look behind the words; nobody may step it.
        actions: those that there are, where they are known.
        seed: of the chance in its answer.
        thoughts: whether it was asked for thoughts.
    """

    messages: list[Message]
    env: TextEnv
    actions: list[str] | None
    seed: int
    thoughts: bool = False

    def reply(self, action: str) -> str:
        """An action as a reply, without a thought."""
        return f"Action: {action}" if self.thoughts else action


class Agent(Protocol):
    """Who acts.

    Attributes:
        name: by which its replies are told from those of others.
        identity: what its replies depend on beside the turns; a collection is continued by the same one only.
    """

    name: str
    identity: Any

    def propose(self, turns: Sequence[Turn], n: int = 1) -> list[list[str]]:
        """n replies to each turn, the one to be taken first."""
        ...


def opening(env: TextEnv, observation: str, thoughts: bool = False) -> Message:
    """What an agent is told first: the instruction, how to reply, and what it sees.

    It is one message of the user, because not every chat template takes one of the system.
    """
    instruction = f"{env.instruction} {THOUGHTS if thoughts else PLAIN}".strip()
    return {"role": "user", "content": f"{instruction}\n\n{observation}"}


def parse_action(reply: str, actions: Sequence[str] | None = None) -> str:
    """The action in a reply: what follows the first `Action:` up to the next tag, or else the reply without thoughts.

    Tags are read in any case, numbered or in bold. Of known actions, the first line that is one of them, whatever its
    case, quotes and full stop, is the action, and the first line otherwise; of unknown ones all the lines are.
    """
    parts = _TAG.split(reply)
    tagged = list(zip(parts[1::2], parts[2::2], strict=True))
    found = next((text for tag, text in tagged if tag.lower() == "action"), None)
    if found is None:
        found = "" if tagged and not parts[0].strip() else parts[0]
    lines = [line.strip().strip("`'\"*").strip() for line in found.strip().splitlines()]
    if actions is None:
        return "\n".join(lines)
    known = {_loose(action): action for action in actions}
    return next((known[_loose(line)] for line in lines if _loose(line) in known), lines[0] if lines else "")


def _loose(action: str) -> str:
    return " ".join(action.casefold().split()).rstrip(".!")


class Random:
    """Takes one of the actions that there are, each with the same chance."""

    name = identity = "random"

    def propose(self, turns: Sequence[Turn], n: int = 1) -> list[list[str]]:
        return [[turn.reply(_any(turn, i)) for i in range(n)] for turn in turns]


def _any(turn: Turn, number: int = 0) -> str:
    if turn.actions is None:
        raise ConfigError(f"{turn.env.name} does not say which actions there are, so that none can be taken at random.")
    return turn.actions[int(generator_of(turn.seed, f"random {number}").integers(len(turn.actions)))]


class Scripted:
    """Does what the environment's expert does, who may know what is hidden from others."""

    name = identity = "scripted"

    def propose(self, turns: Sequence[Turn], n: int = 1) -> list[list[str]]:
        return [[turn.reply(turn.env.expert())] * n for turn in turns]


class LanguageAgent:
    """A language policy as an agent.

    Args:
        name: of the model.
        sampler: draws the replies.
        tokenizer: with a chat template.
        sampling: how they are drawn.
        identity: of the weights.
        context: tokens that the model can read, prompt and reply together. Of a conversation that is longer the oldest
            turns after the first message are left out, and `shortened` counts it; None is no limit.
    """

    def __init__(
        self,
        name: str,
        sampler: Sampler,
        tokenizer: Any,
        sampling: Sampling,
        identity: Any = "",
        context: int | None = None,
    ) -> None:
        self.name, self.identity = name, identity
        self.sampler, self.tokenizer, self.sampling, self.context = sampler, tokenizer, sampling, context
        self.shortened = 0

    def propose(self, turns: Sequence[Turn], n: int = 1) -> list[list[str]]:
        ids = [self._ids(turn.messages) for turn in turns]
        seeds = [completion_seeds(n, "agent", turn.seed) for turn in turns]
        return [[c.text for c in completions] for completions in self.sampler.sample(ids, seeds, self.sampling)]

    def _ids(self, messages: list[Message]) -> list[int]:
        first, *rest = messages
        ids = prompt_ids(messages, self.tokenizer)
        room = None if self.context is None else self.context - self.sampling.max_new_tokens
        self.shortened += room is not None and len(ids) > room
        while room is not None and len(ids) > room:
            if len(rest) < 2:
                raise DataError(
                    f"what {self.name} sees has {len(ids)} tokens, with a reply of {self.sampling.max_new_tokens} more "
                    f"than the {self.context} that it can read: let it say less (--max-new-tokens), or take a model "
                    "that reads more."
                )
            rest = rest[2:]
            ids = prompt_ids([first, *rest], self.tokenizer)
        return ids


@dataclass
class Episode:
    """An episode under way: `turn` is what the agent is to answer next, `take` takes its reply."""

    env: TextEnv
    seed: int
    messages: list[Message]
    info: dict[str, Any]
    thoughts: bool = False
    steps: list[Step] = field(default_factory=list)
    over: tuple[bool, bool] = (False, False)  # terminated, truncated

    @classmethod
    def begin(cls, env: TextEnv, task: str | None, seed: int, thoughts: bool = False) -> Episode:
        observation, info = env.reset(seed=seed, options={"task": task})
        return cls(env, seed, [opening(env, observation, thoughts)], info, thoughts)

    def turn(self, seed: int) -> Turn:
        return Turn(list(self.messages), self.env, self.info.get("actions"), seed, self.thoughts)

    def take(self, reply: str, speaker: str, learn: bool = True) -> None:
        """Act as a reply says; `learn` is whether the reply is `speaker`'s own, to be learned."""
        actions = self.info.get("actions")
        action = parse_action(reply, actions)
        seen = self.messages[-1]["content"]
        observation, reward, *self.over, self.info = self.env.step(action)  # type: ignore[assignment]
        said, learn = (reply, learn) if reply.strip() else (NOTHING, False)
        self.steps.append(Step(seen, said, action, reward, speaker, learn, actions is None or action in actions))
        self.messages += [{"role": "assistant", "content": said}, {"role": "user", "content": observation}]

    def trajectory(self, policy: str, index: int = 0, collection: str = "") -> Trajectory:
        """The episode when it is over."""
        env, (terminated, truncated) = self.env, self.over
        return Trajectory(
            env.name,
            env.task,
            env.split_of(env.task),
            self.seed,
            policy,
            tuple(self.steps),
            env.observation,
            terminated,
            truncated,
            bool(self.info["success"]),
            index,
            collection,
        )


def play(
    make: Callable[[], TextEnv],
    agents: Sequence[Agent],
    episodes: Iterable[int],
    *,
    split: str = "train",
    n: int = 1,
    noise: float = 0.0,
    thoughts: bool = False,
    seed: int = 0,
    collection: str = "",
) -> Iterator[Trajectory]:
    """Let agents act in turn, up to `AT_ONCE` episodes side by side; the trajectories, in the order of their numbers.

    An episode depends on its number and the other arguments, not on what is played beside it. Every agent meets every
    task `n` times, with the same chance in the environment. Tasks come in an order that the seed says; after the last
    one the first comes again, with another chance.

    Args:
        make: makes an environment.
        agents: at least one.
        episodes: numbers of those to play, ascending.
        split: whose tasks.
        n: episodes of each agent and task.
        noise: chance that a step takes a random action in the agent's place, which is not learned.
        thoughts: whether replies are to hold thoughts.
        seed: of everything.
        collection: goes into the trajectories.
    """
    free: list[TextEnv] = [make()]
    tasks = free[0].tasks(split)  # type: ignore[arg-type]
    drawn = generator_of(seed, "tasks").permutation(len(tasks))
    left, order = iter(episodes), []  # numbers begun and not yet given, in their order
    live: dict[int, Episode] = {}
    done: dict[int, Trajectory] = {}
    while True:
        while len(live) < AT_ONCE and (index := next(left, None)) is not None:
            round_ = index // len(agents) // n
            env = free.pop() if free else make()
            reset = completion_seeds(1, "episode", seed, round_)[0] >> 32
            live[index] = Episode.begin(env, tasks[drawn[round_ % len(tasks)]], reset, thoughts)
            order.append(index)
        if not live:
            return
        for number, agent in enumerate(agents):
            turns: dict[int, Turn] = {}
            for index in [index for index in live if index % len(agents) == number]:
                episode = live[index]
                turn = episode.turn(completion_seeds(1, "turn", seed, index, len(episode.steps))[0])
                if noise and generator_of(turn.seed, "noise").random() < noise:
                    episode.take(turn.reply(_any(turn)), "noise", learn=False)
                else:
                    turns[index] = turn
            for index, replies in zip(turns, agent.propose(list(turns.values())) if turns else [], strict=True):
                live[index].take(replies[0], agent.name)
        for index in [index for index, episode in live.items() if any(episode.over)]:
            episode = live.pop(index)
            done[index] = episode.trajectory(agents[index % len(agents)].name, index, collection)
            free.append(episode.env)
        while order and order[0] in done:
            yield done.pop(order.pop(0))
