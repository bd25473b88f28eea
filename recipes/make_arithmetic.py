"""Data for `recipes/tulu3-laptop.yaml`: sums of two-digit numbers, worked out digit by digit.

    python recipes/make_arithmetic.py [DIRECTORY]

They are those of claim 17, `guerdon.claims.paper_17.write_data`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from guerdon.claims.paper_17 import write_data

if __name__ == "__main__":
    write_data(Path(sys.argv[1] if len(sys.argv) > 1 else "arithmetic"))
