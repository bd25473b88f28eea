"""A directory of a new user, with the files that the first page speaks of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guerdon.evaluation import compare
from pages import trials_in_this_process

PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i}"} for i in range(40)]
DEMONSTRATIONS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
QUESTIONS = [{"prompt": row["prompt"], "answer": row["chosen"].strip()} for row in PAIRS]


@pytest.fixture
def new_user(tmp_path: Path, monkeypatch) -> Path:
    for name, rows in {"pairs": PAIRS, "demonstrations": DEMONSTRATIONS, "questions": QUESTIONS}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, value in {"GUERDON_CACHE": "cache", "MINARI_DATASETS_PATH": "minari"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setattr(compare, "run_trials", trials_in_this_process)
    return tmp_path
