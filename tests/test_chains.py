"""Chains of methods on a tiny model: what a stage takes from another, kills, and recipes that contradict themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

import guerdon
from guerdon import cli
from guerdon.chains import Collect, plan, read_chain
from guerdon.errors import ConfigError, GuerdonError
from guerdon.feedback.readers import read_feedback
from guerdon.feedback.records import Record
from guerdon.rewards.verifiers import get_verifier
from guerdon.training.progress import Silent
from guerdon.training.rundir import RunDir

ROOT = Path(__file__).parent.parent
SHORT = {"lr": 1e-2, "batch_size": 8, "max_length": 32, "epochs": 2}
CHAIN: dict[str, Any] = {
    "training": {"model": "tiny:layers=1,width=32,heads=4", "eval_items": 4, "eval_samples": 1, "checkpoint_every": 1},
    "stages": [
        {"name": "sft", "method": "sft", "options": SHORT, "training": {"data": "demonstrations.jsonl"}},
        {
            "name": "samples",
            "method": "collect",
            "options": {"n": 8, "prompts": 12, "max_new_tokens": 6},
            "training": {"task": "prompts.jsonl", "verifier": "exact"},
        },
        {
            "name": "rm",
            "method": "reward-model",
            "options": SHORT,
            "training": {"data": {"stage": "samples"}, "model": {"stage": "sft"}},
        },
        {
            "name": "dpo",
            "method": "dpo-norm",
            "options": SHORT | {"beta": 1.0},
            "training": {"data": {"stage": "samples"}},
        },
        {
            "name": "rlvr",
            "method": "ppo",
            "options": {
                "value_model": {"stage": "rm"},
                "reward_model": {"stage": "rm"},
                "rounds": 2,
                "prompts_per_round": 4,
                "max_new_tokens": 6,
                "epochs": 1,
            },
            "training": {"task": "prompts.jsonl", "verifier": "exact", "eval_max_new_tokens": 6},
        },
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data: one-digit sums as demonstrations, and others as a task."""
    place = tmp_path_factory.mktemp("chains")
    sums = [(a, b) for a in range(10) for b in range(10) if a + b < 10]
    rows = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a, b in sums]
    (place / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"prompt": f"{a}+{b} =", "answer": f"{a + b}"} for a, b in sums]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    (place / "chain.yaml").write_text(yaml.safe_dump(CHAIN))
    return place


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The chain, run without interruption."""
    before = os.getcwd()
    os.chdir(place)
    guerdon.train_chain("chain.yaml", out="whole")
    os.chdir(before)
    return place / "whole"


def weights(directory: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(directory / "model.safetensors").items()}


def assert_equal(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


# What a chain leaves --------------------------------------------------------------------------------------------------


def test_every_stage_starts_from_what_the_recipe_says(whole: Path) -> None:
    training = {p.name: RunDir.open(p).config["training"] for p in whole.glob("*-*") if (p / "config.json").exists()}
    assert training["1-sft"]["model"] == CHAIN["training"]["model"]
    assert training["3-rm"]["model"] == str(whole / "1-sft/policy")
    assert training["4-dpo"]["model"] == str(whole / "1-sft/policy")  # feedback and a reward model are no policies
    assert training["5-rlvr"]["model"] == str(whole / "4-dpo/policy")
    assert training["4-dpo"]["data"] == str(whole / "2-samples/feedback.jsonl")
    assert RunDir.open(whole / "5-rlvr").config["options"]["value_model"] == str(whole / "3-rm/policy")
    assert (whole / "3-rm/policy/head.safetensors").exists()


def test_the_reference_of_dpo_is_the_policy_before(whole: Path) -> None:
    first = RunDir.open(whole / "4-dpo").metrics()[0]
    assert first["loss/total"] == pytest.approx(np.log(2), abs=1e-5)


def test_collected_answers_that_do_not_end_count_as_wrong(whole: Path) -> None:
    feedback = read_feedback(str(whole / "2-samples/feedback.jsonl"))
    assert feedback.kind == "scored" and len(feedback) == 12
    scores = [s for record in feedback.records for s in record.scores or ()]
    ended = [f for record in feedback.records for f in record.columns["finished"]]
    right = [r for record in feedback.records for r in record.columns["rewards"]["exact"]]
    assert len(scores) == 12 * 8
    assert scores == [r if f else 0.0 for r, f in zip(right, ended, strict=True)]
    assert 0 < sum(scores) < len(scores)


def test_the_chain_loads_as_its_last_policy(whole: Path) -> None:
    assert os.readlink(whole / "policy") == "5-rlvr/policy"
    policy = guerdon.load_policy(whole)
    np.testing.assert_array_equal(
        policy.model.model.model.embed_tokens.weight.numpy(),
        weights(whole / "5-rlvr/policy")["model.embed_tokens.weight"],
    )


# Kills ----------------------------------------------------------------------------------------------------------------


def test_a_killed_chain_goes_on_to_the_same_weights(whole: Path, place: Path) -> None:
    killing = f"""
        import os, signal, sys
        sys.path.insert(0, {str(ROOT / "src")!r})
        from guerdon.chains import start
        from guerdon.training.progress import Silent

        class Killing(Silent):
            stage = ""

            def note(self, text):
                self.stage = text

            def update(self, step, done, metrics):
                if "dpo" in self.stage and step == 2:
                    os.kill(os.getpid(), signal.SIGKILL)

        start("chain.yaml", {{"out": "killed"}}, Killing())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(killing)], cwd=place, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    killed = place / "killed"
    assert RunDir.open(killed / "4-dpo").status["state"] == "killed" and not (killed / "policy").exists()
    kept = {p: p.stat().st_mtime_ns for p in (killed / "1-sft").rglob("*") if p.is_file()}

    assert guerdon.resume("killed").path == killed / "5-rlvr"
    assert {p: p.stat().st_mtime_ns for p in (killed / "1-sft").rglob("*") if p.is_file()} == kept
    for stage in ("1-sft", "3-rm", "4-dpo", "5-rlvr"):
        assert_equal(killed / stage / "policy", whole / stage / "policy")
    rewards = [[row.get("reward/mean") for row in RunDir.open(d / "5-rlvr").metrics()] for d in (killed, whole)]
    assert rewards[0] == rewards[1]


class Notes(Silent):
    def __init__(self, interrupt: str = "") -> None:
        self.told: list[str] = []
        self.interrupt = interrupt

    def note(self, text: str) -> None:
        self.told.append(text)
        if self.interrupt and self.interrupt in text:
            raise KeyboardInterrupt


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(place: Path, whole: Path) -> None:
    short = CHAIN | {"stages": CHAIN["stages"][:2] + CHAIN["stages"][3:4]}
    Path("short.yaml").write_text(yaml.safe_dump(short))
    with pytest.raises(KeyboardInterrupt, match=r"stopped in stage 'samples'. `guerdon resume short` goes on"):
        guerdon.train_chain("short.yaml", out="short", progress=Notes(interrupt="of 12 prompts"))
    notes = Notes()
    guerdon.train_chain("short.yaml", out="short", progress=notes)
    assert [line for line in notes.told if line.startswith("stage")] == [
        "stage 2 of 3, samples: collect",
        "stage 3 of 3, dpo: dpo-norm",
    ]
    assert_equal(place / "short/3-dpo/policy", whole / "4-dpo/policy")
    notes.told.clear()
    guerdon.train_chain("short.yaml", out="short", progress=notes)
    assert notes.told == []


def test_another_recipe_does_not_go_on(whole: Path) -> None:
    with pytest.raises(ConfigError, match=r"whole holds a chain that was begun with other flags"):
        guerdon.train_chain("chain.yaml", out="whole", seed=1)
    Path("other.yaml").write_text(yaml.safe_dump(CHAIN | {"stages": CHAIN["stages"][:1]}))
    with pytest.raises(ConfigError, match=r"begun with other stages: `guerdon resume whole`"):
        guerdon.train_chain("other.yaml", out="whole")


# LoRA, several policies, a judge --------------------------------------------------------------------------------------


def test_lora_stages_pass_on_whole_weights_and_a_reward_model_judges(place: Path) -> None:
    sft, samples, rm, dpo, _ = CHAIN["stages"]
    sft = sft | {"options": SHORT | {"lr": 3e-2, "epochs": 10}}
    samples = samples | {"training": {"task": "prompts.jsonl", "verifier": r"format:\d"}}
    both = samples["options"] | {"models": [{"stage": "sft"}, {"stage": "more"}], "n": 4}
    judged = {"name": "judged", "method": "collect", "options": both | {"judge": {"stage": "rm"}}}
    more = {"name": "more", "method": "sft", "options": SHORT, "training": {"data": "demonstrations.jsonl"}}
    stages = [
        sft,
        more,
        samples,
        rm,
        judged | {"training": samples["training"]},
        dpo | {"training": {"data": {"stage": "judged"}}},
    ]
    Path("lora.yaml").write_text(yaml.safe_dump(CHAIN | {"stages": stages}))
    last = guerdon.train_chain("lora.yaml", out="lora", lora_rank=8)
    out = place / "lora"
    assert last.path == out / "6-dpo" and os.readlink(out / "policy") == "6-dpo/merged"
    assert last.config["training"]["model"] == str(out / "2-more/merged")
    assert (out / "4-rm/merged/head.safetensors").exists()
    # The reference is the policy before, not the model under its adapter: the loss starts at ln 2 of real log-ratios.
    assert last.metrics()[0]["preference/margin"] == pytest.approx(0, abs=1e-4)
    assert not np.allclose(
        weights(out / "2-more/merged")["model.layers.0.mlp.up_proj.weight"],
        weights(out / "6-dpo/merged")["model.layers.0.mlp.up_proj.weight"],
    )

    rows = [json.loads(line) for line in (out / "5-judged/feedback.jsonl").read_text().splitlines()]
    parts = [
        [json.loads(line) for line in (out / f"5-judged/answers-{i}.jsonl").read_text().splitlines()] for i in (1, 2)
    ]
    assert [row["completions"] for row in rows] == [
        a["completions"] + b["completions"] for a, b in zip(*parts, strict=True)
    ]
    from guerdon.language.templates import render

    judge = guerdon.load_policy(out / "4-rm/merged")
    record = read_feedback(str(out / "5-judged/feedback.jsonl")).records[3]
    expected = judge.rewards([render(record, judge.tokenizer, max_length=100)])[0]
    np.testing.assert_allclose(record.scores, expected, atol=1e-5)
    assert len(set(expected)) > 1


# Recipes --------------------------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    said = json.loads(json.dumps(CHAIN))
    change(said)
    Path("bad.yaml").write_text(yaml.safe_dump(said))
    return "bad.yaml"


def stage(index: int, part: str, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda said: said["stages"][index][part].update(values)


BAD = {
    "unknown stage": (stage(3, "training", data={"stage": "smaples"}), "stage 'dpo': 'data': no stage before it is"),
    "a later stage": (stage(0, "training", model={"stage": "dpo"}), "stage 'sft': 'model': no stage before it is"),
    "no model": (lambda said: said["training"].pop("model"), "stage 'sft': training: 'model' is missing."),
    "data and task": (stage(3, "training", task="prompts.jsonl"), "stage 'dpo': both data and task are given"),
    "collect from data": (stage(1, "training", data="d.jsonl"), "stage 'samples': training: collect answers"),
    "feedback as a model": (
        stage(4, "options", value_model={"stage": "samples"}),
        "and the stage 'samples' gives feed",
    ),
    "a policy as feedback": (stage(3, "training", data={"stage": "sft"}), "'data' takes feedback, and the stage 'sft'"),
    "a policy as a reward model": (
        stage(4, "options", reward_model={"stage": "sft"}),
        "'reward_model' takes reward model, and the stage 'sft' gives policy",
    ),
    "a policy as a judge": (stage(1, "options", judge={"stage": "sft"}), "'judge' takes reward model"),
    "unknown option": (stage(3, "options", btea=1), "stage 'dpo': options of dpo-norm: there is no option 'btea'"),
    "contradicting options": (stage(3, "options", beta=-1), "stage 'dpo': beta is -1.0"),
    "unknown method": (lambda said: said["stages"][3].update(method="dop"), "stage 'dpo': no method is called 'dop'"),
    "unknown key": (lambda said: said["stages"][3].update(modle=1), "stage 4: there is no key 'modle'"),
    "no name": (lambda said: said["stages"][3].pop("name"), "stage 4: 'name' has to be text."),
    "one name twice": (lambda said: said["stages"][3].update(name="sft"), "stage 4: another stage is called 'sft'"),
    "a name that is a path": (lambda said: said["stages"][3].update(name="../x"), "cannot name a directory"),
    "no stages": (lambda said: said.update(stages=[]), "'stages' has to be a list of stages."),
    "no policy": (lambda said: said.update(stages=said["stages"][1:2]), "no stage trains a policy."),
    "training of all": (lambda said: said["training"].update(sede=1), "training: there is no option 'sede'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_bad_chain_is_told_before_anything_is_loaded(
    change: Callable[[dict[str, Any]], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(change)
    assert cli.main(["train", "--recipe", path, "--out", "bad"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"guerdon: recipe {path}") and message in told and told.count("\n") == 1
    assert not Path("bad").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stage(4, "training", task="nowhere.jsonl"), "stage 'rlvr': nowhere.jsonl: no such file"),
        (stage(3, "training", data="demonstrations.jsonl"), "stage 'dpo': demonstrations.jsonl: dpo-norm learns from"),
        (stage(1, "options", prompts=1000), "stage 'samples': 'prompts' is 1000, and prompts.jsonl has 49"),
        (lambda said: said["stages"][3].update(method="nft", options={}), "stage 'dpo': "),
    ],
)
def test_data_of_later_stages_is_read_before_the_first_one_trains(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(GuerdonError) as told:
        guerdon.train_chain(changed(change), out="bad")
    assert str(told.value).startswith("recipe bad.yaml, stage") and message in str(told.value)
    assert not Path("bad").exists()


def test_flags_override_every_stage_and_the_model_is_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def train_chain(recipe: str, progress: Any, **training: Any) -> RunDir:
        calls.append(training)
        return RunDir(Path("out/5-rlvr"))

    monkeypatch.setattr("guerdon.api.train_chain", train_chain)
    argv = ["train", "--recipe", "chain.yaml", "--model", "tiny:layers=2", "--eval-items=7", "--no-skip-bad"]
    assert cli.main(argv) == 0
    assert calls == [{"model": "tiny:layers=2", "eval_items": 7, "skip_bad": False}]
    stages = plan({**read_chain("chain.yaml"), "given": calls[0]}, "out", "here")
    assert {stage.training.eval_items for stage in stages} == {7}
    assert stages[0].training.model == "tiny:layers=2"
    assert stages[3].training.model == str(stages[0].result)
    with pytest.raises(ConfigError, match="cannot be one"):
        cli._train(["dpo", "--recipe", "chain.yaml"])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("tulu3*.yaml")), ids=lambda path: path.name)
def test_recipes_that_come_with_guerdon_can_be_planned(path: Path) -> None:
    if "stages:" not in path.read_text():
        from guerdon.api import configure
        from guerdon.recipes import read_recipe

        recipe = read_recipe(path)
        configure(recipe.method, {**recipe.options, **recipe.training}, str(path))
        return
    stages = plan({**read_chain(path), "given": {}}, "out", str(path))
    assert [stage.work.name for stage in stages if not isinstance(stage.work, Collect)][-1] == "ppo"


def test_the_verifier_of_the_tulu3_recipe_reads_each_dataset_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    verifier = get_verifier("python:recipes.tulu3.verify")
    assert verifier.binary
    for dataset, answer, right, wrong in [
        ("gsm8k", "-5", "10 less 15 is -5", "the result is 5"),
        ("math", "\\frac{1}{2}", "so it is \\boxed{0.5}", "so it is \\boxed{2}"),
    ]:
        record = Record("What is it?", [], columns={"answer": answer, "dataset": dataset})
        assert verifier(record, [right, wrong]).value.tolist() == [1.0, 0.0]


def test_the_data_of_the_laptop_recipe_is_made_by_its_script(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "recipes/make_arithmetic.py"), str(tmp_path)], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"demonstrations.jsonl", "clean.jsonl", "prompts.jsonl"}
