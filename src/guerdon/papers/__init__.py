"""The catalogue: what 76 papers bring, what guerdon has of them, and whether their claims held when they were tried.

`catalogue.toml` says in our words what each paper is, `tags.toml` what the tags mean. All else is derived: methods from
the registry, code from the docstrings that cite a paper, recipes from what they name, verdicts from the claims and
their stored results.

`guerdon.papers(...)` is `guerdon.papers.search(...)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from guerdon.papers.catalogue import ClaimStatus, Paper, Tag, get_paper, papers, tags
from guerdon.papers.finding import search

__all__ = ["ClaimStatus", "Paper", "Tag", "get_paper", "papers", "search", "tags"]


class _Callable(ModuleType):
    """A verb that has the name of its package."""

    def __call__(self, *args: Any, **options: Any) -> list[Paper]:
        return search(*args, **options)


sys.modules[__name__].__class__ = _Callable
