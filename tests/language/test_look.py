from __future__ import annotations

import json
from io import StringIO

from rich.console import Console

from guerdon.feedback.records import Record
from guerdon.language.look import look, render
from guerdon.language.templates import render_all
from guerdon.language.tiny import TinyConfig, build_tokenizer

TOKENIZER = build_tokenizer(TinyConfig())
CHAT = Record([{"role": "user", "content": "hi\nyou"}], ["yes", "no"], scores=[1, 0], where="f.jsonl:2")


def terminal(view, **options):
    console = Console(file=StringIO(), width=100, **options)
    console.print(render(view))
    return console.file.getvalue()


def run(text, state, special=False):
    return {"text": text, "state": state, "special": special}


def test_plain_data_says_what_is_learned_and_is_json():
    view = look([CHAT, CHAT], TOKENIZER, 1)
    assert json.loads(json.dumps(view)) == view
    assert view == {
        "template": [],
        "records": [
            {
                "where": "f.jsonl:2",
                "warnings": [],
                "prompt": [
                    run("<s><|user|>", "context", True),
                    run("hi\nyou", "context"),
                    run("</s><|assistant|>", "context", True),
                ],
                "completions": [
                    {"score": 1, "learned": 4, "cut": 0, "runs": [run("yes", "learned"), run("</s>", "learned", True)]},
                    {"score": 0, "learned": 3, "cut": 0, "runs": [run("no", "learned"), run("</s>", "learned", True)]},
                ],
            }
        ],
    }


def test_what_the_cut_takes_is_shown_and_agrees_with_rendering():
    record = Record("ab", ["cdef", "cdeg"], scores=[1, 0])
    shown = look([record], TOKENIZER, max_length=6)["records"][0]
    (group,), stats = render_all([record], TOKENIZER, max_length=6)
    assert shown["warnings"] == stats.warnings() and len(stats.warnings()) == 2
    for completion, segment in zip(shown["completions"], group.segments[1:], strict=True):
        assert completion["learned"] == segment.learn.sum() == 3 and completion["cut"] == 2
    assert shown["completions"][1]["runs"] == [run("cde", "learned"), run("g", "cut"), run("</s>", "cut", True)]


def test_a_prompt_that_leaves_no_room_is_shown_all_the_same():
    shown = look([Record("abcdef", ["x"], where="f:1")], TOKENIZER, max_length=4)["records"][0]
    assert "cut to nothing" in shown["warnings"][0]
    assert [c["learned"] for c in shown["completions"]] == [0]


def test_a_record_that_cannot_be_rendered_says_why():
    view = look([Record(None, [[{"role": "user", "content": "hi"}]], where="f:9")], TOKENIZER)
    assert view["records"] == [
        {"where": "f:9", "warnings": ["f:9: no assistant turn follows a prompt, so there is nothing to learn."]}
    ]
    assert "no assistant turn follows" in terminal(view)


def test_the_terminal_shows_special_tokens_scores_line_ends_and_colours():
    text = terminal(look([CHAT], TOKENIZER))
    assert all(
        part in text for part in ("f.jsonl:2", "<s><|user|>hi↵", "you</s><|assistant|>", "score 1, 4 learned", "no</s>")
    )
    coloured = terminal(
        look([Record("ab", ["cdefgh"])], TOKENIZER, max_length=5), force_terminal=True, color_system="standard"
    )
    assert "\x1b[32mcd" in coloured and "\x1b[9;31mefgh" in coloured and "\x1b[2mab" in coloured


def test_records_cannot_steer_the_terminal_or_the_markup():
    tokenizer = build_tokenizer(TinyConfig(), ["\x1b\x07"])
    text = terminal(
        look([Record("a\x1b[2Jb", ["[red]c[/red]\x07"], where="[bold]x")], tokenizer),
        force_terminal=True,
        color_system=None,
    )
    assert "\\x1b[2Jb" in text and "[red]c[/red]\\x07" in text and "[bold]x" in text
    assert "\x1b[2J" not in text and "\x07" not in text
