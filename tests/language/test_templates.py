from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, DataError
from guerdon.feedback.records import Record
from guerdon.language.templates import prompt_ids, render, render_all, stop_ids, verify_template
from guerdon.language.tiny import TinyConfig, build_tokenizer

# As SmolLM2's, but earlier answers lose their reasoning, as Qwen3's and DeepSeek-R1's do.
FORGETS_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM_SOMETIMES = (
    "{% if messages[-1].role == 'user' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
OPENS_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def chatml(smollm2):
    return smollm2[1]


@pytest.fixture(scope="module")
def char(tiny):
    return tiny[1]


def templated(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def parts(group, tokenizer, completion=0):
    """Text that is not learned, and text that is."""
    tokens, learn = group.sequence(completion)
    return tokenizer.decode(tokens[~learn]), tokenizer.decode(tokens[learn])


def test_a_conversation_is_learned_from_its_generation_prompt_to_its_end_of_turn(chatml):
    record = Record([user("Hi")], [[assistant("Hello.")], [assistant("\nGo away")]], scores=[1, 0], where="f.jsonl:3")
    group = render(record, chatml, max_length=100)
    opening = SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert parts(group, chatml, 0) == (opening, "Hello.<|im_end|>")
    assert parts(group, chatml, 1) == (opening, "\nGo away<|im_end|>")
    assert chatml.decode(group.segments[0].tokens) == opening
    assert group.segments[0].tokens.tolist() == prompt_ids(record.prompt, chatml)
    assert group.values["score"].dtype == np.float32 and group.values["score"].tolist() == [1, 0]
    assert group.pairs == [] and group.columns["where"] == "f.jsonl:3"


def test_what_rides_along(chatml):
    record = Record("Q:", ["a", "b"], columns={"answer": "a", "prompt": "?"}, where="x:1")
    group = render(record, chatml, max_length=9)
    assert group.values == {}
    assert group.columns == {"answer": "a", "prompt": "Q:", "completions": ["a", "b"], "where": "x:1"}
    same = render(Record("Q:", ["a", "b"], scores=[1, 0], where="y:7"), chatml, max_length=9)
    other = render(Record("Q:", ["a", "c"]), chatml, max_length=9)
    assert group.key == same.key != other.key and len(group.key) == 32


def test_plain_text_is_learned_with_a_token_that_straddles_and_an_end(chatml):
    group = render(Record("What is ", ["this", "  that"]), chatml, max_length=100)
    assert parts(group, chatml, 0) == ("What is", " this<|im_end|>")
    assert parts(group, chatml, 1) == ("What is", "   that<|im_end|>")
    ended = render(Record("What is", [" this<|im_end|>"]), chatml, max_length=100)
    assert parts(ended, chatml) == ("What is", " this<|im_end|>")
    assert parts(render(Record("Stop", [""]), chatml, max_length=100), chatml) == ("Stop", "<|im_end|>")


def test_offsets_that_a_tokenizer_trims_do_not_shift_the_boundary(chatml):
    from tokenizers.processors import ByteLevel

    trimming = copy.deepcopy(chatml)
    trimming.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    for prompt, completion in [("def f(x):", "\n  return"), ("a", "  b"), ("a\n", "\n\nb "), ("it,", " ")]:
        exact, trimmed = (render(Record(prompt, [completion]), t, max_length=99) for t in (chatml, trimming))
        assert [s.learn.tolist() for s in exact.segments] == [s.learn.tolist() for s in trimmed.segments]
    assert trimming("def f", return_offsets_mapping=True).offset_mapping == [(0, 3), (4, 5)]  # the trap is real


def test_bos_comes_once(char):
    bos = char.bos_token_id
    for prompt in ("ab", "<s>ab"):
        tokens, learn = render(Record(prompt, ["cd"]), char, max_length=20).sequence(0)
        assert tokens.tolist() == [*char("abcd").input_ids, char.eos_token_id]
        assert learn.tolist() == [False] * 3 + [True] * 3
        assert prompt_ids(prompt, char) == char("ab").input_ids
    tokens, _ = render(Record([user("ab")], [[assistant("cd")]]), char, max_length=20).sequence(0)
    assert (tokens == bos).sum() == 1 and tokens[0] == bos  # the template writes it itself


def test_an_empty_prompt_starts_from_a_token(char, chatml):
    for tokenizer in (char, chatml):
        group = render(Record("", ["one", "two"]), tokenizer, max_length=20)
        assert group.segments[0].tokens.tolist() == prompt_ids("", tokenizer) == [tokenizer.bos_token_id]
        assert parts(group, tokenizer, 1) == (tokenizer.bos_token, "two" + tokenizer.eos_token)


def test_without_any_token_to_start_from_a_prompt_needs_text(chatml):
    tokenizer = copy.deepcopy(chatml)
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.chat_template = None
    groups, stats = render_all([Record("Q:", [" one", " two"])], tokenizer, max_length=9)
    assert parts(groups[0], tokenizer, 1) == ("Q:", " two")
    assert stats.warnings() == ["2 completions have no end-of-sequence token: the policy will not learn to stop"]
    for completions in (["one", "two"], []):
        with pytest.raises(DataError, match="f:5: an answer begins at the first token of the text"):
            render(Record("", completions, where="f:5"), tokenizer, max_length=9)


def test_several_turns_learn_the_assistant_alone(chatml):
    tool = {"role": "tool", "content": "42"}
    answer = [assistant("Let me look"), tool, assistant("It is 42"), user("Thanks")]
    group = render(Record([user("How much?"), assistant("Of what?"), user("All")], [answer]), chatml, max_length=200)
    context, learned = parts(group, chatml)
    assert learned == "Let me look<|im_end|>It is 42<|im_end|>"
    assert context.endswith("assistant\n\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n")
    assert "Of what?" in context and "Thanks" not in context


def test_an_answer_that_begins_with_a_tool_turn(chatml):
    group = render(Record([user("Q")], [[{"role": "tool", "content": "t"}, assistant("A")]]), chatml, max_length=99)
    assert parts(group, chatml)[1] == "A<|im_end|>"


def test_language_modelling(char, chatml):
    messages = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    group = render(Record(None, [messages]), chatml, max_length=200)
    assert parts(group, chatml)[1] == "b<|im_end|>d<|im_end|>"
    assert len(group.segments[0]) == np.flatnonzero(group.sequence(0)[1])[0]
    # Nothing precedes the first token of a text, unless the tokenizer begins it with one.
    assert parts(render(Record(None, ["one two"]), chatml, max_length=9), chatml) == ("one", " two<|im_end|>")
    assert parts(render(Record(None, ["one"]), char, max_length=9), char) == ("<s>", "one</s>")


def test_a_first_turn_of_the_assistant_answers_nothing(chatml):
    group = render(Record(None, [[assistant("Welcome"), user("Hi"), assistant("Yes?")]]), chatml, max_length=99)
    context, learned = parts(group, chatml)
    assert learned == "Yes?<|im_end|>" and "Welcome" in context
    with pytest.raises(DataError, match=r"d:1: no assistant turn"):
        render(Record(None, [[assistant("Welcome")]], where="d:1"), chatml, max_length=99)


def test_strings_may_stand_for_one_turn(chatml):
    turns = render(Record([user("Q")], [[assistant("A")]]), chatml, max_length=99)
    for record in (Record([user("Q")], ["A"]), Record("Q", [[assistant("A")]])):
        assert np.array_equal(render(record, chatml, max_length=99).sequence(0), turns.sequence(0))


def test_a_prompt_alone(chatml):
    group = render(Record([user("Q")], []), chatml, max_length=99)
    assert len(group) == 0 and group.segments[0].tokens.tolist() == prompt_ids([user("Q")], chatml)
    with pytest.raises(DataError, match=r"f:4: the prompt has \d+ tokens"):
        render(Record([user("Q")], [], where="f:4"), chatml, max_length=9)


def test_a_template_that_forgets_reasoning_is_refused_where_it_matters(chatml):
    tokenizer = templated(chatml, FORGETS_REASONING)
    first, second = assistant("<think>x</think>one"), assistant("<think>y</think>two")
    last = render(Record([user("a"), first, user("b")], [[second]]), tokenizer, max_length=99)
    assert parts(last, tokenizer)[1] == "<think>y</think>two<|im_end|>"
    with pytest.raises(DataError) as caught:
        render(Record([user("a")], [[first, user("b"), second]], where="data.jsonl:7"), tokenizer, max_length=99)
    message = str(caught.value)
    assert message.startswith("data.jsonl:7: the chat template rewrites earlier turns")
    assert verify_template(tokenizer) == [
        "it rewrites earlier answers, so that only the last one of a conversation can be learned"
    ]
    assert "<think>x" in message and "at character 51" in message and "only appends" in message


def test_a_template_that_adds_a_system_prompt_only_sometimes_is_refused(chatml):
    tokenizer = templated(chatml, SYSTEM_SOMETIMES)
    with pytest.raises(DataError, match="at character 12 it first writes"):
        render(Record([user("a")], [[assistant("b")]]), tokenizer, max_length=99)
    assert "rewrites the prompt" in verify_template(tokenizer)[0]


@pytest.mark.parametrize("content", ["Fine.", "Fine.\n", "Fine. "])
def test_a_template_without_an_end_is_given_one(chatml, content):
    tokenizer = templated(chatml, NO_END)
    group = render(Record([user("Well?")], [[assistant(content)]]), tokenizer, max_length=99)
    context, learned = parts(group, tokenizer)
    assert learned.removeprefix(" ") == f"{content}<|im_end|>"
    assert context + learned == f"user: Well?\n\nassistant: {content}<|im_end|>"
    assert verify_template(tokenizer) == [
        "it ends an answer without an end-of-turn token: the end-of-sequence token is appended instead"
    ]


def test_a_generation_prompt_that_no_answer_begins_with_is_left_out_and_counted(chatml):
    tokenizer = templated(chatml, OPENS_REASONING)
    groups, stats = render_all([Record([user("a")], [[assistant("b")]])] * 2, tokenizer, max_length=99)
    context, learned = parts(groups[0], tokenizer)
    assert (context, learned) == ("<|im_start|>user\na<|im_end|>\n", "<|im_start|>assistant\nb<|im_end|>")
    assert stats.without_generation_prompt == 2
    assert stats.warnings() == ["2 answers open otherwise than the template's generation prompt does"]
    assert "generation prompt" in verify_template(tokenizer)[0]


def test_what_a_template_refuses_is_said(chatml):
    tokenizer = templated(chatml, NO_SYSTEM)
    with pytest.raises(DataError, match=r"f:2: the chat template does not take these messages: no system role here"):
        render(Record([{"role": "system", "content": "s"}], [[assistant("b")]], where="f:2"), tokenizer, max_length=9)
    with pytest.raises(ConfigError, match="no chat template"):
        render_all([Record([user("a")], [])], templated(chatml, None), max_length=9, skip_bad=True)
    assert "no chat template" in verify_template(templated(chatml, None))[0]


def test_templates_that_are_in_order(char, chatml):
    assert verify_template(char) == verify_template(chatml) == []


def test_tools_and_template_arguments_reach_the_template(chatml):
    tokenizer = templated(chatml, "{{ (tools or []) | length }}{{ mood }}" + NO_SYSTEM)
    tools = '[{"type": "function", "function": {"name": "f"}}]'
    columns = {"tools": tools, "chat_template_kwargs": {"mood": "glad"}}
    with_tools = Record([user("a")], [[assistant("b")]], columns=columns)
    group = render(with_tools, tokenizer, max_length=99)
    assert parts(group, tokenizer)[0].startswith("1glad<|im_start|>user")
    assert group.key != render(Record(with_tools.prompt, with_tools.completions), tokenizer, max_length=99).key


def test_an_end_of_turn_that_is_not_the_end_of_sequence_stops_too(chatml, smollm2):
    tokenizer = copy.deepcopy(chatml)
    tokenizer.eos_token = "<|endoftext|>"
    turn, sequence = chatml.eos_token_id, tokenizer.eos_token_id
    assert turn != sequence and stop_ids(tokenizer) == {turn, sequence}
    assert parts(render(Record([user("a")], ["b"]), tokenizer, max_length=99), tokenizer)[1] == "b<|im_end|>"
    assert parts(render(Record("a", [" b"]), tokenizer, max_length=99), tokenizer)[1] == " b<|endoftext|>"
    model = copy.copy(smollm2[0])
    model.generation_config = copy.copy(model.generation_config)
    model.generation_config.eos_token_id = [2, 7]
    assert stop_ids(tokenizer, model) == {turn, sequence, 7}


def test_cutting_is_counted_and_loses_the_end(char):
    records = [Record("ab", ["cdef", "cdeg"], scores=[1, 0]), Record("ab", ["c", "d"], scores=[1, 0])]
    groups, stats = render_all(records, char, max_length=6)
    assert [parts(groups[0], char, i)[1] for i in (0, 1)] == ["cde", "cde"]
    assert [parts(groups[1], char, i)[1] for i in (0, 1)] == ["c</s>", "d</s>"]
    assert (stats.cut, stats.no_eos, stats.identical_after_cut, stats.dropped) == (2, 2, 1, 0)
    assert (stats.records, stats.groups, stats.completions, stats.tokens, stats.learned_tokens) == (2, 2, 4, 16, 10)
    assert stats.warnings() == [
        "2 of 4 completions were cut at the maximum length",
        "1 pairs of completions became identical by the cut and can teach nothing",
    ]
    assert render_all(records, char, max_length=8)[1].warnings() == []


def test_overlong_records_are_dropped_or_refused(char):
    records = [Record("ab", ["cdef"], where="f:1"), Record("ab", ["c"], where="f:2"), Record("abcdefgh", ["c"])]
    groups, stats = render_all(records, char, max_length=6, overlong="drop")
    assert [g.columns["where"] for g in groups] == ["f:2"] and stats.dropped == 2
    with pytest.raises(DataError, match="f:1: 8 tokens are more than the maximum length of 6"):
        render_all(records, char, max_length=6, overlong="refuse")


def test_a_completion_cut_to_nothing_is_refused_by_name(char):
    records = [Record("abcdef", ["x"], where="f:1"), Record("a", ["x"], where="f:2")]
    with pytest.raises(DataError, match=r"f:1: the prompt has 7 tokens.*cut to nothing.*--max-length"):
        render_all(records, char, max_length=7)
    groups, stats = render_all(records, char, max_length=7, skip_bad=True)
    assert len(groups) == 1 and len(stats.bad) == 1 and stats.bad[0].startswith("f:1")
    assert stats.warnings()[0].startswith("1 of 2 records could not be rendered; the first: f:1")


def test_unknown_characters_are_counted(char):
    _, stats = render_all([Record("a☃", ["☃b"])], char, max_length=9)
    assert stats.unknown == 2 and stats.warnings() == ["2 of 6 tokens are unknown to the tokenizer"]


def test_chunks_keep_the_order_and_leave_out_the_bad(chatml):
    records = [Record(f"{i} is", [f" {i}"] * (i % 3), where=f"f:{i}") for i in range(600)]
    records[300] = Record([], [[assistant("a")]], where="f:300")
    groups, stats = render_all(records, chatml, max_length=20, skip_bad=True)
    assert [g.columns["where"] for g in groups] == [f"f:{i}" for i in range(600) if i != 300]
    assert stats.bad == ["f:300: the prompt has no messages."]
    for i, group in enumerate(groups[:300]):
        assert len(group) == i % 3
        assert all(parts(group, chatml, c) == (f"{i} is", f" {i}<|im_end|>") for c in range(len(group)))


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="fast tokenizer"):
        prompt_ids("a", Slow())


@pytest.fixture(scope="module")
def letters():
    return build_tokenizer(TinyConfig(), ["é☃🙂"])


TEXT = st.text(st.sampled_from("aeiou bcdt.,:!?'\n 1279-é☃🙂"), max_size=25)


@settings(max_examples=150, deadline=None)
@given(prompt=TEXT.filter(bool), completions=st.lists(TEXT, min_size=1, max_size=4))
def test_prompt_and_completion_are_the_tokens_of_the_whole_and_the_mask_is_exact(letters, chatml, prompt, completions):
    for tokenizer in (chatml, letters):
        group = render(Record(prompt, completions), tokenizer, max_length=1000)
        eos = tokenizer.eos_token_id
        for index, completion in enumerate(completions):
            tokens, learn = group.sequence(index)
            whole = tokenizer(prompt + completion, return_offsets_mapping=True)
            started = tokens[: len(tokens) - 1 - len(whole.input_ids)].tolist()
            assert started in ([], [tokenizer.bos_token_id])
            assert tokens.tolist() == started + whole.input_ids + [eos]
            holds = [end > len(prompt) for _, end in whole.offset_mapping]
            assert learn.tolist() == [False] * len(started) + holds + [True]
            assert tokenizer.decode(tokens[learn]).removesuffix(tokenizer.eos_token).endswith(completion)
        assert not group.segments[0].learn.any()
        children = group.segments[1:]
        assert any(c.learn[0] for c in children) or len({c.tokens[0] for c in children}) > 1  # no more can be shared


@settings(max_examples=50, deadline=None)
@given(question=TEXT, answers=st.lists(TEXT, min_size=1, max_size=3))
def test_conversations_are_the_tokens_of_the_whole(letters, chatml, question, answers):
    for tokenizer in (chatml, letters):
        group = render(Record([user(question)], [[assistant(a)] for a in answers]), tokenizer, max_length=1000)
        for index, answer in enumerate(answers):
            tokens, learn = group.sequence(index)
            whole = tokenizer.apply_chat_template([user(question), assistant(answer)], tokenize=False).rstrip("\n")
            assert tokens.tolist() == tokenizer(whole, add_special_tokens=False).input_ids
            learned = tokenizer.decode(tokens[learn])
            assert learned.lstrip("\n") == (answer + tokenizer.eos_token).lstrip("\n")


def trl_sft(tokenizer, model, rows, directory):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(directory), use_cpu=True, report_to="none", completion_only_loss=True, max_length=None
    )
    return SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train_dataset


def trl_masked(row):
    return row["input_ids"], [label != -100 for label in row["labels"]]


def test_masks_equal_those_of_trl_on_plain_text(tiny, tmp_path):
    model, char = tiny
    rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "Say hi. ", "completion": "Hi there\nyou"}]
    expected = trl_sft(char, model, rows, tmp_path)
    for row, theirs in zip(rows, expected, strict=True):
        tokens, learn = render(Record(row["prompt"], [row["completion"]]), char, max_length=99).sequence(0)
        assert (tokens.tolist(), learn.tolist()) == trl_masked(theirs)


def test_masks_equal_those_of_trl_on_conversations_up_to_the_newline_after_the_end(tiny, chatml, tmp_path):
    rows = [
        {"prompt": [user("What is 2+2?")], "completion": [assistant("It is 4.")]},
        {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d e f")]},
    ]
    expected = trl_sft(chatml, tiny[0], rows, tmp_path)
    newline = chatml("\n").input_ids
    for row, theirs in zip(rows, expected, strict=True):
        tokens, learn = render(Record(row["prompt"], [row["completion"]]), chatml, max_length=99).sequence(0)
        assert (tokens.tolist() + newline, [*learn.tolist(), True]) == trl_masked(theirs)
