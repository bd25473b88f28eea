"""Vector environments of Gymnasium's own kind, which step all copies of a seed in one call."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import iterate

from guerdon.control.environments import InProcess
from guerdon.control.simulators import Encoding, encoding, make_vector, space_spec
from guerdon.control.spaces import Spec
from guerdon.errors import ConfigError


class NativeCopies(InProcess):
    """The copies of one seed as one vector environment, made by the id's vector entry point.

    What the copies do depends on the seed, their number and all their actions: they share their environment's chance.
    How episodes follow each other is read from `metadata["autoreset_mode"]`:

    - NEXT_STEP: the step after an end takes no action of that copy and shows the first observation of its next episode.
      With one copy it is taken at once; with several the others move on in it, and `Step.acted` tells them apart.
    - SAME_STEP: the step that ends shows that observation, and the last one is `info["final_obs"]`.
    - DISABLED: ended copies are reset at once, with `options={"reset_mask": ...}`.
    """

    ragged = ("frozen", "sizes")
    why = "the state of its vector environment cannot be saved"

    def __init__(self, id: str, options: Mapping[str, Any], places: Sequence[tuple[int, int, int]]) -> None:
        self._id, (self._seed, _, self._count) = id, places[0]
        if options.get("frame_stack"):
            raise ConfigError(f"{id}: a vector environment stacks its frames itself: leave frame_stack out.")
        self._env = make_vector(id, self._count, options)
        self._mode = autoreset_mode(self._env, id)
        self._seen: Encoding = encoding(self._env.single_observation_space, id)
        self.spec = space_spec(self._seen.space, self._env.single_action_space, id)
        self._resets = -1
        self._clear()

    def about(self) -> tuple[Spec, str, int, tuple[int, ...]]:
        space = self._env.single_action_space
        return self.spec, self._seen.note, int(getattr(space, "start", 0)), space.shape or ()

    def _clear(self) -> None:
        self._returns, self._lengths = np.zeros(self._count), np.zeros(self._count, np.int64)
        self._success = np.full(self._count, np.nan)
        self._resetting = np.zeros(self._count, bool)  # whose next step takes no action

    def _encode(self, obs: Any) -> np.ndarray:
        """All copies' observations, in an array of their own."""
        if self._seen.encode is not None:
            obs = [self._seen.encode(x) for x in iterate(self._env.observation_space, obs)]
        return np.array(obs, np.uint8 if self.spec.image else np.float32)

    def _told(self, info: Mapping[str, Any]) -> np.ndarray:
        """What an `info` says of success, nan where it says nothing."""
        found = np.full(self._count, np.nan)
        for name in ("success", "is_success"):
            if name in info:
                found = np.where(info.get(f"_{name}", True), np.asarray(info[name], float), found)
        return found

    def reset(self) -> np.ndarray:
        self._resets += 1
        entropy = np.random.SeedSequence((self._seed, self._resets))
        # Copies get seeds that follow this one: of 30 bits, so that all of them are below 2^31.
        self.obs = self._encode(self._env.reset(seed=int(entropy.generate_state(1)[0] >> 2))[0])
        self._clear()
        return self.obs

    def step(self, actions: Sequence[Any], rows: Sequence[int]) -> tuple[Any, ...]:
        """The arrays of `Step`, for each copy that finished (row, return, length, success), and maybe `acted`."""
        if len(rows) < self._count:
            raise ConfigError(f"{self._id}: a vector environment steps all of its copies: leave active out, or vector.")
        batch = np.asarray(actions, self._env.single_action_space.dtype)
        seen, reward, terminated, truncated, info = self._env.step(batch)
        obs, acted = self._encode(seen), ~self._resetting
        reward, terminated, truncated = np.array(reward, np.float32), np.array(terminated), np.array(truncated)
        ended = terminated | truncated
        final, obs, told = self._succeed(batch, obs, ended, info)
        self._returns += np.where(acted, reward, 0.0)
        self._lengths += acted
        self._success = np.fmax(self._success, np.where(acted, told, np.nan))
        finished = []
        for row in np.flatnonzero(ended).tolist():
            finished.append((row, float(self._returns[row]), int(self._lengths[row]), float(self._success[row])))
        self._returns[ended], self._lengths[ended], self._success[ended] = 0.0, 0, np.nan
        self.obs = obs
        if self._mode is not AutoresetMode.NEXT_STEP or self._count == 1:
            return obs, reward, terminated, truncated, final, finished
        self._resetting = ended
        return obs, reward, terminated, truncated, final, finished, acted

    def _succeed(
        self, actions: np.ndarray, obs: np.ndarray, ended: np.ndarray, info: Mapping[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the actions led to, what is seen next, and what was told of success, where `ended` episodes may be."""
        told = self._told(info)
        if not ended.any() or (self._mode is AutoresetMode.NEXT_STEP and self._count > 1):
            return obs, obs, told
        if self._mode is AutoresetMode.NEXT_STEP:
            return obs, self._encode(self._env.step(actions)[0]), told
        if self._mode is AutoresetMode.DISABLED:
            return obs, self._encode(self._env.reset(options={"reset_mask": ended})[0]), told
        final = obs.copy()
        for row in np.flatnonzero(ended).tolist():
            last = final_observation(info, row, self._id)
            final[row] = last if self._seen.encode is None else self._seen.encode(last)
        return final, obs, np.where(ended, self._told(info.get("final_info", {})), told)

    def state(self) -> dict[str, np.ndarray]:
        frozen = np.frombuffer(freeze(self._env), np.uint8)
        return {
            "frozen": frozen,
            "sizes": np.array([len(frozen), *[0] * (self._count - 1)]),
            "resets": np.full(self._count, self._resets),
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
            "success": self._success.copy(),
            "resetting": self._resetting.copy(),
            "obs": self.obs,
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[bool]]:
        """Bring all copies back, or begin new episodes. What they see, and which came back."""
        self._resets = int(state["resets"][0])
        self.reset()  # where it stays if it cannot be brought back; the names that `thaw` knows are those of a reset
        back = thaw(state["frozen"].tobytes(), self._env)
        if back is not None:
            self._env.close()
            self._env, self._resets = back, self._resets - 1
            self._returns, self._lengths, self._success, self._resetting, self.obs = (
                np.array(state[name]) for name in ("returns", "lengths", "success", "resetting", "obs")
            )
        return self.obs, [back is not None] * self._count

    def draw(self) -> np.ndarray:
        drawn: Any = self._env.render()
        return drawn[0]

    def close(self) -> None:
        self._env.close()


class Alone(gymnasium.Env):
    """A vector environment of one copy, as an environment: of ids that have a vector entry point and no other."""

    def __init__(self, env: VectorEnv, id: str) -> None:
        self._env, self._id, self._mode = env, id, autoreset_mode(env, id)
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space
        self.spec, self.metadata, self.render_mode = env.spec, env.metadata, env.render_mode

    def _first(self, obs: Any) -> Any:
        return next(iter(iterate(self._env.observation_space, obs)))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self._first(self._env.reset(seed=seed, options=options)[0]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        batch = np.asarray(action, self.action_space.dtype)[None]
        obs, reward, terminated, truncated, info = self._env.step(batch)
        seen = self._first(obs)
        if self._mode is AutoresetMode.SAME_STEP and (terminated[0] or truncated[0]):
            seen, info = final_observation(info, 0, self._id), info.get("final_info", {})
        told: dict[str, Any] = {name: info[name][0] for name in ("success", "is_success") if name in info}
        return seen, float(reward[0]), bool(terminated[0]), bool(truncated[0]), told

    def render(self) -> Any:
        drawn: Any = self._env.render()
        return drawn[0]

    def close(self) -> None:
        self._env.close()


def autoreset_mode(env: VectorEnv, id: str) -> AutoresetMode:
    """How the episodes of a vector environment follow each other.

    Raises:
        ConfigError: it does not say.
    """
    try:
        return AutoresetMode(env.metadata.get("autoreset_mode"))
    except ValueError:
        raise ConfigError(
            f"{id}: its vector environment does not say how episodes follow each other: set "
            "metadata['autoreset_mode'] to one of gymnasium.vector.AutoresetMode."
        ) from None


def final_observation(info: Mapping[str, Any], row: int, id: str) -> Any:
    """Where the last action of an episode led, of an environment that resets in the same step.

    Raises:
        ConfigError: `info` does not tell.
    """
    if "final_obs" not in info:
        raise ConfigError(
            f"{id}: its vector environment resets in the same step, without the last observations in "
            "info['final_obs']: values cannot go on where an episode is cut short."
        )
    return info["final_obs"][row]


class _Freezer(pickle.Pickler):
    """Refuses what would be pickled without the state it is in."""

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, EzPickle):  # is made anew from its arguments
            raise pickle.PicklingError(type(thing).__name__)
        return NotImplemented


class _Thawer(pickle.Unpickler):
    """Notes the names that a pickle calls for, or, given `allowed`, refuses others."""

    def __init__(self, data: bytes, allowed: set[tuple[str, str]] | None = None) -> None:
        super().__init__(io.BytesIO(data))
        self.allowed, self.names = allowed, set[tuple[str, str]]()

    def find_class(self, module: str, name: str) -> Any:
        if self.allowed is not None and (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name}")
        self.names.add((module, name))
        return super().find_class(module, name)


def freeze(env: VectorEnv) -> bytes:
    """An environment in the state it is in; nothing where that cannot be had."""
    file = io.BytesIO()
    try:
        _Freezer(file).dump(env)
    except Exception:  # whatever an object that is no data has to say against it
        return b""
    return file.getvalue()


def thaw(frozen: bytes, alike: VectorEnv) -> VectorEnv | None:
    """What `freeze` kept, or None. It is trusted with no more than `alike`, an environment made and reset just now:
    a pickle can call whatever it names, and this one may name only what that one's does.
    """
    known = freeze(alike)
    if not frozen or not known:
        return None
    fresh = _Thawer(known)
    try:
        fresh.load()
        env: VectorEnv = _Thawer(frozen, fresh.names).load()
    except Exception:
        return None
    return env
