"""`python -m benchmarks [NAME ...]`: run all benchmarks, or those named, each on 1 thread and on 2."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

NAMES = ("dpo", "reward_model", "grpo_update", "sampling", "scoring", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options, rest = parser.parse_known_args()
    for name in options.names or NAMES:
        if name not in NAMES:
            parser.error(f"no benchmark is called '{name}': {', '.join(NAMES)}")
        for threads in options.threads if name != "memory" else options.threads[:1]:
            print(f"# {name}, {threads} thread{'s' * (threads > 1)}", flush=True)
            command = [sys.executable, "-m", f"benchmarks.{name}", "--threads", str(threads), *rest]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


if __name__ == "__main__":
    main()
