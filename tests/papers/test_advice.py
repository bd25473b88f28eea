"""Advice: rules that can speak, methods that can learn, caveats that are true, and commands that run as they stand."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

import guerdon
from guerdon.cli import main
from guerdon.control import diagnostics as control_diagnostics
from guerdon.errors import ConfigError
from guerdon.evaluation import compare
from guerdon.evaluation.trials import locked
from guerdon.feedback import diagnostics, inspect
from guerdon.methods.base import all_methods
from guerdon.papers import get_paper, tags
from guerdon.papers.advice import FACTS, Advice, advise, rules
from pages import trials_in_this_process

TINY = "tiny:layers=1,width=16,heads=2,context=128"
PAIRS = [
    {"prompt": f"What is {i}?", "chosen": f"It is the number {i}, as told.", "rejected": f"no {i}"} for i in range(40)
]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write rows into a JSONL file of the working directory; its name comes back."""
    monkeypatch.chdir(tmp_path)

    def write(rows: list[dict], name: str = "data.jsonl") -> str:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return write


def log(episodes: int = 24, discrete: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Episodes of ten steps in D4RL's layout whose returns go from poor to good."""
    rng, n = np.random.default_rng(seed), 10 * episodes
    ends = np.arange(n) % 10 == 9
    return {
        "observations": rng.normal(size=(n, 4)).astype(np.float32),
        "next_observations": rng.normal(size=(n, 4)).astype(np.float32),
        "actions": rng.integers(2, size=n) if discrete else rng.uniform(-1, 1, (n, 1)).astype(np.float32),
        "rewards": np.repeat(np.linspace(0.1, 1, episodes), 10).astype(np.float32),
        "terminals": ends,
        "timeouts": np.zeros(n, bool),
    }


@pytest.fixture
def write_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(**changed) -> str:
        options = {name: changed.pop(name) for name in ("episodes", "discrete") if name in changed}
        np.savez("log.npz", **(log(**options) | changed))
        return "log.npz"

    return write


def points(advice: Advice) -> dict[str, int]:
    return {fit.method: fit.points for fit in advice.fits}


def caveats(advice: Advice) -> str:
    return "\n".join(f"{each['level']}: {each['says']} {each['paper']}" for each in advice.caveats)


# Rules


def test_rules_speak_of_what_there_is():
    """A misspelt fact, method, tag or finding would silence a rule for ever."""
    sources = "".join(Path(module.__file__).read_text() for module in (diagnostics, inspect, control_diagnostics))
    for rule in rules():
        assert set(rule.equal) | set(rule.at_least) | set(rule.below) <= set(FACTS), rule.says
        assert set(rule.methods) <= set(all_methods()) and bool(rule.methods) == bool(rule.points), rule.says
        assert set(rule.see) <= set(tags()), rule.says
        assert rule.finding in sources and get_paper(rule.paper), rule.says
        assert rule.equal or rule.at_least or rule.below or rule.finding, rule.says
        assert rule.says[0].isupper() and rule.says[-1] == "."


def test_the_conditions_of_a_rule():
    rule = rules()[0].__class__(
        paper=1,
        says="X.",
        equal={"kind": ["a", "b"]},
        at_least={"rows": 2},
        below={"rows": 5},
        finding="odd",
        share=0.1,
    )
    odd = [{"what": "rows that are odd", "share": 0.1}]
    assert rule.speaks({"kind": "b", "rows": 4}, odd)
    assert not rule.speaks({"kind": "c", "rows": 4}, odd)
    assert not rule.speaks({"kind": "b", "rows": 1}, odd) and not rule.speaks({"kind": "b", "rows": 5}, odd)
    assert not rule.speaks({"kind": "b"}, odd) and not rule.speaks({"kind": "b", "rows": 4}, [])
    assert not rule.speaks({"kind": "b", "rows": 4}, [odd[0] | {"share": 0.05}])


# Language


def test_preferences(write):
    even = [row | {"rejected": "It is the number 99, as told."} for row in PAIRS]
    found = advise(write(even))
    assert points(found) == {"dpo": 3, "dpo-norm": 2, "sft": 1, "reward-model": -1}
    assert [fit.method for fit in found.fits] == ["dpo", "dpo-norm", "sft", "reward-model"]
    assert found.commands == [
        "guerdon compare dpo dpo-norm sft --model smollm2-135m --data data.jsonl --budget-updates 200"
    ]
    assert found.fits[0].because[0]["paper"] == 11
    unfit = {name: why for why, names in found.unfit.items() for name in names}
    assert unfit["nft"].startswith("learn from a verifier") and unfit["iql"] == "improve a control policy"
    assert set(unfit) | set(points(found)) == set(all_methods())
    assert "Few pairs" in caveats(found) and "length" not in caveats(found)
    assert found.facts["held_out"] == 4 and "Few prompts are held out" in caveats(found)
    assert guerdon.advise("data.jsonl").as_dict() == found.as_dict()  # deterministic


def test_long_answers_contradictions_and_circles_change_it(write):
    circle = [{"prompt": "z", "chosen": a, "rejected": b} for a, b in ("AB", "BC", "CA")]
    twice = [{"prompt": "q", "chosen": a, "rejected": b} for a, b in ("AB", "BA")]
    found = advise(write(PAIRS + circle + twice))
    assert points(found)["dpo-norm"] == 4 > points(found)["dpo"]
    said = caveats(found)
    assert "warning: 1 pairs of answers that are preferred both ways round" in said and "--loss-type robust" in said
    assert "Preferences in circles fit no reward" in said and "the better answer is the longer one" in said
    assert {41, 19, 21} <= {each["id"] for each in found.see}


def test_scores_labels_prompts_and_words(write):
    scored = advise(write([{"prompt": str(i), "completions": ["a", "b"], "scores": [1.0, i % 3]} for i in range(9)]))
    assert {"dpo", "dpo-norm", "sft"} <= set(points(scored)) and "DPO knows only their order" in caveats(scored)

    liked = [{"prompt": str(i), "completion": "x", "label": True} for i in range(9)]
    found = advise(write(liked))
    assert points(found) == {"sft": 1} and "error: 9 every label is 'liked'" in caveats(found)
    assert "Labels of one class alone" in caveats(found)
    assert "Labels of one class alone" not in caveats(
        advise(write([*liked, liked[0] | {"prompt": "y", "label": False}]))
    )

    found = advise(write([{"prompt": str(i)} for i in range(9)]))
    assert not found.fits and not found.commands and "Prompts alone teach nothing" in caveats(found)
    (command,) = advise("data.jsonl", verifier="format:yes|no").commands
    assert "--task data.jsonl --verifier 'format:yes|no'" in command

    found = advise(write([row | {"critique": "too long", "rationale": "true"} for row in PAIRS]))
    assert "There are critiques" in caveats(found) and {37, 53} <= {each["id"] for each in found.see}


def test_labelled_items_are_for_prompts(write):
    named = advise("templated-sentiment", model=TINY)
    assert points(named)["promptquine"] == points(named)["tapruning"] == 2 and points(named)["icl"] == 0
    assert named.commands == [
        f"guerdon compare promptquine tapruning random-pruning --model {TINY} --data templated-sentiment "
        "--budget-samples 150"
    ]
    found = advise(write([{"text": f"number {i}", "label": ["odd", "even"][i % 2]} for i in range(200)]))
    assert [command.split()[2] for command in found.commands] == ["sft", "promptquine"]
    assert "the test that it never saw" in caveats(found) and "the test that it never saw" in caveats(named)
    with pytest.raises(ConfigError, match="text:keys:x is an environment in words: `guerdon collect"):
        advise("text:keys:x")


@pytest.mark.parametrize(
    ("answer", "verifier"), [("1,234.5", "number"), ("-3", "number"), ("\\frac{1}{2}", "math"), ("north", "exact")]
)
def test_answers_can_be_checked(answer, verifier, write):
    found = advise(write([{"prompt": str(i), "answer": answer} for i in range(9)]))
    assert [fit.method for fit in found.fits][:3] == ["nft", "dr-grpo", "rft"]
    assert found.commands[0].startswith(
        f"guerdon compare nft dr-grpo rft --model smollm2-135m --task data.jsonl --verifier {verifier}"
    )


def test_two_ways_to_use_it_are_two_commands(write):
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1), "answer": str(i + 1)} for i in range(30)]
    found = advise(write(rows), verifier="exact")
    assert ["--task" in command for command in found.commands] == [True, False]
    assert "--verifier exact" in found.commands[0] and found.commands[1].startswith("guerdon compare sft ")


# Control


def test_logs(write_log):
    found = advise(write_log(), env="CartPole-v1")
    assert found.facts["uneven"] > 0.3 and found.facts["actions"] == "discrete"
    assert [fit.method for fit in found.fits] == ["iql", "riql", "bc"] and points(found) == {
        "iql": 3,
        "riql": 2,
        "bc": 0,
    }
    assert found.unfit["act with continuous actions, and these are discrete"] == ["td3-bc"]
    assert found.commands == ["guerdon compare iql riql --data log.npz --env CartPole-v1 --budget-updates 50000"]
    assert "where policies are to be judged" not in caveats(found)
    unknown = advise("log.npz")
    assert (
        "warning: log.npz does not say where policies are to be judged" in caveats(unknown)
        and "--env ENV" in unknown.commands[0]
    )


def test_damaged_equal_and_rare_rewards(write_log):
    rewards = log()["rewards"]
    damaged = rewards.copy()
    damaged[::50] = 1e6
    assert points(advise(write_log(rewards=damaged)))["riql"] == 4
    assert "no outlier" in caveats(advise("log.npz"))

    equal = advise(write_log(rewards=np.ones_like(rewards)))
    assert equal.fits[0].method == "bc" and "All rewards are equal" in equal.fits[0].because[-1]["says"]

    rare = np.zeros_like(rewards)
    rare[-1] = 1
    assert "Reward is rare" in caveats(advise(write_log(rewards=rare)))
    assert "Few episodes" in caveats(advise(write_log(episodes=6)))

    broken = rewards.copy()
    broken[3] = np.nan
    assert "error: 1 rows with 'rewards' that are not finite" in caveats(advise(write_log(rewards=broken)))


def test_environments():
    assert [fit.method for fit in advise("Pendulum-v1").fits][:3] == ["ppo-control", "sac", "stream-ac"]
    puzzle = advise("puzzle:pancake5")
    assert [fit.method for fit in puzzle.fits][:2] == ["qstar", "davi"]
    assert puzzle.commands == ["guerdon compare qstar davi --env puzzle:pancake5 --budget-samples 100000"]
    assert "qstar" in advise("CartPole-v1").unfit["learns with the moves of a puzzle at hand, and CartPole-v1 is none"]
    task = advise("reasoning-gym:chain_sum", model=TINY)
    assert task.commands == [
        f"guerdon compare nft dr-grpo rft --model {TINY} --task reasoning-gym:chain_sum --budget-samples 32768"
    ]


# The commands


def checked(command: str, capsys) -> None:
    """Run a printed command up to where trials would start, which a held lock forbids: all before is right."""
    Path("comparison").mkdir(exist_ok=True)
    with locked(Path("comparison")):
        assert main(shlex.split(command)[1:]) == 2
    assert "comparison: a comparison is at work here" in capsys.readouterr().err


def test_every_command_is_one_that_compare_takes(write, write_log, capsys):
    odd = "its data.jsonl"  # a name that has to be quoted
    for rows in (
        PAIRS,
        [{"prompt": str(i), "completions": ["a", "b"], "scores": [1.0, i % 3]} for i in range(9)],
        [{"prompt": str(i), "completion": "x", "label": bool(i % 2)} for i in range(9)],
        [{"prompt": f"{i}+1=", "completion": str(i + 1), "answer": str(i + 1)} for i in range(30)],
        [{"text": f"number {i}", "label": ["odd", "even"][i % 2]} for i in range(200)],
    ):
        for command in advise(write(rows, odd), model=TINY).commands:
            checked(command, capsys)
    for options in ({}, {"discrete": False}):
        env = "Pendulum-v1" if options else "CartPole-v1"
        data = log(**options)
        if options:  # as Pendulum is seen and moved
            data |= {name: data[name][:, :3] for name in ("observations", "next_observations")}
        (command,) = advise(write_log(**data), env=env).commands
        checked(command, capsys)
    for source in ("CartPole-v1", "Pendulum-v1", "puzzle:pancake5", "reasoning-gym:chain_sum"):
        (command,) = advise(source, model=TINY).commands
        checked(command, capsys)


def test_printed_commands_run_as_they_stand(write, write_log, capsys, monkeypatch):
    """To their end, with a budget of one update."""
    monkeypatch.setattr(compare, "run_trials", trials_in_this_process)
    sources = {
        "pairs": (write(PAIRS, "pairs.jsonl"), {"model": TINY}),
        "labels": (
            write([{"prompt": str(i), "completion": "x", "label": True} for i in range(9)], "labels.jsonl"),
            {"model": TINY},
        ),
        "log": (write_log(), {"env": "CartPole-v1"}),
    }
    for name, (source, options) in sources.items():
        (command,) = advise(source, **options).commands
        less = ["--seeds", "1", "--budget-updates", "1", "--out", name]
        assert main([*shlex.split(command)[1:], *less, *(["--eval-episodes", "1"] if name == "log" else [])]) == 0
    capsys.readouterr()
    labels = {name: {row.label for row in compare.load_comparison(name).rows if row.seeds} for name in sources}
    assert labels == {
        "pairs": {"base", "dpo", "dpo-norm", "sft"},
        "labels": {"base", "sft"},
        "log": {"base", "iql", "riql"},
    }
