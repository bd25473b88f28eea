"""The papers, and what is derived about each from code, recipes, claims and their results."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import guerdon
from guerdon.claims import claimed, get_claim
from guerdon.claims.running import stored_result
from guerdon.errors import ConfigError, near
from guerdon.methods.base import Method, all_methods, get_method

Status = Literal["none", "runs", "holds", "does not hold", "cannot be told", "cannot be checked on a laptop"]
PACKAGE = Path(guerdon.__file__).parent
CITATION = re.compile(r"arXiv\s+(\d{4}\.\d{5})")
RECIPES = PACKAGE.parents[1] / "recipes"  # of a checkout; an installed package has none


@dataclass(frozen=True)
class Tag:
    """A word that papers are found by.

    Attributes:
        facet: the field of `Paper` that holds it.
        says: what it means.
        surveys: ids of the papers that brought it.
    """

    name: str
    facet: str
    says: str
    surveys: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ClaimStatus:
    """What became of a paper's central statement.

    Attributes:
        status: "none": nobody has written an experiment. "runs": there is one, and its full version was never run.
            "holds", "does not hold", "cannot be told": what the full version gave. "cannot be checked on a laptop".
        says: what is claimed; or why it cannot be checked.
        sentences: what was found, with numbers and intervals.
        seeds, date, version: of the result: how many, when (ISO 8601), and by which guerdon. 0 and empty without one.
        minutes: that the trials of the full version took, one after the other and by the clock, or will take, about; 0
            without an experiment.
    """

    status: Status
    says: str = ""
    sentences: tuple[str, ...] = ()
    seeds: int = 0
    date: str = ""
    version: str = ""
    minutes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Paper:
    """An entry of the catalogue.

    Attributes:
        id: its number in the catalogue.
        name: what people call it.
        gist: what it brings, in one sentence of ours.
        kind, learns_from, gives, policy, setting, access, reward, technique, steps, continual, problems: tags, see
            `guerdon.papers.tags`.
        methods: names of the registered methods that state it as their source.
        code: dotted names of what else cites its arXiv id in a docstring: modules, or classes and functions of them.
        recipes: files of the checkout's `recipes/` that cite it.
        claim: see `ClaimStatus`.
    """

    id: int
    name: str
    title: str
    arxiv: str
    gist: str
    kind: str
    learns_from: tuple[str, ...]
    gives: tuple[str, ...]
    policy: tuple[str, ...]
    setting: tuple[str, ...]
    access: tuple[str, ...] = ()
    reward: tuple[str, ...] = ()
    technique: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    continual: tuple[str, ...] = ()
    problems: tuple[str, ...]
    methods: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    claim: ClaimStatus = field(default_factory=lambda: ClaimStatus(status="none"))

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def tags(self) -> dict[str, tuple[str, ...]]:
        """Its tags by facet; facets that do not apply are left out."""
        found = {facet: getattr(self, facet) for facet in facets()}
        return {facet: (said,) if isinstance(said, str) else said for facet, said in found.items() if said}

    @property
    def commands(self) -> dict[str, str]:
        """How each method is run; what is written in capitals is the user's."""
        return {name: train_command(get_method(name)) for name in self.methods}

    @property
    def options(self) -> dict[str, tuple[str, ...]]:
        """The options that each method has of its own, beside those of its family."""
        from guerdon.fields import options

        shared = (".base", ".control")  # modules of the families
        return {
            name: tuple(o.name for o in options(get_method(name)) if not o.owner.__module__.endswith(shared))
            for name in self.methods
        }

    def as_dict(self) -> dict[str, Any]:
        """The whole entry as plain data."""
        return asdict(self) | {"url": self.url, "commands": self.commands, "options": self.options}


def papers() -> list[Paper]:
    """Every paper of the catalogue, in order of their ids."""
    methods, code = all_methods(), _cited()
    recipes = {path: path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.yaml"))}
    found = []
    for said in _read("catalogue.toml")["paper"]:
        entry: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in said.items()
        }
        laptop, arxiv = entry.pop("laptop", ""), entry["arxiv"]
        mine = {name: cls for name, cls in methods.items() if entry["id"] in cls.papers}
        own = {name for cls in mine.values() for name in (cls.__module__, f"{cls.__module__}.{cls.__qualname__}")}
        found.append(
            Paper(
                **entry,
                methods=tuple(mine),
                code=tuple(name for name in code[arxiv] if name not in own),
                recipes=tuple(f"recipes/{path.name}" for path, text in recipes.items() if arxiv in text),
                claim=_status(entry["id"], laptop),
            )
        )
    return found


def get_paper(id: int | str) -> Paper:
    """The paper with this id (`62`, `"62"`) or arXiv id (`"2505.18116"`); `ConfigError` where there is none."""
    known = {str(paper.id): paper for paper in papers()} | {paper.arxiv: paper for paper in papers()}
    asked = str(id).lstrip("0") if str(id).isdecimal() else str(id)
    if asked not in known:
        raise ConfigError(
            f"no paper has the id '{id}': they go from 1 to {len(papers())}. `guerdon papers` lists them."
        )
    return known[asked]


@cache
def tags() -> dict[str, Tag]:
    """Every tag by name, in the order of `tags.toml`."""
    return {
        name: Tag(name, facet, says, tuple(group.get("from", ())))
        for facet, group in _read("tags.toml").items()
        for name, says in group.items()
        if name not in ("says", "from")
    }


def facets() -> dict[str, str]:
    """The groups of tags, each with what it says."""
    return {facet: group["says"] for facet, group in _read("tags.toml").items()}


def get_tag(name: str) -> Tag:
    """The tag called `name`; a `ConfigError` with the nearest name where there is none."""
    if name not in tags():
        raise ConfigError(f"no tag is called '{name}'.{near(name, tags())} `guerdon papers --tags` lists them all.")
    return tags()[name]


def train_command(cls: type[Method]) -> str:
    """The shortest command that trains with a method; what is written in capitals is the user's."""
    given = {
        "verifier": "--model MODEL --task TASK",
        "transitions": "--data DATA",
        "environment": "--env ENV",
    }.get(cls.learns_from, "--model MODEL --data DATA")
    return f"guerdon train {cls.name} {given}"


@cache
def _read(file: str) -> dict[str, Any]:
    return tomllib.loads((PACKAGE / "papers" / file).read_text(encoding="utf-8"))


def _status(paper: int, laptop: str) -> ClaimStatus:
    if paper not in claimed():
        return ClaimStatus(status="cannot be checked on a laptop" if laptop else "none", says=laptop)
    result = stored_result(paper)
    if result is None:
        claim = get_claim(paper)
        return ClaimStatus(status="runs", says=claim.says, minutes=claim.minutes)
    return ClaimStatus(
        status=result["verdict"],
        says=result["says"],
        sentences=tuple(result["sentences"]),
        seeds=result["seeds"],
        date=result["environment"]["created"],
        version=result["environment"]["guerdon"],
        minutes=result["seconds"] / 60,
    )


@cache
def _cited() -> defaultdict[str, list[str]]:
    """arXiv id -> modules, public classes and functions whose docstrings cite it; those in a module that does not.

    The files are read, not imported: nothing heavy is loaded for it.
    """
    known = {said["arxiv"] for said in _read("catalogue.toml")["paper"]}
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        parts, source = path.relative_to(PACKAGE.parent).with_suffix("").parts, path.read_text(encoding="utf-8")
        if parts[1] == "claims" or known.isdisjoint(CITATION.findall(source)):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        tree = ast.parse(source)
        own = _ids(tree)
        for arxiv in own:
            found[arxiv].append(module)
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                for arxiv in _ids(node) - own:
                    found[arxiv].append(f"{module}.{node.name}")
    return found


def _ids(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> set[str]:
    return set(CITATION.findall(ast.get_docstring(node) or ""))
