"""Policies in their environments: what they score, and what that looks like."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from guerdon.control.environments import Environments
from guerdon.control.policy import ControlPolicy
from guerdon.control.simulators import make, spec_of
from guerdon.control.spaces import Spec
from guerdon.control.streams import Streams
from guerdon.errors import ConfigError

# Mean returns of a random and of an expert policy by which D4RL (Fu et al. 2020) normalises; Minari keeps them.
REFERENCES = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
}
_TOGETHER = 16  # episodes of a policy that run side by side; their number changes no episode
_MILLISECONDS = 50  # each still of a film
_JUDGED = 1 << 40  # added to the seed, so that no policy is judged from the resets it was trained on


def normalized(env: str, returns: np.ndarray) -> np.ndarray | None:
    """`100 (return - random) / (expert - random)` with the references of D4RL; None where there are none for `env`."""
    reference = REFERENCES.get(env.rpartition("-v")[0])
    return None if reference is None else 100 * (returns - reference[0]) / (reference[1] - reference[0])


def evaluate(policy: ControlPolicy, env: str, episodes: int, seed: int = 0, **options: Any) -> dict[str, np.ndarray]:
    """Whole episodes of the greedy policies of all seeds, which act together; each metric is (S, episodes) float64.

    `return` is the undiscounted sum of raw rewards and `length` its steps; `success` is there where the environment's
    `info` tells "success" or "is_success", 1 if it ever did in the episode; `normalized` where D4RL has references.
    Episode e starts from the same reset whatever policy plays it and however many episodes there are.

    Args:
        env: id of the environment, with the `options` of `make`.

    Raises:
        ConfigError: the policy sees or does something else than the environment shows and takes; see also `make`.
    """
    count = len(policy.seeds)
    with closing(Environments(env, [_JUDGED + seed] * count, min(episodes, _TOGETHER), **options)) as environments:
        _require_fit(policy.spec, environments.spec, env)
        copies = environments.copies
        returns, lengths, success = np.full((3, count, episodes), np.nan)
        # Copy c plays the episodes c, c + copies, ... and then rests.
        playing = np.tile(np.arange(copies), (count, 1))
        obs = environments.reset()
        while (playing < episodes).any():
            step = environments.step(policy.act(obs), playing < episodes)
            obs = step.obs
            for (k, copy, ret, length), told in zip(step.finished, step.success, strict=True):
                episode = playing[k, copy]
                returns[k, episode], lengths[k, episode], success[k, episode] = ret, length, told
                playing[k, copy] += copies
    metrics = {"return": returns, "length": lengths}
    if not np.isnan(success).all():
        metrics["success"] = success
    scores = normalized(env, returns)
    return metrics if scores is None else metrics | {"normalized": scores}


class _RandomPolicy(ControlPolicy):
    def __init__(self, spec: Spec, env: str, seeds: Sequence[int]) -> None:
        self.spec, self.env, self.seeds = spec, env, list(seeds)
        self._streams = Streams(self.seeds)

    def act(self, obs: np.ndarray, streams: Streams | None = None) -> np.ndarray:
        spec, streams = self.spec, streams or self._streams
        if spec.discrete:
            return streams.integers("random", spec.actions, obs.shape[1]).numpy()
        low, high = np.array(spec.low, np.float32), np.array(spec.high, np.float32)
        return low + (high - low) * streams.uniform("random", obs.shape[1], spec.actions).numpy()

    def take(self, index: int) -> ControlPolicy:
        return _RandomPolicy(self.spec, str(self.env), [self.seeds[index]])


def random_policy(env: str, seeds: Sequence[int]) -> ControlPolicy:
    """Policies that act uniformly at random in `env`, one for each seed: what any other is measured against."""
    with closing(make(env)) as made:
        return _RandomPolicy(spec_of(made), env, seeds)


def _require_fit(policy: Spec, env: Spec, name: str) -> None:
    for what, own, theirs in (
        ("observations of shape", policy.observation, env.observation),
        ("image observations", policy.image, env.image),
        ("discrete actions", policy.discrete, env.discrete),
        ("actions", policy.actions, env.actions),
    ):
        if own != theirs:
            raise ConfigError(
                f"the policy does not fit {name}: it was trained with {what} {own}, and there they are {theirs}. "
                "Name the environment that its data or training came from."
            )


@dataclass(frozen=True)
class Film:
    """One rendered episode: `data` is the file, empty where it could not be drawn, and `note` then says why."""

    data: bytes
    note: str
    ret: float
    length: int


def film(
    policy: ControlPolicy,
    env: str,
    *,
    index: int = 0,
    seed: int = 0,
    kind: Literal["png", "gif"] = "png",
    frames: int | None = None,
    height: int = 160,
    limit: int = 2000,
    **options: Any,
) -> Film:
    """An episode of the greedy policy of one seed: episode 0 of `evaluate`, as a strip of stills or as a short film.

    The episode is played first and then once more with the same actions, drawing only what is shown.

    Args:
        index: which of the policy's seeds.
        kind: "png" is a strip of stills, "gif" moves.
        frames: stills, evenly from first to last (8 in a strip, at most 120 in a film).
        height: of a still, in pixels.
        limit: steps after which an episode that will not end is cut.

    Raises:
        ConfigError: see `evaluate`.
    """
    alone = policy.take(index)
    with closing(Environments(env, [_JUDGED + seed], **options)) as environments:
        _require_fit(policy.spec, environments.spec, env)
        obs, actions, ret = environments.reset(), [], 0.0
        for _ in range(limit):
            actions.append(alone.act(obs))
            step = environments.step(actions[-1])
            obs, ret = step.obs, ret + float(step.reward[0, 0])
            if step.finished:
                break
    length = len(actions)
    shown = np.linspace(0, length - 1, min(frames or (8 if kind == "png" else 120), length)).astype(int)
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # the only way of drawing that needs no screen and is often there
    try:
        stills = _stills(env, options | {"render_mode": "rgb_array"}, seed, actions, set(shown.tolist()), height)
        return Film(_file(stills, kind), "", ret, length)
    except Exception as error:  # it ran without drawing: whatever fails now is the drawing, each in a way of its own
        return Film(b"", f"{env} cannot be drawn here ({type(error).__name__}: {error})", ret, length)


def _file(stills: list[np.ndarray], kind: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    if kind == "png":
        Image.fromarray(np.concatenate(stills, 1)).save(file, "png")
    else:
        first, *rest = map(Image.fromarray, stills)
        first.save(file, "gif", save_all=True, append_images=rest, duration=_MILLISECONDS, loop=0)
    return file.getvalue()


def _stills(
    env: str, options: dict[str, Any], seed: int, actions: list[np.ndarray], shown: set[int], height: int
) -> list[np.ndarray]:
    """What is seen before these of the actions, as (height, width, 3) uint8."""
    from PIL import Image

    stills = []
    with closing(Environments(env, [_JUDGED + seed], **options)) as environments:
        environments.reset()
        for number, action in enumerate(actions):
            if number in shown:
                drawn = environments.draw()
                if drawn.dtype != np.uint8:  # MinAtar draws in [0, 1]
                    drawn = (255 * drawn).astype(np.uint8)
                width = round(drawn.shape[1] * height / drawn.shape[0])
                how = Image.Resampling.NEAREST if drawn.shape[0] < height else Image.Resampling.LANCZOS
                stills.append(np.asarray(Image.fromarray(drawn).resize((width, height), how)))
            environments.step(action)
    return stills
