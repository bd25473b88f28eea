"""The documentation as data: fenced blocks of a page, the files they show, commands run as written with less work."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guerdon.cli import main
from guerdon.evaluation.trials import Progress

ROOT = Path(__file__).parent.parent
TINY = "tiny:layers=1,width=16,heads=2"
# What is written otherwise, so that a command takes a moment.
SMALLER = {
    r"(\bmodel(?: |: |=\"))(?:Qwen/Qwen3-0\.6B|smollm2-135m)": rf"\g<1>{TINY}",
    r"evaluate smollm2-135m --": f"evaluate {TINY} --",
    r"--model \.\.\.": f"--model {TINY}",
    r"--task \.\.\.": "--task 'reasoning-gym:chain_sum?max_terms=2'",
    r"--snapshot-every (\d)0000": r"--snapshot-every \g<1>0",
    r"step-000\{10000,30000,50000,70000\}": "step-000000{10,30,50,70}",
    r"step-000(\d)0000": r"step-000000\g<1>0",
    r"\{prompts_per_round: 16, max_new_tokens: 64\}": "{prompts_per_round: 2, group_size: 2, max_new_tokens: 4}",
    r"seeds=3, budget=\{\"updates\": 100\}": 'seeds=1, budget={"updates": 1}',
}
# Flags that are added: the first whose pattern is found.
_EVALUATION = "--eval-items 2 --eval-samples 2 --eval-max-new-tokens 4"
_ROUND = "--rounds 1 --prompts-per-round 2 --group-size 2 --max-new-tokens 4"
_WORDS = f"--model {TINY},vocab=word"  # of which each is a token
LESS = {
    r"^train \S+ .*--task": f"{_ROUND} {_EVALUATION}",
    r"^train sac": "--max-samples 80 --learning-starts 75 --batch-size 4 --hidden 8 --eval-episodes 1",
    r"^train dqn": "--max-samples 1010 --learning-starts 1000 --hidden 8 --eval-episodes 1",
    r"^train ppo-control": "--max-samples 8192 --hidden 8 --epochs 1 --eval-episodes 1",
    r"^train stream-td": "--max-updates 200",
    r"^train qstar": "--max-samples 80 --batch-size 8 --hidden 8 --eval-episodes 1",
    r"^solve .*mcts": "--instances 1 --steps 2 --iterations 3",
    r"^solve": "--instances 1 --max-nodes 300",
    r"--eval-choose": f"{_EVALUATION} --eval-candidates 2",
    r"^train promptquine": f"{_WORDS} --max-samples 12 --population 2 --reproductions 2 --eval-items 4",
    r"^train evoprompt": f"{_WORDS},context=1024 --max-samples 5 --population 2 --eval-items 4 --write-tokens 4",
    r"^train": "--max-updates 2 --batch-size 8",
    r"^compare .*--task": f"--seeds 1 --budget-samples 4 {_EVALUATION}",
    r"^compare .*--data minari": "--budget-updates 1 --eval-episodes 1",
    r"^compare .*--env": "--seeds 1 --budget-samples 2050 --eval-episodes 1",
    r"^compare icl": f"{_WORDS} --seeds 1 --budget-samples 8 --eval-items 4",
    r"^compare": "--seeds 1 --budget-updates 1",
    r"^collect --task": "--prompts 2 --n 2 --max-new-tokens 4",
    r"^collect --env text": "--episodes 9",
    r"^collect --env": "--episodes 6",
    r"--eval-episodes|^evaluate random": "--eval-episodes 2",
}


@dataclass(frozen=True)
class Block:
    language: str
    title: str  # the file that it is, or empty
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, made smaller."""
    for pattern, less in SMALLER.items():
        page = re.sub(pattern, less, page)
    fenced = re.findall(r'^```(\w*)(?: title="(.*?)")?\n(.*?)^```$', page, re.DOTALL | re.MULTILINE)
    return [Block(*each) for each in fenced]


def commands(block: Block) -> Iterator[str]:
    """The commands of guerdon in a block without a language, each on a line of its own."""
    if not block.language:
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.startswith("guerdon "):
                yield line


def words(command: str) -> list[str]:
    """The arguments as a shell reads them, without the name of the program."""
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return said.stdout.split("\0")[1:-1]


def run(command: str) -> int:
    """Run a command as it is written, with flags that make it short."""
    argv = words(command)
    added = next((flags for pattern, flags in LESS.items() if re.search(pattern, " ".join(argv))), "")
    return main([*argv, *added.split()])


def write(block: Block) -> None:
    """The file that a block shows; where it is feedback, its rows many times over with different prompts."""
    text = block.text
    if block.title.endswith(".jsonl"):
        rows = [json.loads(line) for line in text.splitlines()]
        asked = next(iter(rows[0]))
        many = [{**row, asked: f"{i}. {row[asked]}"} for i in range(20) for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in many)
    Path(block.title).write_text(text, encoding="utf-8")


def trials_in_this_process(trials, *, launch, **_) -> None:
    """`run_trials` without a process for each: the same commands, one after the other."""
    for trial in trials:
        stages = ("train",) if trial.method else ("evaluate",)
        for stage in stages:
            assert main(launch(trial, stage)[3:]) == 0
        Progress("done").save(trial.directory)
