"""Tasks: prompts with a verifier, split for good into those one trains on and those one is judged by."""

from __future__ import annotations

from guerdon.tasks.base import Task, load_task, parse_task

__all__ = ["Task", "load_task", "parse_task"]
