"""Makes what the documentation says of methods, papers and benchmarks from the code and from stored results.

The pages under methods/ and papers/ and the one of the benchmarks are made as a whole; in other pages a table stands
where they say `<!-- NAME -->` or `<!-- NAME: ARGUMENT -->`.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File

from guerdon import api
from guerdon.claims.running import stored_result
from guerdon.claims.showing import plot
from guerdon.evaluation.statistics import Interval
from guerdon.evaluation.wording import interval_text
from guerdon.fields import Option, options
from guerdon.methods.base import LanguageMethod, Method, all_methods
from guerdon.methods.control import ControlMethod, OfflineControl, OnlineControl, ReplayControl
from guerdon.methods.prompting.base import PromptMethod
from guerdon.papers import Paper, papers
from guerdon.papers.catalogue import facets
from guerdon.report.plots import interval_image
from guerdon.training.config import ControlTraining, LanguageTraining, PromptTraining

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROOMS = {  # of methods, in this order; others follow
    "demonstrations": "From demonstrations",
    "preferences": "From preferences",
    "reward_models": "Reward models",
    "verifiers": "From a verifier",
    "offline": "From logged transitions",
    "online": "In simulators",
    "planning": "Planning and search",
    "prompting": "Prompts",
}
LOOPS = {  # classes whose options many methods share
    "Every method of language models": LanguageMethod,
    "The runner of language models": LanguageTraining,
    "Every method of control": ControlMethod,
    "From logged transitions": OfflineControl,
    "In simulators": OnlineControl,
    "In simulators, from a replay buffer": ReplayControl,
    "The runner of control": ControlTraining,
    "Every method of prompts": PromptMethod,
    "The runner of prompts": PromptTraining,
}
SHARED = {cls.__module__ for cls in LOOPS.values()}
# How a paragraph of a docstring begins whose lines have to stand as they are: a formula, a list, arguments.
AS_WRITTEN = re.compile(r"\w+(\(.*?\))? = |[ -]|\w+:\n ")
# An image in a page does not see the page's style sheet.
DARK = """
 @media (prefers-color-scheme: dark) {
  text { fill: #b0b8c4 } circle { fill: #6fb6ec } .interval, .seed { stroke: #6fb6ec }
 }
"""

METHODS = {name: cls for name, cls in all_methods().items() if cls.__module__.startswith("guerdon.")}
PAPERS = {paper.id: paper for paper in papers()}
RESULTS = {number: result for number in PAPERS if (result := stored_result(number))}


def on_config(config: Any) -> None:
    sections = {title: pages for entry in config.nav for title, pages in entry.items()}
    sections["Methods"] += [f"methods/{room}.md" for room in _rooms()]
    sections["Papers"] += [{f"{paper.id:02d} {paper.name}": _page(paper)} for paper in PAPERS.values()]


def on_files(files: Any, config: Any) -> None:
    made = {f"methods/{room}.md": _room(room, names) for room, names in _rooms().items()}
    made |= {_page(paper): _paper(paper) for paper in PAPERS.values()}
    made |= {f"papers/{number:02d}.svg": _image(plot(result)) for number, result in RESULTS.items()}
    for path in sorted((BENCHMARKS / "results").glob("*.json")):
        if rows := _ratios(json.loads(path.read_text(encoding="utf-8"))):
            chart = interval_image([("", [(name, ratio, ()) for name, ratio, *_ in rows])], reference=1.0)
            made[f"benchmarks/{path.stem}.svg"] = _image(chart)
    made["benchmarks.md"] = _benchmarks()
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))


def on_page_markdown(markdown: str, **_: Any) -> str:
    made = {
        "methods": _method_list,
        "options": _shared_options,
        "papers": _paper_list,
        "verbs": lambda: ", ".join(api.__all__),
    }
    return re.sub(r"<!-- (\w+)(?:: (.*?))? -->", lambda found: made[found[1]](*filter(None, [found[2]])), markdown)


# Methods --------------------------------------------------------------------------------------------------------------


def _rooms() -> dict[str, list[str]]:
    """Room -> its methods: the package under guerdon.methods in which they stand."""
    order = [*ROOMS, *sorted({_room_of(cls) for cls in METHODS.values()} - set(ROOMS))]
    rooms = {room: [name for name, cls in METHODS.items() if _room_of(cls) == room] for room in order}
    return {room: names for room, names in rooms.items() if names}


def _room_of(cls: type[Method]) -> str:
    return cls.__module__.split(".")[2]


def _room_title(room: str) -> str:
    return ROOMS.get(room, room.replace("_", " ").capitalize())


def _room(room: str, names: Sequence[str]) -> str:
    parts = [f"# {_room_title(room)}", *(_method(METHODS[name]) for name in names)]
    modules = {name: m for name, m in sorted(sys.modules.items()) if name.startswith(f"guerdon.methods.{room}.")}
    functions = {name: found for name, module in modules.items() if (found := _functions(module))}
    if functions:
        parts += ["## Functions", "The mathematics, and what else can be called from Python, by file."]
    for name, found in functions.items():
        body = "\n\n".join(found).replace("\n", "\n    ")
        parts.append(f'??? abstract "{name}"\n    {body}')
    return "\n\n".join(parts)


def _functions(module: ModuleType) -> list[str]:
    """Signature and docstring of the public functions and classes of a file that are no methods."""
    made = []
    for name, each in vars(module).items():
        public = inspect.isfunction(each) or (inspect.isclass(each) and each not in METHODS.values())
        if public and each.__module__ == module.__name__ and not name.startswith("_") and inspect.getdoc(each):
            signature = re.sub(r"'([^']*)'", r"\1", str(inspect.signature(each)))
            made.append(f"```python\n{name}{signature}\n```\n\n{_docstring(each)}")
    return made


def _method(cls: type[Method]) -> str:
    facts = [f"`{cls.__module__}`", f"learns from {'a verifier' if cls.learns_from == 'verifier' else cls.learns_from}"]
    facts += [f"[{PAPERS[number].name}](../{_page(PAPERS[number])})" for number in cls.papers]
    own = [option for option in options(cls) if option.owner.__module__ not in SHARED]
    rest = "It has also [the options that methods share](../methods.md#options-that-methods-share)."
    return "\n\n".join([f"## {cls.name}", " · ".join(facts), _docstring(cls), _option_table(own), rest])


def _docstring(documented: Any) -> str:
    paragraphs = (inspect.getdoc(documented) or "").split("\n\n")
    return "\n\n".join(f"```text\n{p}\n```" if AS_WRITTEN.match(p) else _prose(p) for p in paragraphs)


def _prose(text: str) -> str:
    """A paragraph of a docstring as Markdown: stars and underscores are signs, arXiv ids are links."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([\\*_\[\]<>#])", r"\\\1", part).replace("\\<", "&lt;") for part in parts[::2]]
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", "".join(parts))


def _option_table(listed: Iterable[Option]) -> str:
    return _table(
        ["option", "default", ""],
        ([f"`{o.name}`", _default(o.default), _prose(o.help)] for o in listed),
    )


def _default(value: Any) -> str:
    return "required" if value is MISSING else "none" if value is None else f"`{value}`"


def _method_list(learns_from: str | None = None) -> str:
    chosen = [name for names in _rooms().values() for name in names]
    if learns_from:
        chosen = [name for name in chosen if METHODS[name].learns_from == learns_from]
        assert chosen, learns_from
    rows = [
        [f"[`{name}`](methods/{_room_of(cls)}.md#{name})", *([] if learns_from else [cls.learns_from]), _gist(cls)]
        for name, cls in ((name, METHODS[name]) for name in chosen)
    ]
    return _table(["method", *([] if learns_from else ["learns from"]), ""], rows)


def _gist(cls: type[Method]) -> str:
    return _prose((inspect.getdoc(cls) or "").splitlines()[0])


def _shared_options() -> str:
    sections = []
    for title, cls in LOOPS.items():
        own = [option for option in options(cls) if option.owner is cls]
        sections += [f"### {title}", _option_table(own)]
    return "\n\n".join(sections)


# Papers ---------------------------------------------------------------------------------------------------------------


def _page(paper: Paper) -> str:
    return f"papers/{paper.id:02d}.md"


def _paper_list() -> str:
    rows = []
    for paper in PAPERS.values():
        have = [_method_link(name, "") for name in paper.methods if name in METHODS]
        said = [] if paper.claim.status == "none" else [f"claim: {paper.claim.status}"]
        what = "<br>".join([_prose(paper.gist), *filter(None, [" · ".join([*have, *said])])])
        rows.append([f"{paper.id:02d}", f"[{paper.name}]({_page(paper)})", what])
    return _table(["", "paper", "what it brings, what guerdon has of it"], rows)


def _method_link(name: str, up: str = "../") -> str:
    return f"[`{name}`]({up}methods/{_room_of(METHODS[name])}.md#{name})"


def _paper(paper: Paper) -> str:
    heads = {facet: says.split(":")[0] for facet, says in facets().items()}
    facts = [[heads[facet], ", ".join(names)] for facet, names in paper.tags.items()]
    mine = [name for name in paper.methods if name in METHODS]
    have = [["methods", ", ".join(map(_method_link, mine))]] if mine else []
    have += [["code", ", ".join(f"`{name}`" for name in paper.code)]] if paper.code else []
    have += [["recipes", ", ".join(f"`{name}`" for name in paper.recipes)]] if paper.recipes else []
    return "\n\n".join(
        [
            f"# {_prose(paper.name)}",
            f"*{_prose(paper.title)}* ([arXiv {paper.arxiv}]({paper.url})), paper {paper.id:02d} of the catalogue.",
            _prose(paper.gist),
            _table(["", ""], facts),
            "## In guerdon",
            _table(["", ""], have) if have else "Not yet.",
            *([_commands(paper.commands[name] for name in mine)] if mine else []),
            "## Claim",
            *_claim(paper),
        ]
    )


def _claim(paper: Paper) -> list[str]:
    claim = paper.claim
    if claim.status == "none":
        return ["Nobody has written an experiment for it yet."]
    if claim.status == "cannot be checked on a laptop":
        return [f"It cannot be checked on a laptop: {claim.says}"]
    again = [
        f"About {claim.minutes:g} minutes of one core; with `--quick`, which proves nothing, a few:",
        _commands([f"guerdon reproduce {paper.id}"]),
    ]
    if paper.id not in RESULTS:
        return [f"> {_prose(claim.says)}", "The full version was never run.", *again]
    result = RESULTS[paper.id]
    ran, names = result["environment"], list(dict.fromkeys(name for row in result["rows"] for name in row["metrics"]))
    where = f"guerdon {ran['guerdon']}, {ran['cores']} cores of {ran['cpu']}, torch {ran['packages']['torch']}"
    rows = [
        [
            _prose(row["where"]),
            _prose(row["arm"]),
            interval_text(Interval(**row["score"])),
            *(f"{row['metrics'][name]:.3g}" if name in row["metrics"] else "" for name in names),
        ]
        for row in result["rows"]
    ]
    return [
        f"> {_prose(claim.says)}",
        f"**{result['sentences'][0]}**",
        "\n".join(f"- {_prose(sentence)}" for sentence in result["sentences"][1:]),
        f"![{result['measures']} of every arm, with 95% intervals and seeds]({paper.id:02d}.svg)",
        f"Dots and lines: {result['measures']}, mean over {result['seeds']} seeds with its 95% interval. Ticks: seeds.",
        _table(["setting", "arm", "score", *names], rows),
        f"Run on {ran['created'][:10]} ({where}), {result['seconds'] / 60:.0f} minutes in all.",
        *again,
    ]


# Benchmarks -----------------------------------------------------------------------------------------------------------


def _benchmarks() -> str:
    sections = [(BENCHMARKS / "README.md").read_text(encoding="utf-8"), "## Results"]
    sections.append("How many times as fast as the fastest peer, with 95% intervals; the dashed line is as fast.")
    for path in sorted((BENCHMARKS / "results").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        machine, rows = found["machine"], _ratios(found)
        threads = f"{found['threads']} thread" + ("s" if found["threads"] > 1 else "")
        sections.append(f"### {path.stem.rpartition('-')[0].replace('_', ' ')}, {threads}")
        if rows:
            sections.append(f"![Ratios of {path.stem}](benchmarks/{path.stem}.svg)")
            times = [[name, peer, _times(ratio), f"{bar:g}x", _reached(ratio, bar)] for name, ratio, peer, bar in rows]
            sections.append(_table(["step", "fastest peer", "times as fast", "bar", "reached"], times))
        else:
            sections.append(_peaks(found))
        sections.append(f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}.")
    return "\n\n".join(sections)


def _ratios(found: Mapping[str, Any]) -> list[tuple[str, Interval, str, float]]:
    """(step, how many times as fast as the peer, the fastest peer, bar) of every step that was timed."""
    rows = []
    for name, each in found.items():
        if not isinstance(each, dict):
            continue
        if "best_peer" in each:
            rows.append(
                (name, _interval(each["ratio"][each["best_peer"]][each["clock"]]), each["best_peer"], each["bar"])
            )
        for precision, timed in each.items():  # of searches
            if isinstance(timed, dict) and "ratio of nodes per second" in timed:
                ratio = _interval(timed["ratio of nodes per second"])
                rows.append((f"{name}, {precision}", ratio, "deepxube", found["bar"]))
    return rows


def _interval(ratio: Mapping[str, float]) -> Interval:
    return Interval(ratio["median"], ratio["low"], ratio["high"])


def _times(ratio: Interval) -> str:
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _reached(ratio: Interval, bar: float) -> str:
    return "yes" if ratio.value >= bar else "no"


def _peaks(found: Mapping[str, Any]) -> str:
    """Bytes of memory as a table of GiB."""
    rows = [
        [name, side, f"{value / 2**30:.2f} GiB"]
        for name, sides in found.items()
        if isinstance(sides, dict) and name != "machine"
        for side, value in sides.items()
        if isinstance(value, int)
    ]
    return _table(["step", "side", "peak"], rows)


# Markdown -------------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(f"| {line} |" for line in lines)


def _commands(commands: Iterable[str]) -> str:
    return "```\n" + "\n".join(commands) + "\n```"


def _image(svg: str) -> str:
    return str(svg).replace("</style>", f"{DARK}</style>")
