"""A run of seconds with a known outcome, as a process: what a comparison starts in place of `guerdon train`.

Usage: python trial.py STAGE JSON. The policy "learns" its method's `skill` and gets each held-out item right with that
probability; the options `crash` and `updates` say how it ends and how long it takes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from guerdon.evaluation.metrics import Evaluation
from guerdon.training.rundir import RunDir


def train(trial: dict, run: RunDir) -> None:
    options, seed = trial["options"], trial["training"]["seed"]
    run.set_status("running")
    done = len(run.metrics())
    total = trial["training"].get("max_updates") or 10
    rng = np.random.default_rng([seed, 7])
    for step in range(done, total):
        if options.get("crash") == "train" and seed == 1 and step == total // 2:
            print("Traceback: <script>alert('no memory')</script>", file=sys.stderr)
            raise MemoryError("no memory left for seed 1")
        share = (step + 1) / total
        skill = 0.1 + share * (options.get("skill", 0.5) - 0.1)
        row = {
            "loss/total": 0.693 * (1 - 0.7 * share) + 0.01 * rng.normal(),
            "policy/entropy": 1.5 - share,
            "policy/kl": 2 * share**2,
            "length/mean": 60 + 30 * share,
            "progress/tokens": 5000 * (step + 1),
            "progress/samples": 64 * (step + 1),
        }
        if step % 2 == 1:
            row["eval/pass@1"] = skill + 0.02 * rng.normal()
        run.append(step, row)
        time.sleep(options.get("pause", 0.0))
    prompts = ["What is 2 + 3?", "Say <script>alert(1)</script>."]
    with open(run.path / "samples.jsonl", "w") as file:
        for step in (0, total):
            for i, prompt in enumerate(prompts):
                completions = [f"{trial['label']} at step {step}: {i + 5}", "<b>bold</b> lies"]
                rewards = [float(step > 0), 0.0]
                row = {"step": step, "prompt": prompt, "completions": completions, "rewards": rewards}
                file.write(json.dumps(row) + "\n")
    run.set_status("done")


def evaluate(trial: dict, directory: Path) -> None:
    options, seed = trial["options"], trial["training"]["seed"]
    if options.get("crash") == "evaluate" and seed == 1:
        raise RuntimeError("the judge is ill")
    items = 120
    difficulty = np.random.default_rng(0).random(items)
    rng = np.random.default_rng([1, seed, len(trial["label"])])
    skill = options.get("skill", 0.5) + 0.02 * rng.normal() if trial["method"] else 0.1
    right = (0.7 * difficulty + 0.3 * rng.random(items) < skill).astype(float)
    metrics = {"pass@1": right, "length": 60 + 10 * rng.random(items), "kl": rng.random(items) * bool(trial["method"])}
    directory.mkdir(parents=True, exist_ok=True)
    Evaluation([f"item-{i}" for i in range(items)], metrics, "pass@1").save(directory / "evaluation.json")


def main() -> None:
    stage, trial = sys.argv[1], json.loads(sys.argv[2])
    directory = Path(trial["training"]["out"])
    if stage == "train":
        run = RunDir.create(directory, trial["method"], trial["options"], trial["training"])
        train(trial, run)
    elif stage == "resume":
        train(trial, RunDir.open(directory))
    else:
        evaluate(trial, directory)
    with open(directory.with_name(directory.name + ".stages"), "a") as file:
        file.write(f"{stage} OMP={os.environ['OMP_NUM_THREADS']}\n")


if __name__ == "__main__":
    main()
