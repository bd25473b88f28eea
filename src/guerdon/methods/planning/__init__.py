"""Methods that plan with a model: best-first search of puzzles, and the heuristics that guide it."""

from __future__ import annotations

from guerdon.methods.planning.search import Solution, a_star, deferred, lookahead, q_star
from guerdon.methods.planning.solving import solve

__all__ = ["Solution", "a_star", "deferred", "lookahead", "q_star", "solve"]
