"""Networks whose parameters carry a leading axis of seeds: S networks are one batched computation.

Nothing here mixes the seeds, so that each one's numbers are the same alone or beside others. Parameters are NaN until
`initialise` or `load_state_dict` gives them values: what was forgotten stops a run instead of slowing it.

One function, `_Layers`, is where the time goes. In `precision="bf16"` hidden layers multiply in bf16 from fp32 master
weights; the last layer of every network stays fp32, as a value of 100 in bf16 is a multiple of 1/2.
"""

from __future__ import annotations

from guerdon.control.networks.actors import (
    Actor,
    Categorical,
    CategoricalActor,
    DeterministicActor,
    Gaussian,
    GaussianActor,
    GreedyQ,
    build_actor,
)
from guerdon.control.networks.encoders import ConvEncoder, RecurrentEncoder
from guerdon.control.networks.layers import MLP, LayerNorm, Linear, Precision, one_thread_each
from guerdon.control.networks.network import Pass, in_numpy
from guerdon.control.networks.parameters import How, ema_, initialise
from guerdon.control.networks.values import DiscreteQ, QEnsemble, Value

__all__ = [
    "MLP",
    "Actor",
    "Categorical",
    "CategoricalActor",
    "ConvEncoder",
    "DeterministicActor",
    "DiscreteQ",
    "Gaussian",
    "GaussianActor",
    "GreedyQ",
    "How",
    "LayerNorm",
    "Linear",
    "Pass",
    "Precision",
    "QEnsemble",
    "RecurrentEncoder",
    "Value",
    "build_actor",
    "ema_",
    "in_numpy",
    "initialise",
    "one_thread_each",
]
