"""Best-first search over many puzzles at once, compiled: pop and generate, and then, with heuristics at hand, push.

All nodes of all instances lie in one pool of arrays. CLOSED is an open-addressing table of them by 64-bit keys, and a
hit compares the states too, so that no result hangs on a hash. OPEN is a pairing heap (Fredman et al. 1986) for each
instance whose links are columns of the pool: a node is in it at most once. In Q* search that is enough, because a
node's edges leave in the order of their priorities: its entry stands for the best edge that has not left yet, and the
next one is looked for when it does. What is popped is the same as if all edges lay in the heap, with ties broken by
insertion. This module imports numba.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

NONE = -1
_compiled = njit(cache=True, error_model="numpy")


class Pool(NamedTuple):
    """Nodes as columns; rows up to the count are in use."""

    states: np.ndarray  # (N, L) uint8
    keys: np.ndarray  # (N,) uint64
    g: np.ndarray  # (N,) float64, cost of the path from the start
    parent: np.ndarray  # (N,) int32
    action: np.ndarray  # (N,) int32, by which it was made
    owner: np.ndarray  # (N,) int32, its instance
    goal: np.ndarray  # (N,) bool
    priority: np.ndarray  # (N,) float64, of its entry in OPEN
    edge: np.ndarray  # (N,) int32, the action that the entry stands for in Q* search
    child: np.ndarray  # (N,) int32, links of the heap
    sibling: np.ndarray  # (N,) int32
    q: np.ndarray  # (N, A) float32 in Q* search, else (N, 0)


class Instances(NamedTuple):
    """What is known of each instance; entries (I,)."""

    root: np.ndarray  # int32, of its heap
    lower: np.ndarray  # float64, the largest of the smallest priorities that were popped
    upper: np.ndarray  # float64, cost of the best path to the goal
    best: np.ndarray  # int32, the node at its end
    rounds: np.ndarray  # int64, of popping
    generated: np.ndarray  # int64, nodes
    evaluated: np.ndarray  # int64, states that went to the heuristic


class Moves(NamedTuple):
    """A puzzle's tables."""

    moves: np.ndarray  # (Z, A, L) uint8
    flips: np.ndarray  # (Z, A, L) uint8
    costs: np.ndarray  # (A,) float64
    goal: np.ndarray  # (L,) uint8
    zobrist: np.ndarray  # (L, V) uint64


# OPEN


@_compiled
def _before(pool, a, b):
    pa, pb = pool.priority[a], pool.priority[b]
    return pa < pb or (pa == pb and a < b)


@_compiled
def _meld(pool, a, b):
    """One heap of two; either may be empty."""
    if a == NONE or b == NONE:
        return max(a, b)
    if _before(pool, b, a):
        a, b = b, a
    pool.sibling[b] = pool.child[a]
    pool.child[a] = b
    return a


@_compiled
def _without_root(pool, root):
    """The heap of the root's children, melded in pairs from left to right and then from right to left."""
    rest, paired = pool.child[root], np.int32(NONE)
    while rest != NONE:
        a = rest
        b = pool.sibling[a]
        rest = pool.sibling[b] if b != NONE else np.int32(NONE)
        pool.sibling[a] = NONE
        if b != NONE:
            pool.sibling[b] = NONE
        a = _meld(pool, a, b)
        pool.sibling[a], paired = paired, a
    heap = np.int32(NONE)
    while paired != NONE:
        following = pool.sibling[paired]
        pool.sibling[paired] = NONE
        heap = _meld(pool, heap, paired)
        paired = following
    return heap


@_compiled
def _push(pool, instances, node):
    owner = pool.owner[node]
    pool.child[node], pool.sibling[node] = NONE, NONE
    instances.root[owner] = _meld(pool, instances.root[owner], node)


@_compiled
def _next_edge(pool, node, weight):
    """Let the node's entry stand for its next edge, ordered by priority and then action; False behind the last."""
    base, last, done = weight * pool.g[node], pool.priority[node], pool.edge[node]
    best, found = np.inf, NONE
    q = pool.q[node]
    for a in range(len(q)):
        p = base + q[a]
        if p < best and (p > last or (p == last and a > done)):
            best, found = p, a
    pool.priority[node], pool.edge[node] = best, found
    return found != NONE


# Generation and CLOSED


@_compiled
def _slot(pool, slots, key, owner, state):
    """Where a state is in the table, or where it belongs."""
    mask = len(slots) - 1
    at = np.int64(key >> np.uint64(20)) & mask
    while True:
        node = slots[at]
        if node == NONE:
            return at
        if pool.keys[node] == key and pool.owner[node] == owner and (pool.states[node] == state).all():
            return at
        at = (at + 1) & mask


@_compiled
def _mixed(key, owner):
    """A key of its own for the same state in another instance."""
    return key ^ (np.uint64(owner) * np.uint64(0x9E3779B97F4A7C15))


@_compiled
def refill(pool, slots, count):
    """Fill a new, larger table; of nodes with the same state the latest has the shortest path."""
    for node in range(count):
        slots[_slot(pool, slots, pool.keys[node], pool.owner[node], pool.states[node])] = node


@_compiled
def _generate(pool, slots, tables, count, parent, action):
    """Make row `count` the child of a node; False where CLOSED knows a path to it that is no longer."""
    state, source = pool.states[count], pool.states[parent]
    z = 0
    if len(tables.moves) > 1:
        while source[z] != 0:
            z += 1
    move, flip = tables.moves[z, action], tables.flips[z, action]
    key, goal = np.uint64(0), True
    for j in range(len(state)):
        value = source[move[j]] ^ flip[j]
        state[j] = value
        key ^= tables.zobrist[j, value]
        goal = goal and value == tables.goal[j]
    owner, g = pool.owner[parent], pool.g[parent] + tables.costs[action]
    key = _mixed(key, owner)
    at = _slot(pool, slots, key, owner, state)
    if slots[at] != NONE and pool.g[slots[at]] <= g:
        return False
    slots[at] = count
    pool.keys[count], pool.g[count], pool.owner[count], pool.goal[count] = key, g, owner, goal
    pool.parent[count], pool.action[count] = parent, action
    return True


@_compiled
def start(pool, slots, tables, starts, instances):
    """The starting states (I, L) as the first nodes."""
    for i in range(len(starts)):
        pool.states[i] = starts[i]
        key = np.uint64(0)
        for j in range(starts.shape[1]):
            key ^= tables.zobrist[j, starts[i, j]]
        pool.keys[i], pool.owner[i], pool.g[i] = _mixed(key, i), i, 0.0
        pool.parent[i], pool.action[i] = NONE, NONE
        pool.goal[i] = (starts[i] == tables.goal).all()
        if pool.goal[i]:
            instances.upper[i], instances.best[i], instances.lower[i] = 0.0, i, 0.0
        slots[_slot(pool, slots, pool.keys[i], i, starts[i])] = i
    instances.generated[:] = 1
    return len(starts)


@_compiled
def pop_edges(pool, slots, tables, instances, active, weight, batch, count):
    """Q*: pop up to `batch` edges of every active instance and generate the node behind each.

    Returns the number of nodes then; those after `count` are new, and wait for `push_edges` unless they are goals.
    """
    for i in active:
        instances.rounds[i] += 1
        for b in range(batch):
            node = instances.root[i]
            if node == NONE:
                break
            if b == 0:
                instances.lower[i] = max(instances.lower[i], pool.priority[node])
            action = pool.edge[node]
            instances.root[i] = _without_root(pool, node)
            if _next_edge(pool, node, weight):
                _push(pool, instances, node)
            instances.generated[i] += 1
            if _generate(pool, slots, tables, count, node, action):
                if pool.goal[count] and pool.g[count] < instances.upper[i]:
                    instances.upper[i], instances.best[i] = pool.g[count], count
                count += 1
    return count


@_compiled
def push_edges(pool, instances, first, count, q, weight):
    """Q*: push all edges of the nodes from `first` to `count` that are no goals, given their q (N, A).

    False where a q is nan.
    """
    k = 0
    for node in range(first, count):
        if pool.goal[node]:
            continue
        for a in range(q.shape[1]):
            if np.isnan(q[k, a]):
                return False
            pool.q[node, a] = q[k, a]
        pool.priority[node], pool.edge[node] = -np.inf, NONE
        instances.evaluated[pool.owner[node]] += 1
        if _next_edge(pool, node, weight):
            _push(pool, instances, node)
        k += 1
    return True


@_compiled
def pop_nodes(pool, slots, tables, instances, active, weight, batch, count):
    """A*: pop up to `batch` nodes of every active instance and generate all children; returns as `pop_edges` does."""
    for i in active:
        instances.rounds[i] += 1
        for b in range(batch):
            node = instances.root[i]
            if node == NONE:
                break
            if b == 0:
                instances.lower[i] = max(instances.lower[i], pool.priority[node])
            instances.root[i] = _without_root(pool, node)
            if pool.goal[node]:
                if pool.g[node] < instances.upper[i]:
                    instances.upper[i], instances.best[i] = pool.g[node], node
                continue
            instances.generated[i] += len(tables.costs)
            for action in range(len(tables.costs)):
                if _generate(pool, slots, tables, count, node, action):
                    count += 1
    return count


@_compiled
def push_nodes(pool, instances, first, count, h, weight):
    """A*: push the nodes from `first` to `count`, given h (N,) of those that are no goals; False where one is nan."""
    k = 0
    for node in range(first, count):
        pool.priority[node] = weight * pool.g[node]
        if not pool.goal[node]:
            if np.isnan(h[k]):
                return False
            pool.priority[node] += h[k]
            instances.evaluated[pool.owner[node]] += 1
            k += 1
        _push(pool, instances, node)
    return True


@_compiled
def going(instances, active, weight, first, max_nodes):
    """Those of the active instances that are not over: with a bound that is met, the first path, no nodes, too many."""
    still = active.copy()
    count = 0
    for i in active:
        known = instances.upper[i] < np.inf
        over = known and (first or instances.lower[i] >= weight * instances.upper[i])
        over = over or instances.root[i] == NONE or (max_nodes > 0 and instances.generated[i] >= max_nodes)
        still[count] = i
        count += not over
    return still[:count]
