"""What a control policy sees and does, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """Shapes and ranges of observations and actions.

    `asdict(spec)` is plain data and `Spec(**data)` reads it back, also from JSON, where tuples have become lists.

    Attributes:
        observation: shape of one observation; images are (channels, height, width) in uint8, all else float32.
        image: whether observations are images, for a convolutional encoder.
        discrete: whether an action is the number of a choice, or else a vector.
        actions: number of choices, or dimensions of the vector.
        low: the least action, by dimension; empty where actions are discrete.
        high: the greatest action, by dimension; empty where actions are discrete.
    """

    observation: tuple[int, ...]
    image: bool
    discrete: bool
    actions: int
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("observation", "low", "high"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
