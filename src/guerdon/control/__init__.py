"""Control: networks with the seed axis, logged transitions, replay, environments, streaming learners."""

from __future__ import annotations
