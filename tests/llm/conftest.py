"""A tiny policy, and a real server for it on this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from guerdon.language.forward import GroupModel
from guerdon.language.policy import Policy
from guerdon.llm import endpoint
from guerdon.llm.engine import Engine
from guerdon.llm.serving import make_app


@pytest.fixture(scope="session")
def policy(tiny: tuple[Any, Any]) -> Policy:
    model, tokenizer = tiny
    return Policy(GroupModel(model), tokenizer)


@pytest.fixture
def engine(policy: Policy) -> Engine:
    return Engine(policy)


@pytest.fixture
def served(engine: Engine) -> Iterator[str]:
    """The address of a server of `engine`, whose model is called `tiny`."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(engine, "tiny"), log_level="error"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    engine.close()
    server.should_exit = True
    thread.join(10)
    listening.close()


@pytest.fixture(autouse=True)
def no_key_and_little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
