"""Streaming learners of fully connected networks, compiled: one call takes every seed from one transition to the next.

`learners.TorchLearner` says the same in torch, and is the reference. What is gained here is that nothing is dispatched
and that each parameter is touched twice in a step: once where its gradient is made, decayed into its trace and counted
in the trace's norm, and once where it is moved. Layer by layer, a network's row holds weights (outputs, inputs), then
biases. This module imports numba; whoever has none runs the reference.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from guerdon.control.streaming import EPS

Q, SARSA, TD = 0, 1, 2  # how a value network bootstraps
OBGD, ADAPTIVE, ADAM = 0, 1, 2  # how a trace becomes a step
ROWS = (2, 3, 4)  # of a network's array, by that: weights, trace, second moment, first moment

_ZERO, _ONE, _SLOPE, _LAYER_EPS = np.float32(0), np.float32(1), np.float32(0.01), np.float32(1e-5)
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
# Sums may be reordered, so that they vectorise; what is not finite stays so.
_compiled = njit(cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy")


class Network(NamedTuple):
    """One network per seed: `rows` (S, R, P) weights, traces and moments; `sizes` of its layers; `tape` (S, T).

    `scratch` is the tape of another input (T,) and two gradients as long as the widest layer. All arrays of floats are
    parts of one block: a loop rounds otherwise where it finds arrays so close that it does not vectorise, and how close
    they are must not be left to where memory happens to be free.
    """

    rows: np.ndarray
    sizes: np.ndarray
    tape: np.ndarray
    scratch: np.ndarray


class Senses(NamedTuple):
    """What each seed makes of its observations and rewards.

    Attributes:
        x: (S, F) features of the current observation.
        moments: (S, 2, d + 1) mean and sum of squares of each dimension; the first row's last is their count.
        clock: (S,) the time feature.
        returns: (S, 4) of the discounted sum of rewards: its value, mean, sum of squares and count.
    """

    x: np.ndarray
    moments: np.ndarray
    clock: np.ndarray
    returns: np.ndarray


class Settings(NamedTuple):
    """The options of `streaming.Ingredients` that steps depend on, as numbers; `tick` is 1 / time limit."""

    kind: int
    rule: int
    layer_norm: bool
    normalise: bool
    scale: bool
    tick: float
    gamma: float
    lamda: float
    lr: float
    kappa: float
    kappa_policy: float
    entropy: float


@_compiled
def parts(net):
    """What a network's scratch is for."""
    tape, widest = net.tape.shape[1], net.sizes.max()
    return net.scratch[:tape], net.scratch[tape : tape + widest], net.scratch[tape + widest :]


@_compiled
def forward(w, sizes, layer_norm, x, tape):
    """Outputs of one network (a view of `tape`) for features `x`; `tape` keeps what `backward` needs.

    `tape` holds the inputs of every layer one after another, the outputs, and 1 / deviation of every hidden layer.
    """
    layers = len(sizes) - 1
    total = sizes.sum()
    tape[: sizes[0]] = x
    at, of = 0, 0
    for layer in range(layers):
        n, m = sizes[layer], sizes[layer + 1]
        inputs, outputs, biases = tape[at : at + n], tape[at + n : at + n + m], w[of + m * n : of + m * n + m]
        for j in range(m):
            row = w[of + j * n : of + j * n + n]
            dot = _ZERO
            for i in range(n):
                dot += row[i] * inputs[i]
            outputs[j] = dot + biases[j]
        at, of = at + n, of + m * n + m
        if layer == layers - 1:
            break
        if layer_norm:
            mean, variance = _ZERO, _ZERO
            for j in range(m):
                mean += outputs[j]
            mean /= np.float32(m)
            for j in range(m):
                variance += (outputs[j] - mean) ** 2
            scale = _ONE / np.sqrt(variance / np.float32(m) + _LAYER_EPS)
            tape[total + layer] = scale
            for j in range(m):
                outputs[j] = (outputs[j] - mean) * scale
        for j in range(m):
            outputs[j] = outputs[j] if outputs[j] > _ZERO else outputs[j] * _SLOPE
    return tape[at : at + sizes[layers]]


@_compiled
def backward(w, e, sizes, layer_norm, tape, grad, decay, below):
    """e <- decay * e + gradient of (outputs . grad), and the L1 norm of e.

    `grad` and `below` are as long as the widest layer; `grad` begins with the outputs' gradient, and is overwritten.
    """
    total = sizes.sum()
    norm = 0.0
    at, of = total, len(w)
    for layer in range(len(sizes) - 2, -1, -1):
        n, m = sizes[layer], sizes[layer + 1]
        at, of = at - m, of - m * n - m
        inputs, dx = tape[at - n : at], below[:n]
        dx[:] = _ZERO
        for j in range(m):
            g = grad[j]
            row, trace = w[of + j * n : of + j * n + n], e[of + j * n : of + j * n + n]
            here = _ZERO
            for i in range(n):
                trace[i] = decay * trace[i] + g * inputs[i]
                here += abs(trace[i])
            if g != _ZERO and layer > 0:
                for i in range(n):
                    dx[i] += g * row[i]
            bias = of + m * n + j
            e[bias] = decay * e[bias] + g
            norm += here + abs(e[bias])
        if layer == 0:
            break
        for i in range(n):  # through the activation, of which the inputs tell the sign
            grad[i] = dx[i] if inputs[i] > _ZERO else dx[i] * _SLOPE
        if layer_norm:
            mean, along = _ZERO, _ZERO
            for i in range(n):
                z = inputs[i] if inputs[i] > _ZERO else inputs[i] / _SLOPE
                below[i] = z
                mean += grad[i]
                along += grad[i] * z
            mean, along = mean / np.float32(n), along / np.float32(n)
            scale = tape[total + layer - 1]
            for i in range(n):
                grad[i] = scale * (grad[i] - mean - below[i] * along)
    return norm


@_compiled
def descend(rule, rows, norm, delta, lr, kappa, count, reset):
    """Move the weights rows[0] along delta * trace rows[1]; reset the trace after it where asked.

    Returns (M, share of `lr` that was taken), M = lr kappa max(|delta|, 1) |e|_1 being ObGD's bound; see `streaming`.
    """
    w, e = rows[0], rows[1]
    keep = _ZERO if reset else _ONE
    d = np.float32(delta)
    if rule == ADAM:
        v, m = rows[2], rows[3]
        rate, root = np.float32(lr / (1 - 0.9**count)), np.float32(1 / math.sqrt(1 - 0.999**count))
        b1, b2, c1, c2 = np.float32(0.9), np.float32(0.999), np.float32(0.1), np.float32(0.001)
        for i in range(len(w)):
            g = d * e[i]
            m[i] = b1 * m[i] + c1 * g
            v[i] = b2 * v[i] + c2 * g * g
            w[i] += rate * m[i] / (np.sqrt(v[i]) * root + np.float32(EPS))
            e[i] *= keep
        return 0.0, 1.0
    if rule == ADAPTIVE:
        v = rows[2]
        b2, c2, unbias = np.float32(0.999), np.float32(0.001), np.float32(1 / (1 - 0.999**count))
        norm = 0.0
        for i in range(len(w)):
            g = d * e[i]
            v[i] = b2 * v[i] + c2 * g * g
            norm += abs(e[i]) / np.sqrt(v[i] * unbias + np.float32(EPS))
    bound = lr * kappa * max(abs(delta), 1.0) * norm
    share = 1.0 / max(bound, 1.0)
    step = np.float32(lr * share * delta)
    if rule == ADAPTIVE:
        for i in range(len(w)):
            w[i] += step * e[i] / np.sqrt(v[i] * unbias + np.float32(EPS))
            e[i] *= keep
    else:
        for i in range(len(w)):
            w[i] += step * e[i]
            e[i] *= keep
    return bound, share


@_compiled
def observe(senses, s, raw, x, settings, begins):
    """Features `x` of seed s's observation: normalised once it has joined the moments, then the time if kept."""
    d, moments = len(raw), senses.moments[s]
    if settings.normalise:
        moments[0, d] += 1
        n = moments[0, d]
        for i in range(d):
            before = raw[i] - moments[0, i]
            moments[0, i] += before / n
            moments[1, i] += before * (raw[i] - moments[0, i])
            variance = moments[1, i] / (n - 1) if n > 1 else 1.0
            x[i] = (raw[i] - moments[0, i]) / math.sqrt(variance + EPS)
    else:
        x[:d] = raw
    if len(x) > d:
        if begins:
            senses.clock[s] = -0.5
        x[d] = senses.clock[s]
        if not begins:
            senses.clock[s] += settings.tick


@_compiled
def scaled(reward, done, gamma, u):
    """The reward over the running deviation of its discounted sum; `u` is a row of `Senses.returns`."""
    u[0] = gamma * u[0] * (0.0 if done else 1.0) + reward
    u[3] += 1
    before = u[0] - u[1]
    u[1] += before / u[3]
    u[2] += before * (u[0] - u[1])
    variance = u[2] / (u[3] - 1) if u[3] > 1 else 1.0
    return reward / math.sqrt(variance + EPS)


@_compiled
def epsilon_greedy(q, noise, epsilon):
    """An action, and whether it is not the greedy one (a random draw may fall on that)."""
    greedy = np.argmax(q)
    if noise[0] < epsilon:
        drawn = int(noise[1] * len(q))
        return drawn, drawn != greedy
    return greedy, False


@_compiled
def value_begin(net, senses, settings, epsilon, obs, noise, action, explored):
    """First action of every seed in `action` (S,), and in `explored` (S,) whether it is not greedy."""
    for s in range(len(net.rows)):
        observe(senses, s, obs[s], senses.x[s], settings, True)
        q = forward(net.rows[s, 0], net.sizes, settings.layer_norm, senses.x[s], net.tape[s])
        action[s], explored[s] = epsilon_greedy(q, noise[s], epsilon)


@_compiled
def value_step(
    net, senses, settings, epsilon, count, obs, reward, terminated, truncated, final, noise, action, explored, tally
):
    """Learn from the transition that `action` (S,) led to, then put the next action there: one TD, Q or SARSA step.

    Args:
        count: of steps up to this one, which unbiases moments.
        obs: (S, d) where the next action is taken: after an end the first observation of the next episode.
        final: (S, d) where the transition led: after an end the true last observation, else `obs`.
        noise: (S, 2) uniform draws.
        tally: (S, 5) to which |delta|, delta^2, value, bound and share of the step size are added.
    """
    sizes, layer_norm, kind = net.sizes, settings.layer_norm, settings.kind
    decay = np.float32(settings.gamma * settings.lamda)
    tape_next, grad, below = parts(net)
    x_next = np.empty_like(senses.x[0])
    outputs = sizes[:-1].sum()
    for s in range(len(net.rows)):
        w, e, x, tape = net.rows[s, 0], net.rows[s, 1], senses.x[s], net.tape[s]
        done = terminated[s] or truncated[s]
        observe(senses, s, final[s], x_next, settings, False)
        r = scaled(reward[s], done, settings.gamma, senses.returns[s]) if settings.scale else reward[s]
        q_next = forward(w, sizes, layer_norm, x_next, tape_next)
        taken, roamed = action[s], explored[s]
        if kind == SARSA and not done:
            action[s], explored[s] = epsilon_greedy(q_next, noise[s], epsilon)
        ahead = q_next.max() if kind == Q else q_next[action[s]]
        value = tape[outputs + taken]
        delta = r + (0.0 if done else settings.gamma * ahead) - value
        grad[: sizes[-1]] = _ZERO
        grad[taken] = _ONE
        norm = backward(w, e, sizes, layer_norm, tape, grad, decay, below)
        reset = done or (kind == Q and roamed)
        bound, share = descend(settings.rule, net.rows[s], norm, delta, settings.lr, settings.kappa, count, reset)
        if done:
            observe(senses, s, obs[s], x, settings, True)
        else:
            x[:] = x_next
        q = forward(w, sizes, layer_norm, x, tape)
        if kind == Q or (kind == SARSA and done):
            action[s], explored[s] = epsilon_greedy(q, noise[s], epsilon)
        tally[s, 0] += abs(delta)
        tally[s, 1] += delta * delta
        tally[s, 2] += value
        tally[s, 3] += bound
        tally[s, 4] += share


@_compiled
def softplus(x):
    return np.log1p(np.exp(x)) if x < np.float32(20) else x


@_compiled
def sample(continuous, out, noise, action):
    """An action (A,) from the outputs of a policy.

    Continuous: mean + deviation * noise, `out` being A means and A deviations before softplus. Discrete: in action[0]
    the first category at which the cumulated softmax of `out` exceeds noise[0].
    """
    if continuous:
        n = len(action)
        for i in range(n):
            action[i] = out[i] + softplus(out[n + i]) * noise[i]
        return
    p = np.exp(out - out.max())
    left = p.sum() * noise[0]
    drawn = 0
    while drawn < len(p) - 1 and left >= p[drawn]:
        left -= p[drawn]
        drawn += 1
    action[0] = drawn


@_compiled
def grad_policy(continuous, out, action, bonus, grad):
    """grad <- d [log pi(action) + bonus * entropy] / d out; returns the entropy."""
    n = len(action)
    entropy = 0.0
    if continuous:
        for i in range(n):
            std = softplus(out[n + i])
            z = (action[i] - out[i]) / std
            grad[i] = z / std
            grad[n + i] = (z * z - 1 + bonus) / std / (1 + np.exp(-out[n + i]))
            entropy += 0.5 + _HALF_LOG_2PI + np.log(std)
        return entropy
    shifted = out - out.max()
    logs = shifted - np.log(np.exp(shifted).sum())
    for i in range(len(out)):
        entropy -= np.exp(logs[i]) * logs[i]
    for i in range(len(out)):
        grad[i] = (1.0 if i == action[0] else 0.0) - np.exp(logs[i]) * (1 + bonus * (logs[i] + entropy))
    return entropy


@_compiled
def actor_critic_begin(continuous, actor, critic, senses, settings, obs, noise, action):
    """First action of every seed in `action` (S, A), or (S, 1) where actions are discrete."""
    for s in range(len(actor.rows)):
        x = senses.x[s]
        observe(senses, s, obs[s], x, settings, True)
        forward(critic.rows[s, 0], critic.sizes, settings.layer_norm, x, critic.tape[s])
        out = forward(actor.rows[s, 0], actor.sizes, settings.layer_norm, x, actor.tape[s])
        sample(continuous, out, noise[s], action[s])


@_compiled
def actor_critic_step(
    continuous, actor, critic, senses, settings, count, obs, reward, terminated, truncated, final, noise, action, tally
):
    """Learn from the transition that `action` led to, then put the next action there; see `value_step`.

    `noise` (S, A) is normal, or (S, 2) uniform where actions are discrete; `tally` (S, 8) has the bound, the share and
    the entropy of the policy too.
    """
    layer_norm = settings.layer_norm
    decay = np.float32(settings.gamma * settings.lamda)
    tape_next, grad, below = parts(critic)
    _, grad_actor, below_actor = parts(actor)
    x_next = np.empty_like(senses.x[0])
    at_value, at_policy = critic.sizes[:-1].sum(), actor.sizes[:-1].sum()
    for s in range(len(actor.rows)):
        w, e, x, tape = critic.rows[s, 0], critic.rows[s, 1], senses.x[s], critic.tape[s]
        done = terminated[s] or truncated[s]
        observe(senses, s, final[s], x_next, settings, False)
        r = scaled(reward[s], done, settings.gamma, senses.returns[s]) if settings.scale else reward[s]
        ahead = forward(w, critic.sizes, layer_norm, x_next, tape_next)[0]
        value = tape[at_value]
        delta = r + (0.0 if done else settings.gamma * ahead) - value

        grad[0] = _ONE
        norm = backward(w, e, critic.sizes, layer_norm, tape, grad, decay, below)
        bound, share = descend(settings.rule, critic.rows[s], norm, delta, settings.lr, settings.kappa, count, done)

        w, e, tape = actor.rows[s, 0], actor.rows[s, 1], actor.tape[s]
        out = tape[at_policy : at_policy + actor.sizes[-1]]
        entropy = grad_policy(continuous, out, action[s], settings.entropy * np.sign(delta), grad_actor)
        norm = backward(w, e, actor.sizes, layer_norm, tape, grad_actor, decay, below_actor)
        bound_policy, share_policy = descend(
            settings.rule, actor.rows[s], norm, delta, settings.lr, settings.kappa_policy, count, done
        )
        if done:
            observe(senses, s, obs[s], x, settings, True)
        else:
            x[:] = x_next
        forward(critic.rows[s, 0], critic.sizes, layer_norm, x, critic.tape[s])
        sample(continuous, forward(w, actor.sizes, layer_norm, x, tape), noise[s], action[s])
        tally[s, 0] += abs(delta)
        tally[s, 1] += delta * delta
        tally[s, 2] += value
        tally[s, 3] += bound
        tally[s, 4] += share
        tally[s, 5] += bound_policy
        tally[s, 6] += share_policy
        tally[s, 7] += entropy
