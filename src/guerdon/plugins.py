"""Methods that live outside the package: files named on the command line, and packages that announce themselves.

A plugin is a Python file that uses `@method`, or an entry point of the group `guerdon.methods` that names such a
module. Files are remembered in the environment, so that the processes a comparison starts know the same methods.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

from guerdon.errors import ConfigError

VARIABLE = "GUERDON_PLUGINS"  # files, separated as in PATH


def add_plugin(file: str) -> None:
    """Import a Python file, here and in every process started from here; `ConfigError` where it cannot be imported."""
    path = str(Path(file).resolve())
    _import_file(path)
    known = _files()
    if path not in known:
        os.environ[VARIABLE] = os.pathsep.join([*known, path])


def load_plugins() -> None:
    """Import the remembered files and the entry points of installed packages."""
    for path in _files():
        _import_file(path)
    for entry in entry_points(group="guerdon.methods"):
        try:
            entry.load()
        except Exception as error:
            raise ConfigError(f"plugin '{entry.name}' ({entry.value}) does not import: {_said(error)}") from error


def _files() -> list[str]:
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def _import_file(path: str) -> None:
    name = f"guerdon_plugin_{Path(path).stem}"
    if name in sys.modules and sys.modules[name].__file__ == path:
        return
    if not os.path.isfile(path):
        raise ConfigError(f"plugin {path}: there is no such file.")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"plugin {path}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"plugin {path} does not import: {_said(error)}") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
