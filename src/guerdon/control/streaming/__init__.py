"""Learning from each transition once, as it comes: no replay, no target network, no batch (stream-x).

    e <- gamma lamda e + g                              g: gradient of V(s), of Q(s, a) or of log pi(a|s), not of a loss
    M  = lr kappa max(|delta|, 1) |e|_1                 |e|_1 over all parameters of a network
    w <- w + lr / max(M, 1) delta e                     delta = r + gamma V(s') (1 - done) - V(s)
    e <- 0 where an episode ended, after the update

Elsayed, Vasan and Mahmood 2024, arXiv 2410.14606. `TorchLearner` runs any network and is the reference;
`KernelLearner` runs fully connected ones, compiled, to the same numbers. Each seed has one environment, one network
and statistics of its own; nothing is averaged over seeds.
"""

from __future__ import annotations

EPS = 1e-8  # beside variances and second moments
