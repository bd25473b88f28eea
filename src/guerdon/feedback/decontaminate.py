"""Which test items were seen in training: overlap in n-grams, and exact copies (Tulu 3, arXiv 2411.15124).

A token is a word, a number or one punctuation mark, in lower case; the paper's tool takes spaCy's tokens, which also
split contractions ("do", "n't").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Contamination:
    """Overlap of each test item with the training text that resembles it most.

    Attributes:
        score: (items,) share of the item's tokens that n-grams shared with that one training text cover, 0 to 1.
        source: (items,) index of that training text; -1 where nothing is shared. The first one of equals.
    """

    score: np.ndarray
    source: np.ndarray

    def flagged(self, threshold: float = 0.5) -> np.ndarray:
        """(items,) bool, score above the threshold; the paper's is one half."""
        return self.score > threshold


def contamination(train_texts: Iterable[str], test_texts: Sequence[str], n: int = 8) -> Contamination:
    """Share of each test item's tokens covered by n-grams that one training text holds, maximal over training texts.

    Only the test items are held in memory (as an inverted index of their n-grams); training texts are read once, in a
    stream. An item shorter than n tokens has no n-gram and scores 0: `exact_copies` finds it.

    Args:
        train_texts: prompts that are trained on.
        test_texts: prompts that are judged by.
        n: tokens of an n-gram; 8 in the paper.
    """
    lengths = []
    index: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # n-gram -> (item, position) of each place it stands
    for item, text in enumerate(test_texts):
        tokens = _tokens(text)
        lengths.append(len(tokens))
        for position, gram in enumerate(_ngrams(tokens, n)):
            index.setdefault(gram, []).append((item, position))
    score = np.zeros(len(lengths))
    source = np.full(len(lengths), -1)
    for number, text in enumerate(train_texts):
        covered: dict[int, set[int]] = {}
        for gram in set(_ngrams(_tokens(text), n)) & index.keys():
            for item, position in index[gram]:
                covered.setdefault(item, set()).update(range(position, position + n))
        for item, tokens_covered in covered.items():
            share = len(tokens_covered) / lengths[item]
            if share > score[item]:
                score[item], source[item] = share, number
    return Contamination(score, source)


def exact_copies(train_texts: Iterable[str], test_texts: Sequence[str]) -> np.ndarray:
    """(items,) bool, whether a test item is a training text, up to case and white space."""
    seen = {tuple(_tokens(text)) for text in train_texts}
    return np.array([tuple(_tokens(text)) in seen for text in test_texts], dtype=bool)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))
