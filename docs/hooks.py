"""Fills the page of methods from their docstrings and from the comments of their fields."""

from __future__ import annotations

import inspect
from typing import Any

from guerdon.fields import Option, options
from guerdon.methods.base import LanguageMethod, all_methods


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri != "methods.md":
        return markdown
    sections = [markdown]
    for name, cls in all_methods().items():
        own = [option for option in options(cls) if option.owner is not LanguageMethod]
        source = f"`{cls.__module__}`, learns from {'a verifier' if cls.learns_from == 'verifier' else cls.learns_from}"
        # Formulas are aligned and full of stars and underscores, so a docstring stands as it is written.
        sections += [f"## {name}", source, f"```text\n{inspect.getdoc(cls)}\n```", _table(own)]
    sections += ["## Options of every method", _table(options(LanguageMethod))]
    return "\n\n".join(sections)


def _table(listed: list[Option]) -> str:
    rows = [f"| `{o.name}` | `{o.default}` | {o.help.replace('|', chr(92) + '|')} |" for o in listed]
    return "\n".join(["| option | default | |", "|---|---|---|", *rows]) if rows else ""
