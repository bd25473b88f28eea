"""The guide to black-box models: its server is started and its programs run as they are written, with a tiny model."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from guerdon.cli import main
from pages import ROOT, TINY, blocks, commands, words

PAGE = (ROOT / "docs/llm.md").read_text(encoding="utf-8")


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Where the server of the page's one command listens."""
    (command,) = (command for block in blocks(PAGE) for command in commands(block))
    name, port = re.match(r"guerdon serve (\S+) --port (\d+)$", command).groups()  # type: ignore[union-attr]
    begun: list[uvicorn.Server] = []
    run = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: (begun.append(self), run(self, sockets)))
    argv = ["0" if word == port else TINY if word == name else word for word in words(command)]
    serving = threading.Thread(target=main, args=(argv,), daemon=True)
    serving.start()
    said = ""
    while "Ctrl-C" not in said:
        assert serving.is_alive()
        time.sleep(0.01)
        said += capsys.readouterr().out
    real = re.search(r":(\d+)/v1", said)[1]  # type: ignore[index]
    assert said.replace(real, port).replace(TINY, name) in PAGE
    yield port, real
    begun[0].should_exit = True
    serving.join(10)


def test_the_programs_of_the_guide_say_what_they_say_there(
    port: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shown: dict[str, Any] = {}
    page = [block for block in blocks(PAGE) if block.language in ("python", "text")][1:]
    assert [block.language for block in page] == ["python", "text"] * (len(page) // 2)
    for program, output in zip(page[::2], page[1::2], strict=True):
        exec(program.text.replace(*port), shown)
        said = capsys.readouterr().out
        assert len(said.splitlines()) == len(output.text.splitlines())
        if not re.search(r"chat\(|completions|total|Budget", program.text):  # which another model answers otherwise
            assert said == output.text
    assert shown["found"].stopped.startswith("the budget is spent: tokens are at ")
    assert shown["again"].asked == 0
