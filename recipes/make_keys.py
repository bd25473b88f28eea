"""Data for `recipes/step-q-laptop.yaml`: episodes of `keys:` from which an agent learns to act, but not very well.

    python recipes/make_keys.py [DIRECTORY]

`demonstrations.jsonl` holds single steps of the training tasks, each after a history that may have gone wrong already.
The key that is pressed is the right one with a weight of 9 against 1 for each of the others.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from guerdon.tasks.text import make_text
from guerdon.tasks.text.agent import opening

ENV, WEIGHT, EPISODES = "keys:", 9, 1000


def main(directory: Path) -> None:
    env, rng = make_text(ENV), random.Random(0)
    tasks, rows = env.tasks("train"), []
    for _ in range(EPISODES):
        task = rng.choice(tasks)
        observation, info = env.reset(seed=0, options={"task": task})
        messages, over = [opening(env, observation)], False
        while not over:
            right = f"press {task.split('-')[env.steps % 2]}"
            weights = [WEIGHT if action == right else 1 for action in info["actions"]]
            (action,) = rng.choices(info["actions"], weights)
            said = {"role": "assistant", "content": action}
            rows.append({"prompt": messages, "completion": [said]})
            observation, _, over, _, info = env.step(action)
            messages = [*messages, said, {"role": "user", "content": observation}]
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "demonstrations.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "keys"))
