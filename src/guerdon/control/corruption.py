"""Corrupting logged data on purpose, to see what a method makes of it; the protocol of arXiv 2310.12955.

Each row is hit by its own coin, each element of a transition by its own corruption, and everything is worked out from
the clean data, so that several corruptions do not compound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.control.transitions import Chained, Transitions, moments
from guerdon.errors import ConfigError, near
from guerdon.fields import check_range
from guerdon.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    Critic = Callable[[Tensor, Tensor], Tensor]  # observations (B, *obs), actions (B, A) -> values (..., B)
    Actor = Callable[[Tensor], Tensor]  # observations (B, *obs) -> actions (B, A)

ELEMENTS = ("observations", "actions", "rewards", "next_observations")
_ALIASES = {
    "obs": "observations",
    "observation": "observations",
    "action": "actions",
    "reward": "rewards",
    "next_obs": "next_observations",
    "next_observation": "next_observations",
    "dynamics": "next_observations",
}
_REWARD_RANGE = 30.0  # random rewards are uniform within 30 ranges of 0
_STEPS, _RATE = 100, 0.01  # of the projected gradient descent, in ranges
_BATCH = 4096  # rows attacked at once


@dataclass(frozen=True)
class Corruption:
    """What is corrupted, in which share of the rows, and how far.

    `range` is epsilon of the paper: in standard deviations of each coordinate over the clean data, and for rewards the
    factor of [-30, 30] (random) or of the sign flip (adversarial).
    """

    element: str
    rate: float = 0.3
    range: float = 1.0
    adversarial: bool = False

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            names = (*ELEMENTS, *_ALIASES)
            raise ConfigError(
                f"nothing called '{self.element}' can be corrupted.{near(self.element, names)} "
                "There are observations (obs), actions, rewards, and next_observations (dynamics)."
            )
        check_range(vars(self), "rate", high=1)
        check_range(vars(self), "range", above=True)

    @classmethod
    def parse(cls, text: str) -> Corruption:
        """`ELEMENT[:RATE[:RANGE]][:adversarial]`, e.g. `reward:0.3`, `dynamics:0.3:1.0`, `obs:0.3:1.0:adversarial`.

        Raises:
            ConfigError: the text does not have this form, or names no element.
        """
        element, *rest = text.strip().split(":")
        adversarial = rest[-1:] == ["adversarial"]
        try:
            numbers = [float(part) for part in rest[: len(rest) - adversarial]]
            given = dict(zip(("rate", "range"), numbers, strict=len(numbers) > 2))  # strict: refuses a third
            return cls(_ALIASES.get(element, element), adversarial=adversarial, **given)
        except ConfigError as error:
            raise ConfigError(f"corruption '{text}': {error}") from None
        except ValueError:
            raise ConfigError(
                f"corruption '{text}' is not of the form ELEMENT[:RATE[:RANGE]][:adversarial]."
                f"{near(rest[-1], ['adversarial'])} Write for example reward:0.3 or obs:0.3:1.0:adversarial."
            ) from None

    def __str__(self) -> str:
        """As `parse` reads it, complete."""
        return f"{self.element}:{self.rate!r}:{self.range!r}" + ":adversarial" * self.adversarial


def corrupt(
    transitions: Transitions,
    corruptions: Sequence[Corruption],
    seed: int,
    critic: Critic | None = None,
    actor: Actor | None = None,
) -> tuple[Transitions, dict[str, np.ndarray]]:
    """(corrupted transitions, element -> (N,) bool mask of the rows that were hit); the clean ones stay as they are.

    With epsilon the range, sigma the standard deviation per coordinate over the whole clean data, and lambda drawn
    from U[-epsilon, epsilon] per coordinate:

    - random observations, actions, next observations: x + lambda * sigma. Discrete actions are drawn anew uniformly.
    - random rewards: replaced by U[-30 epsilon, 30 epsilon].
    - adversarial rewards: -epsilon * r.
    - adversarial observations, actions, next observations: x + lambda * sigma, with lambda moved by 100 steps of
      projected gradient descent (each the first step of a fresh Adam with rate 0.01 * epsilon, then clamped to
      [-epsilon, epsilon]) that lower Q(s, a), averaged over the critics, or Q(s', actor(s')) for next observations.

    Images are rounded and kept within 0 and 255. Observations and next observations are corrupted apart, so that rows
    no longer chain. Nothing is clipped to the bounds of the actions.

    Args:
        seed: equal seeds give equal corruption; each element has its own stream, whatever else is corrupted.
        critic: values of observations (B, *obs) and actions (B, A) as a tensor (..., B), differentiable; leading axes
            are ensemble members. It takes raw observations: one that wants them normalised does so itself.
        actor: actions (B, A) of observations, differentiable; used for next observations.

    Raises:
        ConfigError: an element twice, an adversarial corruption without the critic or actor that it needs, or of
            discrete actions.

    Source: arXiv 2310.12955, section on data corruption.
    """
    elements = [corruption.element for corruption in corruptions]
    for element in elements:
        if elements.count(element) > 1:
            raise ConfigError(f"'{element}' is corrupted twice: write one corruption for each element.")
    arrays: dict[str, Any] = {}
    masks = {}
    if "observations" in elements and isinstance(transitions.next_observations, Chained):
        arrays["next_observations"] = np.asarray(transitions.next_observations)  # no longer the following rows'
    for corruption in corruptions:
        _check(corruption, transitions, critic, actor)
        rng = np.random.default_rng([seed, ELEMENTS.index(corruption.element)])
        hit = rng.random(len(transitions)) < corruption.rate
        rows = np.flatnonzero(hit)
        clean = getattr(transitions, corruption.element)
        array = np.array(clean)
        std = moments(clean)[1].astype(np.float32)
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            array[part] = _corrupted(corruption, transitions, part, std, rng, critic, actor)
        arrays[corruption.element], masks[corruption.element] = array, hit
    told = [f"{corruption} hit {masks[corruption.element].sum():,} rows" for corruption in corruptions]
    return replace(transitions, **arrays, notes=[*transitions.notes, *told]), masks


def _check(corruption: Corruption, transitions: Transitions, critic: Critic | None, actor: Actor | None) -> None:
    if not corruption.adversarial or corruption.element == "rewards":
        return
    if transitions.spec.discrete:
        raise ConfigError(f"{corruption}: this attack follows gradients over actions, and these are discrete.")
    if critic is None:
        raise ConfigError(f"{corruption}: the attack lowers a critic's values: name its run as corrupt_against.")
    if corruption.element == "next_observations" and actor is None:
        raise ConfigError(f"{corruption}: the attack values what an actor would do next, and no actor is given.")


def _corrupted(
    corruption: Corruption,
    transitions: Transitions,
    rows: np.ndarray,
    std: np.ndarray,
    rng: np.random.Generator,
    critic: Critic | None,
    actor: Actor | None,
) -> np.ndarray:
    """The corrupted values at `rows`; `std` is sigma."""
    element, epsilon = corruption.element, corruption.range
    x = getattr(transitions, element)[rows]
    if element == "rewards":
        if corruption.adversarial:
            return -epsilon * x
        return rng.uniform(-_REWARD_RANGE * epsilon, _REWARD_RANGE * epsilon, len(rows))
    if element == "actions" and transitions.spec.discrete:
        return rng.integers(transitions.spec.actions, size=len(rows))
    change = rng.uniform(-epsilon, epsilon, x.shape).astype(np.float32)
    if corruption.adversarial:
        assert critic is not None
        change = _attack(corruption, transitions, rows, std, change, critic, actor)
    y = x + change * std
    return np.rint(y).clip(0, 255) if x.dtype == np.uint8 else y


def _attack(
    corruption: Corruption,
    transitions: Transitions,
    rows: np.ndarray,
    std: np.ndarray,
    change: np.ndarray,
    critic: Critic,
    actor: Actor | None,
) -> np.ndarray:
    """lambda (B, *shape) after projected gradient descent from `change`."""
    element, epsilon = corruption.element, corruption.range
    clean = torch.as_tensor(getattr(transitions, element)[rows], dtype=torch.float32)
    observations = torch.as_tensor(transitions.observations[rows], dtype=torch.float32)
    actions = torch.as_tensor(transitions.actions[rows])
    scale, moved = torch.as_tensor(std), torch.as_tensor(change)
    for _ in range(_STEPS):
        moved.requires_grad_(True)
        x = clean + moved * scale
        if element == "observations":
            values = critic(x, actions)
        elif element == "actions":
            values = critic(observations, x)
        else:
            assert actor is not None
            values = critic(x, actor(x))
        # Summed over rows, so that a row's gradient does not shrink against Adam's epsilon with the number of rows.
        total = values.reshape(-1, len(rows)).mean(dim=0).sum()
        (gradient,) = torch.autograd.grad(total, moved)
        step = gradient / (gradient.abs() + 1e-8)  # what Adam's first step makes of a gradient
        moved = (moved.detach() - _RATE * epsilon * step).clamp(-epsilon, epsilon)
    return moved.numpy()
