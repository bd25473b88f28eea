"""The catalogue: complete, in one vocabulary, and true to the code, the recipes and the stored results."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from guerdon.claims import all_claims, running
from guerdon.claims.running import stored_result
from guerdon.errors import ConfigError
from guerdon.methods.base import all_methods
from guerdon.papers import get_paper, papers, tags
from guerdon.papers.catalogue import RECIPES, facets

PAPERS = papers()


def test_there_are_76_papers_and_none_twice():
    assert [paper.id for paper in PAPERS] == list(range(1, 77))
    for name in ("name", "title", "arxiv", "gist"):
        assert all(count == 1 for count in Counter(getattr(paper, name) for paper in PAPERS).values()), name
    assert all(re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv) for paper in PAPERS)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: str(paper.id))
def test_each_says_what_it_is_in_one_sentence(paper):
    assert paper.gist[0].isupper() and paper.gist[-1] == "."
    assert not re.search(r"\.\s", paper.gist) and 60 < len(paper.gist) <= 220
    assert paper.learns_from and paper.gives and paper.policy and paper.setting and paper.problems


def test_tags_are_those_of_the_taxonomy_and_all_are_used():
    used = set()
    for paper in PAPERS:
        for facet, names in paper.tags.items():
            assert {tags()[name].facet for name in names} == {facet}, paper.id
            assert len(set(names)) == len(names), paper.id
            used |= set(names)
    assert used == set(tags())
    assert set(facets()) == {tag.facet for tag in tags().values()}


def test_what_the_surveys_offer_is_in_the_taxonomy():
    by_id = {paper.id: paper for paper in PAPERS}
    surveys = {survey for tag in tags().values() for survey in tag.surveys}
    assert surveys == {9, 27, 48, 57, 68} and all(by_id[survey].kind == "survey" for survey in surveys)
    for survey, facet in ((27, "steps"), (48, "continual"), (68, "access")):
        offered = {tag.name for tag in tags().values() if tag.facet == facet}
        assert offered == set(by_id[survey].tags[facet]), survey


def test_methods_are_those_that_name_the_paper():
    found = {name: paper.id for paper in PAPERS for name in paper.methods}
    for name, cls in all_methods().items():
        for id in cls.papers:
            assert name in get_paper(id).methods
    assert found["nft"] == 62 and found["riql"] == 1 and found["dpo-norm"] == 17
    nft = get_paper(62)
    assert nft.commands["nft"] == "guerdon train nft --model MODEL --task TASK"
    assert "neg_weight" in nft.options["nft"] and "lr" not in nft.options["nft"]


def test_code_is_what_cites_the_paper():
    assert "guerdon.control.corruption" in get_paper(1).code
    assert "guerdon.methods.planning.search" in get_paper("2102.04518").code
    assert not any("methods.verifiers.nft" in name for name in get_paper(62).code)  # a method already
    for name in (name for paper in PAPERS for name in paper.code):
        module, _, last = name.rpartition(".")
        if last[0].isupper() or importlib.util.find_spec(name) is None:
            assert re.search(rf"^(class|def) {last}\b", Path(importlib.util.find_spec(module).origin).read_text(), re.M)


def test_recipes_are_those_that_cite_the_paper():
    assert "recipes/tulu3.yaml" in get_paper(17).recipes
    for paper in PAPERS:
        for name in paper.recipes:
            assert paper.arxiv in (RECIPES.parent / name).read_text()


def test_the_verdict_is_that_of_the_stored_result():
    for paper in PAPERS:
        claim, result = all_claims().get(paper.id), stored_result(paper.id)
        if claim is None:
            assert paper.claim.status in ("none", "cannot be checked on a laptop")
            assert bool(paper.claim.says) == (paper.claim.status != "none")
        elif result is None:
            assert (paper.claim.status, paper.claim.minutes) == ("runs", claim.minutes)
        else:
            assert (paper.claim.status, paper.claim.seeds) == (result["verdict"], result["seeds"])
            assert paper.claim.sentences == tuple(result["sentences"])
            assert paper.claim.date == result["environment"]["created"]
    assert get_paper(9).claim.status == "cannot be checked on a laptop"
    assert get_paper(62).claim.status == "holds"


def test_the_verdict_follows_what_is_stored(tmp_path, monkeypatch):
    """Nobody types a status: another result is another verdict, and none is none."""
    result = stored_result(62)
    monkeypatch.setattr(running, "RESULTS", tmp_path)
    assert get_paper(62).claim.status == "runs"
    (tmp_path / "62.json").write_text(json.dumps(result | {"verdict": "does not hold", "seeds": 5}))
    assert (get_paper(62).claim.status, get_paper(62).claim.seeds) == ("does not hold", 5)


def test_a_paper_by_its_ids():
    assert get_paper(62) == get_paper("062") == get_paper("2505.18116")
    with pytest.raises(ConfigError, match="no paper has the id '77': they go from 1 to 76"):
        get_paper(77)
