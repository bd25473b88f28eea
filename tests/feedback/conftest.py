from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a file by name: bytes and text as they are, anything else as JSON lines."""

    def write(name: str, *content) -> str:
        path = tmp_path / name
        if len(content) == 1 and isinstance(content[0], bytes | str):
            path.write_bytes(content[0] if isinstance(content[0], bytes) else content[0].encode())
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
        return str(path)

    return write
