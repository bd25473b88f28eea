"""What `recipes/tulu3.yaml` starts from, and its verifier.

    python recipes/tulu3.py [DIRECTORY]

`start/` is Llama 3.1 8B, which has no chat template, with that of Tulu. `prompts.jsonl` holds the prompts of GSM8K and
MATH in the paper's mixture, with their answers; its other half, instructions with constraints, needs a checker for each
kind of constraint and is left out.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from guerdon.feedback.records import Record, Text
from guerdon.rewards.verifiers import Verifier, get_verifier

MODEL = "meta-llama/Llama-3.1-8B"
PROMPTS = "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints"
CHECKS = {"gsm8k": "number", "math": "math"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or message['role'] != 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def verify(prompt: Text, completion: str, answer: str, dataset: str) -> bool:
    """Whether the last number is the answer (GSM8K), or the result is equal to it (MATH)."""
    return bool(_verifier(dataset)(Record(prompt, [], columns={"answer": answer}), [completion]).value[0])


@cache
def _verifier(dataset: str) -> Verifier:
    return get_verifier(CHECKS[dataset])


def as_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the mixture with the names that a task reads."""
    return {"prompt": row["messages"], "answer": row["ground_truth"], "dataset": row["dataset"].lower()}


def main(directory: Path) -> None:
    from datasets import load_dataset
    from huggingface_hub import snapshot_download

    snapshot_download(MODEL, local_dir=directory / "start", ignore_patterns="original/*")
    (directory / "start" / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    rows = (as_prompt(row) for row in load_dataset(PROMPTS, split="train"))
    text = "".join(json.dumps(row) + "\n" for row in rows if row["dataset"] in CHECKS)
    (directory / "prompts.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tulu3"))
