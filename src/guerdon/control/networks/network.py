"""A network of observations, and two short ways through it: without a graph, and in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from guerdon.control.networks.encoders import ConvEncoder
from guerdon.control.networks.layers import ACTIVATIONS, MLP, Activation, Precision, backward, for_members, forward
from guerdon.control.spaces import Spec


class Network(nn.Module):
    """What sees observations: an encoder where they are images, then an MLP."""

    def __init__(
        self,
        seeds: int,
        spec: Spec,
        outputs: int,
        hidden: Sequence[int] = (256, 256),
        members: int | None = None,
        *,
        beside: int = 0,
        activation: Activation = "relu",
        layer_norm: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.seeds, self.spec = seeds, spec
        self.encoder = ConvEncoder(seeds, spec.observation, precision=precision) if spec.image else None
        self.mlp = MLP(
            seeds,
            (self.encoder.features if self.encoder else math.prod(spec.observation)) + beside,
            hidden,
            outputs,
            members,
            activation=activation,
            layer_norm=layer_norm,
            precision=precision,
        )
        self.options: dict[str, Any] = {
            "hidden": list(hidden),
            "activation": activation,
            "layer_norm": layer_norm,
            "precision": precision,
        }

    @property
    def plain(self) -> bool:
        """Whether there are fully connected layers and nothing else."""
        return self.encoder is None and not self.mlp.norms

    def features(self, obs: Tensor, *beside: Tensor) -> Tensor:
        """What the MLP sees, (S, B, I)."""
        features = self.encoder(obs) if self.encoder else obs.flatten(2).float()
        return torch.cat([features, *beside], -1) if beside else features

    def outputs(self, obs: Tensor, *beside: Tensor) -> Tensor:
        """(S, [K,] B, O)."""
        return self.mlp(self.features(obs, *beside))


class Pass:
    """One pass through a network, and the gradients that belong to it, for losses with a closed form.

    All of it under `torch.no_grad`: there is no graph.

    The numbers are those of autograd, whose bookkeeping costs as much as the products in small networks. What is not
    fully connected layers alone (images, layer normalisation, dueling) goes through autograd.

    Args:
        network: any of these.
        obs, beside: what its `outputs` takes.

    Attributes:
        output: (S, [K,] B, O), what `outputs` returns.
    """

    def __init__(self, network: Network, obs: Tensor, *beside: Tensor) -> None:
        assert not torch.is_grad_enabled()
        self._network, self._width = network, sum(x.shape[-1] for x in beside)
        if not network.plain:
            with torch.enable_grad():
                self._beside = [x.detach().requires_grad_() for x in beside]
                self._graph = network.outputs(obs, *self._beside)
            self.output = self._graph.detach()
            return
        mlp = network.mlp
        x = for_members(network.features(obs, *beside), mlp.members)
        self.output = forward(self, x, mlp.plan, *mlp.in_order).float()  # type: ignore[arg-type]

    def parameters(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the parameters of encoder and MLP, in their order, from that of the output."""
        if not self._network.plain:
            reached = [p for part in self._network.children() for p in part.parameters()]
            return torch.autograd.grad(self._graph, reached, gradient)
        return self._backward(gradient, False)[2:]

    def beside(self, gradient: Tensor) -> Tensor:
        """Gradient (S, B, ...) of what was beside the observations, from that of the output."""
        if not self._network.plain:
            return torch.cat(torch.autograd.grad(self._graph, self._beside, gradient), -1)
        to_x = self._backward(gradient, True)[0][..., -self._width :]
        return to_x if self._network.mlp.members is None else to_x.sum(1)

    # What `_Layers` needs of a context

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def _backward(self, gradient: Tensor, to_inputs: bool) -> tuple[Any, ...]:
        self.needs_input_grad = (to_inputs, False, *[not to_inputs] * len(self._network.mlp.in_order))
        return backward(self, gradient)


def in_numpy(network: Network) -> Callable[[np.ndarray], np.ndarray]:
    """A function that computes `network.outputs` of a few observations (S, B, *obs), by numpy where that can be.

    On a CPU that takes a third of the time of calls to torch, in fully connected layers without members. It reads the
    parameters where they are, so that it learns with the network.
    """
    mlp, device = network.mlp, next(network.parameters()).device
    if not network.plain or mlp.members is not None or device.type != "cpu":

        def outputs(obs: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return network.outputs(torch.from_numpy(obs).to(device)).cpu().numpy()

        return outputs
    activate, hidden = ACTIVATIONS[mlp.plan.activation][0], mlp.plan.hidden
    arrays: list[np.ndarray] = [cast(Tensor, p).detach().numpy() for p in mlp.in_order]
    layers = [(weight.swapaxes(1, 2), bias[:, None]) for weight, bias in zip(arrays[::2], arrays[1::2], strict=True)]

    def quick(obs: np.ndarray) -> np.ndarray:
        x = obs.reshape(*obs.shape[:2], -1)
        for i, (weight, bias) in enumerate(layers):
            x = np.matmul(x, weight)
            x += bias
            if i < hidden:
                activate(torch.from_numpy(x))
        return x

    return quick
