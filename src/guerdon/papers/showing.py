"""Papers for people: the list, one entry in full, and the tags, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from guerdon.claims.showing import STYLES
from guerdon.papers.catalogue import ClaimStatus, Paper, facets, tags

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text


def overview(papers: Sequence[Paper]) -> Table:
    """What each brings, what guerdon has of it, and whether its claim held."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column(max_width=20, style="bold")
    table.add_column()
    for paper in papers:
        told = Text(paper.gist)
        if paper.methods:
            told.append("\nguerdon: " + ", ".join(paper.methods), style="cyan")
        if paper.claim.status != "none":
            told.append("\nclaim: ", style="dim").append(_status(paper.claim))
        table.add_row(str(paper.id), paper.name, told)
    return table


def entry(paper: Paper) -> Group:
    """All there is to know of one."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for facet, names in paper.tags.items():
        facts.add_row(facets()[facet].split(":")[0], ", ".join(names))
    for name, command in paper.commands.items():
        facts.add_row(f"method {name}", command)
        facts.add_row("", "options of its own: " + (", ".join(paper.options[name]) or "none"))
    for name in paper.code:
        facts.add_row("code", name)
    for name in paper.recipes:
        facts.add_row("recipe", f"guerdon train --recipe {name}")
    if not (paper.methods or paper.code):
        facts.add_row("in guerdon", "not yet")
    head = Text.assemble((f"{paper.id:02d} {paper.name}", "bold"), f"\n{paper.title}\n", (paper.url, "dim"), "\n")
    return Group(head, Text(paper.gist + "\n"), facts, "", *_claim(paper))


def all_tags(papers: Sequence[Paper]) -> Table:
    """The taxonomy: every tag by what it speaks of, what it means, and how many of the papers have it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("tag", "meaning", "papers"):
        table.add_column(column, justify="right" if column == "papers" else "left", overflow="fold")
    for facet, group in groupby(tags().values(), key=lambda tag: tag.facet):
        members = list(group)
        surveys = f" (surveys {', '.join(map(str, members[0].surveys))})" if members[0].surveys else ""
        table.add_section()
        table.add_row(Text(facet, style="bold"), Text(facets()[facet] + surveys, style="bold"))
        for tag in members:
            table.add_row(tag.name, tag.says, str(sum(tag.name in paper.tags.get(facet, ()) for paper in papers)))
    return table


def _status(claim: ClaimStatus) -> Text:
    from rich.text import Text

    return Text(claim.status, style=STYLES.get(claim.status, ""))


def _claim(paper: Paper) -> list[Text]:
    from rich.text import Text

    claim = paper.claim
    never = ", but was never run in full" if claim.status == "runs" else ""
    lines = [Text.assemble(("claim: ", "dim"), _status(claim), f"{never}. {claim.says}".rstrip())]
    lines += [Text(f"  {sentence}") for sentence in claim.sentences]
    if claim.date:
        lines.append(Text(f"  {claim.seeds} seeds, {claim.date[:10]}, guerdon {claim.version}", style="dim"))
    if claim.minutes:
        taken = "took" if claim.date else "takes about"
        command = f"guerdon reproduce {paper.id}"
        lines.append(Text(f"  {command} {taken} {claim.minutes:.2g} minutes on one core; --quick shows that it runs."))
    return lines
