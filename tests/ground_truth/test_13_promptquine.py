"""Sheet 13 (PromptQuine): the margin reward, pruning by deletion alone, and what each search does on known fitness."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from guerdon.language.prompting import Prompt
from guerdon.methods.prompting.promptquine import PromptQuine, mutated, survivors, tournament
from guerdon.methods.prompting.simple import RandomPruning
from guerdon.methods.prompting.tapruning import TAPruning, accepts
from guerdon.training.prompting import Score, Search, choice_gap, margin_reward


def prompt(n: int, slots: tuple[int, ...] = ()) -> Prompt:
    """n tokens a0 a1 ... of which some are slots."""
    return Prompt(
        tuple(f"a{i} " for i in range(n)), tuple(() if i in slots else (i,) for i in range(n)), frozenset(slots)
    )


def kept(p: Prompt) -> frozenset[int]:
    """The positions that a prompt of `prompt` keeps."""
    return frozenset(int(token.strip()[1:]) for token in p.tokens)


def search(full: Prompt, fitness: Callable[[frozenset[int]], float], budget: int = 10_000, seed: int = 0) -> Search:
    def judge(prompts, half):
        return [Score(0.5, float(fitness(kept(p)))) for p in prompts]

    return Search(full, judge, budget, seed)


def run(method, found: Search) -> Search:
    method.check()
    for _ in method.learn(found):
        pass
    return found


# 1: the reward


def test_margin_reward_and_accuracy():
    p = np.array([[0.7, 0.3], [0.45, 0.55], [0.6, 0.4]])
    gaps = np.array([choice_gap(row, 0) for row in p])
    np.testing.assert_allclose(gaps, [0.4, -0.1, 0.2])
    np.testing.assert_allclose(margin_reward(gaps), [80, -18, 40])
    score = Score.of(gaps)
    assert (score.accuracy, score.reward) == pytest.approx((2 / 3, 34))


def test_the_gap_is_to_the_best_of_several_others():
    assert choice_gap(np.array([0.2, 0.5, 0.3]), 2) == pytest.approx(-0.2)


# 2: deletion alone


@pytest.mark.parametrize(
    "method",
    [
        PromptQuine(population=4, reproductions=8, min_length=0),
        PromptQuine(population=4, reproductions=8, min_length=0, mode="ssga"),
        PromptQuine(population=4, reproductions=8, min_length=0, initial="random", halving=True),
        TAPruning(order="shuffled"),
        RandomPruning(),
    ],
    ids=["gga", "ssga", "random", "tapruning", "random-pruning"],
)
def test_prompts_are_subsequences_that_hold_all_slots(method):
    full = prompt(20, slots=(3, 19))
    rng = np.random.default_rng(1)
    weights = rng.normal(size=20)
    found = run(method, search(full, lambda m: 100 + sum(weights[i] for i in m), budget=80))
    assert len(found.archive) > 15
    for tried in found.archive:
        assert list(tried.kept) == sorted(set(tried.kept)) and {3, 19} <= set(tried.kept)
        assert found.prompt.keep(tried.kept).ids == tuple(full.ids[i] for i in tried.kept)
        assert tried.row["tokens"] == len(tried.kept) == len(kept(found.prompt.keep(tried.kept)))


# 3: known optima


def test_tapruning_finds_an_independent_target_in_one_pass():
    n, target = 12, frozenset({0, 2, 3, 7, 11})
    fitness = lambda m: n - len(m ^ target)  # noqa: E731
    found = run(TAPruning(tau=1.0, passes=1), search(prompt(n), fitness))
    assert frozenset(found.archive[found.state["now"]].kept) == target
    assert found.cursor.samples == n + 1
    shuffled = run(TAPruning(tau=1.0, passes=1, order="shuffled"), search(prompt(n), fitness, seed=5))
    assert frozenset(shuffled.archive[shuffled.state["now"]].kept) == target


def test_children_of_a_generation_are_subsets_of_parents_and_only_the_archive_never_falls():
    n, target = 30, frozenset(range(0, 30, 2))
    found = search(prompt(n), lambda m: n - len(m ^ target), budget=1500, seed=3)
    method = PromptQuine(population=6, reproductions=12, min_length=0)
    best_ever, best_now, before = [], [], None
    for row in method.learn(found):
        population = [frozenset(found.archive[i].kept) for i in found.state["population"]]
        if before is not None:
            assert all(any(child <= parent for parent in before) for child in population)
        before = population
        best_ever.append(row["search/best"])
        best_now.append(max(n - len(m ^ target) for m in population))
    assert best_ever == sorted(best_ever)
    assert any(b < a for a, b in pairwise(best_now))  # aging: the population's best may fall
    assert best_ever[-1] > best_ever[0] + 5


# 4: constant fitness


def test_constant_fitness_removes_everything_or_nothing():
    full = prompt(9, slots=(4,))
    everything = run(TAPruning(), search(full, lambda m: 7.0))
    assert everything.archive[everything.state["now"]].kept == (4,)
    nothing = run(TAPruning(tau=1.01), search(full, lambda m: 7.0))
    assert nothing.archive[nothing.state["now"]].kept == tuple(range(9))
    grows = run(TAPruning(tau=1.5), search(full, lambda m: 2.0 ** (9 - len(m))))
    assert grows.archive[grows.state["now"]].kept == (4,)


def test_thresholds_of_fitness_that_is_not_positive():
    assert accepts(96, 100, 0.96) and not accepts(95.9, 100, 0.96)
    assert accepts(-50, -50, 0.96) and accepts(-40, -50, 0.96)
    assert accepts(-55.2, -50, 0.96) and not accepts(-55.3, -50, 0.96)  # 0.96 * 130 = 124.8
    assert accepts(0, 0, 0.96) and not accepts(-10, 0, 0.96)
    assert accepts(95, 100, 0.96, delta=5) and not accepts(94, 100, 0.96, delta=5)


# 5: what is counted


def test_evaluations_of_generations():
    """Each attempt of a generation counts, those that gave no child as well."""
    full = prompt(4)  # so short that most attempts fail
    found = run(PromptQuine(population=4, reproductions=10, min_length=0), search(full, len, budget=100))
    assert found.cursor.samples == 100
    assert len(found.archive) < 15
    longer = search(prompt(40), len, budget=10_000)
    run(PromptQuine(population=4, reproductions=10, min_length=0, max_prompts=55), longer)
    method = PromptQuine(population=4, reproductions=10, min_length=39)
    short = run(method, search(prompt(40), len, budget=10_000))
    assert short.cursor.samples == 11  # one generation brings the mean length down to 39 or less


def test_the_budget_is_kept_to_the_last_evaluation():
    for method in (PromptQuine(population=4, reproductions=7, min_length=0), TAPruning(), RandomPruning()):
        found = run(method, search(prompt(60), lambda m: 100 + len(m), budget=45))
        assert found.cursor.samples <= 45
        assert len(found.archive) <= 45


def test_steady_state_ends_where_no_child_is_new():
    method = PromptQuine(mode="ssga", population=3, reproductions=3, min_length=0, stall=2)
    found = run(method, search(prompt(2), len, budget=10_000))
    assert found.cursor.samples < 10_000
    assert len(found.archive) <= 3


def test_survivors_are_children_and_as_many_worst_parents_as_attempts_failed():
    parents, children = [9.0, 8.0, 1.0], [5.0, 2.0, 7.0, 3.0]
    assert survivors(parents + children, attempts=4, size=3) == [5, 3, 6]
    assert survivors(parents + children, attempts=6, size=3) == [1, 5, 3]  # the best parent alone cannot compete
    assert survivors(parents, attempts=4, size=2) == [0, 1]


def test_tournaments_and_sizes():
    rng = np.random.default_rng(0)
    fitness = list(range(30))
    wins = [tournament(fitness, 0.2, rng) for _ in range(4000)]
    assert np.mean(wins) == pytest.approx(30 * 6 / 7 - 0.5, abs=0.3)  # the best of 6 drawn with replacement
    everything, prunable = tuple(range(50)), frozenset(range(50))
    sizes = [50 - len(mutated(everything, prunable, rng)) for _ in range(2000)]
    assert np.bincount(sizes)[1:] == pytest.approx([500] * 4, abs=80)
    assert {len(mutated((0, 1, 2), prunable, rng)) for _ in range(50)} == {1, 2}  # always fewer than there are
    assert mutated((0,), prunable, rng) is None


# The mechanism without a language model


def test_every_search_removes_the_tokens_that_bias_a_linear_model():
    """Each token adds a vector to the logits of two classes; some push to class 0 and nothing speaks for class 1."""
    rng = np.random.default_rng(4)
    n, bias = 16, frozenset({1, 5, 6, 12})
    evidence = rng.normal(size=40)  # of 40 items: the right class is its sign
    right = (evidence > 0).astype(int)
    push = np.array([1.5 if i in bias else 0.0 for i in range(n)])

    def judge(prompts, half):
        scores = []
        for p in prompts:
            shift = sum(push[i] for i in kept(p)) - 0.05 * len(kept(p) - bias)  # the rest helps a little
            p1 = 1 / (1 + np.exp(shift - 2 * evidence))
            scores.append(Score.of(np.where(right == 1, 2 * p1 - 1, 1 - 2 * p1)))
        return scores

    for method in (
        PromptQuine(population=10, reproductions=20, min_length=4),
        PromptQuine(population=10, reproductions=20, min_length=4, mode="ssga"),
        TAPruning(tau=1.0),
        RandomPruning(high=0.6),
    ):
        found = run(method, Search(prompt(n), judge, budget=400, seed=0))
        best = found.best("reward")
        lost = bias - set(best.kept)
        assert len(lost) >= (2 if method.name == "random-pruning" else 3), method
        (full,) = judge([prompt(n)], None)
        assert best.score.reward > full.reward + 20, method
