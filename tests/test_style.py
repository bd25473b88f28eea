"""The source passes the linter and the type checker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def check(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff():
    check("ruff", "check", "--no-cache", "src", "tests", "benchmarks")


@pytest.mark.slow
def test_mypy(tmp_path: Path):
    check("mypy", "--cache-dir", str(tmp_path))
