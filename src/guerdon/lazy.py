"""Heavy modules, imported at first use, so that `--help`, `methods` and flag validation answer at once.

`from guerdon.lazy import torch` behaves as `import torch` for code that runs and for type checkers; only the moment of
the import differs. Modules that subclass `nn.Module` or `autograd.Function` need torch at import and import it plainly.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _LazyModule(ModuleType):
        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module(self.__name__), name)
            setattr(self, name, value)  # the next use finds it without asking
            return value

    torch = _LazyModule("torch")
