from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from guerdon.control.priorities import SumTree
from guerdon.control.replay import Hindsight, Replay
from guerdon.control.spaces import Spec
from guerdon.control.streams import Streams
from guerdon.control.transitions import Chained, Transitions
from guerdon.errors import ConfigError, DataError

VECTOR = Spec((2,), False, False, 1, (-1.0,), (1.0,))
IMAGE = Spec((3, 2, 2), True, True, 5, (), ())  # three stacked gray images of 2x2
GAMMA = 0.9


@dataclass
class Logged:
    """A transition of the naive buffer; `key` is (seed, copy, time)."""

    key: tuple[int, int, int]
    episode: int
    step: int
    obs: np.ndarray
    action: np.ndarray
    reward: float
    next_obs: np.ndarray
    terminated: bool
    truncated: bool


def stacked(number: int, steps: int) -> np.ndarray:
    """What is seen after so many steps of an episode: every image is unique, the first stands for those before it."""
    return np.stack([np.full((2, 2), (37 * number + max(0, steps - k)) % 251, np.uint8) for k in (2, 1, 0)])


def filled(replay: Replay, spec: Spec, steps: int, copies: int, seeds: int = 2, seed: int = 0) -> list[list[Logged]]:
    """Random episodes with both kinds of ends, in the replay and as plain lists for each seed."""
    rng = np.random.default_rng(seed)
    log: list[list[Logged]] = [[] for _ in range(seeds)]
    number = np.arange(seeds * copies).reshape(seeds, copies)
    step = np.zeros((seeds, copies), int)
    for time in range(steps):
        ends = rng.random((2, seeds, copies)) < [[[0.15]], [[0.1]]]

        def see(after: int, number: np.ndarray = number, step: np.ndarray = step) -> np.ndarray:
            if spec.image:
                return np.stack(
                    [[stacked(n, s + after) for n, s in zip(*r, strict=True)] for r in zip(number, step, strict=True)]
                )
            return np.stack([number, step + after], -1).astype(np.float32)

        shape = (seeds, copies)
        action = rng.integers(5, size=shape) if spec.discrete else rng.normal(size=(*shape, 1)).astype(np.float32)
        reward = rng.normal(size=shape).astype(np.float32)
        obs, following = see(0), see(1)
        replay.add(obs, action, reward, following, *ends)
        for s, c in np.ndindex(shape):
            where = (s, c)
            log[s].append(
                Logged(
                    (s, c, time), number[where], step[where], obs[where], action[where], reward[where],
                    following[where], ends[0][where], ends[1][where],
                )
            )  # fmt: skip
        over = ends.any(0)
        number, step = np.where(over, number + seeds * copies, number), np.where(over, 0, step + 1)
    return log


def n_step(log: list[Logged], start: Logged, n: int) -> tuple[float, Logged, int]:
    """(sum of rewards, last of the steps, their number), by looking for each next step."""
    s, c, time = start.key
    total, last, steps = 0.0, start, 0
    for k in range(n):
        found = [x for x in log if x.key == (s, c, time + k)]
        if not found:
            break
        last, steps = found[0], steps + 1
        total += GAMMA**k * last.reward
        if last.terminated or last.truncated:
            break
    return total, last, steps


@pytest.mark.parametrize("spec", [VECTOR, IMAGE], ids=["vector", "image"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("steps", [9, 20, 47], ids=["filling", "just full", "wrapped"])
def test_batches_are_what_was_added(spec: Spec, n: int, copies: int, steps: int):
    frames = 3 if spec.image else 1
    replay = Replay(20 * copies, 2, spec, Streams([0, 1]), copies=copies, n_step=n, gamma=GAMMA, frames=frames)
    log = filled(replay, spec, steps, copies)
    kept = [[x for x in rows if x.key[2] >= steps - 20] for rows in log]
    assert len(replay) == len(kept[0]) == min(steps, 20) * copies
    batch = replay.sample(400)
    for s in range(2):
        known = {x.reward: x for x in kept[s]}
        first = {(x.obs.tobytes(), np.asarray(x.action).tobytes()): x for x in kept[s]}
        assert len(known) == len(kept[s]) == len(first)
        seen = set()
        for b in range(400):
            start = first[batch.obs[s, b].numpy().tobytes(), batch.action[s, b].numpy().tobytes()]
            total, last, count = n_step(log[s], start, n)
            assert batch.reward[s, b].item() == pytest.approx(total, abs=1e-5)
            assert (batch.steps[s, b] if n > 1 else 1) == count
            assert (batch.steps is None) == (n == 1)
            np.testing.assert_array_equal(batch.next_obs[s, b], last.next_obs)
            assert (batch.terminated[s, b], batch.truncated[s, b]) == (last.terminated, last.truncated)
            seen.add(start.key)
        assert seen == {x.key for x in kept[s]}  # everything that is kept can be drawn, and nothing else
    kinds = {(bool(x.terminated), bool(x.truncated)) for rows in kept for x in rows}
    assert steps == 9 or kinds >= {(False, False), (True, False), (False, True)}


def test_sampling_is_uniform():
    replay = Replay(12, 2, VECTOR, Streams([0, 1]), copies=2)
    filled(replay, VECTOR, 17, 2)
    batch = replay.sample(24_000)
    for rows in batch.index:
        assert stats.chisquare(np.bincount(rows, minlength=12)).pvalue > 1e-3


def test_a_seed_draws_the_same_alone_and_beside_others():
    two, one = (Replay(20, k, VECTOR, Streams([7, 9][-k:]), priority=0.5, n_step=2) for k in (2, 1))
    rng = np.random.default_rng(0)
    for _ in range(30):
        obs, action, flags = rng.normal(size=(2, 1, 2)), rng.normal(size=(2, 1, 1)), rng.random((2, 2, 1)) < 0.2
        reward = rng.normal(size=(2, 1))
        two.add(obs, action, reward, obs + 1, *flags)
        one.add(obs[1:], action[1:], reward[1:], obs[1:] + 1, *flags[:, 1:])
        a, b = two.sample(8), one.sample(8)
        for name in ("obs", "reward", "next_obs", "index", "weight"):
            assert torch.equal(getattr(a, name)[1:], getattr(b, name))
        two.prioritise(a.index, a.reward), one.prioritise(b.index, b.reward)


def test_cut_episodes_are_truncated():
    for spec, frames in ((VECTOR, 1), (IMAGE, 3)):
        replay = Replay(30, 1, spec, Streams([0]), n_step=4, gamma=1.0, frames=frames)
        see = (lambda t: stacked(0, t)) if spec.image else (lambda t: np.array([0, t], np.float32))
        action, no = np.zeros((1, 1) if spec.discrete else (1, 1, 1), int), np.zeros((1, 1), bool)
        for t in range(5):
            replay.add(see(t)[None, None], action, np.ones((1, 1)), see(t + 1)[None, None], no, no)
        replay.cut()
        again = see(100)[None, None]
        replay.add(again, action, np.ones((1, 1)), again, no, no)
        batch = replay.sample(200)
        row = batch.index[0].tolist().index(4)
        assert batch.steps[0, row] == 1 and batch.truncated[0, row] and not batch.terminated[0, row]
        np.testing.assert_array_equal(batch.next_obs[0, row], see(5))
        assert {batch.steps[0, b].item() for b in range(200) if batch.index[0, b] == 1} == {4}
        replay.cut(), replay.cut()  # between episodes there is nothing to cut
        assert replay.sample(50).truncated.sum() > 0


def test_prioritised_draws_are_proportional():
    replay = Replay(8, 2, VECTOR, Streams([0, 1]), priority=0.5)
    filled(replay, VECTOR, 11, 1)
    assert torch.equal(replay.sample(8).weight, torch.ones(2, 8))  # new ones all have the same priority
    errors = torch.tensor([[0.0, 1, -4, 9, 16, 0.25, 1, 1], [1.0, 2, 3, 4, 5, 6, 7, 8]])
    replay.prioritise(torch.arange(8).expand(2, 8), errors)
    batch = replay.sample(20_000, beta=0.7)
    share = (errors.abs() + 1e-6) ** 0.5
    share /= share.sum(1, keepdim=True)
    for s in range(2):
        counts, expected = np.bincount(batch.index[s], minlength=8), 20_000 * share[s].double().numpy()
        likely = expected > 25
        assert (
            stats.chisquare(counts[likely], expected[likely] * counts[likely].sum() / expected[likely].sum()).pvalue
            > 1e-3
        )
        np.testing.assert_allclose(counts, expected, atol=1.01)  # one draw from each of equal parts
        raw = (8 * share[s][batch.index[s]]) ** -0.7
        torch.testing.assert_close(batch.weight[s], raw / raw.max())
    filled(replay, VECTOR, 1, 1)  # overwrites row 3, which gets the greatest priority so far
    counts = np.bincount(replay.sample(4000).index[0], minlength=8)
    assert counts[3] == pytest.approx(counts[4], abs=2)
    with pytest.raises(ConfigError, match="draws uniformly"):
        Replay(8, 2, VECTOR, Streams([0, 1])).prioritise(batch.index, batch.reward)


def test_rows_that_may_not_be_drawn_have_no_priority():
    replay = Replay(10, 1, IMAGE, Streams([0]), priority=1.0, frames=3)
    for steps in (4, 3, 9, 30):
        log = filled(replay, IMAGE, steps, 1, seeds=1)
        known = {x.reward for x in log[0]}
        drawn = replay.sample(500)
        assert len(set(drawn.index[0].tolist())) == len(replay)
    assert {np.float32(r) for r in drawn.reward[0].tolist()} == {x.reward for x in log[0][-10:]} <= known


def test_sum_tree_against_cumulated_sums():
    rng = np.random.default_rng(0)
    for size in (1, 5, 64):
        tree, weights = SumTree(3, size), np.zeros((3, size))
        for _ in range(20):
            index = np.stack([rng.permutation(size)[: max(1, size // 2)] for _ in range(3)])
            new = rng.random(index.shape) * (rng.random(index.shape) < 0.7)
            np.put_along_axis(weights, index, new, 1)
            tree.set(torch.from_numpy(index), torch.from_numpy(new))
            np.testing.assert_array_equal(tree.weights, weights)
            np.testing.assert_allclose(tree.total, weights.sum(1), rtol=1e-12)
            if (weights.sum(1) > 0).all():
                unit = rng.random((3, 50))
                found = tree.find(torch.from_numpy(unit) * tree.total[:, None]).numpy()
                for s in range(3):
                    wanted = np.searchsorted(weights[s].cumsum(), unit[s] * weights[s].sum(), side="right")
                    np.testing.assert_array_equal(found[s], wanted)


def test_sum_tree_never_finds_an_empty_leaf():
    tree = SumTree(1, 7)
    tree.set(torch.tensor([[1, 2, 5]]), torch.tensor([[0.1, 1e-17, 0.2]]))
    mass = torch.cat([torch.zeros(1), tree.total * (1 - 2.0**-53), tree.total, torch.linspace(0, 0.3, 50)])[None]
    assert set(tree.find(mass)[0].tolist()) <= {1, 2, 5}


@pytest.mark.parametrize("spec", [VECTOR, IMAGE], ids=["vector", "image"])
def test_sequences_are_consecutive(spec: Spec):
    replay = Replay(60, 2, spec, Streams([0, 1]), copies=2, frames=3 if spec.image else 1)
    log = filled(replay, spec, 47, 2)
    batch = replay.sequences(300, 5)
    assert batch.obs.shape == (2, 300, 5, *spec.observation) == batch.next_obs.shape
    lengths = set()
    for s in range(2):
        kept = [x for x in log[s] if x.key[2] >= 17]
        known = {x.reward: x for x in kept}
        for b in range(300):
            steps = [known[np.float32(r)] for r in batch.reward[s, b].tolist()]
            real = int(batch.mask[s, b].sum())
            assert batch.mask[s, b].tolist() == [True] * real + [False] * (5 - real)
            assert [x.step - steps[0].step for x in steps[:real]] == list(range(real))
            assert len({x.episode for x in steps}) == 1
            assert all(x is steps[real - 1] for x in steps[real:])
            for t in range(5):
                np.testing.assert_array_equal(batch.obs[s, b, t], steps[t].obs)
                np.testing.assert_array_equal(batch.next_obs[s, b, t], steps[t].next_obs)
                assert batch.terminated[s, b, t] == steps[t].terminated
            whole = sum(x.episode == steps[0].episode for x in kept)
            assert real == min(5, whole)  # nothing of a sequence is wasted that the episode has
            lengths.add(real)
    assert lengths == {1, 2, 3, 4, 5}


GOALS = Spec((3,), False, False, 1, (-1.0,), (1.0,))  # achieved, desired, noise


def reached(achieved: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    return (achieved == goal).all(-1)


def goal_replay(strategy: Any, ratio: float = 0.8) -> Replay:
    """Two episodes of 6 and 4 steps in which step t achieves 10 * episode + t + 1; the second has not ended."""
    how = Hindsight(slice(0, 1), slice(1, 2), lambda a, g: reached(a, g).float() - 1, reached, strategy, ratio)
    replay = Replay(50, 1, GOALS, Streams([0]), hindsight=how)
    for episode, length in enumerate((6, 4)):
        for t in range(length):
            obs = np.array([[[10 * episode + t, -5, 0.5]]])
            end = np.array([[episode == 0 and t == 5]])
            replay.add(obs, np.zeros((1, 1, 1)), -np.ones((1, 1)), obs + np.array([1, 0, 0]), np.zeros_like(end), end)
    return replay


@pytest.mark.parametrize("strategy", ["future", "final", "random"])
def test_hindsight(strategy: str):
    batch = goal_replay(strategy).sample(30_000)
    obs, following = batch.obs[0], batch.next_obs[0]
    relabelled = obs[:, 1] != -5
    assert relabelled.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert torch.equal(obs[:, 1], following[:, 1]) and torch.equal(following[:, 0], obs[:, 0] + 1)
    hit = following[:, 0] == obs[:, 1]
    assert torch.equal(batch.reward[0], torch.where(hit, 0.0, -1.0)) and torch.equal(batch.terminated[0], hit)
    goals = {1: range(1, 7), 11: range(11, 15)}
    for now in (0, 2, 5, 10, 13):
        of_now = obs[(obs[:, 0] == now) & relabelled, 1].numpy()
        last = 6 if now < 10 else 14
        wanted = {"future": range(now + 1, last + 1), "final": [last], "random": [*goals[1], *goals[11]]}[strategy]
        counts = [(of_now == g).sum() for g in wanted]
        assert sum(counts) == len(of_now) > 1000
        assert len(counts) == 1 or stats.chisquare(counts).pvalue > 1e-3


def test_hindsight_without_terminals_and_with_wrong_options():
    how = Hindsight(slice(0, 1), slice(1, 2), lambda a, g: reached(a, g).float() - 1)
    replay = Replay(50, 1, GOALS, Streams([0]), hindsight=how)
    replay.add(
        np.zeros((1, 1, 3)), np.zeros((1, 1, 1)), np.zeros((1, 1)), np.ones((1, 1, 3)), *np.ones((2, 1, 1), bool)
    )
    assert replay.sample(50).terminated.all()
    with pytest.raises(ConfigError, match="leave n_step at 1"):
        Replay(50, 1, GOALS, Streams([0]), hindsight=how, n_step=2)


def logged(lengths: list[int]) -> Transitions:
    """Episodes whose observation is their row's number; the even ones are terminated, the odd ones truncated."""
    n = sum(lengths)
    ends = np.zeros(n, bool)
    ends[np.cumsum(lengths) - 1] = True
    episode = np.repeat(np.arange(len(lengths)), lengths)
    obs = np.arange(n, dtype=np.float32)[:, None]
    action = np.arange(n, dtype=np.float32)[:, None] / n
    return Transitions(
        obs, action, obs[:, 0] % 7, obs + 0.5, ends & (episode % 2 == 0), ends & (episode % 2 == 1), episode,
        Spec((1,), False, False, 1, (-1.0,), (1.0,)),
    )  # fmt: skip


def test_logged_transitions_are_shared():
    data = logged([4, 3, 8])
    replay = Replay.of(data, 3, Streams([5, 6, 7]), n_step=3, gamma=GAMMA)
    assert len(replay) == 15 and not replay.state_dict()
    batch = replay.sample(256)
    assert len({tuple(x.tolist()) for x in batch.index}) == 3  # an order for each seed
    last_rows = np.repeat([3, 6, 14], [4, 3, 8])
    for row in batch.index.unique().tolist():
        s, b = (x[0].item() for x in torch.where(batch.index == row))
        last = min(row + 2, last_rows[row])
        assert batch.obs[s, b] == row and batch.next_obs[s, b] == last + 0.5
        assert batch.steps[s, b] == last - row + 1
        assert batch.reward[s, b].item() == pytest.approx(
            sum(GAMMA**k * ((row + k) % 7) for k in range(last - row + 1))
        )
        assert batch.terminated[s, b] == (last in (3, 14)) and batch.truncated[s, b] == (last == 6)
    before = data.observations.copy()
    batch.obs.zero_()
    np.testing.assert_array_equal(data.observations, before)
    alone = Replay.of(data, 1, Streams([6]), n_step=3, gamma=GAMMA)
    assert torch.equal(alone.sample(256).index[0], batch.index[1]) and not alone.state_dict()


def test_a_task_that_ends_within_a_recording():
    """OGBench goes on after a success: the reward after it belongs to no sum."""
    data = logged([6])
    data.terminated[:] = [False, False, True, False, False, False]
    data.truncated[-1] = True
    batch = Replay.of(data, 1, Streams([0]), n_step=4, gamma=1.0).sample(100)
    steps = {row: batch.steps[batch.index == row][0].item() for row in range(6)}
    assert steps == {0: 3, 1: 2, 2: 1, 3: 3, 4: 2, 5: 1}
    assert batch.reward[batch.index == 0][0] == 0 + 1 + 2


def test_goals_from_the_future():
    replay = Replay.of(logged([40, 5]), 2, Streams([0, 1]))
    index = torch.tensor([[3], [42]]).expand(2, 40_000)
    for gamma in (None, 0.8):
        goals = replay.goals(index, current=0.2, trajectory=0.5, random=0.3, gamma=gamma).numpy()
        for rows, row, last in zip(goals, (3, 42), (39, 44), strict=True):
            ahead = np.arange(1, last - row + 1)
            along = np.full(len(ahead), 1 / len(ahead)) if gamma is None else 0.2 * 0.8 ** (ahead - 1)
            along[-1] = 1 - along[:-1].sum()
            expected = np.full(45, 0.3 / 45)
            expected[row] += 0.2
            expected[row + ahead] += 0.5 * along
            assert stats.chisquare(np.bincount(rows, minlength=45), 40_000 * expected).pvalue > 1e-3
    assert torch.equal(
        replay.goals(torch.tensor([[44], [39]]), current=0, trajectory=1, random=0), torch.tensor([[44], [39]])
    )
    assert torch.equal(replay.observations(index[:, :1]), torch.tensor([[[3.0]], [[42.0]]]))
    assert torch.equal(replay.later(index[:, :1], 4), torch.tensor([[7], [44]]))
    with pytest.raises(ConfigError, match="sum to 1"):
        replay.goals(index, current=0.5)


@pytest.mark.parametrize("spec", [VECTOR, IMAGE], ids=["vector", "image"])
@pytest.mark.parametrize("steps", [7, 33])
def test_state_goes_on_bit_for_bit(spec: Spec, steps: int):
    def new() -> tuple[Replay, Streams]:
        streams = Streams([0, 1])
        frames = 3 if spec.image else 1
        return Replay(20, 2, spec, streams, copies=2, n_step=2, priority=0.6, frames=frames), streams

    kept, streams = new()
    filled(kept, spec, steps, 2)
    drawn = kept.sample(16)
    kept.prioritise(drawn.index, drawn.reward)
    filled(kept, spec, 3, 2, seed=1)
    state = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    back, restored = new()
    restored.load_state_dict(streams.state_dict())
    back.load_state_dict(state)
    for seed in range(3):
        filled(kept, spec, 9, 2, seed=seed), filled(back, spec, 9, 2, seed=seed)
        a, b = kept.sample(32), back.sample(32)
        for name, tensor in vars(a).items():
            assert tensor is None or torch.equal(tensor, getattr(b, name)), name
        kept.prioritise(a.index, a.reward), back.prioritise(b.index, b.reward)


def test_mistakes():
    with pytest.raises(DataError, match="no transition"):
        Replay(5, 1, VECTOR, Streams([0])).sample(2)
    with pytest.raises(ConfigError, match="no stack of 2 images"):
        Replay(5, 1, IMAGE, Streams([0]), frames=2)


def test_logged_images_are_kept_once():
    data = logged([4, 1, 8])
    images = np.arange(13 * 4, dtype=np.uint8).reshape(13, 1, 2, 2)
    ends = data.terminated | data.truncated
    data.observations, data.spec = images, Spec((1, 2, 2), True, False, 1, (-1.0,), (1.0,))
    data.next_observations = Chained(images, ends, 200 + np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2))
    for n in (1, 3):
        batch = Replay.of(data, 2, Streams([0, 1]), n_step=n).sample(100)
        steps = torch.ones_like(batch.index) if batch.steps is None else batch.steps
        for row, count, obs, following in zip(
            *(x[0] for x in (batch.index, steps, batch.obs, batch.next_obs)), strict=True
        ):
            np.testing.assert_array_equal(obs, images[row])
            np.testing.assert_array_equal(following, data.next_observations[int(row + count - 1)])
