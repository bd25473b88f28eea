"""Tulu 3 (Lambert et al. 2024, arXiv 2411.15124): SFT, DPO and RLVR one after the other, on sums of two-digit numbers.

A character model of 0.1 million parameters learns to add from worked sums, of which some are wrong or never end. A
judge who is right four times in five then compares its answers with those of a weaker and a stronger model, and last a
verifier rewards right ones. `recipes/tulu3-laptop.yaml` is the same chain; the other arms leave out or replace a stage.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guerdon.claims.base import Above, Claim, NotBelow
from guerdon.claims.training import learned, one_thread, shared
from guerdon.errors import GuerdonError
from guerdon.evaluation.metrics import Evaluation
from guerdon.methods.base import get_method
from guerdon.rewards.verifiers import last_number

MODEL = "tiny:layers=2,width=64,heads=4,context=64"  # 0.1 million parameters
DEMONSTRATIONS, WRONG, ENDLESS = 5000, 0.25, 0.15
JUDGED_RIGHT = 0.8  # of what the judge says
LONGEST = 32  # tokens of an answer
PER_CHARACTER = 0.05  # by which a judge who likes long answers rates them higher


# Data


def worked(a: int, b: int, result: int) -> str:
    """Units, then tens with what was carried, then the result: 47+85= gives 7+5=12 4+8+1=13 132."""
    units = a % 10 + b % 10
    carried = units // 10
    return f"{a % 10}+{b % 10}={units:02} {a // 10}+{b // 10}+{carried}={a // 10 + b // 10 + carried:02} {result}"


def write_data(directory: Path) -> None:
    """Write `demonstrations.jsonl`, `clean.jsonl` and `prompts.jsonl`; no prompt of the last one is in the others.

    There are 5000 worked sums. A quarter of them end in a wrong result, and 15 % do not end at all: they repeat the
    result until they are cut, so that no end of sequence is learned from them. `clean` holds the same sums without such
    faults. `prompts` are the other 3100 sums with their answers, to be verified.
    """
    rng = random.Random(0)
    sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(sums)
    rows: dict[str, list[dict[str, str]]] = {"demonstrations": [], "clean": [], "prompts": []}
    for a, b in sums[:DEMONSTRATIONS]:
        result = a + b if rng.random() >= WRONG else a + b + rng.choice([-10, -1, 1, 10])
        answer = worked(a, b, result)
        if rng.random() < ENDLESS:
            answer += f" {result}" * 20
        rows["demonstrations"].append({"prompt": f"{a}+{b}=", "completion": answer})
        rows["clean"].append({"prompt": f"{a}+{b}=", "completion": worked(a, b, a + b)})
    for a, b in sums[DEMONSTRATIONS:]:
        rows["prompts"].append({"prompt": f"{a}+{b}=", "answer": str(a + b)})
    directory.mkdir(parents=True, exist_ok=True)
    for name, said in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in said)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def judge(prompt: str, completion: str, answer: str) -> bool:
    """Whether an answer is right, by a judge who errs one time in five, always in the same way."""
    digest = hashlib.blake2b(f"{prompt}{completion}".encode(), digest_size=8).digest()
    errs = int.from_bytes(digest, "little") >= JUDGED_RIGHT * 2**64
    return (last_number(completion) == answer) != errs


# The chain

SFT = {"lr": 4e-3, "batch_size": 16, "max_length": 40}
REWARD_MODEL = {"lr": 1e-3, "batch_size": 16, "epochs": 2, "max_length": 40}
DPO = {"lr": 3e-4, "batch_size": 16, "epochs": 2, "max_length": 40}
PPO = {"lr": 5e-4, "value_lr": 1e-3, "prompts_per_round": 96, "batch_size": 48, "max_new_tokens": LONGEST}
VERIFIED: dict[str, Any] = {"task": "arithmetic/prompts.jsonl", "verifier": "number"}


def recipe(prompts: int, rounds: int, **training: Any) -> dict[str, Any]:
    """The chain as `guerdon.chains` reads it: answers to so many prompts are compared, and RLVR has so many rounds.

    The weaker model has seen a third of what SFT goes through, the stronger one faultless sums on top of it.
    """

    def sft(name: str, data: str, model: str | dict[str, str], epochs: int) -> dict[str, Any]:
        training = {"model": model, "data": f"arithmetic/{data}.jsonl", "holdout": 0.02}
        return {"name": name, "method": "sft", "options": SFT | {"epochs": epochs}, "training": training}

    models = [{"stage": "sft"}, {"stage": "weaker"}, {"stage": "stronger"}]
    judged = {"task": VERIFIED["task"], "verifier": "python:guerdon.claims.paper_17.judge"}
    return {
        "training": {"model": MODEL, "threads": 1, "eval_max_new_tokens": LONGEST, "eval_samples": 1, **training},
        "stages": [
            sft("weaker", "demonstrations", MODEL, 1),
            sft("sft", "demonstrations", MODEL, 3),
            sft("stronger", "clean", {"stage": "sft"}, 1),
            {
                "name": "samples",
                "method": "collect",
                "options": {"models": models, "n": 2, "prompts": prompts, "max_new_tokens": LONGEST},
                "training": judged,
            },
            {
                "name": "reward-model",
                "method": "reward-model",
                "options": REWARD_MODEL,
                "training": {"model": {"stage": "sft"}, "data": {"stage": "samples"}},
            },
            {
                "name": "dpo",
                "method": "dpo-norm",
                "options": DPO,
                "training": {"model": {"stage": "sft"}, "data": {"stage": "samples"}},
            },
            {
                "name": "rlvr",
                "method": "ppo",
                "options": PPO | {"value_model": {"stage": "reward-model"}, "rounds": rounds},
                "training": VERIFIED,
            },
        ],
    }


def chain(place: Path, seed: int, **sizes: Any) -> dict[str, str]:
    """Run the recipe in `place`, or go on with it: stage -> what it gave.

    Raises:
        GuerdonError: it failed; the message has the last lines of what it said.
    """
    said = recipe(**sizes)
    out = place / "chain"
    if not (out / "policy").exists():
        write_data(place / "arithmetic")
        (place / "recipe.yaml").write_text(json.dumps(said), encoding="utf-8")  # YAML, too
        command = [sys.executable, "-m", "guerdon", "train", "--recipe", "recipe.yaml", "--out", "chain"]
        done = subprocess.run([*command, "--seed", str(seed)], cwd=place, capture_output=True, text=True)
        if done.returncode:
            raise GuerdonError(f"{place}: the chain failed with\n" + "\n".join(done.stderr.splitlines()[-5:]))
    gives = {"collect": "feedback.jsonl"}
    return {
        stage["name"]: str(out / f"{number}-{stage['name']}" / gives.get(stage["method"], "policy"))
        for number, stage in enumerate(said["stages"], 1)
    }


# The arms


def trial(
    arm: Mapping[str, Any], seeds: Sequence[int], settings: Mapping[str, Any], directory: Path
) -> dict[int, Evaluation]:
    """A stage of the chain, or what a method makes of one; seed after seed."""
    found = {}
    for seed in seeds:
        with shared(directory, seed=seed, **settings["chain"]) as place:
            stages = chain(place, seed, **settings["chain"])
        policy = stages[arm["stage"]]
        if "method" in arm:
            policy = trained_on(arm, stages, place, seed, settings, directory / f"seed-{seed}")
        found[seed] = evaluated(policy, stages["sft"], place, settings["measure"])
    return found


def trained_on(
    arm: Mapping[str, Any], stages: Mapping[str, str], place: Path, seed: int, settings: Mapping[str, Any], run: Path
) -> str:
    """What the arm's method makes of the stage that it starts from."""
    options = {k: stages.get(v, v) if isinstance(v, str) else v for k, v in arm["options"].items()}
    cls, sizes = get_method(arm["method"]), settings["chain"]
    training: dict[str, Any] = {k: v for k, v in sizes.items() if k not in ("prompts", "rounds")}
    if arm["method"] == "ppo":
        options = PPO | {"rounds": sizes["rounds"]} | options
        training |= VERIFIED | {"task": str(place / VERIFIED["task"])}
    else:
        run.parent.mkdir(parents=True, exist_ok=True)
        feedback = run.with_suffix(".jsonl")
        feedback.write_text(rated(Path(stages["samples"]), settings["long"]), encoding="utf-8")
        options, training = DPO | options, training | {"data": str(feedback)}
    return learned(cls(**options), run, model=stages[arm["stage"]], seed=seed, **training)  # type: ignore[arg-type]


def rated(samples: Path, long: float) -> str:
    """The samples, with ratings that rise by `long` for each character of an answer."""
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["scores"] = [s + long * len(text) for s, text in zip(row["scores"], row["completions"], strict=True)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def evaluated(policy: str, start: str, place: Path, primary: str) -> Evaluation:
    """Answers to held-out prompts, judged by the verifier; the KL is that to the policy that SFT left."""
    from guerdon.evaluation.evaluate import evaluate_policy
    from guerdon.language.policy import Policy
    from guerdon.tasks import load_task
    from guerdon.training.config import LanguageTraining

    source = VERIFIED | {"task": str(place / VERIFIED["task"])}
    task = load_task(source["task"], verifier=source["verifier"])
    drawn: dict[str, Any] = {"eval_items": len(task.test), "eval_samples": 2, "eval_max_new_tokens": LONGEST}
    how = LanguageTraining(model=start, **source, **drawn)
    with one_thread():
        found = evaluate_policy(Policy.load(policy), Policy.load(start).annotate, task.test, task, how)
    kept = {name: found.metrics[name] for name in ("pass@1", "length", "truncated", "kl")}
    return Evaluation(found.items, kept, primary)


def ppo(stage: str = "dpo", **options: Any) -> dict[str, Any]:
    return {
        "where": ["accuracy"],
        "stage": stage,
        "method": "ppo",
        "options": {"value_model": "reward-model", **options},
    }


CHAIN = {"prompts": 600, "rounds": 20}
CLAIM = Claim(
    paper=17,
    says=(
        "Supervised learning, then DPO on judged answers, then reinforcement learning with a verifier (RLVR): each "
        "stage adds to the one before, a reward model beside the verifier or in its place does not help, and "
        "length-normalised DPO lengthens answers less than DPO where the judge likes long ones."
    ),
    measures=(
        "accuracy: share of right answers to held-out sums; length: tokens of an answer after DPO on ratings that rise "
        "with the length"
    ),
    arms={
        "sft": {"stage": "sft"},
        "dpo": {"where": ["accuracy"], "stage": "dpo"},
        "rlvr": {"where": ["accuracy"], "stage": "rlvr"},
        "rlvr-from-sft": ppo("sft"),
        "rlvr-policy-value": ppo(value_model=None),
        "reward-model": ppo(reward_model="reward-model", bonus=0.0),
        "verifier-and-reward-model": ppo(reward_model="reward-model"),
        "dpo-sum": {"stage": "sft", "method": "dpo", "options": {"beta": 0.25}},  # for answers of 20 tokens the same
        "dpo-norm": {"where": ["length"], "stage": "sft", "method": "dpo-norm", "options": {}},
    },
    settings={
        "accuracy": {"measure": "pass@1", "long": 0.0, "chain": CHAIN},
        "length": {"measure": "length", "long": PER_CHARACTER, "chain": CHAIN},
    },
    trial=trial,
    criteria=(
        Above("dpo", "sft", 0.05, where="accuracy"),
        Above("rlvr", "dpo", 0.05, where="accuracy"),
        NotBelow("rlvr", "verifier-and-reward-model", 0.03, where="accuracy"),
        Above("rlvr", "reward-model", where="accuracy"),
        Above("dpo-sum", "dpo-norm", where="length"),
    ),
    seeds=6,
    minutes=25,
    quick={"chain": {"prompts": 40, "rounds": 1, "max_updates": 20}},
    quick_seeds=2,
)
