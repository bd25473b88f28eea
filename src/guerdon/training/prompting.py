"""Prompt policies in training: what was tried of a prompt, by which items, and all that a checkpoint must hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import ConfigError, DataError, near
from guerdon.feedback.labelled import Item, Labelled, digest, draw, ranked, read_labelled, split
from guerdon.feedback.records import Record
from guerdon.rewards.verifiers import get_verifier
from guerdon.training.config import PromptTraining
from guerdon.training.control import Cursor

if TYPE_CHECKING:
    from guerdon.language.prompting import Answerer, Prompt, PromptPolicy
    from guerdon.methods.prompting.base import PromptMethod
    from guerdon.training.distributed import Distribution

Kept = tuple[int, ...]  # positions of the full prompt that a prompt keeps, in order
RIGHT, WRONG = 200.0, 180.0  # what a positive and a negative margin of probability are multiplied with
HISTORY = "history.jsonl"


@dataclass(frozen=True)
class Score:
    """What a prompt reached on some items: the share that it answered right, and the mean margin reward."""

    accuracy: float
    reward: float

    @classmethod
    def of(cls, gaps: np.ndarray) -> Score:
        """From the gap of each item: p[y] - max of the others; of free answers 1 where right, else 0."""
        return cls(float(np.mean(gaps > 0)), float(np.mean(margin_reward(gaps))))

    def fitness(self, by: str) -> float:
        return float(getattr(self, by))


def margin_reward(gaps: np.ndarray) -> np.ndarray:
    """200 gap where it is positive, else 180 gap: (n,) in [-180, 200] (RLPrompt's piecewise reward)."""
    return np.where(gaps > 0, RIGHT * gaps, WRONG * gaps)


def choice_gap(p: np.ndarray, right: int) -> float:
    """p[right] - max of the others, for probabilities (choices,)."""
    return float(p[right] - np.delete(p, right).max())


@dataclass(frozen=True)
class Tried:
    """A prompt that was evaluated.

    Attributes:
        kept: positions of the full prompt.
        text: it as people read it.
        score: on the search items; on their first half alone where it was found wanting there.
        evaluations: how many prompts had been evaluated by then, this one included.
    """

    kept: Kept
    text: str
    score: Score
    evaluations: int

    @property
    def row(self) -> dict[str, Any]:
        """As a line of the history."""
        return {
            "prompt": self.text,
            **asdict(self.score),
            "tokens": len(self.kept),
            "kept": list(self.kept),
            "evaluations": self.evaluations,
        }


# (prompts, which half of the items: 0, 1, or None for all) -> one score for each prompt
Judge = Callable[[Sequence["Prompt"], int | None], list[Score]]


class Search:
    """What a prompt method works with: the full prompt, a black box that judges prompts, and what it said so far.

    Attributes:
        prompt: the full prompt.
        budget: evaluations that may be spent.
        rng: the method's random numbers.
        archive: every prompt that was evaluated, once.
        state: what else the method remembers, as plain data.
        cursor: how far it has come; `samples` are evaluations, also of prompts that were known already.
    """

    def __init__(self, prompt: Prompt, judge: Judge, budget: int, seed: int = 0):
        self.prompt, self.judge, self.budget = prompt, judge, budget
        self.rng = np.random.default_rng(seed)
        self.archive: list[Tried] = []
        self.known: dict[str, int] = {}
        self.state: dict[str, Any] = {}
        self.cursor = Cursor()

    @property
    def left(self) -> int:
        """Evaluations that may still be spent."""
        return max(0, self.budget - self.cursor.samples)

    @property
    def everything(self) -> Kept:
        """The full prompt."""
        return tuple(range(len(self.prompt)))

    def text(self, kept: Kept) -> str:
        return self.prompt.keep(kept).text

    def spend(self, evaluations: int) -> None:
        self.cursor.samples += evaluations
        self.cursor.done = min(1.0, self.cursor.samples / self.budget)

    def evaluate(self, candidates: Sequence[Kept], least: tuple[str, float] | None = None) -> list[int]:
        """Judge prompts on the search items; where they stand in the archive. Text that is known is not judged again.

        Args:
            least: (fitness, value) that a prompt has to reach on the first half of the items to be judged on the
                second half as well (successive halving).
        """
        new = list({text: kept for kept in candidates if (text := self.text(kept)) not in self.known}.values())
        prompts = [self.prompt.keep(kept) for kept in new]
        scores = self.judge(prompts, None if least is None else 0) if new else []
        if least is not None:
            by, value = least
            good = [i for i, score in enumerate(scores) if score.fitness(by) >= value]
            for i, rest in zip(good, self.judge([prompts[i] for i in good], 1) if good else [], strict=True):
                first = scores[i]
                scores[i] = Score((first.accuracy + rest.accuracy) / 2, (first.reward + rest.reward) / 2)
        before = self.cursor.samples
        self.spend(len(candidates))
        order = {self.text(kept): n for n, kept in reversed(list(enumerate(candidates, before + 1)))}
        for kept, score in zip(new, scores, strict=True):
            text = self.text(kept)
            self.known[text] = len(self.archive)
            self.archive.append(Tried(kept, text, score, order[text]))
        return [self.known[self.text(kept)] for kept in candidates]

    def best(self, by: str) -> Tried:
        """The first among the best of the archive."""
        return max(self.archive, key=lambda tried: tried.score.fitness(by))

    def snapshot(self) -> dict[str, Any]:
        """All that the rest of the search depends on, as plain data."""
        archive = [[list(t.kept), t.score.accuracy, t.score.reward, t.evaluations] for t in self.archive]
        rng = self.rng.bit_generator.state
        return {"archive": archive, "state": self.state, "rng": rng, "cursor": asdict(self.cursor)}

    def continue_from(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `snapshot` returned."""
        self.archive = [
            Tried(tuple(kept), self.text(tuple(kept)), Score(accuracy, reward), evaluations)
            for kept, accuracy, reward, evaluations in saved["archive"]
        ]
        self.known = {tried.text: i for i, tried in enumerate(self.archive)}
        self.state, self.cursor = dict(saved["state"]), Cursor(**saved["cursor"])
        self.rng.bit_generator.state = saved["rng"]


@dataclass(frozen=True)
class Material:
    """Labelled items on their sides, and the full prompt that the demonstrations make."""

    labelled: Labelled
    template: list[tuple[str, bool]]
    words: dict[str, str]
    demonstrations: list[Item]
    search: list[Item]
    validation: list[Item]
    test: list[Item]
    notes: list[str]

    @property
    def parts(self) -> list[tuple[str, bool]]:
        """The runs of the full prompt."""
        from guerdon.language.prompting import few_shot

        return few_shot(self.template, self.demonstrations, self.words)

    @property
    def texts(self) -> list[str]:
        """Every word that the model meets, for tokenizers that are built from data."""
        words = [f" {word}" for word in self.words.values()]
        items = [text for item in self.labelled.items for text in (*item.columns.values(), *item.choices, item.answer)]
        return [text for text, _ in self.parts] + words + items

    def digests(self) -> dict[str, str]:
        """Of each side; which items a prompt was made, searched, chosen and tested with."""
        names = ("demonstrations", "search", "validation", "test")
        return {name: digest(getattr(self, name)) for name in names}


def material(config: PromptTraining) -> Material:
    """Read the items and put them on their sides.

    Test and validation items depend on the data alone, so that all seeds and methods are judged by the same ones;
    demonstrations and search items are drawn from the rest by the seed.

    Raises:
        DataError: items that cannot be read, or too few of them.
        ConfigError: a template or verbalizers that do not fit them.
    """
    from guerdon.language.prompting import TEMPLATES, parse_template

    labelled = read_labelled(str(config.data), skip_bad=config.skip_bad)
    sources = [labelled]
    if config.eval_data is None:
        rest, validation, test = split(labelled.items, config.validation_items, config.eval_items)
    else:
        sources.append(tested := read_labelled(config.eval_data, skip_bad=config.skip_bad))
        if tested.kind != labelled.kind or (tested.kind == "classification" and _classes(tested) != _classes(labelled)):
            raise DataError(f"{config.eval_data}: its items are of another kind or of other classes than the data.")
        seen = {item.text for item in tested.items}
        own = [item for item in labelled.items if item.text not in seen]
        rest, validation, _ = split(own, config.validation_items, 0)
        test = ranked(tested.items)[: config.eval_items]
    classes = _classes(labelled)
    rng = np.random.default_rng([config.seed, 13])
    demonstrations = draw(rest, config.shots * max(1, len(classes)), rng)
    shown = {item.text for item in demonstrations}
    search = draw([item for item in rest if item.text not in shown], config.search_items, rng)
    if len(search) < 2 or not (validation and test):
        raise DataError(
            f"{config.data}: {len(labelled.items)} items are too few: some are needed for demonstrations, for the "
            "search, for validation and for the test."
        )
    notes = [
        f"{source.source}: {len(source.bad)} rows cannot be read and are left out; the first: {source.bad[0]}."
        for source in sources
        if source.bad
    ]
    wanted = {"search": config.search_items, "validation": config.validation_items, "test": config.eval_items}
    for (name, count), side in zip(wanted.items(), (search, validation, test), strict=True):
        if len(side) < count:
            notes.append(f"{len(side)} {name} items, not the {count} asked for: there are too few different ones.")
    columns = [name for name in labelled.items[0].columns if all(name in i.columns for i in (*labelled.items, *test))]
    template = parse_template(
        config.template or _template(TEMPLATES[labelled.kind], columns), columns, str(config.data)
    )
    words = _words(config.verbalizers, classes, str(config.data))
    return Material(labelled, template, words, demonstrations, search, validation, test, notes)


def _classes(labelled: Labelled) -> tuple[str, ...]:
    return labelled.items[0].choices if labelled.kind == "classification" else ()


def _template(plain: str, columns: Sequence[str]) -> str:
    """The plain template, with the column that holds the items here."""
    return plain if "text" in columns else plain.replace("{text}", "{prompt}")


def _words(said: Sequence[str], classes: Sequence[str], where: str) -> dict[str, str]:
    words = {name: name for name in classes}
    for pair in said:
        name, equals, word = pair.partition("=")
        if not equals or not word.strip():
            raise ConfigError(f"the verbalizer '{pair}' has to be CLASS=WORD.")
        if name not in words:
            known = f"its classes are {', '.join(words)}" if words else "it has no classes"
            raise ConfigError(
                f"the verbalizer '{pair}' is for the class '{name}' of {where}; {known}.{near(name, words)}"
            )
        words[name] = word.strip()
    return words


def load_answerer(config: PromptTraining, said: Material) -> Answerer:
    """The model, ready to answer.

    Raises:
        ConfigError: there is no such model, or a verbalizer is no single token for it.
    """
    from guerdon.language.policy import Policy
    from guerdon.language.prompting import Answerer, check_verbalizers

    policy = Policy.load(config.model, config.precision, texts=said.texts)
    check_verbalizers(said.words, policy.tokenizer)
    return Answerer(policy, said.labelled.kind, said.words, config.calibrate, config.max_new_tokens, config.max_tokens)


def full_prompt(said: Material, answerer: Answerer) -> Prompt:
    """Demonstrations and template, as the model's tokens."""
    from guerdon.language.prompting import Prompt

    return Prompt.of(said.parts, answerer.policy.tokenizer)


def item_gaps(answerer: Answerer, prompts: Sequence[Prompt], items: Sequence[Item], verifier: str) -> np.ndarray:
    """(prompts, items): p[right] - max of the others; of free answers 1 where the verifier finds them right, else 0."""
    if answerer.kind != "generation":
        found = answerer.probabilities(prompts, items)
        right = [item.choices.index(item.answer) for item in items]
        return np.array([[choice_gap(p, y) for p, y in zip(row, right, strict=True)] for row in found])
    judge = get_verifier(verifier)
    records = [Record(item.text, [], columns={"answer": item.answer}, where=item.where) for item in items]
    texts = answerer.texts(prompts, items)
    return np.array([[float(judge(r, [t]).value[0] > 0) for r, t in zip(records, row, strict=True)] for row in texts])


def as_policy(
    config: PromptTraining,
    said: Material,
    answerer: Answerer,
    full: Prompt,
    kept: Kept,
    scores: Mapping[str, Mapping[str, float]],
) -> PromptPolicy:
    """A pruned prompt as a policy, with where it comes from."""
    from guerdon.language.prompting import PromptPolicy

    facts = {"model": config.model, "full": full.text, "kept": list(kept), "splits": said.digests(), "scores": scores}
    return PromptPolicy(answerer, full.keep(kept), facts)


class PromptRun(Search):
    """A search over the prompts of a fixed language model.

    Attributes:
        material: the items.
        answerer: the model and how it answers.
        notes: what the user should know of the data.
    """

    def __init__(self, method: PromptMethod, config: PromptTraining, distribution: Distribution, directory: Path):
        if distribution.world > 1:
            raise ConfigError("prompts are searched in one process: start guerdon without a launcher.")
        self.method, self.config, self.distribution, self.directory = method, config, distribution, directory
        self.material = material(config)
        self.notes = list(self.material.notes)
        self.answerer = load_answerer(config, self.material)
        prompt = full_prompt(self.material, self.answerer)
        super().__init__(prompt, self._judge_search, config.max_samples or method.max_prompts, config.seed)
        self._chosen: tuple[Tried, Score, int] | None = None

    def _judge_search(self, prompts: Sequence[Prompt], half: int | None) -> list[Score]:
        items = self.material.search
        middle = -(-len(items) // 2)
        part = items if half is None else items[:middle] if half == 0 else items[middle:]
        return [Score.of(gaps) for gaps in item_gaps(self.answerer, prompts, part, self.config.verifier)]

    def token_logps(self) -> np.ndarray:
        """(len(prompt),) log-prob of each token of the full prompt given those before it; 0 for slots."""
        from guerdon.language.scoring import score_pairs

        policy, ids = self.answerer.policy, self.prompt.ids
        flat = [token for part in ids for token in part]
        start = policy.tokenizer.bos_token_id
        context, rest = ([start], flat) if start is not None else (flat[:1], flat[1:])
        (found,) = score_pairs(policy.model, [(context, rest)], max_tokens=self.config.max_tokens)
        each = iter(np.concatenate([np.zeros(len(flat) - len(found)), found]))
        return np.array([sum(next(each) for _ in part) for part in ids])

    def selected(self) -> tuple[Tried, Score, int]:
        """The prompt that validation chooses among the method's candidates, its score there, how many there were.

        By accuracy, which the test reports too, whatever the search went by; the margin reward decides between equals.
        """
        if self._chosen is None:
            candidates = self.method.candidates(self)
            prompts = [self.prompt.keep(self.archive[i].kept) for i in candidates]
            gaps = item_gaps(self.answerer, prompts, self.material.validation, self.config.verifier)
            scores = [Score.of(each) for each in gaps]
            at = max(range(len(scores)), key=lambda i: (scores[i].accuracy, scores[i].reward))
            self._chosen = self.archive[candidates[at]], scores[at], len(candidates)
        return self._chosen

    @property
    def policy(self) -> PromptPolicy:
        """The model with the selected prompt."""
        tried, validation, _ = self.selected()
        scores = {"search": asdict(tried.score), "validation": asdict(validation)}
        return as_policy(self.config, self.material, self.answerer, self.prompt, tried.kept, scores)

    # State

    def save(self, directory: Path) -> None:
        (directory / "search.json").write_text(json.dumps(self.snapshot()), encoding="utf-8")

    def restore(self, directory: Path) -> None:
        self.continue_from(json.loads((directory / "search.json").read_text(encoding="utf-8")))

    def export(self, directory: Path) -> None:
        """Write the policy, and what was tried in the order of trying."""
        self.policy.save(directory)
        rows = [json.dumps(tried.row, ensure_ascii=False) + "\n" for tried in self.archive]
        (directory / HISTORY).write_text("".join(rows), encoding="utf-8")

    def dump_batch(self, directory: Path) -> None:
        """What was tried: there are no batches."""
        self.save(directory)
