"""Environments in words by name, for agents that are language models; needs the extra `text`.

`base` says what one is, `agent` lets a policy act in one, `trajectories` keeps what it did and makes feedback of it.
"""

from __future__ import annotations

from guerdon.tasks.text.names import ENVIRONMENTS, make_text

__all__ = ["ENVIRONMENTS", "make_text"]
