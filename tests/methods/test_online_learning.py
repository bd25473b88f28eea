"""Every method that learns from a verifier, on a model of 10 thousand weights that is to give short answers."""

from __future__ import annotations

import json

import pytest

import guerdon


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {}),
        ("dapo", {"group_size": 8}),
        ("rloo", {}),
        ("ppo", {"group_size": 8, "value_lr": 5e-3, "epochs": 2}),
        ("nft", {"group_size": 8, "normalizer": 4.0, "weight_decay": 0.0}),
        ("infonca", {"group_size": 8}),
    ],
)
def test_rewards_rise(name, options, tmp_path):
    task = tmp_path / "short.jsonl"
    rows = [{"prompt": f"{i}{j}=", "pattern": "^.?.?$"} for i in range(6) for j in range(6)]
    task.write_text("\n".join(map(json.dumps, rows)))
    guerdon.train(
        name, model="tiny:layers=1,width=32,heads=2", task=str(task), verifier="regex", out=str(tmp_path / "run"),
        prompts_per_round=16, batch_size=8, rounds=12, max_new_tokens=4, lr=5e-3, schedule="constant", warmup=0.0,
        **options,
    )  # fmt: skip
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward/mean"] for row in metrics if "reward/mean" in row]
    assert rewards[0] < 0.15 and rewards[-1] > 0.5
    first = next(row for row in metrics if "policy/ratio" in row)
    assert first["policy/ratio"] == pytest.approx(1, abs=1e-4) and first["policy/ratio_error"] < 1e-4
