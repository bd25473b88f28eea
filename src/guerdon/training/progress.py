"""What a person sees of a run, on standard error: a live bar in a terminal, else a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

_SHOWN = {
    "loss/total": "loss",
    "reward/mean": "reward",
    "episode/return": "return",
    "preference/accuracy": "accuracy",
    "policy/kl": "kl",
    "search/best": "best",
}
_SECONDS_BETWEEN_LINES = 5.0
_PARTS = 10_000  # of the bar


class Progress(Protocol):
    """Shows how far a run is. `done` is the share of the run in [0, 1]."""

    def begin(self, step: int, done: float) -> None: ...

    def update(self, step: int, done: float, metrics: Mapping[str, float]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Shows nothing."""

    def begin(self, step: int, done: float) -> None:
        pass

    def update(self, step: int, done: float, metrics: Mapping[str, float]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Terminal:
    """A bar and one line of figures with rich: step / total, remaining time, tokens/s, loss, reward, evaluation."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.live = self.console.is_terminal
        self.line = ""  # what has not been printed yet
        self.last_line = 0.0

    def begin(self, step: int, done: float) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self.start = (time.monotonic(), done)
        self.shown: dict[str, float] = {}  # the latest value of every metric
        if self.live:
            self.bar = Bar(BarColumn(20), TextColumn("{task.description}"), console=self.console)
            self.task = self.bar.add_task(f"step {step}", total=_PARTS, completed=round(_PARTS * done))
            self.bar.start()

    def update(self, step: int, done: float, metrics: Mapping[str, float]) -> None:
        self.shown |= metrics
        self.line = self._line(step, done)
        if self.live:
            self.bar.update(self.task, completed=round(_PARTS * done), description=self.line)
        elif time.monotonic() - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.note(self.line)
            self.last_line, self.line = time.monotonic(), ""

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.live:
            self.bar.stop()
        elif self.line:
            self.note(self.line)

    def _line(self, step: int, done: float) -> str:
        began, done_before = self.start
        left = (time.monotonic() - began) * (1 - done) / (done - done_before) if done > done_before else 0.0
        total = round(step / done) if done else "?"
        parts = [f"step {step}/{total}", f"{_duration(left)} left"]
        for name, unit in (("time/tokens_per_second", "tok/s"), ("time/steps_per_second", "steps/s")):
            if name in self.shown:
                parts.append(f"{self.shown[name]:.0f} {unit}")
        parts += [f"{label} {self.shown[name]:.4g}" for name, label in _SHOWN.items() if name in self.shown]
        parts += [f"{name} {value:.4g}" for name, value in self.shown.items() if name.startswith("eval/")][:2]
        return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
