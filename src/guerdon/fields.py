"""Dataclass fields as configuration: their comments are the help, and plain data fills them after a check.

Command line, recipes, Python keywords and documentation all read the same fields; nothing is described twice.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import math
import textwrap
import tokenize
from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from guerdon.errors import ConfigError, near

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One field of a configuration, as a person or a program wants to see it."""

    name: str
    kind: str  # its type, as the source spells it
    default: Any  # dataclasses.MISSING where a value is required
    help: str  # the field's trailing comment
    owner: type  # the class that declares the field


def options(cls: type[Any]) -> list[Option]:
    """The fields of a dataclass with their comments, those that the class itself declares first."""
    found: dict[str, tuple[str, str, type]] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            for name, (kind, comment) in _declared(owner).items():
                found[name] = (kind, comment or found.get(name, ("", ""))[1], owner)
    listed = [Option(f.name, found[f.name][0], _default(f), *found[f.name][1:]) for f in dataclasses.fields(cls)]
    return sorted(listed, key=lambda option: cls.__mro__.index(option.owner))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@cache
def _declared(cls: type) -> dict[str, tuple[str, str]]:
    """Name -> (type, trailing comment) of the fields in the body of one class."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
    return {
        node.target.id: (ast.unparse(node.annotation), " ".join(filter(None, map(comments.get, _lines(node)))))
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of a dataclass from plain data, each value checked against its field's type.

    Args:
        cls: a dataclass whose fields are numbers, strings, booleans, literals, or sequences or optional ones of these.
        values: field name -> value.
        where: where the values come from, for messages about them.

    Raises:
        ConfigError: an unknown name (with the nearest one), a missing one, or a value of another type.
    """
    return cls(**checked(cls, values, where, required=True))


def checked(cls: type[Any], values: Mapping[str, Any], where: str, required: bool = False) -> dict[str, Any]:
    """`values` as the fields of `cls` hold them; see `build`. What is not given is left out, unless `required`."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    kinds = get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise ConfigError(f"{where}: there is no option '{name}'.{near(str(name), fields)}")
    if required:
        for name, field in fields.items():
            if name not in values and _default(field) is dataclasses.MISSING:
                raise ConfigError(f"{where}: '{name}' is missing.")
    result = {}
    for name, value in values.items():
        try:
            result[name] = _coerce(value, kinds[name])
        except ValueError:
            raise ConfigError(f"{where}: '{name}' has to be {spell(kinds[name])}, not {value!r}.") from None
    return result


def check_range(
    values: Mapping[str, Any],
    *names: str,
    low: float = 0,
    high: float = math.inf,
    above: bool = False,
    below: bool = False,
) -> None:
    """Raise `ConfigError` where one of these values is no finite number from `low` to `high`.

    Args:
        above, below: `low`, or `high`, itself is not allowed.
    """
    for name in names:
        value = values[name]
        fits = (low < value if above else low <= value) and (value < high if below else value <= high)
        if not fits or not math.isfinite(value):
            least = f"{'above' if above else 'at least'} {low:g}"
            most = f" and {'below' if below else 'at most'} {high:g}" if high < math.inf else ""
            finite = "" if math.isfinite(value) else ", and finite"
            raise ConfigError(f"{name} is {value}: it must be {least}{most}{finite}.")


def spell(kind: Any) -> str:
    """A type in words: `a number`, `one of a, b`, `a list of text`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, UnionType):
        return " or ".join("nothing" if arg is NoneType else spell(arg) for arg in args)
    if origin in (tuple, list):
        return f"a list of {spell(args[0]).removeprefix('a ')}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, str(kind))


def _coerce(value: Any, kind: Any) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal and value in args:
        return value
    if origin in (Union, UnionType):
        for arg in args:
            try:
                return _coerce(value, arg)
            except ValueError:
                continue
    if origin in (tuple, list) and isinstance(value, (tuple, list)):
        kinds = args if len(args) == len(value) and Ellipsis not in args else [args[0]] * len(value)
        return origin(_coerce(item, k) for item, k in zip(value, kinds, strict=True))
    if kind is NoneType and value is None:
        return None
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return float(value)  # YAML reads 1e-6, a number without a dot, as text
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if origin is dict and isinstance(value, dict):
        return {_coerce(k, args[0]): _coerce(v, args[1]) for k, v in value.items()}
    raise ValueError
