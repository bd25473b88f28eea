"""The corruption protocol of RIQL: its grammar, what each kind does to which rows, and the attack on a known critic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guerdon.control.corruption import ELEMENTS, Corruption, corrupt
from guerdon.control.spaces import Spec
from guerdon.control.transitions import Chained, Transitions
from guerdon.errors import ConfigError

N = 4000
WIDE = np.array([1.0, 5.0, 0.1], np.float32)


def transitions(discrete: bool = False) -> Transitions:
    rng = np.random.default_rng(0)
    seen = (rng.normal(size=(N + 1, 3)) * WIDE).astype(np.float32)
    actions = rng.integers(4, size=N) if discrete else rng.uniform(-1, 1, (N, 2)).astype(np.float32)
    ends = np.arange(N) % 100 == 99
    spec = Spec((3,), False, discrete, 4 if discrete else 2, (-1.0, -1.0), (1.0, 1.0))
    rewards = rng.normal(size=N).astype(np.float32)
    return Transitions(seen[:-1], actions, rewards, seen[1:], np.zeros(N, bool), ends, np.arange(N) // 100, spec)


def critic(observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Two members; their mean rises with every coordinate of the observation and with the first action."""
    value = observations.sum(-1) + actions[..., 0] - 2 * actions[..., 1]
    return torch.stack([0.5 * value, 1.5 * value])


def actor(observations: torch.Tensor) -> torch.Tensor:
    return torch.stack([-3 * observations[..., 0], torch.zeros(len(observations))], dim=-1)


ATTACK = {"critic": critic, "actor": actor}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reward", Corruption("rewards", 0.3, 1.0)),
        ("reward:0.5", Corruption("rewards", 0.5, 1.0)),
        ("dynamics:0.3:2", Corruption("next_observations", 0.3, 2.0)),
        ("obs:0.1:1.0:adversarial", Corruption("observations", 0.1, 1.0, adversarial=True)),
        ("actions:adversarial", Corruption("actions", 0.3, 1.0, adversarial=True)),
        ("next_obs:1:0.5", Corruption("next_observations", 1.0, 0.5)),
    ],
)
def test_grammar(text: str, expected: Corruption):
    assert Corruption.parse(text) == expected


@given(
    st.builds(
        Corruption,
        st.sampled_from(ELEMENTS),
        st.floats(0, 1),
        st.floats(0, 1e9, exclude_min=True, allow_infinity=False),
        st.booleans(),
    )
)
def test_what_is_written_is_read_again(corruption: Corruption):
    assert Corruption.parse(str(corruption)) == corruption


@given(st.text(alphabet="abcdeorsvw:._0123456789- naif", max_size=30) | st.from_regex(r"(obs|reward)(:[\w.-]*){0,4}"))
def test_any_text_is_a_corruption_or_a_mistake_that_is_told(text: str):
    try:
        corruption = Corruption.parse(text)
    except ConfigError as error:
        assert f"corruption '{text}'" in str(error)
    else:
        assert corruption.element in ELEMENTS and 0 <= corruption.rate <= 1 and corruption.range > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rewrd:0.3", r"nothing called 'rewrd'.*Did you mean 'reward'\?.*observations \(obs\), actions, rewards"),
        ("reward:1.3", r"rate is 1.3: it must be at least 0 and at most 1"),
        ("reward:nan", "rate is nan"),
        ("reward:0.3:0", r"range is 0.0: it must be above 0"),
        ("reward:0.3:inf", "finite"),
        ("reward:0.3:1:2", r"not of the form ELEMENT\[:RATE\[:RANGE\]\]\[:adversarial\]"),
        ("reward:30%", "not of the form"),
        ("obs:0.3:adversary", r"Did you mean 'adversarial'\?"),
        ("obs:adversarial:0.3", "not of the form"),
        ("", "nothing called ''"),
    ],
)
def test_mistakes_in_the_grammar(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        Corruption.parse(text)


@pytest.mark.parametrize("element", ["observations", "actions", "next_observations"])
def test_random_corruption_stays_within_its_range_of_standard_deviations(element: str):
    clean = transitions()
    dirty, masks = corrupt(clean, [Corruption(element, 0.3, 2.0)], seed=3)
    hit = masks[element]
    assert set(masks) == {element} and 0.27 < hit.mean() < 0.33
    before, after = getattr(clean, element), getattr(dirty, element)
    np.testing.assert_array_equal(after[~hit], before[~hit])
    change = (after - before)[hit] / before.std(axis=0)
    assert np.abs(change).max() <= 2.0 + 1e-4 and (np.abs(change).max(axis=0) > 1.98).all()
    # U[-2, 2] has mean 0 and standard deviation 2 / sqrt(3), in each coordinate by itself.
    np.testing.assert_allclose(change.mean(axis=0), 0, atol=0.11)
    np.testing.assert_allclose(change.std(axis=0), 2 / np.sqrt(3), atol=0.05)
    assert abs(np.corrcoef(change.T)[0, 1]) < 0.1
    for other in set(ELEMENTS) - {element}:
        np.testing.assert_array_equal(getattr(dirty, other), getattr(clean, other))
    assert after.dtype == np.float32 and dirty.digest != clean.digest
    assert f"{element}:0.3:2.0 hit {hit.sum():,} rows" in dirty.notes and clean.notes == []


def test_random_rewards_are_replaced():
    clean = transitions()
    dirty, masks = corrupt(clean, [Corruption.parse("reward:0.5:0.1")], seed=0)
    hit = masks["rewards"]
    new = dirty.rewards[hit]
    assert np.abs(new).max() <= 3.0 and np.abs(new).max() > 2.98 and abs(new.mean()) < 0.12
    assert abs(np.corrcoef(new, clean.rewards[hit])[0, 1]) < 0.07
    np.testing.assert_array_equal(dirty.rewards[~hit], clean.rewards[~hit])


def test_adversarial_rewards_are_turned_round():
    clean = transitions()
    dirty, masks = corrupt(clean, [Corruption.parse("rewards:0.3:2:adversarial")], seed=0)
    expected = np.where(masks["rewards"], -2 * clean.rewards, clean.rewards)
    np.testing.assert_allclose(dirty.rewards, expected, rtol=1e-6)


def test_random_choices_are_drawn_anew():
    clean = transitions(discrete=True)
    dirty, masks = corrupt(clean, [Corruption.parse("action:1")], seed=0)
    assert masks["actions"].all() and dirty.actions.dtype == np.int64
    np.testing.assert_allclose(np.bincount(dirty.actions, minlength=4) / N, 0.25, atol=0.03)
    np.testing.assert_allclose((dirty.actions == clean.actions).mean(), 0.25, atol=0.03)


@pytest.mark.parametrize(
    ("element", "signs"),
    [
        ("observations", [-1, -1, -1]),
        ("actions", [-1, 1]),
        ("next_observations", [1, -1, -1]),  # the actor answers the first coordinate with three times its opposite
    ],
)
def test_the_attack_goes_to_the_worst_corner(element: str, signs: list[int]):
    """A linear critic pulls every coordinate one way: 100 steps of 0.01 epsilon cross half the range of 2 epsilon."""
    clean = transitions()
    epsilon = 0.5
    dirty, masks = corrupt(clean, [Corruption(element, 0.3, epsilon, adversarial=True)], seed=1, **ATTACK)
    random, same = corrupt(clean, [Corruption(element, 0.3, epsilon)], seed=1)
    hit = masks[element]
    np.testing.assert_array_equal(hit, same[element])
    clean_x, random_x, x = (getattr(data, element) for data in (clean, random, dirty))
    sigma = clean_x.std(axis=0)
    start, end = ((y - clean_x)[hit] / sigma for y in (random_x, x))
    expected = np.clip(start + np.array(signs) * 100 * 0.01 * epsilon, -epsilon, epsilon)
    np.testing.assert_allclose(end, expected, atol=2e-4)
    np.testing.assert_array_equal(x[~hit], clean_x[~hit])


def test_the_attack_lowers_any_critic_and_does_not_train_it():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))

    def value(observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return network(torch.cat([observations, actions], -1)).T

    clean = transitions()
    values = []
    for text in ("obs:0.3", "obs:0.3:1.0:adversarial"):
        dirty, masks = corrupt(clean, [Corruption.parse(text)], seed=1, critic=value)
        with torch.no_grad():
            rows = masks["observations"]
            inputs = torch.tensor(dirty.observations[rows]), torch.tensor(dirty.actions[rows])
            values.append(value(*inputs).mean(0))
    random, attacked = values
    assert (attacked < random).float().mean() > 0.95 and attacked.mean() < random.mean() - 0.05
    assert all(parameter.grad is None for parameter in network.parameters())


def test_elements_have_streams_of_their_own():
    clean = transitions()
    both = [Corruption.parse("obs:0.3"), Corruption.parse("reward:0.3")]
    dirty, masks = corrupt(clean, both, seed=5)
    turned, _ = corrupt(clean, both[::-1], seed=5)
    alone, alone_masks = corrupt(clean, both[1:], seed=5)
    assert turned.digest == dirty.digest
    np.testing.assert_array_equal(alone.rewards, dirty.rewards)
    np.testing.assert_array_equal(alone_masks["rewards"], masks["rewards"])
    # Independent coins: about 0.3 * 0.3 of the rows are hit by both.
    assert 0.07 < (masks["rewards"] & masks["observations"]).mean() < 0.11
    assert corrupt(clean, both, seed=6)[0].digest != dirty.digest


def test_nothing_to_do():
    clean = transitions()
    assert corrupt(clean, [], seed=0)[0].digest == clean.digest
    dirty, masks = corrupt(clean, [Corruption.parse("dynamics:0:1:adversarial")], seed=0, **ATTACK)
    assert dirty.digest == clean.digest and not masks["next_observations"].any()


def test_images_stay_images_and_next_ones_stay_clean():
    frames = np.random.default_rng(0).integers(0, 256, (51, 1, 6, 6), np.uint8)
    ends = np.arange(50) == 49
    following = Chained(frames[:50], ends, frames[50:])
    base = transitions(discrete=True).subset(np.arange(50))
    spec = replace(base.spec, observation=(1, 6, 6), image=True)
    clean = replace(base, observations=frames[:50], next_observations=following, spec=spec)
    dirty, masks = corrupt(clean, [Corruption.parse("obs:0.5")], seed=0)
    hit = masks["observations"]
    assert dirty.observations.dtype == np.uint8
    assert (dirty.observations[hit] != frames[:50][hit]).mean() > 0.9
    np.testing.assert_array_equal(dirty.observations[~hit], frames[:50][~hit])
    np.testing.assert_array_equal(dirty.next_observations, frames[1:])
    assert isinstance(dirty.next_observations, np.ndarray)  # they no longer are the observations of the next rows
    dirty, masks = corrupt(clean, [Corruption.parse("dynamics:0.5")], seed=0)
    np.testing.assert_array_equal(dirty.observations, frames[:50])
    rows = ~masks["next_observations"]
    np.testing.assert_array_equal(dirty.next_observations[rows], frames[1:][rows])


@pytest.mark.parametrize(
    ("texts", "given", "discrete", "message"),
    [
        (["obs", "observations:0.1"], {}, False, "'observations' is corrupted twice"),
        (["obs:adversarial"], {}, False, "name its run as corrupt_against"),
        (["dynamics:adversarial"], {"critic": critic}, False, "no actor is given"),
        (["action:adversarial"], ATTACK, True, "follows gradients over actions, and these are discrete"),
    ],
)
def test_corruption_that_cannot_be(texts: list[str], given: dict, discrete: bool, message: str):
    with pytest.raises(ConfigError, match=message):
        corrupt(transitions(discrete), [Corruption.parse(text) for text in texts], seed=0, **given)
