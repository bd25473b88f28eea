"""Simulators by name: Gymnasium, Atari, MiniGrid and MinAtar ids, seen as vectors or images."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from guerdon.control.spaces import Spec
from guerdon.errors import ConfigError, near

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.vector import VectorEnv

# Beginning of an id -> (module that registers it, package to install)
_PACKAGES = {
    "ALE/": ("ale_py", "ale-py"),
    "MiniGrid-": ("minigrid", "minigrid"),
    "BabyAI-": ("minigrid", "minigrid"),
    "MinAtar/": ("minatar.gym", "MinAtar"),
}


def make(id: str, *, frame_stack: int | None = None, **kwargs: Any) -> gymnasium.Env:
    """One environment whose observations are what networks take: a vector, or an image of uint8 (C, H, W).

    Observations are encoded as `encoding` says. `ALE/...` follows Machado et al. 2018: up to 30 no-ops at reset, each
    action for 4 frames, sticky actions as registered (0.25), the last two frames merged, 84x84 gray, 4 frames stacked;
    rewards are as they are.

    Args:
        id: what `gymnasium.make` knows, `module:ID` too, and `puzzle:NAME`; `ALE/`, `MiniGrid-`, `BabyAI-`
            and `MinAtar/` need no import. Of an id with a vector entry point alone it is a vector of one.
        frame_stack: so many observations together, the newest last; at a reset the first one stands for all.
        kwargs: passed to the environment, such as `render_mode="rgb_array"`.

    Raises:
        ConfigError: an id that nobody knows (with a near one), a package that is not installed, an option that the
            environment does not take, or an observation that no network fits.
    """
    return make_noted(id, frame_stack, kwargs)[0]


def make_noted(id: str, frame_stack: int | None, kwargs: Mapping[str, Any]) -> tuple[gymnasium.Env, str]:
    """The environment of `make`, and what its observations leave out."""
    from gymnasium.wrappers import FrameStackObservation, ReshapeObservation, TransformObservation

    with _made(id):
        if id.startswith("puzzle:"):
            from guerdon.control.puzzles.environment import PuzzleEnv

            env: gymnasium.Env = PuzzleEnv(id.removeprefix("puzzle:"), **kwargs)
        elif id.startswith("ALE/"):
            env = _atari(id, **kwargs)
        else:
            env = _single(id, kwargs)
    found = encoding(env.observation_space, id)
    if found.encode is not None:
        env = TransformObservation(env, found.encode, found.space)
    if frame_stack is None:
        frame_stack = frames_of(id)
    if frame_stack > 1:
        first, *rest = found.space.shape
        env = ReshapeObservation(FrameStackObservation(env, frame_stack), (frame_stack * first, *rest))
    return env, found.note


@contextmanager
def _made(id: str) -> Iterator[None]:
    """Makes what is needed for an id known, and says what went wrong with it."""
    import gymnasium

    _register(id)
    try:
        yield
    except gymnasium.error.DeprecatedEnv as error:
        raise ConfigError(f"{id}: {error}") from error
    except gymnasium.error.UnregisteredEnv as error:
        for prefix in _PACKAGES:
            with suppress(ConfigError):
                _register(prefix)
        raise ConfigError(f"there is no environment '{id}'.{near(id, gymnasium.registry)}") from error
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise ConfigError(f"the environment {id} cannot be made: {error}") from error


def _entries(id: str) -> tuple[Any, Any]:
    """The entry points of a registered id, of one environment and of a vector of them; None where there is none."""
    import gymnasium

    module, _, name = id.rpartition(":")
    if module:
        importlib.import_module(module)
    spec = gymnasium.registry.get(name)
    return (spec.entry_point, spec.vector_entry_point) if spec else (None, None)


def _single(id: str, kwargs: Mapping[str, Any]) -> gymnasium.Env:
    import gymnasium

    one, many = _entries(id)
    if one is None and many is not None:
        from guerdon.control.native import Alone

        return Alone(make_vector(id, 1, kwargs), id)
    return gymnasium.make(id, disable_env_checker=True, **kwargs)


def make_vector(id: str, count: int, kwargs: Mapping[str, Any]) -> VectorEnv:
    """So many copies from the vector entry point of an id. Atari games reset in the step that ends, have their
    rewards as they are and press no FIRE by themselves, as those of `make`.

    Raises:
        ConfigError: there is none, or it does not take the `kwargs`; see also `make`.
    """
    import gymnasium

    with _made(id):
        if id.startswith("puzzle:") or (_entries(id)[0] is not None and _entries(id)[1] is None):
            raise ConfigError(f"{id} has no vector entry point: its copies can be stepped with vector sync or async.")
        if id.startswith("ALE/"):
            kwargs = {"autoreset_mode": "SameStep", "reward_clipping": False, "use_fire_reset": False} | dict(kwargs)
        return gymnasium.make_vec(id, count, vectorization_mode="vector_entry_point", **kwargs)


def frames_of(id: str) -> int:
    """How many images an observation stacks where nothing else is said: 4 in Atari games."""
    return 4 if id.startswith("ALE/") else 1


def _register(id: str) -> None:
    import gymnasium

    for prefix, (module, package) in _PACKAGES.items():
        if id.startswith(prefix) and not any(name.startswith(prefix) for name in gymnasium.registry):
            try:
                found = importlib.import_module(module)
            except ImportError as error:
                raise ConfigError(f"{id} needs the package {package}: pip install {package} ({error})") from error
            getattr(found, "register_envs", lambda: None)()  # of MinAtar; the others register when imported


def _atari(id: str, **kwargs: Any) -> gymnasium.Env:
    import gymnasium
    from gymnasium.wrappers import AtariPreprocessing, StickyAction

    class Reseed(gymnasium.Wrapper):
        """Seeds chance without loading the ROM again (0.2 s): but for sticky actions the emulator knows none."""

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            if seed is not None:
                self.unwrapped.np_random = np.random.default_rng(seed)
            return self.env.reset(options=options)

    sticky = kwargs.pop("repeat_action_probability", gymnasium.spec(id).kwargs["repeat_action_probability"])
    env = gymnasium.make(id, frameskip=1, repeat_action_probability=0.0, disable_env_checker=True, **kwargs)
    return AtariPreprocessing(StickyAction(Reseed(env), sticky))


class Encoding(NamedTuple):
    """How the observations of a space become what networks take; see `encoding`."""

    space: gymnasium.spaces.Box  # of the encoded observation
    encode: Callable[[Any], Any] | None  # None where nothing is to be done
    note: str = ""  # what is left out


def encoding(space: gymnasium.Space, where: str) -> Encoding:
    """How observations of `space` become a vector of floats or an image of uint8 (C, H, W).

    Boxes of uint8 with two or three dimensions are images (the channels are the shorter of the first and the last);
    so are masks with three (MinAtar), as 0 and 255. Everything else is flattened as `gymnasium.spaces.utils.flatten`
    does it, discrete parts one-hot. Text in a dict is left out. `where` names the space in messages.

    Raises:
        ConfigError: graphs, sequences and lone texts, which no network here takes.
    """
    from gymnasium import spaces
    from gymnasium.spaces.utils import flatdim, flatten

    if isinstance(space, spaces.Dict):
        parts = {name: part for name, part in space.items() if not _is_text(part)}
        if len(parts) < len(space.spaces) or len(parts) == 1:
            lone = next(iter(parts)) if len(parts) == 1 else None
            inner = encoding(parts[lone] if lone else spaces.Dict(parts), where)
            dropped = ", ".join(f"'{name}'" for name in space if name not in parts)

            def reduced(x: Any) -> Any:
                x = x[lone] if lone else {name: x[name] for name in parts}
                return x if inner.encode is None else inner.encode(x)

            return Encoding(inner.space, reduced, f"{where}: policies do not see the text {dropped}" if dropped else "")
    elif isinstance(space, spaces.Box) and space.dtype in (np.uint8, bool) and len(space.shape) == 3:
        height, _, channels = space.shape
        order = (2, 0, 1) if channels <= height else (0, 1, 2)
        scale = np.uint8(255 if space.dtype == bool else 1)
        box: Any = spaces.Box(0, 255, tuple(space.shape[axis] for axis in order), np.uint8)
        plain = order == (0, 1, 2) and scale == 1
        return Encoding(box, None if plain else lambda x: (x * scale).transpose(order))
    elif isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 2:
        return Encoding(spaces.Box(0, 255, (1, *space.shape), np.uint8), lambda x: x[None])
    if _is_text(space) or not space.is_np_flattenable:
        raise ConfigError(
            f"{where}: no network fits the observations {space}. Those of Box, Discrete, MultiDiscrete, MultiBinary, "
            "and of Dict and Tuple of these do: wrap the environment."
        )
    box = spaces.Box(-math.inf, math.inf, (flatdim(space),), np.float32)
    plain = isinstance(space, spaces.Box) and len(space.shape) == 1
    return Encoding(box, None if plain else lambda x: flatten(space, x))


def _is_text(space: gymnasium.Space) -> bool:
    return space.dtype is not None and space.dtype.kind == "U"


def spec_of(env: gymnasium.Env) -> Spec:
    """What a policy sees and does in an environment that `make` made; see `space_spec`."""
    return space_spec(env.observation_space, env.action_space, env.spec.id if env.spec else str(env))


def space_spec(seen: gymnasium.Space, action: gymnasium.Space, name: str) -> Spec:
    """What a policy sees and does where observations are encoded and actions from `action`; `name` is for messages.

    Raises:
        ConfigError: actions that are neither one choice (Discrete) nor numbers with finite bounds (Box).
    """
    from gymnasium import spaces

    assert isinstance(seen, spaces.Box)
    shape, image = seen.shape, seen.dtype == np.uint8
    if isinstance(action, spaces.Discrete):
        return Spec(shape, image, True, int(action.n), (), ())
    if not isinstance(action, spaces.Box) or action.dtype.kind != "f":
        raise ConfigError(f"{name}: no policy fits the actions {action}. One Discrete or a Box of floats does.")
    low, high = action.low.ravel(), action.high.ravel()
    if not np.isfinite([low, high]).all():
        raise ConfigError(f"{name}: the actions {action} have no finite bounds: give its Box some.")
    return Spec(shape, image, False, low.size, tuple(low.tolist()), tuple(high.tolist()))
