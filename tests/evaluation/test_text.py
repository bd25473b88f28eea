"""Agents judged in environments in words."""

from __future__ import annotations

import numpy as np
import pytest

from guerdon.api import configure, evaluate
from guerdon.errors import ConfigError
from guerdon.evaluation.text import agent_of, judge_agent
from guerdon.language.policy import Policy
from guerdon.methods.planning.step_q import QGuidedAgent, Voting
from guerdon.tasks.text import make_text
from guerdon.tasks.text.agent import LanguageAgent, Random, Scripted
from guerdon.training.config import LanguageTraining

ENV = "text:keys:?depth=2&actions=3"
TINY = "tiny:layers=1,width=32,heads=2,context=512"


def judged_by(**options) -> LanguageTraining:
    how = LanguageTraining(model=TINY, env=ENV, **options)
    how.check()
    return how


def test_one_who_knows_the_keys_opens_every_door_and_chance_some():
    how = judged_by(eval_samples=3)
    best = judge_agent(Scripted(), how)
    assert best.primary == "success" and sorted(best.items) == sorted(make_text(ENV[5:]).tasks("test"))
    assert best.means() == {"success": 1.0, "return": 1.0, "steps": 2.0, "admissible": 1.0}
    many = judge_agent(Random(), judged_by(eval_samples=300))
    assert many.items == best.items
    assert abs(many.means()["success"] - 1 / 9) < 0.05


def test_tasks_and_chance_are_the_same_each_time():
    first, again = (judge_agent(Random(), judged_by(eval_samples=20)) for _ in range(2))
    assert np.array_equal(first.metrics["success"], again.metrics["success"])
    assert len(judge_agent(Random(), judged_by(eval_items=1)).items) == 1


def test_how_a_policy_takes_part():
    policy = Policy.load(TINY)
    assert isinstance(agent_of(policy, policy.annotate, judged_by(), 256), LanguageAgent)
    voting = agent_of(policy, policy.annotate, judged_by(eval_choose="vote", eval_candidates=3), 256)
    assert isinstance(voting, Voting) and voting.candidates == 3
    guided = agent_of(policy, policy.annotate, judged_by(eval_agent="random", eval_candidates=4), 256)
    assert isinstance(guided, QGuidedAgent) and (guided.candidates, guided.q.max_length) == (4, 256)
    assert guided.agent.name == "random"


def test_a_policy_that_is_its_start_chooses_nothing():
    same = evaluate(TINY, env=ENV, eval_agent="random", eval_candidates=3, eval_samples=5)[0]
    alone = evaluate("random", env=ENV, eval_samples=5)[0]
    assert np.array_equal(same.metrics["return"], alone.metrics["return"])
    assert same.settings["agent"] == "random guided by Q"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": "CartPole-v1"}, "a language policy acts in words, and CartPole-v1 is no environment in words"),
        ({"env": "text:kyes:"}, "there is no environment in words 'kyes:'"),
        ({"env": ENV, "eval_choose": "lines"}, "with env a reply is taken, voted for"),
        ({"env": ENV, "eval_choose": "vote", "eval_agent": "random"}, "eval_agent's replies are chosen by Q"),
        ({"eval_agent": "random", "data": "x.jsonl"}, "eval_agent acts in an environment in words"),
        ({}, "nothing to learn from is given"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(ConfigError, match=message):
        LanguageTraining(model=TINY, **options).check()


def test_training_needs_more_than_a_place_to_be_judged_in():
    with pytest.raises(ConfigError, match="give either data or task; env is judged in alone"):
        configure("dpo", {"model": TINY, "env": ENV}, "train")
