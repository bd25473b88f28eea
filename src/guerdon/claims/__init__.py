"""Claims: what each paper says of its method, as an experiment small enough for a laptop, with criteria that can fail.

`paper_NN.py` states one claim, `base` what a claim is and how it is judged, `running` how its trials are run and kept,
`training` the trials that train policies, `showing` a result as tables and as a plot. `results/NN.json` is what the
full version gave; only running it writes there.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from guerdon.claims.base import Above, Alike, Claim, NotBelow
from guerdon.errors import ConfigError

__all__ = ["Above", "Alike", "Claim", "NotBelow", "all_claims", "claimed", "get_claim"]


@cache
def claimed() -> list[int]:
    """The ids of the papers whose claims are written, which are not imported for it."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(int(name.removeprefix("paper_")) for name in names if name.startswith("paper_"))


def all_claims() -> dict[int, Claim]:
    """Every claim by the id of its paper."""
    return {paper: get_claim(paper) for paper in claimed()}


def get_claim(paper: int | str) -> Claim:
    """The claim of a paper by its id, `1`, `"1"` or `"01"`; `ConfigError` where there is none."""
    if not str(paper).isdecimal() or int(paper) not in claimed():
        known = ", ".join(f"{each:02d}" for each in claimed())
        raise ConfigError(f"there is no claim of a paper '{paper}': there are {known}. `guerdon claims` lists them.")
    return importlib.import_module(f"{__name__}.paper_{int(paper):02d}").CLAIM
