"""Prompt policies: a fixed language model with a learned prompt, and the tokens of which a prompt is made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import ConfigError, DataError, near
from guerdon.feedback.labelled import Item, TaskKind
from guerdon.language.policy import Policy
from guerdon.language.sampling.base import Sampling
from guerdon.language.templates import prompt_ids

if TYPE_CHECKING:
    from guerdon.language.sampling.vllm import VLLMSampler

SLOT = re.compile(r"\{(\w+)\}")
WORD = re.compile(r"[a-z]{3,}")
BETWEEN = "\n\n"  # demonstrations
MASK = "mask"  # the slot that a masked language model fills
TEMPLATES: dict[TaskKind, str] = {
    "classification": "{text}\nLabel:",
    "choice": "Question: {prompt}\nAnswer:",
    "generation": "Question: {prompt}\nAnswer:",
}
# What calibration asks about instead of an item (Zhao et al. 2021, "Calibrate before use").
CONTENT_FREE = ("N/A", "", "[MASK]")
FILE = "prompt.json"
FACTS = ("model", "full", "kept", "instruction", "splits", "scores")  # of a policy, beside what it answers with


@dataclass(frozen=True)
class Prompt:
    """A prompt as its tokens, any of which may be left out but the slots.

    Attributes:
        tokens: the text of each token; of a slot the name of its column. Together they are the prompt, to the letter.
        ids: their ids; none for a slot, several where one character is made of several tokens.
        slots: which of them are slots.
    """

    tokens: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    slots: frozenset[int]

    @classmethod
    def of(cls, parts: Sequence[tuple[str, bool]], tokenizer: Any) -> Prompt:
        """From runs of text and slots, (text, whether it is a slot)."""
        tokens: list[str] = []
        ids: list[tuple[int, ...]] = []
        slots = set()
        for text, is_slot in parts:
            if is_slot:
                slots.add(len(tokens))
                tokens.append(text)
                ids.append(())
            else:
                pieces = list(_pieces(text, tokenizer))
                tokens += [piece for piece, _ in pieces]
                ids += [piece_ids for _, piece_ids in pieces]
        return cls(tuple(tokens), tuple(ids), frozenset(slots))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def text(self) -> str:
        """What people read, with slots in braces."""
        return "".join(f"{{{token}}}" if i in self.slots else token for i, token in enumerate(self.tokens))

    @property
    def columns(self) -> list[str]:
        """The columns that fill its slots."""
        return [self.tokens[i] for i in sorted(self.slots) if self.tokens[i] != MASK]

    @property
    def masked(self) -> bool:
        """Whether a masked language model answers, in a slot of its own."""
        return any(self.tokens[i] == MASK for i in self.slots)

    @property
    def prunable(self) -> tuple[int, ...]:
        """Positions that may be left out."""
        return tuple(i for i in range(len(self)) if i not in self.slots)

    def keep(self, kept: Sequence[int]) -> Prompt:
        """The prompt of these positions, in order, alone."""
        return Prompt(
            tuple(self.tokens[i] for i in kept),
            tuple(self.ids[i] for i in kept),
            frozenset(new for new, old in enumerate(kept) if old in self.slots),
        )

    def instructed(self, instruction: str, tokenizer: Any) -> Prompt:
        """The prompt with an instruction before it."""
        head = Prompt.of([(instruction + BETWEEN, False)], tokenizer)
        return Prompt(
            head.tokens + self.tokens, head.ids + self.ids, frozenset(slot + len(head) for slot in self.slots)
        )

    def fill(self, columns: Mapping[str, str]) -> str:
        """What the model reads: every slot holds its column."""
        return "".join(columns[token] if i in self.slots else token for i, token in enumerate(self.tokens))


def _pieces(text: str, tokenizer: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The text cut at the ends of its tokens; those that end within one character stay together."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start = 0
    waiting: tuple[int, ...] = ()
    for i, (token, (_, end)) in enumerate(zip(found.input_ids, found.offset_mapping, strict=True)):
        waiting += (token,)
        last = i + 1 == len(found.input_ids)
        if last or (end > start and found.offset_mapping[i + 1][1] > end):
            end = len(text) if last else end
            yield text[start:end], waiting
            start, waiting = end, ()


def parse_template(template: str, columns: Sequence[str], where: str) -> list[tuple[str, bool]]:
    r"""The runs of a template, (text, whether it is a slot); `\n` stands for a line break.

    The slot `{mask}` is filled by a masked language model.

    Raises:
        ConfigError: a slot that no column fills, no slot for an item at all, or several for the answer.
    """
    pieces = SLOT.split(template.replace("\\n", "\n"))
    if pieces[1::2].count(MASK) > 1:
        raise ConfigError(f"the template {template!r} has several slots {{{MASK}}}, and the answer is one word.")
    slots = [slot for slot in pieces[1::2] if slot != MASK]
    for slot in slots:
        if slot not in columns:
            raise ConfigError(
                f"the template has a slot '{{{slot}}}', and {where} has no column of texts of that name, only "
                f"{', '.join(columns)}.{near(slot, columns)}"
            )
    if not slots:
        raise ConfigError(f"the template {template!r} has no slot: it needs one of {{{'}, {'.join(columns)}}}.")
    return [(piece, i % 2 == 1) for i, piece in enumerate(pieces) if piece]


def few_shot(
    template: Sequence[tuple[str, bool]], demonstrations: Sequence[Item], words: Mapping[str, str]
) -> list[tuple[str, bool]]:
    """The runs of a prompt: the template filled and answered for each demonstration, then the template itself.

    Args:
        words: what stands for an answer, a class's verbalizer; other answers stand for themselves.
    """
    shown = ""
    for item in demonstrations:
        columns = {**item.columns, MASK: words.get(item.answer, item.answer)}
        filled = "".join(columns[text] if is_slot else text for text, is_slot in template)
        shown += f"{filled}{'' if (MASK, True) in template else continuation(item.answer, words)}{BETWEEN}"
    first, *rest = template
    if first[1]:
        return [*([(shown, False)] if shown else []), first, *rest]
    return [(shown + first[0], False), *rest]


def continuation(answer: str, words: Mapping[str, str]) -> str:
    """An answer as it follows a prompt, with a space before it."""
    return f" {words.get(answer, answer)}"


def check_verbalizers(words: Mapping[str, str], tokenizer: Any) -> None:
    """Raise `ConfigError` where a verbalizer is not one token after a space, or two classes share one."""
    seen: dict[int, str] = {}
    for name, word in words.items():
        ids = tokenizer(f" {word}", add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            parts = " + ".join(repr(tokenizer.decode([i])) for i in ids)
            raise ConfigError(
                f"the verbalizer ' {word}' of '{name}' is {parts} for this model, and it has to be a single token: "
                f"give another word, --verbalizers {name}=WORD ..."
            )
        if ids[0] in seen:
            raise ConfigError(f"'{seen[ids[0]]}' and '{name}' have the same verbalizer ' {word}': give each its own.")
        seen[ids[0]] = name


def random_words(classes: Sequence[str], tokenizer: Any, rng: np.random.Generator) -> dict[str, str]:
    """A verbalizer for each class that says nothing: English-looking words of the vocabulary, each a single token.

    Raises:
        ConfigError: the vocabulary has too few of them.
    """
    found: list[str] = []
    for token in rng.permutation(len(tokenizer)).tolist():
        word = tokenizer.decode([token]).strip()
        if WORD.fullmatch(word) and word not in found:
            if tokenizer(f" {word}", add_special_tokens=False).input_ids == [token]:
                found.append(word)
            if len(found) == len(classes):
                return dict(zip(classes, found, strict=True))
    raise ConfigError(f"the model's vocabulary has no {len(classes)} words that could be random verbalizers.")


@dataclass(frozen=True)
class Answerer:
    """A language model that answers items under any prompt.

    Attributes:
        policy: the model.
        kind: how it answers: by the verbalizers' probabilities, by those of an item's choices, or in words.
        words: class -> verbalizer.
        calibrate: divide probabilities by those that the prompt gives where an item has no content.
        max_new_tokens: of an answer in words, which ends at a line break.
        max_tokens: computed in one forward pass.
        engine: answers instead of the model itself: in words, and by probability where choices are single tokens.
    """

    policy: Policy
    kind: TaskKind
    words: Mapping[str, str]
    calibrate: bool = False
    max_new_tokens: int = 32
    max_tokens: int = 4096
    engine: VLLMSampler | None = None

    def probabilities(self, prompts: Sequence[Prompt], items: Sequence[Item]) -> list[list[np.ndarray]]:
        """For each prompt and each item the probabilities (choices,) of the item's choices, which sum to 1.

        p = softmax over the choices of log p(choice | prompt filled with the item). Calibrated: p_c / q_c, normalised,
        with q the mean of such p over content-free inputs. What prompts and items share is computed once.
        """
        logps = self._logps(prompts, [(item.columns, item.choices) for item in items])
        found = [[_softmax(x) for x in of_prompt] for of_prompt in logps]
        if not self.calibrate:
            return found
        asked = list(dict.fromkeys(item.choices for item in items))
        names = list(items[0].columns)
        empty = [(dict.fromkeys(names, text), choices) for choices in asked for text in CONTENT_FREE]
        for of_prompt, free in zip(found, self._logps(prompts, empty), strict=True):
            n = len(CONTENT_FREE)
            shares = [np.mean([_softmax(x) for x in free[i : i + n]], 0) for i in range(0, len(free), n)]
            of_choices = dict(zip(asked, shares, strict=True))
            for i, item in enumerate(items):
                ratio = of_prompt[i] / of_choices[item.choices]
                of_prompt[i] = ratio / ratio.sum()
        return found

    def texts(self, prompts: Sequence[Prompt], items: Sequence[Item]) -> list[list[str]]:
        """For each prompt and each item the likeliest answer, token by token, up to a line break."""
        ids = [prompt_ids(prompt.fill(item.columns), self.policy.tokenizer) for prompt in prompts for item in items]
        sampling = Sampling(max_new_tokens=self.max_new_tokens, temperature=0.0, stop=("\n",))
        found = (self.engine or self.policy.sampler).sample(ids, [[0]] * len(ids), sampling)
        answers = [completions[0].text.strip() for completions in found]
        return [answers[i : i + len(items)] for i in range(0, len(answers), len(items))]

    def answers(self, prompt: Prompt, items: Sequence[Item]) -> list[str]:
        """The answer to each item: its likeliest choice, or the text."""
        if self.kind == "generation":
            return self.texts([prompt], items)[0]
        (found,) = self.probabilities([prompt], items)
        return [item.choices[int(p.argmax())] for item, p in zip(items, found, strict=True)]

    def _logps(
        self, prompts: Sequence[Prompt], asked: Sequence[tuple[Mapping[str, str], tuple[str, ...]]]
    ) -> list[list[np.ndarray]]:
        """For each prompt and each (columns, choices) the log-probs (choices,) of the choices."""
        from guerdon.language.scoring import score_pairs

        tokenizer = self.policy.tokenizer
        texts = {continuation(choice, self.words) for _, choices in asked for choice in choices}
        ids = {text: tokenizer(text, add_special_tokens=False).input_ids for text in texts}
        asked_of = [
            (prompt_ids(prompt.fill(columns), tokenizer), [ids[continuation(choice, self.words)] for choice in choices])
            for prompt in prompts
            for columns, choices in asked
        ]
        if self.engine is not None and all(self.engine.can_rank(tokens) for _, tokens in asked_of):
            rank = self.engine.next_logps([c for c, _ in asked_of], [[one for (one,) in t] for _, t in asked_of])
            return [rank[i : i + len(asked)] for i in range(0, len(rank), len(asked))]
        pairs = [(context, one) for context, tokens in asked_of for one in tokens]
        scores = iter(score_pairs(self.policy.model, pairs, max_tokens=self.max_tokens))
        return [[np.array([next(scores).sum(dtype=float) for _ in choices]) for _, choices in asked] for _ in prompts]


def _softmax(logps: np.ndarray) -> np.ndarray:
    p = np.exp(logps - logps.max())
    return p / p.sum()


class PromptPolicy:
    """A language model with a prompt, which answers new items.

    Attributes:
        answerer: the model and how it answers.
        prompt: the prompt.
        facts: where the prompt comes from: `model`, `full` (the text it was made of), `kept` (positions in it),
            `instruction` (what stands before them), digests of the splits, scores.
    """

    def __init__(self, answerer: Answerer, prompt: Prompt, facts: Mapping[str, Any]):
        self.answerer, self.prompt, self.facts = answerer, prompt, dict(facts)

    def predict(self, items: Sequence[str | Mapping[str, Any]]) -> list[str]:
        """The class, the choice, or the text that answers each item.

        Args:
            items: texts, where the prompt has one slot; or columns by name, with `choices` for multiple choice.
        """
        return self.answerer.answers(self.prompt, [self._item(item) for item in items])

    def probabilities(self, items: Sequence[str | Mapping[str, Any]]) -> list[dict[str, float]]:
        """Class (or choice) -> probability, for each item."""
        if self.answerer.kind == "generation":
            raise ConfigError("this prompt is answered in words: there are no choices that would have probabilities.")
        asked = [self._item(item) for item in items]
        (found,) = self.answerer.probabilities([self.prompt], asked)
        return [dict(zip(item.choices, p.tolist(), strict=True)) for item, p in zip(asked, found, strict=True)]

    def _item(self, item: str | Mapping[str, Any]) -> Item:
        slots = self.prompt.columns
        columns: dict[str, Any] = {slots[0]: item} if isinstance(item, str) else dict(item)
        choices = tuple(columns.pop("choices", None) or self.answerer.words)
        if missing := [slot for slot in slots if not isinstance(columns.get(slot), str)]:
            raise DataError(f"an item has no text '{missing[0]}', which the prompt asks for: it has {list(columns)}.")
        if self.answerer.kind == "choice" and len(choices) < 2:
            raise DataError("an item has no 'choices', and the prompt is for questions with choices.")
        return Item(columns, "", choices)

    def save(self, directory: Path) -> None:
        """Write `prompt.json`; the model goes by its name, a tiny one is written into `model`."""
        from guerdon.language.models import save_model

        answerer, policy = self.answerer, self.answerer.policy
        said = {
            "kind": answerer.kind,
            "text": self.prompt.text,
            "tokens": [[token, list(ids)] for token, ids in zip(self.prompt.tokens, self.prompt.ids, strict=True)],
            "slots": sorted(self.prompt.slots),
            "verbalizers": dict(answerer.words),
            "calibrate": answerer.calibrate,
            "max_new_tokens": answerer.max_new_tokens,
            **self.facts,
        }
        if str(self.facts["model"]).startswith("tiny:"):
            save_model(policy.model.model, policy.tokenizer, directory / "model")
        (directory / FILE).write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def is_at(cls, directory: str | Path) -> bool:
        """Whether a directory holds what `save` wrote, or is that of a run which does."""
        return any((place / FILE).is_file() for place in (Path(directory), Path(directory) / "policy"))

    @classmethod
    def load(cls, directory: str | Path, precision: str = "auto") -> PromptPolicy:
        """Read what `save` wrote, also by the directory of a run.

        Raises:
            ConfigError: the file is not whole, or its model is not there.
        """
        path = Path(directory)
        path = path / "policy" if (path / "policy").is_dir() else path
        try:
            said = json.loads((path / FILE).read_text(encoding="utf-8"))
            tokens, ids = zip(*said["tokens"], strict=True)
            prompt = Prompt(tuple(map(str, tokens)), tuple(map(tuple, ids)), frozenset(said["slots"]))
            name, kind, words = (
                str(said["model"]),
                said["kind"],
                {str(k): str(v) for k, v in said["verbalizers"].items()},
            )
            calibrate, max_new_tokens = bool(said["calibrate"]), int(said["max_new_tokens"])
            if kind not in TEMPLATES:
                raise ValueError(f"there is no kind '{kind}'")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path / FILE} is no prompt policy ({type(error).__name__}: {error}).") from error
        facts = {k: v for k, v in said.items() if k in FACTS}
        if prompt.masked:
            from guerdon.language.masked import MaskedAnswerer

            return cls(replace(MaskedAnswerer.load(name, precision, words), calibrate=calibrate), prompt, facts)
        policy = Policy.load(path / "model" if (path / "model").is_dir() else name, precision)
        return cls(Answerer(policy, kind, words, calibrate, max_new_tokens), prompt, facts)
