"""Commands and programs that README and guides show are run as written, with less work, in the order of the page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from guerdon.feedback.readers import read_feedback
from guerdon.methods.base import all_methods
from pages import ROOT, blocks, commands, run, write

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
README, FEEDBACK = (ROOT / "README.md").read_text(encoding="utf-8"), PAGES["feedback.md"]
# Blocks without a language that are no commands of guerdon.
OTHERS = ("pip install ", "make ", "accelerate launch ", ".venv/bin/python ")
# Run by tests of their own, or, on the first page, those of the README.
ELSEWHERE = ("errors.md", "adding-a-method.md", "llm.md", "index.md")


@pytest.mark.parametrize("name", [name for name in PAGES if name not in ELSEWHERE])
def test_the_commands_of_a_page_work_as_they_are_written(name, new_user):
    for block in blocks(PAGES[name]):
        if block.title:
            write(block)
        elif block.language == "python":
            exec(block.text, {})
        for command in commands(block):
            assert run(command) == 0, command
    sys.modules.pop("rewards", None)


def test_the_commands_of_the_readme_work_as_they_are_written(new_user):
    (recipe,) = (block for block in blocks(README) if block.language == "yaml")
    Path("recipe.yaml").write_text(recipe.text)
    for block in blocks(README):
        for command in commands(block):
            assert run(command) == 0, command
    assert json.loads(Path("faster/config.json").read_text())["options"]["lr"] == 2e-6
    settings = json.loads(Path("comparison/comparison.json").read_text())["settings"]
    assert [row["name"] for row in settings["methods"]] == ["sft", "dpo", "dpo-norm"]


def test_the_python_of_the_readme_works_as_it_is_written(new_user, capsys):
    (code,) = (block for block in blocks(README) if block.language == "python")
    exec(code.text, {})
    assert json.loads(Path("loose/status.json").read_text())["state"] == "done"
    assert "One seed per method is no result" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", *PAGES])
def test_every_block_of_a_page_is_commands_a_file_or_says_what_else(name):
    page = README if name == "README.md" else PAGES[name]
    for block in blocks(page):
        for line in block.text.replace("\\\n", " ").splitlines() if not block.language else ():
            assert not line.strip() or line.startswith(("guerdon ", *OTHERS)), line


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_of_the_repository_lead_to_files(name):
    file = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text(encoding="utf-8"))
    assert not [link for link in links if not (file.parent / link).exists()]


def test_the_first_page_has_the_commands_of_the_readme():
    first = [line.partition(" #")[0].rstrip() for line in blocks(README)[2].text.splitlines()]
    assert blocks(PAGES["index.md"])[0].text.splitlines() == first


@pytest.mark.parametrize("name", re.findall(r"^\| ([a-z ]+) \| .* \| `\{", FEEDBACK, re.MULTILINE))
def test_the_examples_of_feedback_have_the_type_that_is_said(name, tmp_path):
    kinds = {
        "language modelling": "language_modeling",
        "prompt and completion": "prompt_completion",
        "preference": "preference",
        "unpaired preference": "unpaired_preference",
        "ratings": "scored",
        "steps of one answer": "stepwise_supervision",
        "prompts": "prompt_only",
    }
    (row,) = re.findall(rf"^\| {name} \| .* \| `(\{{.*\}})` \|$", FEEDBACK, re.MULTILINE)
    (tmp_path / "file.jsonl").write_text(row)
    assert read_feedback(str(tmp_path / "file.jsonl")).kind == kinds.pop(name)


def test_readme_lists_every_method():
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \|", README, re.MULTILINE)
    built_in = {name: cls for name, cls in all_methods().items() if cls.__module__.startswith("guerdon.")}
    assert dict(rows) == {name: cls.learns_from for name, cls in built_in.items()}
