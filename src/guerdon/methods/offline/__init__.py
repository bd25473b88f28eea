"""Methods that learn from logged transitions alone."""

from __future__ import annotations
