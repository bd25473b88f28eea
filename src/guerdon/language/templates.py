"""From records to groups: chat templates, the exact completion mask, truncation. Masks are made here and nowhere else.

A prompt and its completion are written as one text and tokenised once. A token is learned if it holds at least one
character of an answer, so a token that straddles the boundary belongs to the completion. What is left out: templates
that rewrite earlier turns are refused rather than patched, and prompts are never shortened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.feedback.records import Message, Record, Text
from guerdon.language.groups import Group, Segment

CHUNK = 256  # records tokenised in one call


@dataclass
class RenderStats:
    """What rendering did with the records; nothing is cut or left out without being counted here.

    Attributes:
        records: records seen.
        groups: groups made.
        completions: completions in them.
        tokens: unique tokens in them, shared prompts counted once.
        learned_tokens: tokens of them that are learned.
        cut: completions that were cut at `max_length`.
        dropped: records left out because they are longer than `max_length`.
        identical_after_cut: pairs of completions whose tokens differ only beyond the cut.
        no_eos: completions whose end is not learned: cut, or of a tokenizer without an end-of-sequence token.
        unknown: tokens that stand for text which the tokenizer does not know.
        without_generation_prompt: completions whose template opens an answer otherwise than its generation prompt does.
        bad: messages about the records that could not be rendered.
    """

    records: int = 0
    groups: int = 0
    completions: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    cut: int = 0
    dropped: int = 0
    identical_after_cut: int = 0
    no_eos: int = 0
    unknown: int = 0
    without_generation_prompt: int = 0
    bad: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """One sentence for each thing that a user should know of."""
        found = [
            (len(self.bad), f"of {self.records} records could not be rendered; the first: {(self.bad or [''])[0]}"),
            (self.dropped, f"of {self.records} records are longer than the maximum length and were left out"),
            (self.cut, f"of {self.completions} completions were cut at the maximum length"),
            (self.identical_after_cut, "pairs of completions became identical by the cut and can teach nothing"),
            (self.no_eos - self.cut, "completions have no end-of-sequence token: the policy will not learn to stop"),
            (self.unknown, f"of {self.tokens} tokens are unknown to the tokenizer"),
            (self.without_generation_prompt, "answers open otherwise than the template's generation prompt does"),
        ]
        return [f"{count} {what}" for count, what in found if count > 0]


class _OverlongError(DataError):
    """A record that is longer than the maximum length."""


@dataclass(slots=True)
class _Row:
    """A completion with its prompt, as text up to the last learned character, and the spans that are learned.

    Attributes:
        bos: whether the tokenizer's beginning-of-sequence token goes before it; a chat template brings its own.
        opened: whether every answer begins as the template's generation prompt does.
    """

    text: str
    spans: list[tuple[int, int]]
    bos: bool
    opened: bool = True


@dataclass(frozen=True, slots=True)
class _Facts:
    """What rendering needs to know of a tokenizer, found once.

    Attributes:
        encoder: the backend without its post-processor, which would trim spaces off the offsets.
        bos: the token that the tokenizer puts before plain text, or nothing.
        start: the token before an answer that nothing precedes: beginning, else end of sequence.
        eos: the end-of-sequence token.
        tail: what the chat template writes after the content of a last answer.
        closing: the part of `tail` up to and including its end-of-turn token; empty without one.
        ends: tokens that end an answer.
        unknown: the token for text that the tokenizer does not know, where it has one of its own.
    """

    encoder: Any
    bos: list[int]
    start: int | None
    eos: int | None
    tail: str
    closing: str
    ends: frozenset[int]
    unknown: int | None


def render(record: Record, tokenizer: Any, *, max_length: int, overlong: Literal["cut", "refuse"] = "cut") -> Group:
    """One record as a group of tokens with masks.

    The root is what all completions share, up to the first learned token; each completion is one segment after it. Only
    answers are learned: a plain completion, or the assistant turns of a conversational one, each with its end-of-turn
    token; an answer that ends without one is given the end-of-sequence token, which is learned as well. A turn with the
    weight 0, as in OpenAI's fine-tuning format, is not. In language modelling everything (`text`) or every assistant
    turn (`messages`) is learned.

    Args:
        record: completions may be empty, which gives the prompt alone.
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens of a prompt with one completion.
        overlong: `cut` cuts completions at `max_length`, `refuse` raises.

    Returns:
        A group with `values["score"]` where the record has scores, and `columns` that hold the record's other columns
        and its `prompt`, `completions` and `where`.

    Raises:
        DataError: naming the record: a template that rewrites earlier turns or refuses the messages, a prompt that
            leaves no room for a completion, or nothing to learn.
    """
    groups, _ = render_all([record], tokenizer, max_length=max_length, overlong=overlong)
    return groups[0]


def render_all(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int,
    overlong: Literal["cut", "refuse", "drop"] = "cut",
    skip_bad: bool = False,
) -> tuple[list[Group], RenderStats]:
    """Every record as a group, tokenised a few hundred at a time, and the count of what was done to them.

    Arguments and errors as for `render`; `overlong="drop"` leaves out records that are longer than `max_length`, and
    `skip_bad` goes on past records that cannot be rendered and lists them in the statistics.
    """
    records, facts = list(records), _facts(tokenizer)
    groups: list[Group] = []
    stats = RenderStats(records=len(records))

    @contextmanager
    def forgiving() -> Iterator[None]:
        try:
            yield
        except DataError as error:
            if overlong == "drop" and isinstance(error, _OverlongError):
                stats.dropped += 1
            elif skip_bad:
                stats.bad.append(str(error))
            else:
                raise

    for start in range(0, len(records), CHUNK):
        drafts: list[tuple[Record, list[_Row]]] = []
        for record in records[start : start + CHUNK]:
            with forgiving():
                drafts.append((record, _write(record, tokenizer, facts)))
        texts = [row.text for _, rows in drafts for row in rows]
        encodings = iter(facts.encoder.encode_batch(texts, add_special_tokens=False))
        for record, rows in drafts:
            learned = [_learned(row, next(encodings), facts) for row in rows]
            with forgiving():
                group = _assemble(record, learned, tokenizer, facts, max_length, overlong, stats)
                stats.without_generation_prompt += sum(not row.opened for row in rows)
                groups.append(group)
    return groups, stats


def render_each(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int,
    overlong: Literal["cut", "refuse", "drop"] = "cut",
    skip_bad: bool = False,
) -> list[Group | None]:
    """One group per record, or None where it is left out; arguments and errors as for `render_all`."""
    how: dict[str, Any] = {"max_length": max_length, "overlong": overlong, "skip_bad": skip_bad}
    return [next(iter(render_all([record], tokenizer, **how)[0]), None) for record in records]


def prompt_ids(prompt: Text, tokenizer: Any) -> list[int]:
    """The tokens of a prompt alone, as sampling begins from them: a conversation with its generation prompt.

    Raises:
        DataError: an empty prompt for a tokenizer that has no token to start from, or a template that refuses it.
    """
    return _prompt_ids(Record(prompt, []), tokenizer, _facts(tokenizer))


def continued_ids(prompt: str, continuation: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens of a text apart at the end of its prompt; a token that straddles the boundary belongs to what follows.

    Raises:
        DataError: the first token belongs to the continuation, and the tokenizer has no token to put before it.
    """
    facts = _facts(tokenizer)
    encoding = facts.encoder.encode(prompt + continuation, add_special_tokens=False)
    first = next((k for k, (_, end) in enumerate(encoding.offsets) if end > len(prompt)), len(encoding.ids))
    before, after = encoding.ids[:first], encoding.ids[first:]
    if before[:1] != facts.bos:
        before = facts.bos + before
    return before or _start(Record(prompt, []), facts), after


def stop_ids(tokenizer: Any, model: Any = None) -> set[int]:
    """Tokens that end an answer: end-of-sequence, the template's end-of-turn, and those the model's settings name."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return {*_facts(tokenizer).ends, *(token for token in listed if token is not None)}


def verify_template(tokenizer: Any) -> list[str]:
    """What is unusual about the tokenizer's chat template, one sentence each; nothing where all is well."""
    if not tokenizer.chat_template:
        return ["the tokenizer has no chat template: conversational feedback cannot be rendered"]
    asked: list[Message] = [{"role": "user", "content": "First?"}]
    answered = [*asked, {"role": "assistant", "content": "One."}]
    reasoned = [*asked, {"role": "assistant", "content": "<think>\nWell.\n</think>\n\nOne."}]
    whole = [*reasoned, {"role": "user", "content": "Second?"}, {"role": "assistant", "content": "Two."}]
    record = Record(asked, [])

    def begins(long: list[Message], short: list[Message], generation: bool = False) -> bool:
        return _apply(tokenizer, long, False, record).startswith(_apply(tokenizer, short, generation, record))

    findings = []
    try:
        if not begins(answered, asked):
            findings.append("it rewrites the prompt once an answer follows, so no answer can be told from its prompt")
        elif not begins(answered, asked, generation=True):
            findings.append("its generation prompt is not how an answer begins: the header of the turn is learned too")
        if not begins(whole, reasoned):
            findings.append("it rewrites earlier answers, so that only the last one of a conversation can be learned")
    except DataError as error:
        return [str(error)]
    if not _facts(tokenizer).closing:
        findings.append("it ends an answer without an end-of-turn token: the end-of-sequence token is appended instead")
    return findings


def _write(record: Record, tokenizer: Any, facts: _Facts) -> list[_Row]:
    """The record's completions as texts with the spans that are learned; a record without completions has no rows."""
    if not record.conversational:
        prompt = record.prompt or ""
        return [_Row(f"{prompt}{c}", [(len(prompt), len(prompt) + len(c))], bos=True) for c in record.completions]
    prompt = record.prompt or []
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if record.prompt is not None and not prompt:
        raise DataError(f"{_place(record)}the prompt has no messages.")
    opening = _apply(tokenizer, prompt, True, record) if prompt and record.completions else ""
    rows = []
    for completion in record.completions:
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        rows.append(_write_turns(prompt, answer, opening, tokenizer, facts, record))
    return rows


def _write_turns(
    prompt: list[Message], completion: list[Message], opening: str, tokenizer: Any, facts: _Facts, record: Record
) -> _Row:
    """The conversation as the template writes it; each answer spans from its generation prompt to its end of turn."""
    messages = [*prompt, *completion]
    whole = _apply(tokenizer, messages, False, record)
    spans, opened = [], True
    for turn in range(max(len(prompt), 1), len(messages)):  # an answer to nothing is context
        if messages[turn].get("role") != "assistant" or messages[turn].get("weight") == 0:
            continue
        before = opening if turn == len(prompt) else _apply(tokenizer, messages[:turn], True, record)
        if not whole.startswith(before):
            before, opened = _apply(tokenizer, messages[:turn], False, record), False
        after = whole if turn + 1 == len(messages) else _apply(tokenizer, messages[: turn + 1], False, record)
        for part in (before, after):
            if not whole.startswith(part):
                raise DataError(_rewritten(part, whole, record))
        end = len(after)
        if after.endswith(facts.tail) and len(before) <= end - len(facts.tail):
            end += len(facts.closing) - len(facts.tail)
        spans.append((len(before), end))
    if not spans:
        raise DataError(f"{_place(record)}no assistant turn follows a prompt, so there is nothing to learn.")
    return _Row(whole[: spans[-1][1]], spans, bos=False, opened=opened)


def _rewritten(part: str, whole: str, record: Record) -> str:
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    near = slice(max(0, at - 20), at + 30)
    return (
        f"{_place(record)}the chat template rewrites earlier turns when later ones follow, so that answers cannot be "
        f"told from their prompts: at character {at} it first writes {part[near]!r}, then {whole[near]!r}. Put all but "
        "the last answer into the prompt, or give the model a chat template that only appends."
    )


def _learned(row: _Row, encoding: Any, facts: _Facts) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of one text and which of them are learned, an end-of-sequence token added where the answer has none."""
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    learn = np.zeros(len(offsets), dtype=bool)
    for start, end in row.spans:
        learn |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
    ids = encoding.ids
    if row.bos and ids[:1] != facts.bos:
        ids, learn = facts.bos + ids, np.concatenate([np.zeros(len(facts.bos), dtype=bool), learn])
    if facts.eos is not None and not (learn.any() and learn[-1] and ids[-1] in facts.ends):
        ids, learn = [*ids, facts.eos], np.append(learn, True)
    return np.array(ids, dtype=np.int64), learn


def _assemble(
    record: Record,
    learned: list[tuple[np.ndarray, np.ndarray]],
    tokenizer: Any,
    facts: _Facts,
    max_length: int,
    overlong: str,
    stats: RenderStats,
) -> Group:
    """Completions cut to length, after the root that they share; counted in `stats`."""
    if learned:
        shared, learned = _shared(record, learned, facts)
        root = learned[0][0][:shared]
    else:
        shared, root = 0, np.array(_prompt_ids(record, tokenizer, facts), dtype=np.int64)
    longest = max((len(tokens) for tokens, _ in learned), default=len(root) + 1)
    if longest > max_length and overlong != "cut":
        raise _OverlongError(
            f"{_place(record)}{longest} tokens are more than the maximum length of {max_length}: raise --max-length, "
            "or choose --overlong cut or drop."
        )
    first = max((int(learn.argmax()) for _, learn in learned), default=len(root))
    if first >= max_length:
        raise _OverlongError(
            f"{_place(record)}the prompt has {first} tokens, so that its completion would be cut to nothing at the "
            f"maximum length of {max_length}: raise --max-length, or choose --overlong drop."
        )
    whole = [tokens for tokens, _ in learned]
    cut = [tokens[:max_length] for tokens in whole]
    scores = None if record.scores is None else np.asarray(record.scores, dtype=np.float32)
    group = Group(
        [
            Segment(root, np.zeros(len(root), dtype=bool)),
            *(Segment(t[shared:], m[shared:max_length], parent=0) for t, (_, m) in zip(cut, learned, strict=True)),
        ],
        leaves=list(range(1, len(cut) + 1)),
        values={} if scores is None else {"score": scores},
        columns={
            **record.columns,
            "prompt": record.prompt,
            "completions": record.completions,
            "where": record.where,
        },
        key=_key(record),
    )
    stats.groups += 1
    stats.completions += len(cut)
    stats.tokens += group.unique_tokens
    stats.learned_tokens += group.learned_tokens
    stats.cut += sum(len(tokens) > max_length for tokens in whole)
    stats.no_eos += sum(int(tokens[-1]) not in facts.ends for tokens in cut)
    stats.unknown += sum(int((segment.tokens == facts.unknown).sum()) for segment in group.segments)
    if longest > max_length:
        stats.identical_after_cut += sum(
            np.array_equal(cut[a], cut[b]) and not np.array_equal(whole[a], whole[b])
            for a, b in combinations(range(len(cut)), 2)
        )
    return group


def _prompt_ids(record: Record, tokenizer: Any, facts: _Facts) -> list[int]:
    if isinstance(record.prompt, list):
        return facts.encoder.encode(_apply(tokenizer, record.prompt, True, record), add_special_tokens=False).ids
    ids = facts.encoder.encode(record.prompt or "", add_special_tokens=False).ids
    return (ids if ids[:1] == facts.bos else facts.bos + ids) or _start(record, facts)


def _start(record: Record, facts: _Facts) -> list[int]:
    if facts.start is None:
        raise DataError(
            f"{_place(record)}an answer begins at the first token of the text, and the tokenizer has no token to put "
            "before it: give the prompt some text that does not run into the answer."
        )
    return [facts.start]


def _shared(
    record: Record, learned: list[tuple[np.ndarray, np.ndarray]], facts: _Facts
) -> tuple[int, list[tuple[np.ndarray, np.ndarray]]]:
    """How many tokens all completions begin with, learned in none; where there are none, a start token is added."""
    shared = min(int(learn.argmax()) for _, learn in learned)
    for tokens, _ in learned[1:]:
        differs = np.flatnonzero(learned[0][0][:shared] != tokens[:shared])
        shared = int(differs[0]) if len(differs) else shared
    if shared == 0 and record.prompt is not None:
        start = _start(record, facts)
        learned = [(np.concatenate([start, tokens]), np.append(False, learn)) for tokens, learn in learned]
    # The first token of a text without a prompt has nothing that it could be predicted from.
    shared = max(shared, 1)
    if not all(learn[shared:].any() for _, learn in learned):
        raise DataError(f"{_place(record)}a completion has no token that could be learned.")
    return shared, learned


def _apply(tokenizer: Any, messages: list[Message], generation: bool, record: Record) -> str:
    """The messages as the chat template writes them, with the record's `tools` and `chat_template_kwargs`."""
    if not tokenizer.chat_template:
        raise ConfigError(
            "the feedback is conversational, but the model's tokenizer has no chat template: take an instruct model, "
            "or give the feedback as plain text."
        )
    tools = record.columns.get("tools")
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            add_generation_prompt=generation,
            tokenize=False,
            **(record.columns.get("chat_template_kwargs") or {}),
        )
    except Exception as error:  # a template is a program that came with the model and may raise anything
        raise DataError(f"{_place(record)}the chat template does not take these messages: {error}") from error


def _key(record: Record) -> str:
    """Identity of what is rendered."""
    told = [record.columns.get(name) for name in ("tools", "chat_template_kwargs")]
    content = json.dumps([record.prompt, record.completions, *told], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _place(record: Record) -> str:
    return f"{record.where}: " if record.where else ""


def _facts(tokenizer: Any) -> _Facts:
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{type(tokenizer).__name__} does not say where its tokens lie in the text, so no exact mask can be made: "
            "guerdon needs a fast tokenizer (tokenizer.json)."
        )
    changeable = (repr(tokenizer.chat_template), tokenizer.eos_token_id, len(tokenizer))
    return _find_facts(tokenizer, changeable)


@lru_cache(maxsize=16)
def _find_facts(tokenizer: Any, changeable: tuple[Any, ...]) -> _Facts:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.post_processor = None
    encoder.no_padding()
    encoder.no_truncation()
    first, bos, eos = tokenizer("").input_ids[:1], [tokenizer.bos_token_id], tokenizer.eos_token_id
    start = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    tail, closing, ends = _tail(tokenizer), "", set() if eos is None else {eos}
    encoded = encoder.encode(tail, add_special_tokens=False)
    for token, (_, end) in zip(encoded.ids, encoded.offsets, strict=True):
        if token in tokenizer.added_tokens_decoder:
            closing = tail[:end]
            ends.add(token)
            break
    named = {tokenizer.bos_token_id, tokenizer.pad_token_id, *ends}
    unknown = None if tokenizer.unk_token_id in named else tokenizer.unk_token_id
    return _Facts(encoder, bos if first == bos else [], start, eos, tail, closing, frozenset(ends), unknown)


def _tail(tokenizer: Any) -> str:
    """What the chat template writes after the content of a last answer; empty without a template that can be asked."""
    content = "(the answer)"
    messages = [{"role": "user", "content": "(the question)"}, {"role": "assistant", "content": content}]
    try:
        written = _apply(tokenizer, messages, False, Record(messages, []))
    except (ConfigError, DataError):
        return ""
    return written.rpartition(content)[2]
