"""Black-box models that act in words."""

from __future__ import annotations

import pytest

from guerdon.errors import ConfigError
from guerdon.language.sampling.base import Sampling
from guerdon.llm import make_client
from guerdon.tasks.text import make_text
from guerdon.tasks.text.agent import Episode, play
from guerdon.tasks.text.clients import ClientAgent
from guerdon.tasks.text.collect import make_agent

TINY = "tiny:layers=1,width=32,heads=2,context=512"


@pytest.fixture(scope="module")
def agent() -> ClientAgent:
    return ClientAgent("tiny", make_client(TINY), Sampling(max_new_tokens=3))


def test_it_says_as_much_as_it_is_asked_for_and_the_same_for_the_same_seed(agent):
    episode = Episode.begin(make_text("keys:"), None, 0)
    turns = [episode.turn(seed) for seed in (1, 2**40 + 1, 2)]
    replies = agent.propose(turns, 4)
    assert [len(each) for each in replies] == [4, 4, 4] and len(set(replies[0])) > 1
    assert agent.propose(turns[:1], 4) == replies[:1] and replies[2] != replies[0]
    assert all(len(reply) <= 3 for each in replies for reply in each)


def test_it_plays(agent):
    (trajectory,) = play(lambda: make_text("keys:?depth=2"), [agent], [0])
    assert trajectory.policy == "tiny" and len(trajectory.steps) == 2


def test_what_it_cannot_do_is_told(agent, tmp_path):
    with pytest.raises(ConfigError, match="tiny does not draw among the k likeliest tokens"):
        ClientAgent("tiny", agent.client, Sampling(top_k=5))
    with pytest.raises(ConfigError, match="cassette"):
        make_agent(f"cassette:{tmp_path / 'none.jsonl'}", Sampling())
