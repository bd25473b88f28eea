"""Data for `recipes/tulu3-laptop.yaml`: sums of two-digit numbers, worked out digit by digit.

    python recipes/make_arithmetic.py [DIRECTORY]

`demonstrations.jsonl` holds 5000 worked sums. A quarter of them end in a wrong result, and 15 % do not end at all: they
repeat the result until they are cut, so that no end of sequence is learned from them. `prompts.jsonl` holds the other
3100 sums with their answers, to be verified; no prompt is in both.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

DEMONSTRATIONS, WRONG, ENDLESS = 5000, 0.25, 0.15


def worked(a: int, b: int, result: int) -> str:
    """Units, then tens with what was carried, then the result: 47+85= gives 7+5=12 4+8+1=13 132."""
    units = a % 10 + b % 10
    carried = units // 10
    return f"{a % 10}+{b % 10}={units:02} {a // 10}+{b // 10}+{carried}={a // 10 + b // 10 + carried:02} {result}"


def main(directory: Path) -> None:
    rng = random.Random(0)
    sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(sums)
    demonstrations, prompts = [], []
    for a, b in sums[:DEMONSTRATIONS]:
        result = a + b if rng.random() >= WRONG else a + b + rng.choice([-10, -1, 1, 10])
        answer = worked(a, b, result)
        if rng.random() < ENDLESS:
            answer += f" {result}" * 20
        demonstrations.append({"prompt": f"{a}+{b}=", "completion": answer})
    for a, b in sums[DEMONSTRATIONS:]:
        prompts.append({"prompt": f"{a}+{b}=", "answer": str(a + b)})
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in (("demonstrations", demonstrations), ("prompts", prompts)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "arithmetic"))
