"""Real Minari datasets, HDF5 and npz files, whole and broken: what is read, what is told, and what is refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from minari.data_collector.episode_buffer import EpisodeBuffer

from guerdon.control.datasets import is_control_source, read_transitions
from guerdon.control.flat_files import unchained
from guerdon.control.minari_files import Episode, write_minari
from guerdon.control.spaces import Spec
from guerdon.control.transitions import Chained, Normalizer, Transitions, blocks, moments, not_finite
from guerdon.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def minari_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("MINARI_REMOTE", "nowhere://at-all")
    return tmp_path / "minari"


def play(env: gymnasium.Env, episodes: int) -> list[EpisodeBuffer]:
    """Random episodes as Minari takes them; observations of Dict spaces as dicts of arrays."""
    env.action_space.seed(0)
    buffers = []
    for number in range(episodes):
        seen = [env.reset(seed=number)[0]]
        actions, rewards, terminations, truncations = [], [], [], []
        done = False
        while not done:
            actions.append(env.action_space.sample())
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            seen.append(observation)
            rewards.append(float(reward))
            terminations.append(terminated)
            truncations.append(truncated)
            done = terminated or truncated
        observations = {k: [s[k] for s in seen] for k in seen[0]} if isinstance(seen[0], dict) else np.array(seen)
        buffers.append(EpisodeBuffer(number, number, None, observations, actions, rewards, terminations, truncations))
    return buffers


def record(name: str, buffers: list[EpisodeBuffer], env: gymnasium.Env, **more) -> minari.MinariDataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minari.create_dataset_from_buffers(name, buffers, env, **more)


def d4rl(lengths: tuple[int, ...] = (4, 3, 5), ended: tuple[str, ...] = ("terminals", "timeouts", "timeouts")) -> dict:
    """Columns in which observation t of episode e is (100 e + t, -t), and the reward is t."""
    steps = [(e, t) for e, length in enumerate(lengths) for t in range(length)]
    last = np.array([t == lengths[e] - 1 for e, t in steps])
    return {
        "observations": np.array([(100.0 * e + t, -t) for e, t in steps]),
        "actions": np.linspace(-0.5, 0.5, len(steps))[:, None],
        "rewards": np.array([float(t) for _, t in steps]),
        "next_observations": np.array([(100.0 * e + t + 1, -t - 1) for e, t in steps]),
        "terminals": last & np.array([ended[e] == "terminals" for e, _ in steps]),
        "timeouts": last & np.array([ended[e] == "timeouts" for e, _ in steps]),
    }


def npz(path: Path, columns: dict) -> str:
    np.savez(path / "data.npz", **columns)
    return str(path / "data.npz")


def hdf5(path: Path, columns: dict) -> str:
    with h5py.File(path / "data.hdf5", "w") as file:
        for name, values in columns.items():
            file[name] = values
        file["metadata/algorithm"] = "sac"
    return str(path / "data.hdf5")


def without(columns: dict, *names: str) -> dict:
    return {name: values for name, values in columns.items() if name not in names}


# ---------------------------------------------------------------------------------------------------------- Minari


def test_cartpole_from_minari():
    env = gymnasium.make("CartPole-v1", max_episode_steps=15)
    buffers = play(env, 6)
    record("cart/random-v0", buffers, env)
    data = read_transitions("minari:cart/random-v0")
    assert data.spec == Spec((4,), False, True, 2, (), ())
    assert data.env == "CartPole-v1" and data.notes == []
    assert data.lengths().tolist() == [len(b.rewards) for b in buffers]
    assert data.returns().tolist() == [sum(b.rewards) for b in buffers]
    for number, buffer in enumerate(buffers):
        rows = data.episode == number
        np.testing.assert_array_equal(data.observations[rows], buffer.observations[:-1])
        np.testing.assert_array_equal(data.next_observations[rows], buffer.observations[1:])
        np.testing.assert_array_equal(data.actions[rows], buffer.actions)
        np.testing.assert_array_equal(data.terminated[rows], buffer.terminations)
        np.testing.assert_array_equal(data.truncated[rows], buffer.truncations)
    assert data.terminated.any() and data.truncated.any() and not (data.terminated & data.truncated).any()
    dtypes = [x.dtype for x in (data.observations, data.actions, data.rewards, data.episode, data.terminated)]
    assert dtypes == [np.float32, np.int64, np.float32, np.int64, bool]


def test_every_way_to_name_a_minari_dataset(minari_home: Path):
    env = gymnasium.make("Pendulum-v1", max_episode_steps=7)
    record("pendulum-v3", play(env, 2), env)
    directory = minari_home / "pendulum-v3"
    sources = ["minari:pendulum-v3", f"minari:{directory}", str(directory), str(directory / "data/main_data.hdf5")]
    read = [read_transitions(source) for source in sources]
    assert len({data.digest for data in read}) == 1
    assert all(is_control_source(source) for source in sources)
    assert read[0].spec == Spec((3,), False, False, 1, (-2.0,), (2.0,))
    assert read[0].actions.shape == (14, 1) and np.abs(read[0].actions).max() > 1


def test_dict_observations_are_flattened_like_those_of_environments():
    space = gymnasium.spaces.Dict(
        {
            "where": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
            "facing": gymnasium.spaces.Discrete(4),
            "mission": gymnasium.spaces.Text(20),
        }
    )
    steps = {"where": np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], np.float32), "facing": np.array([0, 3, 1])}
    observations = {**steps, "mission": ["go", "go", "stop"]}
    buffer = EpisodeBuffer(0, 0, None, observations, np.array([2, 1]), [0.0, 1.0], [False, False], [False, True])
    actions = gymnasium.spaces.Discrete(3, start=1)
    record("maze-v0", [buffer], None, observation_space=space, action_space=actions)
    data = read_transitions("minari:maze-v0")
    plain = gymnasium.spaces.Dict({name: part for name, part in space.items() if name != "mission"})
    expected = [gymnasium.spaces.flatten(plain, {k: v[t] for k, v in steps.items()}) for t in range(3)]
    np.testing.assert_allclose(data.observations, expected[:2])
    np.testing.assert_allclose(data.next_observations, expected[1:])
    assert data.actions.tolist() == [1, 0] and data.spec.actions == 3 and data.env is None
    assert any("mission" in note for note in data.notes) and any("count from 1" in note for note in data.notes)


def test_images_from_minari_put_channels_first_and_are_not_held_twice():
    frames = np.random.default_rng(0).integers(0, 256, (9, 8, 6, 3), np.uint8)
    parts = [(frames[:5], [False] * 3 + [True]), (frames[5:], [False] * 3)]
    buffers = [
        EpisodeBuffer(n, None, None, x, np.zeros((len(f), 2), np.float32), [0.0] * len(f), f, [False] * len(f))
        for n, (x, f) in enumerate(parts)
    ]
    spaces = {
        "observation_space": gymnasium.spaces.Box(0, 255, (8, 6, 3), np.uint8),
        "action_space": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
    }
    record("pixels-v0", buffers, None, **spaces)
    data = read_transitions("minari:pixels-v0")
    first = np.moveaxis(frames, -1, 1)
    assert data.spec.image and data.spec.observation == (3, 8, 6) and isinstance(data.next_observations, Chained)
    np.testing.assert_array_equal(data.observations, first[[0, 1, 2, 3, 5, 6, 7]])
    np.testing.assert_array_equal(data.next_observations, first[[1, 2, 3, 4, 6, 7, 8]])
    np.testing.assert_array_equal(data.next_observations[np.array([6, 0, 3])], first[[8, 1, 4]])
    np.testing.assert_array_equal(data.next_observations[3], first[4])
    assert data.truncated.tolist() == [False] * 6 + [True]
    assert data.notes == ["1 episodes that end neither terminated nor truncated: they count as truncated"]


def test_large_images_say_that_they_went_through_jpeg():
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    buffer = EpisodeBuffer(0, None, None, frames, np.zeros(2, int), [0.0, 0.0], [False, True], [False, False])
    spaces = (gymnasium.spaces.Box(0, 255, (32, 32, 3), np.uint8), gymnasium.spaces.Discrete(2))
    record("jpeg-v0", [buffer], None, observation_space=spaces[0], action_space=spaces[1])
    assert any("JPEG" in note for note in read_transitions("minari:jpeg-v0").notes)


def test_what_is_odd_in_minari_is_refused(minari_home: Path):
    env = gymnasium.make("CartPole-v1")
    record("odd-v0", play(env, 3), env)
    main = minari_home / "odd-v0/data/main_data.hdf5"
    with h5py.File(main, "a") as file:
        short = file["episode_1/actions"][:-1]
        del file["episode_1/actions"]
        file["episode_1/actions"] = short
    with pytest.raises(DataError, match=r"minari:odd-v0: episode 1: 'actions' has \d+ rows; \d+ rewards need \d+"):
        read_transitions("minari:odd-v0")
    with h5py.File(main, "a") as file:
        del file["episode_0/truncations"]
    with pytest.raises(DataError, match="a missing truncated field"):
        read_transitions("minari:odd-v0")
    main.write_bytes(main.read_bytes()[:2000])
    with pytest.raises(DataError, match="not a whole file"):
        read_transitions("minari:odd-v0")
    metadata = minari_home / "odd-v0/data/metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"minari_version": "9.9"}))
    with pytest.raises(DataError, match="does not support"):
        read_transitions("minari:odd-v0")


def test_unknown_minari_ids():
    env = gymnasium.make("CartPole-v1")
    record("cartpole/random-v0", play(env, 1), env)
    with pytest.raises(DataError, match=r"could not be downloaded.*Did you mean 'cartpole/random-v0'\?"):
        read_transitions("minari:cartpole/randm-v0")
    with pytest.raises(DataError, match="a version at its end"):
        read_transitions("minari:cartpole")


def test_a_lone_minari_file(tmp_path: Path, minari_home: Path):
    env = gymnasium.make("CartPole-v1")
    record("lone-v0", play(env, 12), env)
    (minari_home / "lone-v0/data/main_data.hdf5").rename(tmp_path / "moved.hdf5")
    data = read_transitions(str(tmp_path / "moved.hdf5"))
    assert data.spec.discrete and data.spec.actions == 2 and data.env is None and len(data.starts) == 12
    assert "no metadata.json" in data.notes[0]
    assert not unchained(data.observations, data.next_observations)[np.diff(data.episode) == 0].any()


@pytest.mark.parametrize("target", ["minari:cart/pole/mixed-v1", "{}/some/where"])
def test_written_episodes_are_read_as_they_were(tmp_path: Path, target: str):
    target = target.format(tmp_path)
    rng = np.random.default_rng(0)
    spec = Spec((3,), False, False, 2, (-1.0, -2.0), (1.0, 2.0))
    episodes = [
        Episode(
            rng.normal(size=(n + 1, 3)).astype(np.float32),
            rng.uniform(-1, 1, (n, 2)).astype(np.float32),
            rng.normal(size=n),
            terminated=n == 3,
            truncated=n != 3,
            seed=n,
        )
        for n in (3, 1, 4)
    ]
    directory = write_minari(iter(episodes), target, spec, "Pendulum-v1", "random")
    data = read_transitions(target)
    assert (data.spec, data.env, data.notes) == (spec, "Pendulum-v1", [])
    np.testing.assert_array_equal(data.observations, np.concatenate([e.observations[:-1] for e in episodes]))
    np.testing.assert_array_equal(data.next_observations, np.concatenate([e.observations[1:] for e in episodes]))
    np.testing.assert_array_equal(data.actions, np.concatenate([e.actions for e in episodes]))
    assert np.flatnonzero(data.terminated).tolist() == [2] and np.flatnonzero(data.truncated).tolist() == [3, 7]
    native = minari.MinariDataset(directory / "data")
    assert native.total_episodes == 3 and native.total_steps == 8 and native[2].id == 2
    assert native.recover_environment().spec.id == "Pendulum-v1"
    with pytest.raises(DataError, match="exists already"):
        write_minari(episodes, target, spec)


def test_written_images_and_choices_are_read_as_they_were(tmp_path: Path):
    spec = Spec((10, 10, 10), True, True, 6, (), ())
    frames = np.random.default_rng(0).integers(0, 256, (4, 10, 10, 10), np.uint8)
    episode = Episode(frames, np.array([5, 0, 3]), np.zeros(3), terminated=True, truncated=False)
    write_minari([episode], str(tmp_path / "a"), spec, "MinAtar/Seaquest-v1")
    data = read_transitions(str(tmp_path / "a"))
    assert data.spec == spec and data.env == "MinAtar/Seaquest-v1" and data.actions.tolist() == [5, 0, 3]
    np.testing.assert_array_equal(data.observations, frames[:3])
    np.testing.assert_array_equal(data.next_observations, frames[1:])


def test_a_dataset_is_written_whole_or_not_at_all(tmp_path: Path):
    spec = Spec((2,), False, True, 2, (), ())
    good = Episode(np.zeros((3, 2), np.float32), np.zeros(2, int), np.zeros(2), True, False)

    def episodes(broken):
        yield good
        yield broken

    wrong = replace(good, observations=good.observations[:2])
    with pytest.raises(DataError, match=r"episode 1 of 2 steps has 'observations' of shape \(2, 2\), not \(3, 2\)"):
        write_minari(episodes(wrong), str(tmp_path / "a"), spec)
    with pytest.raises(DataError, match="no episodes"):
        write_minari([], str(tmp_path / "a"), spec)
    with pytest.raises(DataError, match="a version at its end"):
        write_minari([good], "minari:a b", spec)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ flat files


@pytest.mark.parametrize("write", [npz, hdf5])
def test_d4rl_with_next_observations(tmp_path: Path, write):
    columns = d4rl()
    data = read_transitions(write(tmp_path, columns))
    assert data.spec == Spec((2,), False, False, 1, (-1.0,), (1.0,)) and data.notes == [] and data.env is None
    for name in ("observations", "actions", "rewards", "next_observations"):
        np.testing.assert_array_equal(getattr(data, name), columns[name].astype(np.float32))
    assert data.episode.tolist() == [0] * 4 + [1] * 3 + [2] * 5
    assert np.flatnonzero(data.terminated).tolist() == [3] and np.flatnonzero(data.truncated).tolist() == [6, 11]
    assert data.where(5) == "row 5 (episode 1, step 1)"


def test_d4rl_without_next_observations_leaves_out_rows_whose_future_is_unknown(tmp_path: Path):
    columns = d4rl()
    data = read_transitions(npz(tmp_path, without(columns, "next_observations")))
    kept = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
    np.testing.assert_array_equal(data.observations, columns["observations"][kept])
    expected = columns["next_observations"][kept]
    expected[3] = columns["observations"][3]
    np.testing.assert_array_equal(data.next_observations, expected)
    assert data.episode.tolist() == [0] * 4 + [1] * 2 + [2] * 4
    assert np.flatnonzero(data.terminated).tolist() == [3] and np.flatnonzero(data.truncated).tolist() == [5, 9]
    assert data.notes == [
        "2 rows that end by timeout without a next observation, left out",
        "1 terminal rows without a next observation, which repeat their own",
    ]


def test_a_missing_truncated_field(tmp_path: Path):
    columns = d4rl()
    data = read_transitions(npz(tmp_path, without(columns, "timeouts")))
    assert np.flatnonzero(data.truncated).tolist() == [6, 11] and data.episode.tolist() == [0] * 4 + [1] * 3 + [2] * 5
    assert data.notes[0].startswith("a missing truncated field ('timeouts'): 1 episode ends")
    assert "the last episode does not end" in data.notes[1]
    with pytest.raises(DataError, match="a missing truncated field: without 'timeouts'"):
        read_transitions(npz(tmp_path, without(columns, "timeouts", "next_observations")))


def test_the_words_of_gymnasium(tmp_path: Path):
    columns = d4rl()
    renamed = without(columns, "terminals", "timeouts") | {
        "terminated": columns["terminals"],
        "truncated": columns["timeouts"].astype(float)[:, None],
    }
    assert read_transitions(npz(tmp_path, renamed)).digest == read_transitions(hdf5(tmp_path, columns)).digest


def ogbench() -> dict:
    """Two trajectories of 4 and 3 observations; the task ends in the middle of the first."""
    return {
        "observations": np.array([[0.0], [1], [2], [3], [10], [11], [12]]),
        "actions": np.array([[0.1], [0.2], [0.3], [9], [0.4], [0.5], [9]]),
        "terminals": np.array([0.0, 0, 0, 1, 0, 0, 1]),
        "qpos": np.zeros((7, 2)),
    }


def test_ogbench_as_it_is_stored(tmp_path: Path):
    data = read_transitions(npz(tmp_path, ogbench()))
    assert data.observations.ravel().tolist() == [0, 1, 2, 10, 11]
    assert data.next_observations.ravel().tolist() == [1, 2, 3, 11, 12]
    assert not data.terminated.any() and data.truncated.tolist() == [False, False, True, False, True]
    assert data.episode.tolist() == [0, 0, 0, 1, 1] and not data.rewards.any()
    assert any("no rewards" in note for note in data.notes) and any("no 'masks'" in note for note in data.notes)


def test_ogbench_keeps_terminals_and_masks_apart(tmp_path: Path):
    rewards = {"masks": np.array([1.0, 0, 1, 1, 1, 0, 1]), "rewards": np.array([-1.0, 0, -1, -1, -1, 0, -1])}
    compact = ogbench() | rewards | {"valids": np.array([1.0, 1, 1, 0, 1, 1, 0])}
    compact["terminals"] = np.array([0.0, 0, 1, 1, 0, 1, 1])
    regular = {name: values[[0, 1, 2, 4, 5]] for name, values in compact.items() if name not in ("valids", "qpos")}
    regular["next_observations"] = compact["observations"][[1, 2, 3, 5, 6]]
    for columns in (ogbench() | rewards, compact, regular):
        data = read_transitions(npz(tmp_path, columns))
        assert data.observations.ravel().tolist() == [0, 1, 2, 10, 11]
        assert data.next_observations.ravel().tolist() == [1, 2, 3, 11, 12]
        assert data.terminated.tolist() == [False, True, False, False, True]
        assert data.truncated.tolist() == [False, False, True, False, False]
        assert data.episode.tolist() == [0, 0, 0, 1, 1] and data.rewards.tolist() == [-1, 0, -1, -1, 0]
        assert data.notes == ["1 rows where the task ends and the trajectory goes on"]


def test_images_in_flat_files(tmp_path: Path):
    frames = np.random.default_rng(0).integers(0, 256, (7, 64, 64, 3), np.uint8)
    data = read_transitions(npz(tmp_path, ogbench() | {"observations": frames}))
    assert data.spec.image and data.spec.observation == (3, 64, 64) and isinstance(data.next_observations, Chained)
    np.testing.assert_array_equal(np.asarray(data.next_observations), np.moveaxis(frames, -1, 1)[[1, 2, 3, 5, 6]])


def test_discrete_actions_and_odd_bounds(tmp_path: Path):
    data = read_transitions(npz(tmp_path, d4rl() | {"actions": np.arange(12)[:, None] % 4}))
    assert data.spec == Spec((2,), False, True, 4, (), ()) and data.actions.dtype == np.int64
    assert "makes it 4" in data.notes[0]
    data = read_transitions(npz(tmp_path, d4rl() | {"actions": np.linspace(-3, 2, 24).reshape(12, 2)}))
    np.testing.assert_allclose([*data.spec.low, *data.spec.high], [-3, -3 + 5 / 23, 2 - 5 / 23, 2], rtol=1e-6)
    assert "beyond [-1, 1]" in data.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": np.zeros(11)}, r"different numbers of rows: .*'observations' 12.*'rewards' 11"),
        ({"rewards": np.zeros((12, 2))}, r"'rewards' has shape \(12, 2\): it must be one number per row"),
        ({"terminals": np.full(12, 2)}, "'terminals' is 2 at row 0: it must be 0 or 1"),
        ({"actions": np.array(["a"] * 12)}, "'actions' holds <U1, not numbers"),
        ({"actions": np.zeros((12, 2), int)}, "several discrete choices at once"),
        ({"actions": np.arange(12) - 1}, "'actions' is -1 at row 0: actions count from 0"),
        ({"observations": np.zeros((0, 2))}, "'observations' is empty"),
        ({"next_observations": np.zeros((12, 3))}, r"shape \(12, 3\), 'observations' \(12, 2\)"),
        ({"actions": np.array([{}] * 12, object)}, "holds Python objects"),
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, change: dict, message: str):
    with pytest.raises(DataError, match=message):
        read_transitions(npz(tmp_path, d4rl() | change))


def test_missing_columns(tmp_path: Path):
    columns = d4rl()
    columns["observation"] = columns.pop("observations")
    with pytest.raises(DataError, match=r"has no 'observations'\. Did you mean 'observation'\? It holds actions"):
        read_transitions(npz(tmp_path, columns))
    with pytest.raises(DataError, match="'dones' does not say whether the task ended or the time did"):
        read_transitions(npz(tmp_path, without(d4rl(), "terminals") | {"dones": np.zeros(12)}))
    with pytest.raises(DataError, match=r"has no 'terminals'\. Did you mean 'terminal'\?"):
        read_transitions(npz(tmp_path, without(d4rl(), "terminals") | {"terminal": np.zeros(12)}))
    for misspelled in (without(d4rl(), "rewards"), without(d4rl(), "rewards", "timeouts") | {"reward": np.zeros(12)}):
        with pytest.raises(DataError, match="has no 'rewards'"):
            read_transitions(npz(tmp_path, misspelled))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "next_observations"])
def test_values_that_are_not_finite(tmp_path: Path, name: str, value: float):
    columns = d4rl()
    columns[name][5:7] = value
    source = hdf5(tmp_path, columns)
    column = r"\[0\]" if name.endswith("observations") else ""
    message = rf"'{name}'{column} is {value} at row 5 \(episode 1, step 1\), and 2 of 12 rows"
    with pytest.raises(DataError, match=message):
        read_transitions(source)
    found = not_finite(read_transitions(source, finite=False))
    assert {key: rows.tolist() for key, rows in found.items()} == {name: [5, 6]}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.97])
@pytest.mark.parametrize("write", [npz, hdf5])
def test_files_that_break_off(tmp_path: Path, write, share: float):
    columns = d4rl((400, 300), ("timeouts", "timeouts"))
    source = Path(write(tmp_path, columns))
    source.write_bytes(source.read_bytes()[: int(share * source.stat().st_size)])
    with pytest.raises(DataError, match="not a whole file"):
        read_transitions(str(source))


def test_bytes_that_changed_on_the_way(tmp_path: Path):
    np.savez_compressed(tmp_path / "data.npz", **d4rl((400, 300), ("timeouts", "timeouts")))
    source = tmp_path / "data.npz"
    content = bytearray(source.read_bytes())
    content[200:400] = bytes(200)
    source.write_bytes(content)
    with pytest.raises(DataError, match="'observations': not a whole file"):
        read_transitions(str(source))


def test_sources_that_are_none(tmp_path: Path):
    npz(tmp_path, d4rl())
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "text.npz").write_text("observations")
    (tmp_path / "text.csv").write_text("observations")
    np.savez(tmp_path / "short.npz", **(ogbench() | {"terminals": np.ones(7)}))
    for name, message in {
        "dat.npz": r"no such file\. Did you mean 'data.npz'\?",
        "short.npz": "no row is followed by another",
        "array.npz": "one array without a name",
        "text.npz": "holds Python objects",
        "text.csv": "not a file of trajectories",
        "": "a directory, but not that of a Minari dataset",
    }.items():
        with pytest.raises(DataError, match=message):
            read_transitions(str(tmp_path / name))
    assert all(map(is_control_source, ("minari:x", "a.npz", "b.HDF5", "c.h5")))
    assert not any(map(is_control_source, ("d.jsonl", "owner/name", str(tmp_path))))


# ------------------------------------------------------------------------------------------------------ Transitions


def test_split_keeps_episodes_whole(tmp_path: Path):
    data = read_transitions(npz(tmp_path, d4rl((4, 3, 5, 2, 6), ("timeouts",) * 5)))
    train, held_out = data.split(0.4, seed=1)
    sides = set(train.episode), set(held_out.episode)
    assert not sides[0] & sides[1] and len(sides[0]) == 3 and len(sides[1]) == 2
    assert len(train) + len(held_out) == 20
    assert all(side.lengths().sum() == len(side) for side in (train, held_out))
    assert data.split(0.4, seed=1)[0].digest == train.digest
    assert {data.split(0.4, seed=s)[0].digest for s in range(10)} != {train.digest}
    assert [len(set(side.episode)) for side in data.split(0.01)] == [4, 1] and len(data.split(0.0)[1]) == 0
    with pytest.raises(ConfigError, match="a share of 2 cannot be held out"):
        data.split(2)


def test_data_and_the_environment_that_made_them(tmp_path: Path):
    env = gymnasium.make("Pendulum-v1", max_episode_steps=5)
    record("pendulum-v0", play(env, 2), env)
    declared = read_transitions("minari:pendulum-v0")
    assert declared.recorded_in("Pendulum-v1", declared.spec).digest == declared.digest
    wider = replace(declared.spec, low=(-3.0,))
    with pytest.raises(DataError, match=r"do not fit: low \(-2.0,\) in the data and \(-3.0,\) there"):
        declared.recorded_in("Pendulum-v1", wider)
    flat = read_transitions(npz(tmp_path, d4rl()))
    there = replace(flat.spec, low=(-3.0,), high=(3.0,))
    found = flat.recorded_in("Wide-v0", there)
    assert found.spec == there and found.env == "Wide-v0" and found.digest == flat.digest
    with pytest.raises(DataError, match=r"observation \(2,\) in the data and \(4,\) there"):
        flat.recorded_in("Wide-v0", replace(there, observation=(4,)))
    choices = read_transitions(npz(tmp_path, d4rl() | {"actions": np.arange(12) % 3}))
    more = replace(choices.spec, actions=5)
    assert choices.recorded_in("Maze-v0", more).spec.actions == 5
    with pytest.raises(DataError, match="action 2 in the data and 2 actions there"):
        choices.recorded_in("Maze-v0", replace(more, actions=2))
    with pytest.raises(DataError, match="discrete True in the data and False there"):
        choices.recorded_in("Wide-v0", there)


def test_a_part_of_chained_rows_is_still_right():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (20, 1, 4, 4), np.uint8)
    ends = rng.random(20) < 0.2
    ends[-1] = True
    finals = rng.integers(0, 256, (ends.sum(), 1, 4, 4), np.uint8)
    following = np.concatenate([frames[1:], frames[:1]])
    following[ends] = finals
    spec = Spec((1, 4, 4), True, True, 2, (), ())
    flags = np.zeros(20, bool)
    arrays = (frames, np.zeros(20, int), np.zeros(20, np.float32), Chained(frames, ends, finals))
    data = Transitions(*arrays, flags, ends, np.cumsum(ends) - ends, spec)
    for rows in (np.arange(3, 15), rng.permutation(20)[:9], rng.random(20) < 0.5, slice(2, 9)):
        part = data.subset(rows)
        assert isinstance(part.next_observations, Chained)
        np.testing.assert_array_equal(part.next_observations, following[rows])
    assert replace(data, next_observations=following).digest == data.digest


def test_digest_tells_data_apart(tmp_path: Path):
    data = read_transitions(npz(tmp_path, d4rl()))
    other = d4rl()
    other["rewards"][3] += 1
    assert read_transitions(hdf5(tmp_path, d4rl())).digest == data.digest
    assert read_transitions(hdf5(tmp_path, other)).digest != data.digest


def test_normalizer(tmp_path: Path):
    data = read_transitions(npz(tmp_path, d4rl()))
    both = np.concatenate([data.observations, data.next_observations]).astype(np.float64)
    normalizer = Normalizer.fit(data)
    np.testing.assert_allclose(normalizer.mean, both.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(normalizer.std, both.std(axis=0) + 1e-3, rtol=1e-6)
    x = normalizer.apply(data.observations[None, :3])
    np.testing.assert_allclose(x, (both[None, :3] - both.mean(0)) / (both.std(0) + 1e-3), rtol=1e-4)
    assert x.dtype == np.float32 and x.shape == (1, 3, 2)
    with pytest.raises(ConfigError, match="images cannot be normalised"):
        Normalizer.fit(replace(data, spec=replace(data.spec, image=True)))


def test_moments_in_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("guerdon.control.transitions._BLOCK", 10)
    x, y = np.random.default_rng(0).normal(5, 2, (2, 17, 3)).astype(np.float32)
    assert len(blocks(x)) == 6
    mean, std = moments(x, y[:4])
    whole = np.concatenate([x, y[:4]]).astype(np.float64)
    np.testing.assert_allclose(mean, whole.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, whole.std(axis=0), rtol=1e-12)
    assert unchained(x, np.concatenate([x[1:], x[:1]])).sum() == 0
    assert np.flatnonzero(unchained(x, x + (np.arange(17)[:, None] == 3))).tolist() == list(range(16))
