"""Black-box models as agents in environments in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from guerdon.errors import ConfigError
from guerdon.language.sampling.base import Sampling
from guerdon.llm import make_client
from guerdon.llm.base import Client, Request, gather
from guerdon.llm.loop import wait
from guerdon.tasks.text.agent import Turn


class ClientAgent:
    """A model behind a client as an agent.

    Args:
        name: by which its replies are told from those of others.
        client: asks the model; its cache and budget hold here as everywhere.
        sampling: how replies are drawn; a client knows no `top_k`.
    """

    def __init__(self, name: str, client: Client, sampling: Sampling) -> None:
        if sampling.top_k:
            raise ConfigError(f"{name} does not draw among the k likeliest tokens: leave out top_k, or give top_p.")
        self.name, self.client, self.sampling = name, client, sampling
        self.identity = [wait(client.identity()), asdict(sampling)]

    @classmethod
    def load(cls, name: str, sampling: Sampling) -> ClientAgent:
        """The agent at an address, see `guerdon.llm.make_client`."""
        return cls(name, make_client(name), sampling)

    def propose(self, turns: Sequence[Turn], n: int = 1) -> list[list[str]]:
        how = self.sampling
        requests = [
            Request(
                prompt=turn.messages,
                n=n,
                max_tokens=how.max_new_tokens,
                temperature=how.temperature,
                top_p=how.top_p,
                stop=how.stop,
                seed=turn.seed % 2**31,  # the most that some servers take
            )
            for turn in turns
        ]
        return [[reply.text for reply in replies] for replies in gather(self.client, requests).complete()]
