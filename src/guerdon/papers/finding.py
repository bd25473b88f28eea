"""Finding papers by words and tags, the best match first (BM25, by SQLite's full-text index)."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence

from guerdon.errors import near
from guerdon.papers import catalogue
from guerdon.papers.catalogue import Paper, get_tag, papers

# How much a word counts by where it stands: in the name, the title, the gist, tags, what tags mean, methods and code.
WEIGHTS = (8, 4, 2, 4, 0.5, 6)


def search(query: str = "", *, tags: str | Sequence[str] = ()) -> list[Paper]:
    """The papers that have all the words, the best match first; where none has all, those that have any of them.

    Args:
        query: words, or an id, or an arXiv id; empty for all papers in order of their ids. Words match whole words by
            their stem, or the beginning of one.
        tags: see `guerdon.papers.tags`; a paper has to have all of them.

    Raises:
        ConfigError: a tag that does not exist, with the nearest name.
    """
    wanted = {get_tag(tag).name for tag in ([tags] if isinstance(tags, str) else tags)}
    found = [paper for paper in papers() if wanted <= {tag for group in paper.tags.values() for tag in group}]
    exact = [paper for paper in found if query.strip().lstrip("0") in (str(paper.id), paper.arxiv)]
    words = _words(query)
    if exact or not words:
        return exact or found
    texts = {paper.id: _texts(paper) for paper in found}
    by_id = {paper.id: paper for paper in found}
    return [by_id[id] for id in _matches(texts, words, " AND ") or _matches(texts, words, " OR ")]


def nearest(query: str) -> str:
    """' Did you mean 'preference'?' for the first word of a query that no paper has and that resembles one, or ''."""
    vocabulary = sorted({word for paper in papers() for text in _texts(paper) for word in _words(text)})
    return next((hint for word in _words(query) if word not in vocabulary and (hint := near(word, vocabulary))), "")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _texts(paper: Paper) -> tuple[str, ...]:
    own = [tag for group in paper.tags.values() for tag in group]
    meanings = " ".join(catalogue.tags()[tag].says for tag in own)
    return paper.name, paper.title, paper.gist, " ".join(own), meanings, " ".join((*paper.methods, *paper.code))


def _matches(texts: dict[int, tuple[str, ...]], words: list[str], joined: str) -> list[int]:
    """Ids of the texts that match, the best first; ties in order of the ids."""
    index = sqlite3.connect(":memory:")
    index.execute(
        "CREATE VIRTUAL TABLE entry USING fts5(name, title, gist, tags, meanings, code, tokenize='porter unicode61')"
    )
    index.executemany(
        "INSERT INTO entry(rowid, name, title, gist, tags, meanings, code) VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(id, *said) for id, said in texts.items()],
    )
    rank = f"bm25(entry, {', '.join(map(str, WEIGHTS))})"
    asked = joined.join(f'"{word}" * ' for word in words)
    return [
        id for (id,) in index.execute(f"SELECT rowid FROM entry WHERE entry MATCH ? ORDER BY {rank}, rowid", [asked])
    ]
