"""Groups on disk, exactly as they were in memory: safetensors for arrays, JSON in its header for the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from guerdon.language.groups import Group, Segment


def save_groups(path: Path, groups: Sequence[Group]) -> None:
    """Write groups to one safetensors file."""
    from safetensors.numpy import save_file

    segments = [s for g in groups for s in g.segments]
    arrays = {
        "tokens": _concatenate([s.tokens for s in segments], np.int64),
        "learn": _concatenate([s.learn for s in segments], bool),
    }
    for g, group in enumerate(groups):
        arrays |= {f"group.{g}.{name}": np.ascontiguousarray(v) for name, v in group.values.items()}
    for i, s in enumerate(segments):
        arrays |= {f"segment.{i}.{name}": np.ascontiguousarray(v) for name, v in s.values.items()}
    shape = [
        {
            "lengths": [len(s) for s in g.segments],
            "parents": [s.parent for s in g.segments],
            "leaves": g.leaves,
            "pairs": g.pairs,
            "columns": g.columns,
            "key": g.key,
        }
        for g in groups
    ]
    save_file(arrays, path, metadata={"groups": json.dumps(shape)})


def load_groups(path: Path) -> list[Group]:
    """Read what `save_groups` wrote."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        shape = json.loads(file.metadata()["groups"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    named: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        if name not in ("tokens", "learn"):
            owner, index, value = name.split(".", 2)
            named.setdefault(f"{owner}.{index}", {})[value] = array
    tokens, learn = arrays["tokens"], arrays["learn"]
    groups, at, count = [], 0, 0
    for g, form in enumerate(shape):
        segments = []
        for length, parent in zip(form["lengths"], form["parents"], strict=True):
            values = named.get(f"segment.{count}", {})
            segments.append(Segment(tokens[at : at + length], learn[at : at + length], parent, values))
            at, count = at + length, count + 1
        groups.append(
            Group(
                segments,
                form["leaves"],
                named.get(f"group.{g}", {}),
                [(a, b) for a, b in form["pairs"]],
                form["columns"],
                form["key"],
            )
        )
    return groups


def _concatenate(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)
