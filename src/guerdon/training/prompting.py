"""Prompt policies in training: what was tried of a prompt, by which items, and all that a checkpoint must hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import ConfigError, DataError, near
from guerdon.feedback.labelled import Item, Labelled, digest, draw, ranked, read_labelled, split
from guerdon.feedback.records import Record
from guerdon.rewards.verifiers import Verdict, Verifier, get_verifier
from guerdon.training.config import PromptTraining
from guerdon.training.control import Cursor

if TYPE_CHECKING:
    from guerdon.language.policy import Policy
    from guerdon.language.prompting import Answerer, Prompt, PromptPolicy
    from guerdon.llm import Client
    from guerdon.methods.prompting.base import PromptMethod
    from guerdon.training.distributed import Distribution

Kept = tuple[int, ...]  # positions of the full prompt that a prompt keeps, in order
Candidate = Kept | str  # what can be tried: a pruning of the full prompt, or an instruction to stand before all of it
RIGHT, WRONG = 200.0, 180.0  # what a positive and a negative margin of probability are multiplied with
HISTORY = "history.jsonl"
LEARNER = "learner.safetensors"
RANDOM_WORDS = ("random",)  # verbalizers


@dataclass(frozen=True)
class Score:
    """What a prompt reached on some items: the share that it answered right, and the mean margin reward."""

    accuracy: float
    reward: float

    @classmethod
    def of(cls, gaps: np.ndarray, free: bool = False) -> Score:
        """From the gap of each item, p[y] - max of the others; of free answers how right they are, 0 to 1."""
        return cls(float(np.mean(gaps if free else gaps > 0)), float(np.mean(margin_reward(gaps))))

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
        prompt: its tokens.
        kept: positions of the full prompt.
        instruction: what stands before them; of a pruned prompt nothing.
        score: on the search items; on their first half alone where it was found wanting there.
        evaluations: how many prompts had been evaluated by then, this one included.
    """

    prompt: Prompt
    kept: Kept
    instruction: str
    score: Score
    evaluations: int

    @property
    def text(self) -> str:
        """It as people read it."""
        return self.prompt.text

    @property
    def row(self) -> dict[str, Any]:
        """As a line of the history."""
        made = {"instruction": self.instruction} if self.instruction else {"kept": list(self.kept)}
        return {
            "prompt": self.text,
            **asdict(self.score),
            "tokens": len(self.prompt),
            **made,
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
        tokenizer: of instructions.
        examples: search items as (what is asked, right answer), for who writes instructions.
        llm: who writes them, where the method asks one.
        learner: what the method trains, if anything: its tensors, by `state_dict`, are saved with the rest.
    """

    examples: Sequence[tuple[str, str]] = ()
    llm: Client | None = None
    learner: Any = None

    def __init__(self, prompt: Prompt, judge: Judge, budget: int, seed: int = 0, tokenizer: Any = None):
        self.prompt, self.judge, self.budget, self.tokenizer = prompt, judge, budget, tokenizer
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

    def made(self, candidate: Candidate) -> Prompt:
        """The full prompt with an instruction before it, or those positions of it alone."""
        if isinstance(candidate, str):
            return self.prompt.instructed(candidate, self.tokenizer)
        return self.prompt.keep(candidate)

    def text(self, candidate: Candidate) -> str:
        return self.made(candidate).text

    def spend(self, evaluations: int) -> None:
        self.cursor.samples += evaluations
        self.cursor.done = min(1.0, self.cursor.samples / self.budget)

    def evaluate(self, candidates: Sequence[Candidate], least: tuple[str, float] | None = None) -> list[int]:
        """Judge prompts on the search items; where they stand in the archive. Text that is known is not judged again.

        Args:
            least: (fitness, value) that a prompt has to reach on the first half of the items to be judged on the
                second half as well (successive halving).
        """
        every = [self.made(candidate) for candidate in candidates]
        texts = [prompt.text for prompt in every]
        new = {text: n for n, text in enumerate(texts) if text not in self.known}
        prompts = [every[n] for n in new.values()]
        scores = self.judge(prompts, None if least is None else 0) if new else []
        if least is not None:
            by, value = least
            good = [i for i, score in enumerate(scores) if score.fitness(by) >= value]
            for i, rest in zip(good, self.judge([prompts[i] for i in good], 1) if good else [], strict=True):
                first = scores[i]
                scores[i] = Score((first.accuracy + rest.accuracy) / 2, (first.reward + rest.reward) / 2)
        for (text, n), score in zip(new.items(), scores, strict=True):
            self._remember(candidates[n], every[n], score, self.cursor.samples + texts.index(text) + 1)
        self.spend(len(candidates))
        return [self.known[text] for text in texts]

    def _remember(self, candidate: Candidate, prompt: Prompt, score: Score, evaluations: int) -> None:
        kept, instruction = (self.everything, candidate) if isinstance(candidate, str) else (candidate, "")
        self.known[prompt.text] = len(self.archive)
        self.archive.append(Tried(prompt, kept, instruction, score, evaluations))

    def best(self, by: str) -> Tried:
        """The first among the best of the archive."""
        return max(self.archive, key=lambda tried: tried.score.fitness(by))

    def snapshot(self) -> dict[str, Any]:
        """All that the rest of the search depends on, as plain data."""
        archive = [[t.instruction or t.kept, t.score.accuracy, t.score.reward, t.evaluations] for t in self.archive]
        rng = self.rng.bit_generator.state
        return {"archive": archive, "state": self.state, "rng": rng, "cursor": asdict(self.cursor)}

    def continue_from(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `snapshot` returned."""
        self.archive, self.known = [], {}
        for made, accuracy, reward, evaluations in saved["archive"]:
            candidate = made if isinstance(made, str) else tuple(made)
            self._remember(candidate, self.made(candidate), Score(accuracy, reward), evaluations)
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

    def parts(self, words: Mapping[str, str]) -> list[tuple[str, bool]]:
        """The runs of the full prompt, with these verbalizers."""
        from guerdon.language.prompting import few_shot

        return few_shot(self.template, self.demonstrations, words)

    @property
    def texts(self) -> list[str]:
        """Every word that the model meets, for tokenizers that are built from data."""
        words = [f" {word}" for word in self.words.values()]
        items = [text for item in self.labelled.items for text in (*item.columns.values(), *item.choices, item.answer)]
        return [text for text, _ in self.parts(self.words)] + words + items

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
    if config.labels == "random":
        answers = [item.answer for item in rest]
        demonstrations = [replace(item, answer=str(rng.choice(item.choices or answers))) for item in demonstrations]
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
    for pair in () if tuple(said) == RANDOM_WORDS else said:
        name, equals, word = pair.partition("=")
        if not equals or not word.strip():
            raise ConfigError(f"the verbalizer '{pair}' has to be CLASS=WORD, or random alone for all classes.")
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
    from guerdon.language.prompting import MASK, Answerer, check_verbalizers, random_words
    from guerdon.language.templates import stop_ids

    if (MASK, True) in said.template:
        from guerdon.language.masked import MaskedAnswerer

        if said.labelled.kind != "classification":
            raise ConfigError("a masked model answers by one word for each class: the items need a column 'label'.")
        found: Answerer = MaskedAnswerer.load(config.model, config.precision, said.words, config.max_tokens)
    else:
        policy = Policy.load(config.model, config.precision, texts=said.texts)
        found = Answerer(policy, said.labelled.kind, said.words, False, config.max_new_tokens, config.max_tokens)
        if config.sampler == "vllm":
            from guerdon.language.sampling.vllm import VLLMSampler

            ends = stop_ids(policy.tokenizer, policy.model.model)
            found = replace(found, engine=VLLMSampler(policy.model, policy.tokenizer, ends))
    words = said.words
    if config.verbalizers == RANDOM_WORDS:
        words = random_words(list(words), found.policy.tokenizer, np.random.default_rng([config.seed, 13, 1]))
    check_verbalizers(words, found.policy.tokenizer)
    return replace(found, words=words, calibrate=config.calibrate)


def full_prompt(said: Material, answerer: Answerer) -> Prompt:
    """Demonstrations and template, as the model's tokens."""
    from guerdon.language.prompting import Prompt

    return Prompt.of(said.parts(answerer.words), answerer.policy.tokenizer)


def load_judge(config: PromptTraining, answerer: Answerer) -> Verifier:
    """What decides how right a free answer is.

    Raises:
        ConfigError: there is no such verifier or classifier.
    """
    if not config.style:
        return get_verifier(config.verifier)
    from guerdon.rewards.style import style_verifier

    if answerer.kind != "generation":
        raise ConfigError(
            "style judges answers in words: the items need 'prompt' and 'answer', and no label or choices."
        )
    return style_verifier(config.style, config.fluency, lambda text: likelihood(answerer.policy, text))


def likelihood(policy: Policy, text: str) -> float:
    """exp(mean log p(token)) of a text, given the start token; 0 of a text without tokens."""
    from guerdon.language.scoring import score_pairs
    from guerdon.language.templates import continued_ids

    context, rest = continued_ids("", text, policy.tokenizer)
    if not rest:
        return 0.0
    return float(np.exp(score_pairs(policy.model, [(context, rest)])[0].mean()))


def verdicts(
    answerer: Answerer, prompts: Sequence[Prompt], items: Sequence[Item], judge: Verifier
) -> list[list[Verdict]]:
    """What a verifier says of the answer in words to each item under each prompt."""
    records = [Record(item.text, [], columns={"answer": item.answer}, where=item.where) for item in items]
    texts = answerer.texts(prompts, items)
    return [[judge(record, [text]) for record, text in zip(records, row, strict=True)] for row in texts]


def value(verdict: Verdict, judge: Verifier) -> float:
    """How right the one answer of a verdict is: 0 or 1, or between them where the verifier is not binary."""
    found = float(verdict.value[0])
    return float(found > 0) if judge.binary else min(max(found, 0.0), 1.0)


def item_gaps(answerer: Answerer, prompts: Sequence[Prompt], items: Sequence[Item], judge: Verifier) -> np.ndarray:
    """(prompts, items): p[right] - max of the others; of free answers how right they are, 0 to 1."""
    if answerer.kind != "generation":
        found = answerer.probabilities(prompts, items)
        right = [item.choices.index(item.answer) for item in items]
        return np.array([[choice_gap(p, y) for p, y in zip(row, right, strict=True)] for row in found])
    said = verdicts(answerer, prompts, items, judge)
    return np.array([[value(verdict, judge) for verdict in row] for row in said])


class PromptRun(Search):
    """A search over the prompts of a fixed language model.

    Attributes:
        material: the items.
        answerer: the model and how it answers.
        verifier: what decides how right a free answer is.
        notes: what the user should know of the data.
    """

    def __init__(self, method: PromptMethod, config: PromptTraining, distribution: Distribution, directory: Path):
        if distribution.world > 1:
            raise ConfigError("prompts are searched in one process: start guerdon without a launcher.")
        self.method, self.config, self.distribution, self.directory = method, config, distribution, directory
        self.material = material(config)
        self.notes = list(self.material.notes)
        self.answerer = load_answerer(config, self.material)
        self.verifier = load_judge(config, self.answerer)
        prompt = full_prompt(self.material, self.answerer)
        budget = config.max_samples or method.max_prompts
        super().__init__(prompt, self._judge_search, budget, config.seed, self.answerer.policy.tokenizer)
        words = self.answerer.words
        self.examples = [
            ("\n".join(item.columns[column] for column in prompt.columns), words.get(item.answer, item.answer))
            for item in self.material.search
        ]
        self._chosen: tuple[Tried, Score, int] | None = None

    def _judge_search(self, prompts: Sequence[Prompt], half: int | None) -> list[Score]:
        items = self.material.search
        middle = -(-len(items) // 2)
        part = items if half is None else items[:middle] if half == 0 else items[middle:]
        return self._scores(prompts, part)

    def _scores(self, prompts: Sequence[Prompt], items: Sequence[Item]) -> list[Score]:
        free = self.answerer.kind == "generation"
        return [Score.of(gaps, free) for gaps in item_gaps(self.answerer, prompts, items, self.verifier)]

    def causal(self, instead: str) -> Policy:
        """The model itself, where it reads and writes from left to right; `ConfigError` where it fills masks.

        Args:
            instead: what the user can do in that case.
        """
        if self.prompt.masked:
            raise ConfigError(
                f"{self.method.name} needs a causal model, and {self.config.model} fills masks: {instead}."
            )
        return self.answerer.policy

    def writer(self, spec: str, cache: str = "") -> Client:
        """Who writes instructions: what `make_client` makes of `spec`, or the model itself where it is empty."""
        from guerdon.llm import make_client
        from guerdon.llm.cache import Cache, Remembering
        from guerdon.llm.local import LocalClient

        if spec:
            return make_client(spec, cache=cache or None)
        policy = self.causal("give --llm")
        if not policy.tokenizer.chat_template:
            raise ConfigError(f"{self.config.model} has no chat template, so that it cannot be asked: give --llm.")
        own = LocalClient(policy)
        return Remembering(Cache(cache), own) if cache else own

    def token_logps(self) -> np.ndarray:
        """(len(prompt),) log-prob of each token of the full prompt given those before it; 0 for slots."""
        from guerdon.language.scoring import score_pairs

        policy, ids = self.causal("take another method"), self.prompt.ids
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
            prompts = [self.archive[i].prompt for i in candidates]
            scores = self._scores(prompts, self.material.validation)
            at = max(range(len(scores)), key=lambda i: (scores[i].accuracy, scores[i].reward))
            self._chosen = self.archive[candidates[at]], scores[at], len(candidates)
        return self._chosen

    @property
    def policy(self) -> PromptPolicy:
        """The model with the selected prompt."""
        from guerdon.language.prompting import PromptPolicy

        tried, validation, _ = self.selected()
        facts = {
            "model": self.config.model,
            "full": self.prompt.text,
            "kept": list(tried.kept),
            "instruction": tried.instruction,
            "splits": self.material.digests(),
            "scores": {"search": asdict(tried.score), "validation": asdict(validation)},
        }
        return PromptPolicy(self.answerer, tried.prompt, facts)

    # State

    def save(self, directory: Path) -> None:
        (directory / "search.json").write_text(json.dumps(self.snapshot()), encoding="utf-8")
        if self.learner is not None:
            from safetensors.torch import save_file

            save_file(self.learner.state_dict(), directory / LEARNER)

    def restore(self, directory: Path) -> None:
        self.continue_from(json.loads((directory / "search.json").read_text(encoding="utf-8")))
        if self.learner is not None:
            from safetensors.torch import load_file

            self.learner.load_state_dict(load_file(directory / LEARNER))

    def export(self, directory: Path) -> None:
        """Write the policy, and what was tried in the order of trying."""
        self.policy.save(directory)
        rows = [json.dumps(tried.row, ensure_ascii=False) + "\n" for tried in self.archive]
        (directory / HISTORY).write_text("".join(rows), encoding="utf-8")

    def dump_batch(self, directory: Path) -> None:
        """What was tried: there are no batches."""
        self.save(directory)
