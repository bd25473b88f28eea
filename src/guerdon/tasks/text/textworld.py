"""Text adventures of TextWorld (Cote et al. 2018), generated and compiled here; nothing is downloaded.

A task is a game of its own: rooms, things, words and quest follow from its id. Games are kept in guerdon's cache. The
interpreter is not copied: an episode is brought back by playing it again, some 2 ms a step, and checked.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import textworld
from textworld.challenges import CHALLENGES

from guerdon.control.streams import generator_of
from guerdon.errors import ConfigError, near
from guerdon.fields import check_range
from guerdon.language.models import cache_directory
from guerdon.tasks.text.base import TextEnv, numbered
from guerdon.tasks.text.names import TextSpec


@dataclass(frozen=True)
class Game:
    """Options of every game."""

    limit: int = 50  # steps of an episode
    games: int = 1000  # to train on; a tenth as many for each of the other splits
    commands: bool = True  # whether what is seen ends with the commands that there are
    walkthrough: bool = False  # whether the quest is told step by step, and not its aim alone


@dataclass(frozen=True)
class Coin(Game):
    """Coin Collector: a chain of rooms with a coin at its end; a level of 101 or more adds dead ends."""

    level: int = 5  # rooms to the coin, plus 100 for one dead end each, plus 200 for two


@dataclass(frozen=True)
class Treasure(Game):
    """Treasure Hunter: find one thing and not another, among rooms, containers and doors."""

    level: int = 5  # 1 to 30


@dataclass(frozen=True)
class Cooking(Game):
    """The Cooking Game: gather what a recipe says, prepare it, eat; foods that are held out are unknown to training."""

    recipe: int = 1  # ingredients
    take: int = 1  # of them, those that have to be found
    go: int = 6  # rooms: 1, 6, 9 or 12
    open: bool = False  # whether doors and containers are closed
    cook: bool = False  # whether ingredients have to be cooked
    cut: bool = False  # whether ingredients have to be cut
    drop: bool = False  # whether hands are few


@dataclass(frozen=True)
class House(Game):
    """A house with a quest, as TextWorld makes them by itself."""

    rooms: int = 3  # rooms
    objects: int = 5  # things in them
    quest: int = 3  # commands that the quest takes


GAMES: dict[str, tuple[type[Game], str]] = {
    "coin": (Coin, "tw-coin_collector"),
    "treasure": (Treasure, "tw-treasure_hunter"),
    "cooking": (Cooking, "tw-cooking"),
    "house": (House, ""),
}


class TextWorld(TextEnv):
    """`textworld:coin`, `textworld:treasure`, `textworld:cooking`, `textworld:house`.

    The reward is what the game's score rises by; the episode ends when the game is won or lost. Any command is taken,
    the game says what it makes of it; `info["actions"]` are those that lead somewhere.
    """

    copies: ClassVar[bool] = False
    closed: ClassVar[bool] = False

    def __init__(self, name: str, game: str, options: Game) -> None:
        check_range(vars(options), "games", low=1)
        super().__init__(
            name,
            numbered(options.games, max(options.games // 10, 1), max(options.games // 10, 1)),
            instruction="You play a text adventure. An action is one command, for example: go north",
            limit=options.limit,
        )
        self.game, self.options = game, options
        self._running: Any = None

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _begin(self) -> str:
        self.close()
        infos = textworld.EnvInfos(
            description=True,
            objective=True,
            score=True,
            won=True,
            lost=True,
            admissible_commands=True,
            policy_commands=True,
        )
        self._running = textworld.start(str(self._compiled()), infos)
        self._now = self._running.reset()
        self.state, self._score = None, int(self._now.score)
        return f"{_plain(self._now.objective)}\n\n{_plain(self._now.description)}{self._commands()}"

    def _act(self, action: str) -> tuple[str, float, bool]:
        before = self._score
        self._now, self._score, _ = self._running.step(" ".join(action.split()) or "wait")
        over = bool(self._now.won or self._now.lost)
        told = _plain(self._now.feedback)
        return (told if over else f"{told}{self._commands()}"), float(self._score - before), over

    def _actions(self) -> list[str]:
        return list(self._now.admissible_commands)

    def _commands(self) -> str:
        return f"\n\nCommands: {', '.join(self._actions())}" if self.options.commands else ""

    def _succeeded(self) -> bool:
        return bool(self._now.won)

    def expert(self) -> str:
        """The next command of the shortest way; where it is lost there is none, and looking does no harm."""
        return next(iter(self._now.policy_commands), "look")

    def _compiled(self) -> Path:
        """The file of the task's game, which is made where it is not there yet."""
        options = {
            name: value for name, value in asdict(self.options).items() if name not in ("games", "limit", "commands")
        }
        made = f"{textworld.__version__} {self.game} {options} {self.task}"
        target = cache_directory() / "textworld" / hashlib.blake2b(made.encode(), digest_size=12).hexdigest()
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
                self._write(Path(scratch) / "made" / "game.z8")
                try:
                    (Path(scratch) / "made").rename(target)
                except OSError:
                    if not target.is_dir():  # otherwise another process was first, and its game is the same
                        raise
        return target / "game.z8"

    def _write(self, path: Path) -> None:
        seed = int(generator_of(0, f"{self.game} {self.task}").integers(2**31))
        textworld.g_rng.set_seed(seed)
        given = textworld.GameOptions()
        given.seeds, given.path = seed, str(path)
        given.grammar.only_last_action = not self.options.walkthrough
        settings = asdict(self.options)
        challenge = GAMES[self.game][1]
        try:
            if challenge:
                split = self.split_of(self.task)
                game = CHALLENGES[challenge][1](settings | {"split": split, "recipe_seed": seed}, given)
            else:
                given.nb_rooms, given.nb_objects = settings["rooms"], settings["objects"]
                given.quest_length = settings["quest"]
                game = textworld.generator.make_game(given)
        except (ValueError, AssertionError, textworld.generator.QuestGenerationError) as error:
            raise ConfigError(f"{self.name}: no game can be made with these options: {error or 'too hard'}.") from error
        textworld.generator.compile_game(game, given)


def _plain(text: str) -> str:
    """What a game tells, without the status line, the prompt, and empty lines more than one."""
    text = re.sub(r"\n>[^\n]*$", "", text.rstrip())
    text = re.sub(r"\n\s*Would you like to RESTART.*", "", text, flags=re.DOTALL)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()


def make(spec: TextSpec) -> TextWorld:
    if spec.name not in GAMES:
        raise ConfigError(
            f"{spec.spec}: no game is called '{spec.name}'.{near(spec.name, GAMES)} There are {', '.join(GAMES)}."
        )
    return TextWorld(spec.spec, spec.name, spec.options(GAMES[spec.name][0]))
