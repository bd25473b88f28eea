"""Control policies outside their training: what is saved, loaded, judged and used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from guerdon.control.spaces import Spec
from guerdon.errors import ConfigError, DataError
from guerdon.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from guerdon.control.networks import Actor, QEnsemble
    from guerdon.control.streams import Streams

_FILE, _WEIGHTS, _CRITIC = "policy.json", "policy.safetensors", "critic.safetensors"


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
        critic: what the method took its actions to be worth; None where it has no critic of continuous actions.
    """

    def __init__(
        self,
        actor: Actor,
        spec: Spec,
        normalizer: Scaling | None = None,
        env: str | None = None,
        seeds: Sequence[int] | None = None,
        critic: QEnsemble | None = None,
    ) -> None:
        self.actor, self.spec, self.normalizer, self.env, self.critic = actor, spec, normalizer, env, critic
        self.seeds = list(range(actor.seeds)) if seeds is None else list(seeds)

    def act(self, obs: np.ndarray, streams: Streams | None = None) -> np.ndarray:
        """Actions (S, B, A), or (S, B) where they are discrete, for observations (S, B, *obs).

        Args:
            streams: where exploration draws from; None acts greedily.
        """
        if self.normalizer is not None:
            mean, std = self._scales()
            obs = (obs - mean) / std
        seen = torch.from_numpy(np.ascontiguousarray(obs if self.spec.image else obs.astype(np.float32, copy=False)))
        with torch.inference_mode():
            return self.actor.act(seen.to(next(self.actor.parameters()).device), streams).cpu().numpy()

    def attacked(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """(critic, actor) of the first seed, as `corruption.corrupt` attacks them: of raw observations, differentiable.

        Raises:
            ConfigError: no critic was saved with the policy.
        """
        if self.critic is None:
            raise ConfigError("it has no critic of continuous actions; runs of iql, riql, td3-bc and sac have one.")
        first = self.take(0)
        assert first.critic is not None
        critic, actor = first.critic.requires_grad_(False), first.actor.requires_grad_(False)
        mean, std = (torch.as_tensor(x) for x in first._scales()) if first.normalizer is not None else (0.0, 1.0)
        return (
            lambda obs, action: critic(((obs - mean) / std)[None], action[None])[0],
            lambda obs: actor.act(((obs - mean) / std)[None])[0],
        )

    def _scales(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, as they go with observations (S, B, *obs)."""
        assert self.normalizer is not None
        own = self.normalizer.mean.ndim > len(self.spec.observation)
        mean, std = self.normalizer.mean, self.normalizer.std
        return (mean[:, None], std[:, None]) if own else (mean, std)

    def take(self, index: int) -> ControlPolicy:
        """The policy of one seed, by its position."""
        from guerdon.control.networks import QEnsemble, build_actor

        actor = build_actor({**self.actor.config, "seeds": 1})
        actor.load_state_dict({name: p[index : index + 1] for name, p in self.actor.state_dict().items()})
        normalizer = self.normalizer
        if normalizer is not None and normalizer.mean.ndim > len(self.spec.observation):
            normalizer = SimpleNamespace(mean=normalizer.mean[index], std=normalizer.std[index])
        critic = None
        if self.critic is not None:
            critic = QEnsemble(spec=self.spec, **{**self.critic.config, "seeds": 1})
            critic.load_state_dict({name: p[index : index + 1] for name, p in self.critic.state_dict().items()})
        return ControlPolicy(actor, self.spec, normalizer, self.env, [self.seeds[index]], critic)

    def save(self, directory: str | Path) -> None:
        """Write `policy.json`, `policy.safetensors` and, where there is a critic, `critic.safetensors`."""
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
            "critic": self.critic and self.critic.config,
        }
        for network, file in ((self.actor, _WEIGHTS), (self.critic, _CRITIC)):
            if network is not None:
                save_file({k: v.contiguous() for k, v in network.state_dict().items()}, directory / file)
        (directory / _FILE).write_text(json.dumps(facts), encoding="utf-8")

    @staticmethod
    def is_at(directory: str | Path) -> bool:
        """Whether a directory holds what `save` wrote, or is that of a run which does."""
        return (_in_run(directory) / _FILE).is_file()

    @classmethod
    def load(cls, directory: str | Path) -> ControlPolicy:
        """Read what `save` wrote, also by the directory of a run.

        Raises:
            DataError: there is no control policy, or a damaged one.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from guerdon.control.networks import QEnsemble, build_actor

        directory = _in_run(directory)
        if not (directory / _FILE).is_file():
            raise DataError(f"{directory} holds no control policy: there is no {_FILE} in it.")
        try:
            facts: dict[str, Any] = json.loads((directory / _FILE).read_text(encoding="utf-8"))
            actor = build_actor(facts["actor"])
            actor.load_state_dict(load_file(directory / _WEIGHTS))
            scaling = facts["normalizer"] and SimpleNamespace(
                **{name: np.array(x, dtype=np.float32) for name, x in facts["normalizer"].items()}
            )
            spec, critic = Spec(**facts["spec"]), None
            if facts.get("critic"):
                critic = QEnsemble(spec=spec, **facts["critic"])
                critic.load_state_dict(load_file(directory / _CRITIC))
            return cls(actor, spec, scaling, facts["env"], facts["seeds"], critic)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise DataError(
                f"{directory} holds no control policy that can be read ({type(error).__name__}: {error})."
            ) from error


def _in_run(directory: str | Path) -> Path:
    """The policy's directory, where it may be that of its run which is given."""
    inside = Path(directory) / "policy"
    return inside if inside.is_dir() else Path(directory)
