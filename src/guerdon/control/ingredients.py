"""What streaming learners are made of, as options: each ingredient can be left out; the defaults are the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from guerdon.errors import ConfigError
from guerdon.fields import check_range


@dataclass(kw_only=True)
class Ingredients:
    """Options of every streaming learner (Elsayed, Vasan and Mahmood 2024, arXiv 2410.14606)."""

    gamma: float = 0.99  # discount
    lamda: float = 0.8  # decay of eligibility traces beside the discount; 0 keeps no trace
    optimizer: Literal["obgd", "adaptive-obgd", "sgd", "adam"] = "obgd"  # sgd is obgd without its bound
    lr: float = 1.0  # step size; ObGD shortens it wherever it would overshoot
    kappa: float = 2.0  # of ObGD's bound for the value network; above 1, the larger the safer
    hidden: tuple[int, ...] = ()  # widths of the fully connected layers; none given are the paper's
    layer_norm: bool = True  # normalise what each hidden layer sends into its activation, without learned scale
    sparsity: float = 0.9  # share of each unit's incoming weights that begin at 0
    connect_all: bool = False  # leave every unit a weight; else layers with few inputs (below 10) begin at 0 altogether
    normalize_observations: bool = True  # by running mean and deviation
    scale_rewards: bool = True  # by the running deviation of their discounted sum
    time_feature: bool = True  # of vectors, where episodes have a time limit: -0.5 at the start, up to 0.5

    def check(self) -> None:
        """Raise `ConfigError` where a value cannot be meant."""
        check_range(vars(self), "gamma", "lamda", high=1)
        check_range(vars(self), "lr", above=True)
        check_range(vars(self), "kappa")
        check_range(vars(self), "sparsity", high=1, below=True)
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"hidden is {self.hidden}: every layer must be at least 1 wide.")
        if self.optimizer in ("sgd", "adam") and self.lr >= 0.5:
            raise ConfigError(
                f"lr={self.lr:g} is a step size for ObGD, which bounds it; {self.optimizer} takes it as it is: "
                "give a smaller lr, such as 0.001."
            )

    def epsilon(self, done: float) -> float:
        """The share of random actions after a share `done` of the run."""
        return 0.0


@dataclass(kw_only=True)
class ValueIngredients(Ingredients):
    """Options of streaming learners of action values, which explore at random."""

    epsilon_start: float = 1.0  # share of random actions at the start
    epsilon_end: float = 0.01  # share of random actions after the decay
    epsilon_decay: float = 0.05  # share of the run over which epsilon falls linearly; the paper has 0.2 on MinAtar

    def check(self) -> None:
        super().check()
        check_range(vars(self), "epsilon_start", "epsilon_end", "epsilon_decay", high=1)

    def epsilon(self, done: float) -> float:
        if done >= self.epsilon_decay:
            return self.epsilon_end
        return self.epsilon_start + (self.epsilon_end - self.epsilon_start) * done / self.epsilon_decay


@dataclass(kw_only=True)
class ActorCriticIngredients(Ingredients):
    """Options of streaming actor-critic."""

    kappa_policy: float = 3.0  # of ObGD's bound for the policy network
    entropy_coef: float = 0.01  # weight of the policy's entropy, which every step pushes up

    def check(self) -> None:
        super().check()
        check_range(vars(self), "kappa_policy", "entropy_coef")
