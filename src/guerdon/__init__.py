"""guerdon: any feedback becomes a better policy, and the methods that do it are compared fairly on your own data.

The verbs of the command line as functions. They are imported at first use, so that `import guerdon` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guerdon.api import (
        advise,
        all_methods,
        collect,
        collect_episodes,
        collect_trajectories,
        collect_trees,
        compare,
        evaluate,
        export,
        get_method,
        inspect,
        load_policy,
        look,
        read_feedback,
        resume,
        serve,
        solve,
        train,
        train_chain,
        write_feedback,
        write_report,
    )
    from guerdon.errors import GuerdonError
    from guerdon.papers.finding import search as papers

__version__ = "0.1.0"

__all__ = [
    "GuerdonError",
    "advise",
    "all_methods",
    "collect",
    "collect_episodes",
    "collect_trajectories",
    "collect_trees",
    "compare",
    "evaluate",
    "export",
    "get_method",
    "inspect",
    "load_policy",
    "look",
    "papers",
    "read_feedback",
    "resume",
    "serve",
    "solve",
    "train",
    "train_chain",
    "write_feedback",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "papers":  # a package that is called
        return importlib.import_module("guerdon.papers")
    if name in __all__:
        return getattr(importlib.import_module("guerdon.api"), name)
    raise AttributeError(f"module 'guerdon' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
