"""The store of trajectories, and the feedback that is made of it, read back by what reads feedback."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import guerdon
from guerdon import api
from guerdon.errors import ConfigError, DataError
from guerdon.feedback.readers import read_feedback
from guerdon.feedback.records import Record
from guerdon.feedback.writers import write_feedback
from guerdon.language.templates import render
from guerdon.language.tiny import TinyConfig, build_tokenizer
from guerdon.tasks.text.trajectories import (
    FEEDBACK,
    Step,
    Store,
    Trajectory,
    check_kinds,
    preference,
    scored,
    sft,
    sft_each,
    step_preference,
    unpaired,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def episode(
    said: str, ret: float, task: str = "one", seen: str | None = None, learn: str = "", **how: Any
) -> Trajectory:
    """Replies to what is seen, one letter each; rewarded at the end; those in `learn` alone are learned, or all."""
    observations = [f"task {task}", *(seen or [f"after {letter}" for letter in said])]
    steps = [
        Step(observations[i], f"say {letter}", letter, ret * (i + 1 == len(said)), "me", not learn or letter in learn)
        for i, letter in enumerate(said)
    ]
    success = how.pop("success", ret > 0)
    return Trajectory("test:", task, "train", 7, "me", tuple(steps), observations[-1], True, False, success, **how)


def test_a_trajectory_comes_back_from_its_line(tmp_path: Path):
    told = [
        episode("abc", 1.0, index=3, collection="x"),
        episode("ab", -0.5, learn="b"),
        Trajectory(
            "e",
            "täsk\n",
            "test",
            0,
            "p",
            (Step("Hé\u2028", '{"\\', "", 0.25, "q", True, False),),
            "",
            False,
            True,
            False,
        ),
    ]
    store = Store(tmp_path / "deep" / "store.jsonl")
    assert list(store) == []
    for trajectory in told:
        store.append(trajectory)
    assert list(Store(store.path)) == told
    assert [t.total for t in told] == [1.0, -0.5, 0.25]


def test_a_line_that_was_cut_gives_way(tmp_path: Path):
    store = Store(tmp_path / "store.jsonl")
    store.append(episode("ab", 1.0))
    whole = store.path.read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 1):
        store.path.write_bytes(whole + whole[:cut])
        assert len(list(store)) == 1
        store.append(episode("ba", 0.0))
        assert [t.steps[0].action for t in store] == ["a", "b"]
        assert store.path.read_bytes().startswith(whole) and store.path.read_bytes().endswith(b"\n")
    store.path.write_bytes(whole[:10])
    store.append(episode("ab", 1.0))
    assert store.path.read_bytes() == whole


def test_what_is_no_trajectory_is_told_with_its_line(tmp_path: Path):
    store = Store(tmp_path / "store.jsonl")
    store.append(episode("ab", 1.0))
    with store.path.open("a") as file:
        file.write('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"store\.jsonl:2: not a trajectory"):
        list(store)
    with pytest.raises(ConfigError, match=r"kept in a \.jsonl file"):
        Store(tmp_path / "store.csv")


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path[:0] = {path!r}
from test_trajectories import Store, episode
store = Store({store!r})
for i in range(10**6):
    store.append(episode("ab" * 200, 1.0, index=i))
    print(i, flush=True)
"""


def test_what_was_said_to_be_written_survives_a_kill(tmp_path: Path):
    target = tmp_path / "store.jsonl"
    path = [str(Path(__file__).parent), str(Path(guerdon.__file__).parent.parent)]
    code = WRITER.format(path=path, store=str(target))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        told = [int(next(writer.stdout)) for _ in range(20)]
        os.kill(writer.pid, signal.SIGKILL)
        told += [int(line) for line in writer.stdout if line.endswith("\n")]
    kept = [t.index for t in Store(target)]
    assert kept == list(range(len(kept))) and len(kept) >= len(told) == told[-1] + 1
    Store(target).append(episode("a", 0.0, index=len(kept)))
    assert [t.index for t in Store(target)] == [*kept, len(kept)]


def _append(path: Path, first: int) -> None:
    for index in range(first, first + 40):
        Store(path).append(episode("abc" * 100, 1.0, index=index))


def test_two_processes_may_append(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(tmp_path / "store.jsonl", first)) for first in (0, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    indices = [t.index for t in Store(tmp_path / "store.jsonl")]
    assert sorted(indices) == [*range(40), *range(100, 140)]
    for first in (0, 100):
        assert [i for i in indices if first <= i < first + 40] == list(range(first, first + 40))


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """Characters with guerdon's own template, and with ChatML, whose turns end in a line break that nobody learns."""
    own, chatml = build_tokenizer(TinyConfig()), build_tokenizer(TinyConfig())
    chatml.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chatml.chat_template = CHATML
    return {"own": own, "chatml": chatml}


END = {"own": "</s>", "chatml": "<|im_end|>"}


def learned(group: Any, completion: int, tokenizer: Any) -> tuple[str, str]:
    """Text of the tokens that are learned, and of those that are not, runs divided by `|`."""
    tokens, learn = group.sequence(completion)
    parts: dict[bool, list[str]] = {True: [], False: []}
    last = None
    for token, mask in zip(tokens, learn, strict=True):
        if bool(mask) != last:
            parts[bool(mask)].append("")
        last = bool(mask)
        parts[last][-1] += tokenizer.decode([token])
    return "|".join(parts[True]), "|".join(parts[False])


@pytest.mark.parametrize("template", ["own", "chatml"])
@pytest.mark.parametrize("kind", FEEDBACK)
def test_what_is_learned_is_what_the_agent_said_and_nothing_else(kind: str, template: str, tokenizers, tmp_path: Path):
    """Observations repeat the agent's own words, so that a mask by content would fail."""
    seen = ["say a", "say b", "say c"]
    episodes = [
        episode("abc", 1.0, seen=seen),
        episode("abd", 0.0, seen=seen),
        episode("aba", 0.5, seen=seen, learn="a"),
    ]
    write_feedback(tmp_path / "rows.jsonl", FEEDBACK[kind](episodes))
    feedback, end = read_feedback(str(tmp_path / "rows.jsonl")), END[template]
    tokenizer, found = tokenizers[template], []
    for record in feedback.records:
        group = render(record, tokenizer, max_length=10_000)
        for completion in range(len(group)):
            said, unsaid = learned(group, completion, tokenizer)
            found.append(said)
            assert unsaid.startswith(("<s><|user|>task one", "<|im_start|>user\ntask one")), "where it all begins"
    whole = {letters: "|".join(f"say {letter}{end}" for letter in letters) for letters in ("abc", "abd", "aa")}
    a, b, c, d = (f"say {letter}{end}" for letter in "abcd")
    assert (
        found
        == {
            "sft": [whole["abc"], whole["aa"]],
            "sft-each": [a, b, c, a, a],
            "preference": [whole["abc"], whole["abd"]],
            "step-preference": [c, d],
            "unpaired": [whole["abc"], whole["abd"], whole["aa"]],
            "scored": [whole["abc"], whole["abd"], whole["aa"]],
        }[kind]
    )


def test_what_others_said_stays_in_the_conversation(tokenizers):
    """A random step in the middle is seen, not learned; so is one at the end, which is then left out."""
    tokenizer = tokenizers["own"]
    task, a, b = "<s><|user|>task one</s><|assistant|>", "<|user|>after a</s><|assistant|>", "<|user|>after b</s>"
    for letters, learn, said, unsaid in (
        ("abc", "ac", "say a</s>|say c</s>", f"{task}|{a}say b</s>{b}<|assistant|>"),
        ("ab", "a", "say a</s>", task),
    ):
        (row,) = sft([episode(letters, 1.0, learn=learn)])
        group = render(Record(row["prompt"], [row["completion"]]), tokenizer, max_length=999)
        assert learned(group, 0, tokenizer) == (said, unsaid)


def test_the_store_and_all_that_it_makes_is_read_by_inspect_and_look(tmp_path: Path):
    store = Store(tmp_path / "store.jsonl")
    for t in (episode("abc", 1.0), episode("abd", 0.0), episode("c", 0.5, task="two"), episode("d", 0.0, task="two")):
        store.append(t)
    kinds = {"store": ("prompt_completion", 4)}
    for kind, make in FEEDBACK.items():
        write_feedback(tmp_path / f"{kind}.jsonl", make(store))
    kinds |= {
        "sft": ("prompt_completion", 2),
        "sft-each": ("prompt_completion", 4),
        "preference": ("preference", 2),
        "step-preference": ("preference", 2),
        "unpaired": ("unpaired_preference", 4),
        "scored": ("scored", 2),
    }
    for name, (kind, rows) in kinds.items():
        file = str(tmp_path / f"{name}.jsonl")
        found = api.inspect(file)
        assert (found["kind"], found["rows"]) == (kind, rows), name
        assert "sft" in found["methods"]
        view = api.look(file, model="tiny:layers=1,width=4,heads=1", records=rows)
        assert [record["warnings"] for record in view["records"]] == [[]] * rows
        runs = view["records"][0]["completions"][0]["runs"]
        words = "".join(run["text"] for run in runs if run["state"] == "learned")
        assert (
            words.replace("</s>", " ").split()
            == {"sft-each": "say a", "step-preference": "say c"}.get(name, "say a say b say c").split()
        )


def test_the_best_episode_of_a_task_is_preferred_to_the_worst():
    episodes = [episode("a", 0.5), episode("b", 1.0), episode("c", 0.0), episode("d", 0.9, task="two")]
    (row,) = preference(episodes)
    assert row["prompt"] == [{"role": "user", "content": "task one"}]
    assert [row[side][0]["content"] for side in ("chosen", "rejected")] == ["say b", "say c"]
    assert (row["score_chosen"], row["score_rejected"], row["task"]) == (1.0, 0.0, "one")
    assert preference(episodes, min_gap=1.0) == [] and preference([episode("a", 1.0), episode("b", 1.0)]) == []


def test_steps_are_compared_by_the_mean_return_of_those_who_took_them():
    """After a: b is worth (1 + 0) / 2, c 3/4, d 1/4; what is not learned takes no part."""
    episodes = [
        episode("ab", 1.0),
        episode("ab", 0.0),
        episode("ac", 0.75),
        episode("ad", 0.25),
        episode("ae", -1.0, learn="a"),
        episode("xb", 5.0, task="two"),
    ]
    (row,) = step_preference(episodes)
    assert [message["content"] for message in row["prompt"]] == ["task one", "say a", "after a"]
    assert row["chosen"] == [{"role": "assistant", "content": "say c"}]
    assert row["rejected"] == [{"role": "assistant", "content": "say d"}]
    assert (row["score_chosen"], row["score_rejected"], row["step"]) == (0.75, 0.25, 1)
    assert step_preference(episodes, min_gap=0.5) == []
    assert step_preference([episode("ab", 1.0), episode("ac", 1.0)]) == [], "a tie says nothing"


def test_a_step_is_known_by_its_action_and_not_by_its_words():
    """Two ways of saying a are one action; the reply of the better episode stands for it."""
    one, other, worse = episode("a", 0.4), episode("a", 0.6), episode("b", 0.0)
    worded = replace(other, steps=(Step("task one", "I say a!", "a", 0.6, "me"),))
    (row,) = step_preference([one, worded, worse])
    assert row["chosen"][0]["content"] == "I say a!" and row["score_chosen"] == pytest.approx(0.5)


def test_labels_and_scores_are_success_and_return():
    episodes = [episode("a", 0.5, success=False), episode("b", 1.0), episode("c", 0.2, task="two")]
    assert [row["label"] for row in unpaired(episodes)] == [False, True, True]
    assert [row["scores"] for row in scored(episodes)] == [[0.5, 1.0], [0.2]]
    assert len(sft(episodes)) == 2 and len(sft_each(episodes)) == 2
    silent = [episode("ab", 1.0, learn="x"), episode("ac", 0.0, learn="x")]
    assert [make(silent) for make in FEEDBACK.values()] == [[]] * len(FEEDBACK), "nothing of it was the agent's own"


def test_kinds_are_checked():
    with pytest.raises(ConfigError, match=r"make no feedback 'preferences'\. Did you mean 'preference'"):
        check_kinds(["sft", "preferences"])
