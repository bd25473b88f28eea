"""The page of errors quotes what is really said: each command is run, and its message compared with the one quoted."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from guerdon.cli import main
from pages import ROOT, blocks, words

PAGE = (ROOT / "docs/errors.md").read_text(encoding="utf-8")


def test_every_message_of_the_page_is_what_is_said(new_user, capsys):
    quoted = 0
    for block in blocks(PAGE):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        if block.language != "console":
            continue
        command, _, message = block.text.replace("\\\n", " ").partition("\n")
        assert main(words(command.removeprefix("$ "))) == 2, command
        said = capsys.readouterr().err
        said = said[said.index("guerdon: ") :]
        # Messages are one long line: the page breaks it, and leaves out what differs between machines.
        parts = [re.escape(" ".join(part.split())) for part in message.split("...")]
        assert re.fullmatch(r" ?.*? ?".join(parts), " ".join(said.split())), said
        quoted += 1
    sys.modules.pop("rewards", None)
    assert quoted == PAGE.count("$ guerdon")
