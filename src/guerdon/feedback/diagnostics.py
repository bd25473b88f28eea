"""What can be wrong with feedback, one function per suspicion, each linear in the size of the feedback.

Every function returns findings as plain data: `level` (info, warning, error), `what` was found, the `count` of it and
its `share`, `examples` (where it stands) and `advice`. None reads anything but text: what a model would make of the
feedback is not judged here.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from guerdon.feedback.readers import Feedback
from guerdon.feedback.records import Record, Text
from guerdon.feedback.schema import plain

Finding = dict[str, Any]
_EXAMPLES = 5


@dataclass(frozen=True)
class View:
    """Feedback with its texts as strings: one that is equal for equal texts (roles included), and its bare words."""

    feedback: Feedback
    prompts: list[str]
    answers: list[list[str]]
    prompt_words: list[str]
    answer_words: list[list[str]]

    @classmethod
    def of(cls, feedback: Feedback) -> View:
        records = feedback.records
        return cls(
            feedback,
            [_identity(r.prompt) for r in records],
            [[_identity(c) for c in r.completions] for r in records],
            [plain(r.prompt) for r in records],
            [[plain(c) for c in r.completions] for r in records],
        )

    @property
    def records(self) -> list[Record]:
        return self.feedback.records

    def __len__(self) -> int:
        return len(self.records)


def _identity(text: Text | None) -> str:
    return text if isinstance(text, str) else repr([sorted(message.items()) for message in text or ()])


def found(level: str, what: str, where: Sequence[str], total: int, advice: str) -> list[Finding]:
    """One finding about the rows at `where`, or none where there are no such rows."""
    if not where:
        return []
    share = len(where) / total
    examples = list(where[:_EXAMPLES])
    return [{"level": level, "what": what, "count": len(where), "share": share, "examples": examples, "advice": advice}]


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (95% by default) of a share of `successes` among `n`; (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    p, zz = successes / n, z * z / n
    centre = (p + zz / 2) / (1 + zz)
    half = z / (1 + zz) * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def repeated(view: View) -> list[Finding]:
    """Rows that are there already, and prompts that are there already with other answers."""
    rows: set[tuple[Any, ...]] = set()
    prompts: dict[str, str] = {}  # without regard to case and spacing -> as first written
    again: list[str] = []
    same: list[str] = []
    nearly: list[str] = []
    for record, prompt, answers in zip(view.records, view.prompts, view.answers, strict=True):
        row = (prompt, *answers, *(record.scores or record.columns.get("labels") or ()))
        loose = " ".join(prompt.casefold().split())
        if row in rows:
            again.append(record.where)
        elif record.prompt is not None and loose in prompts:
            (same if prompts[loose] == prompt else nearly).append(record.where)
        rows.add(row)
        prompts.setdefault(loose, prompt)
    total = len(view)
    return [
        *found("warning", "rows that repeat an earlier row", again, total, "They weigh more than others: drop them."),
        *found(
            "info",
            "rows with an earlier row's prompt",
            same,
            total,
            "Rows with one prompt stay on one side when a share is held out.",
        ),
        *found(
            "info",
            "rows whose prompt differs from an earlier one in case or spacing only",
            nearly,
            total,
            "One may be held out and the other learned: make them equal.",
        ),
    ]


def identical_pairs(view: View) -> list[Finding]:
    """Preferences whose chosen and rejected answers are the same but for surrounding space."""
    same = [
        record.where
        for record, (chosen, rejected), words in zip(view.records, view.answers, view.answer_words, strict=True)
        if chosen == rejected or words[0].strip() == words[1].strip() != ""
    ]
    what = "pairs whose chosen and rejected answers are identical"
    return found("warning", what, same, len(view), "They say nothing and add noise: drop them.")


_CONTRADICTED = {
    "preference": "pairs of answers that are preferred both ways round",
    "unpaired_preference": "answers that are liked in one row and disliked in another",
    "scored": "answers with different scores for the same prompt",
}


def contradictions(view: View) -> list[Finding]:
    """The same answer to the same prompt judged differently: A over B and B over A, liked and not, two scores."""
    told: dict[tuple[str, ...], list[tuple[float, str]]] = defaultdict(list)
    for record, prompt, answers in zip(view.records, view.prompts, view.answers, strict=True):
        if view.feedback.kind == "preference":
            told[(prompt, *sorted(answers))].append((answers[0] > answers[1], record.where))
        else:
            for answer, score in zip(answers, record.scores or (), strict=True):
                told[(prompt, answer)].append((score, record.where))
    examples = [
        " and ".join(dict.fromkeys(where for _, where in judgements))
        for judgements in told.values()
        if len({score for score, _ in judgements}) > 1
    ]
    advice = "They cancel out: keep what most judges say, or smooth the labels."
    return found("warning", _CONTRADICTED[view.feedback.kind], examples, len(told), advice)


def cycles(view: View) -> list[Finding]:
    """Prompts with A over B, B over C, C over A: no ranking of the answers agrees with all preferences."""
    graphs: dict[str, Graph] = defaultdict(dict)
    for record, prompt, (better, worse) in zip(view.records, view.prompts, view.answers, strict=True):
        if better != worse:
            graphs[prompt].setdefault(better, {}).setdefault(worse, record.where)
    examples = []
    for graph in graphs.values():
        if len(graph) < 3:  # each of the three answers of a cycle is preferred to another
            continue
        cycle = next((cycle for part in components(graph) if (cycle := _cycle(graph, part))), None)
        if cycle:
            examples.append(", ".join(graph[a][b] for a, b in zip(cycle, [*cycle[1:], cycle[0]], strict=True)))
    advice = "No reward explains them: drop the weakest pair of each, or learn a general preference model."
    return found("warning", "prompts with a preference cycle (A over B over C over A)", examples, len(graphs), advice)


Graph = dict[str, dict[str, str]]  # better -> worse -> where it is said


def components(graph: Graph) -> list[list[str]]:
    """Strongly connected components of two nodes or more (Tarjan's algorithm, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    parts = []
    for root in graph:
        work = [(root, iter(graph[root]))] if root not in index else []
        while work:
            node, successors = work[-1]
            if node not in index:
                index[node] = low[node] = len(index)
                stack.append(node)
                on_stack.add(node)
            for successor in successors:
                if successor not in index:
                    work.append((successor, iter(graph.get(successor, ()))))
                    break
                if successor in on_stack:
                    low[node] = min(low[node], index[successor])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    part = [stack.pop()]
                    while part[-1] != node:
                        part.append(stack.pop())
                    on_stack.difference_update(part)
                    if len(part) > 1:
                        parts.append(part)
    return parts


def _cycle(graph: Graph, part: list[str]) -> list[str]:
    """A cycle of three or more in this component: a shortest one through some preference that nobody contradicts.

    Where every preference of the component is contradicted, there is none that is not already told as contradictions.
    """
    inside = set(part)
    one_way = ((a, b) for a in graph if a in inside for b in graph[a] if b in inside and a not in graph[b])
    start, first = next(one_way, ("", ""))
    if not first:
        return []
    came_from = {first: start}
    queue = [first]
    for node in queue:
        for successor in graph[node]:
            if successor == start:
                path = [node]
                while path[-1] != first:
                    path.append(came_from[path[-1]])
                return [start, *path[::-1]]
            if successor in inside and successor not in came_from:
                came_from[successor] = node
                queue.append(successor)
    raise AssertionError("every edge of a strongly connected component lies on a cycle")


def length_bias(view: View, lengths: Sequence[Sequence[int]]) -> tuple[dict[str, Any], list[Finding]]:
    """Whether the longer answer tends to be the better one: the best against the worst answer of each record.

    The correlation is Pearson's, of length and score, each less its mean over the record's answers. `lengths` holds one
    number per completion of each record.
    """
    differences: list[tuple[str, int]] = []  # where, length of the best answer less that of the worst
    xy = xx = yy = 0.0
    for record, sizes in zip(view.records, lengths, strict=True):
        scores = record.scores or []
        if len(set(scores)) < 2:
            continue
        difference = sizes[scores.index(max(scores))] - sizes[scores.index(min(scores))]
        differences.append((record.where, difference))
        size, score = sum(sizes) / len(sizes), sum(scores) / len(scores)
        for x, y in zip(sizes, scores, strict=True):
            xy += (x - size) * (y - score)
            xx += (x - size) ** 2
            yy += (y - score) ** 2
    longer = sum(d > 0 for _, d in differences)
    unequal = sum(d != 0 for _, d in differences)
    low, high = wilson(longer, unequal)
    bias = {
        "pairs": len(differences),
        "of_different_length": unequal,
        "better_is_longer": longer / unequal if unequal else None,
        "interval": [low, high],
        "mean_difference": sum(d for _, d in differences) / len(differences) if differences else None,
        "correlation": xy / math.sqrt(xx * yy) if xx * yy > 0 else None,
    }
    findings: list[Finding] = []
    if unequal and not low <= 0.5 <= high and abs(longer / unequal - 0.5) >= 0.1:
        kind = "longer" if longer > unequal / 2 else "shorter"
        sign = 1 if kind == "longer" else -1
        biased = [where for where, d in differences if d * sign > 0]
        findings = found(
            "warning",
            f"the better answer is the {kind} one in {len(biased) / unequal:.0%} of the pairs of different length "
            f"(95% interval {_interval(low, high, kind)})",
            biased,
            len(differences),
            "A policy may learn length instead of quality: watch the lengths, or use a length-normalised loss.",
        )
    return bias, findings


def _interval(low: float, high: float, kind: str) -> str:
    low, high = (low, high) if kind == "longer" else (1 - high, 1 - low)
    return f"{low:.0%} to {high:.0%}"


def margins(view: View) -> list[Finding]:
    """Preferences whose own scores say otherwise."""
    against, tied = [], []
    for record in view.records:
        columns = record.columns
        chosen, rejected = columns.get("scores") or (columns.get("score_chosen"), columns.get("score_rejected"))
        if chosen is None or rejected is None:
            continue
        if chosen < rejected:
            against.append(record.where)
        elif chosen == rejected:
            tied.append(record.where)
    total = len(view)
    return [
        *found("warning", "pairs whose rejected answer has the higher score", against, total, "Check their order."),
        *found("info", "pairs whose two answers have the same score", tied, total, "They may be coin tosses."),
    ]


def ties(view: View) -> list[Finding]:
    """Prompts whose answers all have one score, or whose best score is shared."""
    constant, best = [], []
    for record in view.records:
        scores = record.scores or []
        if len(scores) < 2:
            continue
        if len(set(scores)) == 1:
            constant.append(record.where)
        elif scores.count(max(scores)) > 1:
            best.append(record.where)
    single = [r.where for r in view.records if len(r.completions) == 1]
    total = len(view)
    return [
        *found(
            "error" if len(constant) + len(single) == total else "info",
            "prompts whose answers all have the same score",
            constant,
            total,
            "Preference and group-relative methods learn nothing from them.",
        ),
        *found("info", "prompts with one answer only", single, total, "There is nothing to compare the answer with."),
        *found("info", "prompts whose best score several answers share", best, total, "The first counts as best."),
    ]


def label_balance(view: View) -> tuple[dict[str, int], list[Finding]]:
    """Liked and disliked answers, or right and wrong steps."""
    if view.feedback.kind == "stepwise_supervision":
        labels = [(bool(label), r.where) for r in view.records for label in r.columns["labels"]]
        names = {True: "right", False: "wrong"}
    else:
        labels = [(bool(r.scores and r.scores[0]), r.where) for r in view.records]
        names = {True: "liked", False: "disliked"}
    counts = Counter(label for label, _ in labels)
    balance = {names[label]: counts[label] for label in (True, False)}
    fewer = min((True, False), key=lambda label: counts[label])
    if counts[fewer] == 0:
        where = list(dict.fromkeys(where for _, where in labels))
        advice = "There is nothing to contrast: bring labels of both kinds."
        return balance, found("error", f"every label is '{names[not fewer]}'", where, len(where), advice)
    where = [where for label, where in labels if label is fewer]
    if counts[fewer] < 0.1 * len(labels):
        what = f"labels '{names[fewer]}', the rarer kind"
        return balance, found("warning", what, where, len(labels), "Weigh the two kinds, so that neither is drowned.")
    return balance, []


_NOT_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())


@cache
def _script(character: str) -> str:
    """The script of a letter, as Unicode names it: latin, cyrillic, cjk, ..."""
    return unicodedata.name(character, "other").split()[0].split("-")[0].lower()


def script(text: str) -> str:
    """The script of most letters of a text (of its first 2000 characters), '' where it has none."""
    text = text[:2000]
    plain_letters = len(text.encode("ascii", "ignore").translate(None, _NOT_LETTERS))
    if plain_letters > len(text) / 2:
        return "latin"
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if character.isalpha():
            counts[_script(character)] += count
    # Japanese is written in several scripts at once; any kana tells it from Chinese.
    kana = counts.pop("hiragana", 0) + counts.pop("katakana", 0)
    if kana:
        counts["japanese"] = kana + counts.pop("cjk", 0)
    return counts.most_common(1)[0][0] if counts else ""


def scripts(view: View) -> tuple[dict[str, float], list[Finding]]:
    """Share of rows by script, the rare scripts, and answers in another script than their prompt."""
    by_script: dict[str, list[str]] = defaultdict(list)
    other = []
    for record, prompt, words in zip(view.records, view.prompt_words, view.answer_words, strict=True):
        asked, answered = script(prompt), [script(text) for text in words]
        by_script[asked or next(filter(None, answered), "")].append(record.where)
        if asked and any(answer not in ("", asked) for answer in answered):
            other.append(record.where)
    total = len(view)
    ranked = sorted(by_script.items(), key=lambda item: -len(item[1]))
    shares = {name or "no letters": len(where) / total for name, where in ranked}
    findings = [
        finding
        for name, where in ranked[1:]
        for finding in found(
            "info",
            f"rows in {name} script" if name else "rows without letters",
            where,
            total,
            f"Most rows are in {ranked[0][0] or 'no'} script: check that these are meant to be here.",
        )
    ]
    advice = "Translations apart, this is often a mix-up."
    return shares, [*findings, *found("info", "answers in another script than their prompt", other, total, advice)]


# UTF-8 that was read as Windows-1252 (e acute as A tilde and copyright sign), and the replacement character.
_MOJIBAKE = ("\u00e2\u20ac", "\u00ef\u00bb\u00bf", "\u00f0\u0178", "\ufffd")
_MOJIBAKE_PAIR = re.compile("[\u00c2\u00c3][\u0080-\u00bf\u20ac\u0152\u0153\u2018-\u2022\u02c6\u2030]")


def mojibake(view: View) -> list[Finding]:
    """Texts that look as if they had been decoded wrongly."""
    where = [
        record.where
        for record, prompt, words in zip(view.records, view.prompt_words, view.answer_words, strict=True)
        if any(not text.isascii() and _garbled(text) for text in (prompt, *words))
    ]
    advice = "The text was decoded wrongly before it came here: read the original as UTF-8 and write it again."
    return found("warning", "rows with wrongly decoded characters", where, len(view), advice)


def _garbled(text: str) -> bool:
    pair = "\u00c2" in text or "\u00c3" in text
    return any(mark in text for mark in _MOJIBAKE) or (pair and _MOJIBAKE_PAIR.search(text) is not None)


def odd_answers(view: View) -> list[Finding]:
    """Answers that are empty, that repeat their prompt, or in which the assistant says nothing."""
    empty, repeats, nobody = [], [], []
    for record, prompt, words in zip(view.records, view.prompts, view.answer_words, strict=True):
        for completion, text in zip(record.completions, words, strict=True):
            said = [m for m in completion if m["role"] == "assistant"] if isinstance(completion, list) else [completion]
            if not said:
                nobody.append(record.where)
            elif not text.strip() and not any(isinstance(m, dict) and m.get("tool_calls") for m in said):
                empty.append(record.where)
            # A greeting may well answer a greeting: only a longer beginning is no chance.
            if record.prompt and len(prompt) >= 20 and completion[: len(record.prompt)] == record.prompt:
                repeats.append(record.where)
    total = sum(map(len, view.answers))
    return [
        *found("warning", "empty answers", empty, total, "Only the end of the answer is learned from them."),
        *found("warning", "answers that begin with their whole prompt", repeats, total, "Cut it off: it comes twice."),
        *found("warning", "conversations without an assistant message", nobody, total, "There is no answer to learn."),
    ]


def missing_columns(view: View) -> list[Finding]:
    """Columns that some rows have and others lack."""
    total = len(view)
    counts = Counter(name for r in view.records for name, value in r.columns.items() if value is not None)
    findings = []
    for name in (name for name, count in counts.items() if count < total):
        lacking = [r.where for r in view.records if r.columns.get(name) is None]
        findings += found("info", f"rows without the column '{name}'", lacking, total, "Other rows have it.")
    return findings


Check = Callable[[View], list[Finding]]
CHECKS: tuple[Check, ...] = (repeated, odd_answers, mojibake, missing_columns)
CHECKS_OF_KIND: dict[str, tuple[Check, ...]] = {
    "preference": (identical_pairs, contradictions, cycles, margins),
    "unpaired_preference": (contradictions,),
    "scored": (contradictions, ties),
}
