from __future__ import annotations

import sys

from guerdon.cli import main

sys.exit(main())
