"""What the benchmarks share: sides in processes of their own, taken in turn; data; peaks; the report.

A side is a function that builds something once and returns a step, which can then be taken again and again. Each side
has its own process, so that neither threads, caches, memory nor global settings of one touch the other.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
OPEN = ExitStack()  # what a side keeps open for as long as its process lives
PACKAGES: tuple[str, ...] = ("torch", "transformers", "trl", "accelerate", "numpy")

TOLERANCE = 1e-4  # relative, of losses and gradient norms in fp32
Build = Callable[..., Callable[[], Any]]


@dataclass(frozen=True)
class Step:
    """One step of a side.

    Attributes:
        cpu, wall: seconds; cpu is that of the whole process and so of all its threads.
        peak: bytes of resident memory at most during the step.
        result: what the step returned.
    """

    cpu: float
    wall: float
    peak: int
    result: Any


class Side:
    """A process that builds one side of a comparison and takes a step whenever it is asked to.

    Args:
        threads: of torch in that process.
        build: a function at the top of a module, returning the step.
        args: its arguments.
    """

    def __init__(self, threads: int, build: Build, *args: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, build, args), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def step(self) -> Step:
        self._pipe.send("step")
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit("a side has died; if it says nothing above, the machine has run out of memory") from None

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, threads: int, build: Build, args: Sequence[Any]) -> None:
    import torch

    torch.set_num_threads(threads)
    with OPEN, suppress(EOFError):
        step = build(*args)
        pipe.send("ready")
        while pipe.recv():
            forget_peak()
            cpu, wall = time.process_time(), time.perf_counter()
            result = step()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            pipe.send(Step(cpu, wall, peak_memory(), result))


def forget_peak() -> None:
    """Let `peak_memory` start again from now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes of resident memory at most since `forget_peak`; where there is no /proc, since the process began."""
    try:
        line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return int(line.split()[1]) * 1024


def alternate(ours: Side, peer: Side, repeats: int) -> tuple[list[Step], list[Step]]:
    """`repeats` counted steps of each side, taken in turn, so that load on the machine meets both alike."""
    for side in (ours, peer):
        side.step()  # the first one allocates the optimiser's state
    pairs = [(ours.step(), peer.step()) for _ in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def ratio(peer: Sequence[Step], ours: Sequence[Step], clock: str) -> dict[str, float]:
    """Median of peer / ours over pairs of neighbouring steps, with its bootstrap 95% interval over the pairs."""
    pairs = np.array([getattr(p, clock) / getattr(o, clock) for p, o in zip(peer, ours, strict=True)])
    drawn = np.random.default_rng(0).choice(pairs, (10_000, len(pairs)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return {"median": float(np.median(pairs)), "low": float(low), "high": float(high)}


def summary(steps: Sequence[Step]) -> dict[str, Any]:
    """Median, least and most of the steps' seconds, and the highest of their peaks of memory."""
    found: dict[str, Any] = {"repeats": len(steps), "peak_gib": max(s.peak for s in steps) / 2**30}
    for clock in ("cpu", "wall"):
        seconds = [getattr(s, clock) for s in steps]
        found[clock] = {"median": float(np.median(seconds)), "min": min(seconds), "max": max(seconds)}
    return found


# Data: English text that comes with the repository, so that log-probs are those of a model that reads sense.


def text_tokens(tokenizer: Any, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Runs of tokens of the given lengths from random places of a text."""
    tokens = tokenizer((HERE.parent / "LICENSE").read_text(encoding="utf-8")).input_ids
    rng = np.random.default_rng(seed)
    starts = [int(rng.integers(0, len(tokens) - n)) for n in lengths]
    return [tokens[s : s + n] for s, n in zip(starts, lengths, strict=True)]


def text_groups(tokenizer: Any, prompts: int, completions: int, shape: tuple[int, int], seed: int = 0) -> list[Any]:
    """Groups with exactly `shape` (prompt, completion) tokens: rows of equal length, in which no side has to pad."""
    from guerdon.language.groups import Group

    groups = []
    for i in range(prompts):
        prompt, *answers = text_tokens(tokenizer, [shape[0], *[shape[1]] * completions], seed * prompts + i)
        groups.append(Group.of(prompt, answers, values={}))
    return groups


def noisy_logps(groups: Sequence[Any], model: Any, name: str, noise: float, seed: int = 0) -> None:
    """Set `name` on learned tokens: fp32 log-probs of `model` with noise, so that no loss stands at its start."""
    from guerdon.language.policy import annotate

    annotate(model, groups, name, "logps", 1.0, 8192)
    rng = np.random.default_rng(seed)
    for group in groups:
        for segment in group.segments[1:]:
            segment.values[name] = segment.values[name] + rng.normal(0, noise, len(segment)).astype(np.float32)


# The two trainers


def our_step(method: Any, groups: Callable[[Any], list[Any]], precision: str, **options: Any) -> Callable[[], Any]:
    """guerdon's update as its loop takes it: totals, packing, forward, backward, clipping, AdamW, metrics.

    Args:
        groups: makes the credited groups of a batch from the run.
        options: of `guerdon.training.config.LanguageTraining`.
    """
    import tempfile

    from guerdon.training.config import LanguageTraining
    from guerdon.training.distributed import Distribution
    from guerdon.training.language import LanguageRun

    config = LanguageTraining(
        **{"model": MODEL, "task": "reasoning-gym:chain_sum", "precision": precision, **options}  # type: ignore[arg-type]
    )
    run = LanguageRun(method, config, Distribution(), Path(tempfile.mkdtemp()))
    run.cursor.step = 1  # the checks of a run's first update are not part of a step
    batch = groups(run)

    def step() -> dict[str, float]:
        metrics = method.update(run, batch)
        return {"loss": metrics["loss/total"], "grad_norm": metrics["optim/grad_norm"]}

    return step


# How TRL may be set. Its default is bf16 autocast over fp32 weights with gradient checkpointing. Weights in bf16 are
# here for their speed: without fp32 masters most updates of this learning rate are lost in rounding.
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"dtype": "float32", "options": {}},
    "autocast": {"dtype": "float32", "options": {"bf16": True, "gradient_checkpointing": False}},
    "bf16 weights": {"dtype": "bfloat16", "options": {"bf16": False, "gradient_checkpointing": False}},
    "fp32": {"dtype": "float32", "options": {"bf16": False, "gradient_checkpointing": False}},
}
# The same optimiser on both sides: AdamW with TRL's betas and epsilon, which are ours too.
OUR_OPTIMIZER: dict[str, Any] = {"lr": 1e-6, "schedule": "constant", "warmup": 0.0, "max_grad_norm": 1.0}
TRL_OPTIONS: dict[str, Any] = {
    "output_dir": "trl",
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def trl_step(trainer: Any, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """TRL's step as its loop takes it on a collated batch: training_step, clipping, optimiser, schedule, zero_grad."""
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    model, _ = trainer._prepare_for_training(1000, None, None)
    trainer.current_gradient_accumulation_steps = 1

    def step() -> dict[str, float]:
        loss = trainer.training_step(model, dict(inputs), None)
        norm = trainer._clip_grad_norm(model)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        return {"loss": float(loss), "grad_norm": float(norm)}

    return step


def quiet() -> None:
    """No progress bars, advice or look-ups of the peers' libraries."""
    import logging
    import warnings

    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", ACCELERATE_USE_CPU="true")
    warnings.filterwarnings("ignore")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)


# What the machine can do, and what a step needs


def matmul_peak(precision: str, threads: int) -> float:
    """FLOP/s of a large square matmul, the best of many, by CPU time on one thread and by the clock on several.

    In fp32 by torch's own library or by oneDNN, whichever is faster: off Intel's CPUs the former has half the speed.
    """
    import torch

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    n = 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    ways: list[Callable[[], Any]] = [lambda: a @ b]
    if torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    best = float("inf")
    for _ in range(20):
        for multiply in ways:
            start = clock()
            multiply()
            best = min(best, clock() - start)
    return 2 * n**3 / best


def useful_flops(groups: Sequence[Any], config: Any, logits: bool) -> float:
    """FLOPs that an update of these groups needs, if every shared token is computed once.

    6 x parameters outside the embedding x unique tokens + 8 x width x vocabulary x learned tokens (forward, once more
    in the backward pass, two gradients) + 12 x attention width x layers x (token, token that it sees) pairs.
    """
    from guerdon.language.packing import pack

    d, kv = config.hidden_size, config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    body = config.num_hidden_layers * (2 * d * d + 2 * d * kv + 3 * d * config.intermediate_size)
    seen = int(pack(groups).layout.mask().sum())
    tokens, learned = sum(g.unique_tokens for g in groups), sum(g.learned_tokens for g in groups)
    head = 8.0 * d * config.vocab_size * learned if logits else 0.0
    return 6.0 * body * tokens + head + 12.0 * d * config.num_hidden_layers * seen


# Comparison and report


def check_equal(threads: int, ours: tuple[Any, ...], peer: tuple[Any, ...]) -> dict[str, Any]:
    """Take two steps of each side, which must agree in loss and gradient norm before and after the first update.

    Args:
        ours, peer: what `Side` builds: a function and its arguments.

    Raises:
        SystemExit: the sides do not compute the same.
    """
    results = []
    for what in (ours, peer):  # one after the other: in fp32 both at once would need much memory
        with Side(threads, *what) as side:
            results.append([side.step().result for _ in range(2)])
    found: dict[str, Any] = {"tolerance": TOLERANCE}
    for when, a, b in zip(("first", "second"), *results, strict=True):
        for name in a:
            error = abs(a[name] - b[name]) / max(abs(b[name]), 1e-8)
            found[f"{name} of the {when} step"] = {"ours": a[name], "peer": b[name], "error": error}
            if not error <= TOLERANCE:
                raise SystemExit(f"{name} of the {when} step: ours {a[name]:.8g}, peer {b[name]:.8g}")
    return found


def compare_updates(
    ours: Build, trl: Build, *args: Any, flops: float, bar: float, threads: int, repeats: int
) -> dict[str, Any]:
    """Equality in fp32, then our update in bf16 and TRL's at each of its settings, in turn.

    Args:
        ours, trl: build a side from ("fp32" or "bf16", or the name of a setting) and `args`.
        flops: that one update needs.
        bar: what the ratio to TRL's best setting must reach.
    """
    equality = check_equal(threads, (ours, "fp32", *args), (trl, "fp32", *args))
    peers = {f"trl {setting}": (trl, setting, *args) for setting in ("autocast", "bf16 weights", "default")}
    found = compare((ours, "bf16", *args), peers, bar, threads, repeats)
    peak = matmul_peak("bf16", threads)
    return {
        **found,
        "equality_fp32": equality,
        "useful_gflop": flops / 1e9,
        "matmul_peak_gflops": peak / 1e9,
        "fraction_of_peak": flops / found["steps"]["ours"][found["clock"]]["median"] / peak,
    }


def compare(
    ours: tuple[Any, ...], peers: Mapping[str, tuple[Any, ...]], bar: float, threads: int, repeats: int
) -> dict[str, Any]:
    """Steps of ours and of each peer in turn, and the ratios of their times.

    What is shown is CPU time on one thread, since others may use the machine, and the clock's on several, which wait
    for each other.

    Args:
        ours, peers: what `Side` builds: a function and its arguments.
        bar: what the ratio to the best peer must reach.
    """
    steps: dict[str, list[Step]] = {"ours": []}
    ratios = {}
    for name, what in peers.items():
        with Side(threads, *ours) as a, Side(threads, *what) as b:
            own, steps[name] = alternate(a, b, repeats)
        steps["ours"] += own
        ratios[name] = {clock: ratio(steps[name], own, clock) for clock in ("cpu", "wall")}
    found = {name: summary(taken) for name, taken in steps.items()}
    clock = "cpu" if threads == 1 else "wall"
    return {
        "steps": found,
        "clock": clock,
        "ratio": ratios,
        "best_peer": min(ratios, key=lambda name: ratios[name][clock]["median"]),
        "bar": bar,
    }


def thread_counts() -> list[int]:
    """One, and as many as there are cores."""
    return sorted({1, os.cpu_count() or 1})


def arguments(what: str, repeats: bool = True) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on each side")
    if repeats:
        parser.add_argument("--repeats", type=int, default=5, help="counted steps of each side")
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """Hardware, versions and load."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "cpu": found.group(1) if found else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def show(name: str, found: Mapping[str, Any]) -> None:
    """Print one comparison as a small table."""
    clock = found["clock"]
    print(f"{name}: the best peer is '{found['best_peer']}', the bar {found['bar']}x", end="")
    print(f", {found['fraction_of_peak']:.0%} of matmul peak" if "fraction_of_peak" in found else "")
    for side, steps in found["steps"].items():
        s = steps[clock]
        row = f"  {side:18} {s['median']:7.2f} s {clock} [{s['min']:.2f}, {s['max']:.2f}]  {steps['peak_gib']:.1f} GiB"
        if side in found["ratio"]:
            r = found["ratio"][side][clock]
            row += f"  {r['median']:.2f}x [{r['low']:.2f}, {r['high']:.2f}]"
        print(row, flush=True)


def save(name: str, threads: int, found: Any) -> None:
    """Write `results/NAME-THREADS.json`."""
    path = HERE / "results" / f"{name}-{threads}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "threads": threads, "machine": machine(), **found}, indent=2) + "\n")
