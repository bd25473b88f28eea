"""`guerdon papers` and `guerdon advise`: what is printed, and what is not loaded for it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from guerdon.cli import main


def said(capsys, *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def test_json_lists_all_papers_with_what_is_derived(capsys):
    listed = json.loads(said(capsys, "papers", "--json"))
    assert len(listed) == 76 and len({paper["id"] for paper in listed}) == 76
    nft = listed[61]
    assert (nft["id"], nft["url"], nft["methods"]) == (62, "https://arxiv.org/abs/2505.18116", ["infonca", "nft"])
    assert nft["claim"]["status"] == "holds" and nft["claim"]["seeds"] >= 10
    assert "NFT" in said(capsys, "papers") and len(json.loads(said(capsys, "papers", "--tags", "--json"))) >= 70


def test_one_entry_in_full(capsys):
    shown = " ".join(said(capsys, "papers", "62").split())
    for part in (
        "62 NFT", "https://arxiv.org/abs/2505.18116", "guerdon train nft --model MODEL --task TASK", "claim: holds",
        "many-answers: nft is above rft: as claimed, the difference is 0.023 [0.019, 0.026].",
        "guerdon reproduce 62 took 1.4 minutes on one core; --quick shows that it runs.",
    ):  # fmt: skip
        assert part in shown
    assert "in guerdon not yet" in " ".join(said(capsys, "papers", "36").split())
    assert "claim: cannot be checked on a laptop. A survey" in " ".join(said(capsys, "papers", "57").split())


def test_words_tags_and_nothing(capsys):
    shown = said(capsys, "papers", "preference", "--tag", "intransitive-preferences")
    assert "Nash-MD" in shown and "RIQL" not in shown
    assert "Did you mean 'preference'?" in said(capsys, "papers", "prefrence")
    assert json.loads(said(capsys, "papers", "xyzzy", "--json")) == []
    assert "grounding" in said(capsys, "papers", "--tags")
    assert main(["papers", "--tag", "grounded"]) == 2
    assert "Did you mean 'grounding'?" in capsys.readouterr().err


def test_neither_torch_nor_a_simulator_is_loaded():
    script = (
        "import sys; from guerdon.cli import main; main(['papers']); main(['papers', '62'])\n"
        "print({'torch', 'gymnasium', 'numba', 'transformers', 'openai'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


def test_advice_for_an_environment(capsys):
    shown = said(capsys, "advise", "CartPole-v1")
    assert (
        shown.splitlines()[-1] == "guerdon compare dqn ppo-control stream-q --env CartPole-v1 --budget-samples 100000"
    )
    assert "sac: act with continuous actions, and these are discrete." in shown
    found = json.loads(said(capsys, "advise", "CartPole-v1", "--json"))
    assert found["commands"] == shown.splitlines()[-1:]
    assert [fit["method"] for fit in found["fits"]][:3] == ["dqn", "ppo-control", "stream-q"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("nothing.jsonl", "no such file or directory"),
        ("puzzle:cubes3", "no puzzle is called"),
    ],
)
def test_what_cannot_be_advised_on(source, why, capsys):
    assert main(["advise", source]) == 2
    assert why in capsys.readouterr().err
