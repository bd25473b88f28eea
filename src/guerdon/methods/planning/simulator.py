"""Episodes of Gymnasium environments that can be brought back, and playing them by search."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from guerdon.errors import ConfigError, GuerdonError
from guerdon.methods.planning.mcts import MCTS, Ask, search, together

if TYPE_CHECKING:
    import gymnasium

_TRIED = 8  # actions by which it is tried whether copies lead to the same
_SIMULATORS = ("mujoco.", "gymnasium.envs.mujoco.", "ale_py.")  # modules whose objects are copied in ways of their own


class Simulator:
    """One episode of an environment, brought back to the last bit, its chance and its count of steps too.

    A snapshot holds a copy of whatever the environment and its wrappers keep, and where MuJoCo or the Arcade Learning
    Environment do the work, a copy of theirs: of MuJoCo all of its data, since rewards are made of what the last step
    left there as well, which positions and velocities alone do not bring back. Where copies do not lead to the same,
    as is tried at first, the episode is played again from its reset.

    As chance is brought back, a search sees what will happen, and not what might: plans for an environment in which
    the same action may lead elsewhere are better than can be had without looking ahead.

    Args:
        env: an id as `guerdon.control.simulators.make` takes it, or an environment of your own, which is from then on
            the simulator's.
        seed: of the episode.
        options: of `make`, with an id.

    Attributes:
        env, name: the environment, and its id.
        actions: how many there are, where they are discrete; they count from 0. Else None.
        replays: whether the episode is played again from its reset.
    """

    def __init__(self, env: str | gymnasium.Env, seed: int = 0, **options: Any) -> None:
        from gymnasium import Wrapper
        from gymnasium.spaces import Discrete

        from guerdon.control.simulators import make

        self.env = make(env, **options) if isinstance(env, str) else env
        self.name = self.env.spec.id if self.env.spec else str(env)
        space = self.env.action_space
        self.actions = int(space.n) if isinstance(space, Discrete) else None
        self._first = int(space.start) if isinstance(space, Discrete) else 0
        self._seed, self._played, self._seen = seed, list[Any](), None
        self._layers = [self.env]
        while isinstance(layer := self._layers[-1], Wrapper):
            self._layers.append(layer.env)
        kinds = {type(getattr(self.env.unwrapped, name, None)).__name__ for name in ("ale", "data")}
        self._simulator = next(iter(kinds & {"ALEInterface", "MjData"}), "")
        self.replays = False
        self.replays = not self._copies()

    def reset(self) -> Any:
        """The first observation."""
        self._played = []
        self._seen = self.env.reset(seed=self._seed)[0]
        self._fixed = self._shared()
        return self._seen

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        given = action if self.actions is None else int(action) + self._first
        self._seen, reward, terminated, truncated, info = self.env.step(given)
        self._played.append(action)
        return self._seen, float(reward), bool(terminated), bool(truncated), info

    def snapshot(self) -> Any:
        played = list(self._played)
        if self.replays:
            return played, self._seen, None, None
        kept = copy.deepcopy([vars(layer) for layer in self._layers], dict(self._fixed))
        return played, self._seen, kept, self._inner()

    def restore(self, snapshot: Any) -> Any:
        """The observation there; raises `GuerdonError` where the same reset and actions lead elsewhere."""
        played, seen, kept, inner = snapshot
        if self.replays:
            self.reset()
            for action in played:
                self.step(action)
            if not _same(self._seen, seen):
                raise GuerdonError(
                    f"{self.name}: the same reset and actions lead elsewhere, and its state cannot be copied: it "
                    "cannot be searched."
                )
            return seen
        for layer, attributes in zip(self._layers, copy.deepcopy(kept, dict(self._fixed)), strict=True):
            vars(layer).clear()
            vars(layer).update(attributes)
        self._take_up(inner)
        self._played, self._seen = list(played), seen
        return seen

    def close(self) -> None:
        self.env.close()

    def _shared(self) -> dict[int, Any]:
        """The memo of a deep copy that leaves the layers themselves, and what no step changes, as they are."""
        said = [item for layer in self._layers for item in vars(layer).items()]
        fixed: list[Any] = [value for name, value in said if _is_fixed(name, value)]
        if type(self.env.unwrapped).__module__.startswith("gymnasium.envs.toy_text."):
            fixed.append(getattr(self.env.unwrapped, "P", None))  # the table of all transitions
        return {id(each): each for each in (*self._layers, *fixed)}

    def _inner(self) -> Any:
        """A copy of what MuJoCo or the Arcade Learning Environment keep; None where neither does the work."""
        if self._simulator == "ALEInterface":
            return self.env.unwrapped.ale.cloneSystemState()  # type: ignore[attr-defined]
        if self._simulator != "MjData":
            return None
        import mujoco

        bottom: Any = self.env.unwrapped
        kept = mujoco.MjData(bottom.model)
        mujoco.mj_copyData(kept, bottom.model, bottom.data)
        return kept

    def _take_up(self, inner: Any) -> None:
        """Let MuJoCo or the Arcade Learning Environment go on from what `_inner` gave."""
        bottom: Any = self.env.unwrapped
        if self._simulator == "ALEInterface":
            bottom.ale.restoreSystemState(inner)
        elif self._simulator == "MjData":
            import mujoco

            mujoco.mj_copyData(bottom.data, bottom.model, inner)

    def _copies(self) -> bool:
        """Whether an episode goes on from a copy as it did."""
        self.env.action_space.seed(self._seed)
        actions = [self.env.action_space.sample() - self._first for _ in range(_TRIED)]
        self.reset()
        try:
            start = self.snapshot()
            first, second = self._tried(actions), (self.restore(start), self._tried(actions))[1]
        except Exception:  # whatever an environment raises that was not made to be copied
            return False
        return _same(first, second)

    def _tried(self, actions: Sequence[Any]) -> list[Any]:
        seen = []
        for action in actions:
            seen.append(self.step(action)[:4])
            if any(seen[-1][2:]):
                break
        return seen


def _is_fixed(name: str, value: Any) -> bool:
    """What no step changes, or copies of which are made otherwise: it would take long to copy, or cannot be."""
    from gymnasium import Space
    from gymnasium.envs.registration import EnvSpec

    outside = f"{type(value).__module__}.".startswith(_SIMULATORS)
    return outside or isinstance(value, Space | EnvSpec) or name == "_saved_kwargs"


def _same(one: Any, other: Any) -> bool:
    from gymnasium.utils.env_checker import data_equivalence

    return data_equivalence(one, other, exact=True)


class Episode(NamedTuple):
    """An episode that was played."""

    ret: float  # sum of its rewards
    actions: list[int]
    terminated: bool  # it ended, rather than being cut short


def play(simulator: Simulator, how: MCTS, *, steps: int = 1000, seed: int = 0) -> Episode:
    """Play an episode of discrete actions, with a search by `how` from where it stands before each of them.

    All actions are candidates at every node, whatever `how` says, and a rollout takes them at random: with uct that is
    UCT (Kocsis and Szepesvari 2006). As the simulator does the same again, the best episode that any search has found
    is known to be there, and its next action is taken.

    Args:
        steps: at most.
        seed: of the searches.

    Raises:
        ConfigError: options that cannot be meant, or actions that are not discrete.
        GuerdonError: the environment cannot be brought back.
    """
    if simulator.actions is None:
        raise ConfigError(
            f"{simulator.name}: a search tries every action, and here they are no choice among a few: wrap it so."
        )
    actions = simulator.actions
    how = dataclasses.replace(how, candidates=actions)

    def propose(asks: list[Ask]) -> list[Sequence[int]]:
        return [range(actions) if ask.n == actions else [ask.seed % actions] for ask in asks]

    observation, ret, done = simulator.reset(), 0.0, list[int]()
    plan, worth, ends = list[int](), 0.0, False  # what is left of the best episode, what it brings, whether it ends
    for step in range(steps):
        here = simulator.snapshot()
        ((_, root),) = together([search(simulator, observation, how, seed + step)], propose)
        simulator.restore(here)
        best = root.best
        assert best is not None
        if not plan or not ends or best.reward > worth:
            plan, worth, ends = [node.action for node in best.path[1:]], best.reward, best.depth < how.max_depth
        observation, reward, terminated, truncated, _ = simulator.step(plan[0])
        ret, worth = ret + reward, worth - reward
        done.append(plan.pop(0))
        if terminated or truncated:
            return Episode(ret, done, terminated)
    return Episode(ret, done, False)
