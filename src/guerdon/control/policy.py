"""Control policies outside their training: what is saved, loaded, judged and used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from guerdon.control.spaces import Spec
from guerdon.errors import DataError
from guerdon.lazy import torch

if TYPE_CHECKING:
    from guerdon.control.networks import Actor
    from guerdon.control.streams import Streams

_FILE, _WEIGHTS = "policy.json", "policy.safetensors"


class Scaling(Protocol):
    """What scales observations: `Normalizer`, or whatever has its two arrays, (*obs) or (S, *obs)."""

    @property
    def mean(self) -> np.ndarray: ...

    @property
    def std(self) -> np.ndarray: ...


class ControlPolicy:
    """The policies of S seeds, with what they need of the data they learned from.

    Attributes:
        actor: the network that acts.
        spec: what it sees and does.
        normalizer: observations are (x - mean) / std to the actor; None leaves them.
        env: id of the environment, where one is known.
        seeds: the S seeds.
    """

    def __init__(
        self,
        actor: Actor,
        spec: Spec,
        normalizer: Scaling | None = None,
        env: str | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.actor, self.spec, self.normalizer, self.env = actor, spec, normalizer, env
        self.seeds = list(range(actor.seeds)) if seeds is None else list(seeds)

    def act(self, obs: np.ndarray, streams: Streams | None = None) -> np.ndarray:
        """Actions (S, B, A), or (S, B) where they are discrete, for observations (S, B, *obs).

        Args:
            streams: where exploration draws from; None acts greedily.
        """
        if self.normalizer is not None:
            mean, std = (self._beside_batch(x) for x in (self.normalizer.mean, self.normalizer.std))
            obs = (obs - mean) / std
        seen = torch.from_numpy(np.ascontiguousarray(obs if self.spec.image else obs.astype(np.float32, copy=False)))
        with torch.inference_mode():
            return self.actor.act(seen.to(next(self.actor.parameters()).device), streams).cpu().numpy()

    def _beside_batch(self, x: np.ndarray) -> np.ndarray:
        return x[:, None] if x.ndim > len(self.spec.observation) else x

    def take(self, index: int) -> ControlPolicy:
        """The policy of one seed, by its position."""
        from guerdon.control.networks import build_actor

        actor = build_actor({**self.actor.config, "seeds": 1})
        actor.load_state_dict({name: p[index : index + 1] for name, p in self.actor.state_dict().items()})
        normalizer = self.normalizer
        if normalizer is not None and normalizer.mean.ndim > len(self.spec.observation):
            normalizer = SimpleNamespace(mean=normalizer.mean[index], std=normalizer.std[index])
        return ControlPolicy(actor, self.spec, normalizer, self.env, [self.seeds[index]])

    def save(self, directory: str | Path) -> None:
        """Write `policy.json` and `policy.safetensors`."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        scaling = self.normalizer
        facts = {
            "actor": self.actor.config,
            "spec": dataclasses.asdict(self.spec),
            "normalizer": scaling and {"mean": scaling.mean.tolist(), "std": scaling.std.tolist()},
            "env": self.env,
            "seeds": self.seeds,
        }
        save_file({k: v.contiguous() for k, v in self.actor.state_dict().items()}, directory / _WEIGHTS)
        (directory / _FILE).write_text(json.dumps(facts), encoding="utf-8")

    @staticmethod
    def is_at(directory: str | Path) -> bool:
        """Whether a directory holds what `save` wrote."""
        return (Path(directory) / _FILE).is_file()

    @classmethod
    def load(cls, directory: str | Path) -> ControlPolicy:
        """Read what `save` wrote.

        Raises:
            DataError: there is no control policy, or a damaged one.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from guerdon.control.networks import build_actor

        directory = Path(directory)
        if not (directory / _FILE).is_file():
            raise DataError(f"{directory} holds no control policy: there is no {_FILE} in it.")
        try:
            facts: dict[str, Any] = json.loads((directory / _FILE).read_text(encoding="utf-8"))
            actor = build_actor(facts["actor"])
            actor.load_state_dict(load_file(directory / _WEIGHTS))
            scaling = facts["normalizer"] and SimpleNamespace(
                **{name: np.array(x, dtype=np.float32) for name, x in facts["normalizer"].items()}
            )
            return cls(actor, Spec(**facts["spec"]), scaling, facts["env"], facts["seeds"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise DataError(
                f"{directory} holds no control policy that can be read ({type(error).__name__}: {error})."
            ) from error
