"""Runs: their directory, the optimiser, processes, and the loop that logs, evaluates, checkpoints and resumes."""

from __future__ import annotations
