"""Code that lives outside the package: methods in files named on the command line, or in packages that announce
themselves; and functions of the user, `python:module.function`.

A plugin is a Python file that uses `@method`, or an entry point of the group `guerdon.methods` that names such a
module. Files are remembered in the environment, so that the processes a comparison starts know the same methods.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from guerdon.errors import ConfigError, near

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


def import_function(path: str) -> Callable[..., Any]:
    """The function at a dotted path, `module.function`; modules are found in the working directory too.

    Raises:
        ConfigError: no such module or function, or a module that fails to import.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name or not name:
        raise ConfigError(f"'python:{path}' has to be python:module.function.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"python:{path}: there is no module '{error.name}' in {os.getcwd()} or among the installed packages."
            ) from error
        raise ConfigError(f"python:{path}: the module '{module_name}' does not import: {_said(error)}.") from error
    if not callable(getattr(module, name, None)):
        raise ConfigError(
            f"python:{path}: {module.__file__ or module_name} has no function '{name}'.{near(name, vars(module))}"
        )
    function: Callable[..., Any] = getattr(module, name)
    return function


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


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
