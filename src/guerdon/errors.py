"""What a user may have got wrong, said once and clearly.

Every mistake that a user can mend is a `GuerdonError`: its message says where, what, and what to do. The command line
prints the message alone and exits with code 2; anything else that is raised is a defect of guerdon and keeps its
traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GuerdonError(Exception):
    """A mistake that the user can mend; the message says where, what and what to do."""


class ConfigError(GuerdonError):
    """A method, option, model or task that does not exist, or options that contradict each other."""


class DataError(GuerdonError):
    """Feedback that cannot be read or learned from."""


class InvariantError(GuerdonError):
    """A run-time invariant does not hold: the numbers of this run could not be trusted."""


def near(name: str, names: Iterable[str]) -> str:
    """' Did you mean 'dpo'?' where some of `names` resembles `name`, else an empty string."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""
