"""What methods share that have a language model write instructions: whom they ask, for what, and what a reply says.

An instruction stands before the full prompt and is judged as every other prompt is. The LLM sees search items alone.
Its replies are drawn with seeds of the run, so that a run that is resumed asks the same again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guerdon.fields import check_range
from guerdon.methods.base import Metrics
from guerdon.methods.prompting.base import PromptMethod

if TYPE_CHECKING:
    from guerdon.training.config import PromptTraining
    from guerdon.training.prompting import PromptRun, Search

TAGGED = re.compile(r"<prompt>(.*?)(?:</prompt>|$)", re.DOTALL)
# Zhou et al. 2022, figure 2 (forward generation) and section 3.3 (resampling).
PROPOSE = (
    "I gave a friend an instruction and {count} inputs. The friend read the instruction and wrote an output for every "
    "one of the inputs. Here are the input-output pairs:\n\n{pairs}\n\nThe instruction was"
)
VARY = "Generate a variation of the following instruction while keeping the semantic meaning.\n\nInput: {0}\n\nOutput:"


@dataclass(kw_only=True)
class InstructionMethod(PromptMethod):
    """Instructions that an LLM writes: whom to ask, and what it may write."""

    llm: str = ""  # who writes: an address (http://...), a run, a model or cassette:PATH; without it the model itself
    cache: str = ""  # file that keeps the replies, so that none is asked for twice, also by other runs
    instructions: tuple[str, ...] = ()  # the first ones; what is missing the LLM writes
    pairs: int = 5  # search items with answers that the LLM sees where it has no instruction to start from
    write_tokens: int = 128  # tokens of a reply
    write_temperature: float = 0.7  # of the LLM's replies

    def check_loop(self, training: PromptTraining) -> None:
        super().check_loop(training)
        check_range(vars(self), "pairs", "write_tokens", low=1)
        check_range(vars(self), "write_temperature")

    def setup(self, run: PromptRun) -> None:
        run.llm = run.writer(self.llm, self.cache)

    def write(self, run: Search, requests: Sequence[str]) -> list[str]:
        """The instruction in the reply to each request, empty where there is none."""
        from guerdon.llm import Request, gather

        assert run.llm is not None
        seeds = run.rng.integers(0, 2**31, len(requests)).tolist()
        asked = [
            Request(
                prompt=[{"role": "user", "content": text}],
                max_tokens=self.write_tokens,
                temperature=self.write_temperature,
                seed=seed,
            )
            for text, seed in zip(requests, seeds, strict=True)
        ]
        found = gather(run.llm, asked)
        replies = [reply.text for (reply,) in found.complete()]
        run.state["requests"] = run.state.get("requests", 0) + len(asked)
        run.state["tokens"] = run.state.get("tokens", 0) + found.usage().total
        return [instruction_in(text) for text in replies]

    def first(self, run: Search, count: int) -> list[str]:
        """`count` requests for instructions: variations of the given ones, or proposals that explain some items."""
        if self.instructions:
            return [VARY.format(self.instructions[i % len(self.instructions)]) for i in range(count)]
        return [proposal(run, self.pairs) for _ in range(count)]

    def judge(self, run: Search, written: Sequence[str]) -> list[int]:
        """Where the instructions stand in the archive; for an empty one the prompt without one, which is known."""
        return run.evaluate([text or run.everything for text in written])

    def progress(self, run: Search, now: list[int]) -> Metrics:
        asked = {f"llm/{name}": run.state.get(name, 0) for name in ("requests", "tokens")}
        return {**super().progress(run, now), **asked}


def proposal(run: Search, pairs: int) -> str:
    """A request for the instruction that explains some items, drawn anew."""
    chosen = run.rng.permutation(len(run.examples))[:pairs]
    shown = "\n\n".join(f"Input: {text}\nOutput: {answer}" for text, answer in (run.examples[i] for i in chosen))
    return PROPOSE.format(count=len(chosen), pairs=shown)


def instruction_in(reply: str) -> str:
    """What a reply brackets with <prompt> and </prompt>, the last one; else all of it, without quotes around it."""
    tagged = TAGGED.findall(reply)
    text = (tagged[-1] if tagged else reply).strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == '"' else text
