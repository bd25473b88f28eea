from __future__ import annotations

import json
import pickle
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

import guerdon
from guerdon.control.environments import Environments, Step
from guerdon.control.native import Alone, freeze, thaw
from guerdon.control.rollout import evaluate, random_policy
from guerdon.control.simulators import make, make_vector
from guerdon.errors import ConfigError
from methods.online_problems import begin

GOAL, LIMIT = 4, 3


class Walk(gymnasium.Env):
    """Ends when the sum of its actions, 1 or 2, reaches the goal, and is cut after some steps; sees both."""

    observation_space = spaces.Dict({"sum": spaces.Box(0, 9, (1,), np.float64), "steps": spaces.Discrete(9)})
    action_space = spaces.Discrete(2, start=1)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.sum = self.steps = 0
        return self.see(), {"success": True}  # of what a reset tells nothing counts

    def see(self) -> dict:
        return {"sum": np.array([self.sum], np.float64), "steps": self.steps}

    def step(self, action: int) -> Any:
        self.sum, self.steps = self.sum + action, self.steps + 1
        done = self.sum >= GOAL
        return self.see(), 0.5 * action, done, not done and self.steps >= LIMIT, {"success": self.sum == GOAL}


class Walks(VectorEnv):
    """Many such walks, in arrays that are written to again and again."""

    def __init__(self, num_envs: int, mode: AutoresetMode | None, tells: bool = True) -> None:
        self.num_envs, self.mode, self.tells = num_envs, mode, tells
        self.metadata = {"autoreset_mode": mode} if mode else {}
        self.single_observation_space, self.single_action_space = Walk.observation_space, Walk.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.sums, self.steps, self.done = np.zeros((num_envs, 1)), np.zeros(num_envs, int), np.zeros(num_envs, bool)

    def see(self) -> dict:
        return {"sum": self.sums, "steps": self.steps}

    def start(self, mask: np.ndarray) -> None:
        self.sums[mask], self.steps[mask], self.done[mask] = 0, 0, False

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        options = options or {}
        assert self.mode is AutoresetMode.DISABLED or "reset_mask" not in options
        self.start(options.get("reset_mask", np.ones(self.num_envs, bool)))
        return self.see(), {}

    def step(self, actions: np.ndarray) -> Any:
        assert self.action_space.contains(actions) and self.mode
        moves = ~self.done
        assert self.mode is AutoresetMode.NEXT_STEP or moves.all()
        self.start(self.done)
        self.sums[:, 0] += np.where(moves, actions, 0)
        self.steps += moves
        reward = np.where(moves, 0.5 * actions, 0.0)
        terminated = moves & (self.sums[:, 0] >= GOAL)
        truncated = moves & ~terminated & (self.steps >= LIMIT)
        info: dict[str, Any] = {"success": self.sums[:, 0] == GOAL, "_success": np.ones(self.num_envs, bool)}
        if self.mode is AutoresetMode.NEXT_STEP:
            self.done = terminated | truncated
        if self.mode is AutoresetMode.SAME_STEP and (ended := terminated | truncated).any():
            final = np.full(self.num_envs, None)
            for row in np.flatnonzero(ended):
                final[row] = {"sum": self.sums[row].copy(), "steps": int(self.steps[row])}
            if self.tells:
                info = {"final_obs": final, "_final_obs": ended, "final_info": info}
            self.start(ended)
        return self.see(), reward, terminated, truncated, info


class Locked(Walks):
    """What it is in cannot be pickled."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs, AutoresetMode.DISABLED)
        self.locked = (x for x in ())


class Remade(Walks, EzPickle):
    """Pickled, it is made anew."""

    def __init__(self, num_envs: int) -> None:
        EzPickle.__init__(self, num_envs)
        super().__init__(num_envs, AutoresetMode.DISABLED)


for name, mode in {
    "Next": AutoresetMode.NEXT_STEP,
    "Same": AutoresetMode.SAME_STEP,
    "Off": AutoresetMode.DISABLED,
}.items():
    gymnasium.register(f"{name}Walk-v0", Walk, vector_entry_point=Walks, kwargs={"mode": mode})
    gymnasium.register(f"{name}Walks-v0", vector_entry_point=Walks, kwargs={"mode": mode})
gymnasium.register("LoneWalk-v0", Walk)
gymnasium.register("LockedWalks-v0", vector_entry_point=Locked)
gymnasium.register("RemadeWalks-v0", vector_entry_point=Remade)
gymnasium.register("SilentWalks-v0", vector_entry_point=Walks, kwargs={"mode": None})
gymnasium.register("CurtWalks-v0", vector_entry_point=Walks, kwargs={"mode": AutoresetMode.SAME_STEP, "tells": False})


def random_actions(shape: tuple[int, ...], steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, size=(steps, *shape))


def equal(a: Step, b: Step) -> bool:
    arrays = all(np.array_equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))
    return arrays and a.finished == b.finished and str(a.success) == str(b.success)


@pytest.mark.parametrize(("name", "copies"), [("Same", 3), ("Off", 3), ("Next", 1)])
def test_steps_are_those_of_single_environments(name, copies):
    native, single = (
        Environments(f"{name}Walks-v0", [0, 1], copies, "native"),
        Environments("LoneWalk-v0", [0, 1], copies),
    )
    np.testing.assert_array_equal(native.reset(), single.reset())
    assert native.spec == single.spec and native.frames == 1
    kept, ends = [], [0, 0]
    for actions in random_actions((2, copies), 60):
        a, b = native.step(actions), single.step(actions)
        assert equal(a, b) and a.acted is None
        assert a.obs.dtype == np.float32 and a.reward.dtype == np.float32 and a.terminated.dtype == bool
        kept.append((a, [x.copy() for x in a[:5]]))
        ends = [ends[0] + a.terminated.sum(), ends[1] + a.truncated.sum()]
    assert min(ends) > 3  # of both kinds
    for step, arrays in kept:  # what was handed out is not written to
        assert all(np.array_equal(x, y) for x, y in zip(step[:5], arrays, strict=True))


def test_a_step_that_resets_takes_no_action_of_its_copy():
    native, single = Environments("NextWalks-v0", [0, 1], 3, "native"), Environments("LoneWalk-v0", [0, 1], 3)
    seen = native.reset()
    np.testing.assert_array_equal(seen, single.reset())
    resting, finished = np.zeros((2, 3), bool), []
    for actions in random_actions((2, 3), 60):
        a, b = native.step(actions), single.step(actions, ~resting)
        np.testing.assert_array_equal(a.acted, ~resting)
        for x, y in ((a.reward, b.reward), (a.terminated, b.terminated), (a.truncated, b.truncated)):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(a.final_obs[~resting], b.final_obs[~resting])
        assert sorted(a.finished) == sorted(b.finished)
        finished += a.finished
        ended = a.terminated | a.truncated
        np.testing.assert_array_equal(a.obs[~ended], b.obs[~ended])  # of reset copies too
        np.testing.assert_array_equal(a.obs[ended], a.final_obs[ended])
        resting = ended
    assert len(finished) > 30 and len({ending.length for ending in finished}) == 2


def test_a_registered_vector_environment_moves_as_its_single_one():
    native, pole = Environments("CartPole-v1", [3], 8, "native"), make("CartPole-v1").unwrapped
    pole.reset(seed=0)
    obs, ends = native.reset(), 0
    assert (np.abs(obs) <= 0.05).all() and len(np.unique(obs)) == 32
    for actions in random_actions((1, 8), 60):
        step = native.step(actions)
        for copy in np.flatnonzero(step.acted[0]):
            pole.state, pole.steps_beyond_terminated = tuple(obs[0, copy].astype(np.float64)), None
            after, reward, terminated, _, _ = pole.step(int(actions[0, copy]))
            np.testing.assert_allclose(step.final_obs[0, copy], after, atol=1e-6)
            assert (reward, terminated) == (step.reward[0, copy], step.terminated[0, copy])
        assert (step.reward[~step.acted] == 0).all() and (np.abs(step.obs[~step.acted]) <= 0.05).all()
        assert all(ending.ret == ending.length for ending in step.finished)
        obs, ends = step.obs, ends + len(step.finished)
    assert ends > 10


def test_a_seed_does_the_same_alone_and_beside_others():
    three, alone = Environments("CartPole-v1", [3, 5, 9], 4, "native"), Environments("CartPole-v1", [5], 4, "native")
    np.testing.assert_array_equal(three.reset()[1:2], alone.reset())
    for actions in random_actions((3, 4), 60):
        together, by_itself = three.step(actions), alone.step(actions[1:2])
        assert all(np.array_equal(x[1:2], y) for x, y in zip(together[:5], by_itself[:5], strict=True))
        assert [f[1:] for f in together.finished if f.seed == 1] == [f[1:] for f in by_itself.finished]
    first = alone.reset()
    assert not np.array_equal(first, alone.reset())  # episodes have resets of their own


@pytest.mark.parametrize(("id", "copies"), [("CartPole-v1", 1), ("CartPole-v1", 5), ("SameWalks-v0", 2)])
def test_state_comes_back_bit_for_bit(id, copies):
    kept = Environments(id, [3, 4], copies, "native")
    kept.reset()
    actions = random_actions((2, copies), 120)
    for given in actions[:57]:
        kept.step(given)
    state = kept.state_dict()
    assert all(isinstance(x, torch.Tensor) for x in state.values())
    back = Environments(id, [3, 4], copies, "native")
    back.load_state_dict(state)
    assert back.restorable and not back.notes
    np.testing.assert_array_equal(back.obs, kept.obs)
    for given in actions[57:]:
        a, b = kept.step(given), back.step(given)
        assert equal(a, b) and np.array_equal(a.acted, b.acted)
    np.testing.assert_array_equal(kept.reset(), back.reset())


@pytest.mark.parametrize("id", ["LockedWalks-v0", "RemadeWalks-v0"])
def test_what_cannot_be_kept_goes_on_with_new_episodes_and_says_so(id):
    environments = Environments(id, [0, 1], 2, "native")
    environments.reset()
    environments.step(np.ones((2, 2), int))
    environments.load_state_dict(environments.state_dict())
    assert not environments.restorable
    assert f"{id} cannot be restored" in environments.notes[0] and "4 of 4 copies" in environments.notes[0]
    finished = [f for _ in range(4) for f in environments.step(np.zeros((2, 2), int)).finished]
    assert {(f.ret, f.length) for f in finished} == {(1.5, 3)}  # nothing of the lost episode is counted


class Call:
    def __reduce__(self) -> Any:
        return json.loads, ("{}",)


def test_a_kept_state_calls_for_nothing_that_its_environment_does_not():
    env = make_vector("CartPole-v1", 2, {})
    env.reset(seed=0)
    assert thaw(freeze(env), env) is not None
    assert thaw(pickle.dumps(Call()), env) is None and thaw(b"", env) is None and thaw(b"x", env) is None


def test_ids_with_a_vector_alone_are_judged_one_by_one():
    for name in ("NextWalks-v0", "SameWalks-v0", "OffWalks-v0"):
        single, alone = make("LoneWalk-v0"), make(name)
        assert isinstance(alone.unwrapped, Alone)
        for actions in random_actions((6, 1), 4):
            pairs = [(single.reset(seed=1)[0], alone.reset(seed=1)[0])]
            done = False
            while not done:
                a, b = single.step(int(actions[len(pairs) - 1, 0]) + 1), alone.step(int(actions[len(pairs) - 1, 0]) + 1)
                assert a[1:] == b[1:]
                pairs.append((a[0], b[0]))
                done = a[2] or a[3]
            assert all(np.array_equal(x, y) for x, y in pairs)
    scores = [evaluate(random_policy(id, [0]), id, 8) for id in ("LoneWalk-v0", "OffWalks-v0")]
    assert scores[0].keys() == scores[1].keys() == {"return", "length", "success"}
    for key in scores[0]:
        np.testing.assert_array_equal(scores[0][key], scores[1][key])


def test_what_is_wrong_is_told_in_one_message():
    for id, told in [
        ("LoneWalk-v0", "LoneWalk-v0 has no vector entry point"),
        ("puzzle:cube3", "puzzle:cube3 has no vector entry point"),
        ("CartPol-v1", "'CartPole-v1'"),
        ("nowhere:CartPole-v1", "nowhere"),
        ("SilentWalks-v0", "does not say how episodes follow each other"),
    ]:
        with pytest.raises(ConfigError, match=told):
            Environments(id, [0], 2, "native")
    with pytest.raises(ConfigError, match="frame_stack"):
        Environments("CartPole-v1", [0], 2, "native", frame_stack=4)
    environments = Environments("CartPole-v1", [0], 2, "native")
    environments.reset()
    with pytest.raises(ConfigError, match="steps all of its copies"):
        environments.step(np.zeros((1, 2), int), np.array([[True, False]]))
    environments = Environments("CurtWalks-v0", [0], 2, "native")
    environments.reset()
    with pytest.raises(ConfigError, match="final_obs"):
        for _ in range(4):
            environments.step(np.zeros((1, 2), int))
    with pytest.raises(ConfigError, match="vector says how"):
        guerdon.train("iql", data="x.npz", vector="native", max_updates=1)


# In training

PPO = {"rollout": 32, "batch_size": 64, "copies": 4, "epochs": 2, "hidden": (8, 8), "vector": "native", "seeds": 2}


@pytest.mark.parametrize("name", ["ppo-control", "dqn"])
def test_a_run_goes_on_bit_for_bit(tmp_path, name):
    how = {"max_samples": 512, "log_every": 128}
    how |= PPO if name == "ppo-control" else {"vector": "native", "learning_starts": 50, "hidden": (8,), "seeds": 2}
    method, run = begin(name, "CartPole-v1", tmp_path, **how)
    steps = method.learn(run)
    next(steps)
    run.save(tmp_path)
    rest = list(steps)
    again, fresh = begin(name, "CartPole-v1", tmp_path, **how)
    fresh.restore(tmp_path)
    assert str(list(again.learn(fresh))) == str(rest) and len(rest) == 3
    for p, q in zip(run.policy.actor.parameters(), fresh.policy.actor.parameters(), strict=True):
        assert torch.equal(p, q)


def test_ppo_learns_nothing_from_steps_that_took_no_action(tmp_path):
    found = []
    for seed in (0, 1):  # of what is noted of such steps
        method, run = begin("ppo-control", "CartPole-v1", tmp_path, **PPO, max_samples=128, scale_rewards=False)
        envs, rng = run.envs, np.random.default_rng(seed)
        obs = envs.reset()
        while True:
            actions = method.explore(run, obs)
            step = envs.step(actions)
            idle = ~step.acted
            noise = rng.normal(size=(*idle.shape, 4)).astype(np.float32)
            wrong = step._replace(
                reward=np.where(idle, noise[..., 0], step.reward),
                final_obs=np.where(idle[..., None], noise, step.final_obs),
            )
            told = method.observe(run, obs, np.where(idle, noise[..., 1] > 0, actions), wrong)
            obs = step.obs
            if told:
                break
        assert (run.batch.weight == 0).any() or (method.gathered.arrays["acted"] == 0).any()
        found.append((told, [p.detach().clone() for p in method.actor.parameters()]))
    for (told, weights), (others, same) in [(found[0], found[1])]:
        assert all(torch.equal(told[name], others[name]) for name in told)
        assert all(torch.equal(p, q) for p, q in zip(weights, same, strict=True))
