"""Weights in shards: they compute what whole ones do, alone and in two processes, also when a run is resumed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from guerdon.errors import ConfigError, GuerdonError
from guerdon.language.forward import GroupModel
from guerdon.language.groups import Group
from guerdon.language.models import add_lora, load_model
from guerdon.language.packing import pack
from guerdon.language.policy import Policy
from guerdon.language.sampling.base import Sampling
from guerdon.language.sharding import IDLE, idle_loss, in_step, whole
from guerdon.runs import resume
from guerdon.training.distributed import FSDP, Distribution
from guerdon.training.optim import MasterAdamW
from guerdon.training.rundir import RunDir
from training import shards

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "accelerate"
MODEL = "tiny:layers=2,width=32,heads=4"
TASK = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"
GROUPS = [Group.of([5, 6, 7], [[8, 9], [10, 11, 12]]), Group.of([30, 31], [[32, 33, 34]])]
TOLERANCE = {"atol": 2e-6, "rtol": 1e-4}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Distribution]:
    """A process that holds all shards."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Distribution(sharded=True)
    torch.distributed.destroy_process_group()


def build(head: str | None = None, lora: bool = False, checkpointing: bool = False) -> GroupModel:
    torch.manual_seed(0)
    model, _ = load_model(MODEL, seed=1)
    if lora:
        model = add_lora(model, 4, 8.0)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return GroupModel(model, head)


def optimised(model: GroupModel) -> MasterAdamW:
    return MasterAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1)


def steps(model: GroupModel, optimizer: MasterAdamW, n: int) -> list[float]:
    """Gradient norms of n steps, each on two micro-batches and an idle one."""
    norms = []
    for _ in range(n):
        for part in (GROUPS[:1], GROUPS[1:], IDLE):
            outputs = model(pack(part), {"logps", "entropy"})
            loss = idle_loss(outputs) if part is IDLE else -(outputs.logps.sum() + 0.1 * outputs.entropy.sum()) / 8
            loss.backward()
            optimizer.accumulate()
        norms.append(optimizer.step())
    return norms


@pytest.mark.parametrize("kind", [{}, {"lora": True}, {"checkpointing": True}], ids=["full", "lora", "checkpointing"])
def test_shards_learn_what_a_copy_learns(alone: Distribution, kind: dict[str, bool]) -> None:
    copied, sharded = Distribution().place(build(**kind), "fp32"), alone.place(build(**kind), "fp32")
    ours, theirs = optimised(sharded), optimised(copied)
    assert ours.sharded and not theirs.sharded and ours.names == theirs.names
    assert steps(sharded, ours, 3) == pytest.approx(steps(copied, theirs, 3), rel=1e-4)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys() and state["step"] == 3
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, **TOLERANCE)
    assert ours.state_dict(keep=False).keys() == {"step"}


def test_a_state_goes_from_shards_to_a_copy_and_back(alone: Distribution) -> None:
    sharded, copied = alone.place(build(), "fp32"), Distribution().place(build(), "fp32")
    ours, theirs = optimised(sharded), optimised(copied)
    steps(sharded, ours, 2)
    theirs.load_state_dict(ours.state_dict())
    steps(copied, theirs, 1)
    again = alone.place(build(), "fp32")
    loaded = optimised(again)
    loaded.load_state_dict(theirs.state_dict())
    assert steps(again, loaded, 1) == pytest.approx(steps(copied, theirs, 1), rel=1e-4)
    torch.testing.assert_close(again(pack(GROUPS)).logps, copied(pack(GROUPS)).logps, **TOLERANCE)
    with pytest.raises(GuerdonError, match=r"another model: master\.model"):
        loaded.load_state_dict({**theirs.state_dict(), f"master.{theirs.names[0]}": torch.zeros(3, 3)})


def test_bf16_is_of_the_matmuls_and_masters_are_never_rounded(alone: Distribution) -> None:
    start = build("scores")
    copied, sharded = (d.place(copy.deepcopy(start), "bf16") for d in (Distribution(), alone))
    assert sharded.dtype == copied.dtype == torch.bfloat16
    wants = {"logps", "scores"}
    ours, theirs = sharded(pack(GROUPS), wants), copied(pack(GROUPS), wants)
    assert torch.equal(ours.logps, theirs.logps) and torch.equal(ours.scores, theirs.scores)
    masters = optimised(sharded).state_dict()
    assert all(torch.equal(masters[f"master.{name}"], p) for name, p in start.named_parameters())
    frozen = alone.place(copy.deepcopy(start).requires_grad_(False), "bf16")
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert torch.equal(frozen(pack(GROUPS)).logps, theirs.logps)


def test_sampling_from_shards_gathers_them_once_and_gives_them_back(alone: Distribution) -> None:
    _, tokenizer = load_model(MODEL)
    copied, sharded = Distribution().place(build(), "fp32"), alone.place(build(), "fp32")
    how = Sampling(max_new_tokens=8)
    ours, theirs = (Policy(m, tokenizer).answer(["1+1", "Two"], 3, how) for m in (sharded, copied))
    assert [[c.tokens for c in cs] for cs in ours] == [[c.tokens for c in cs] for cs in theirs]
    is_shard = lambda: {hasattr(p, "device_mesh") for p in sharded.parameters()}  # noqa: E731
    assert is_shard() == {True}
    with whole(sharded):
        assert is_shard() == {False}
        assert torch.equal(sharded.model.get_output_embeddings().weight, copied.model.get_output_embeddings().weight)
    assert is_shard() == {True}


def test_the_group_forward_of_shards_is_checked_against_rows(alone: Distribution) -> None:
    sharded = alone.place(build(), "fp32")
    group = Group.of(list(range(5, 60)), [list(range(20, 50)), list(range(30, 90))])
    assert 0 < sharded.group_error(group) < 1e-5
    assert not sharded.padded


def test_idle_passes_are_made_by_those_that_have_less_and_teach_nothing(
    alone: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = alone.place(build("values"), "fp32")
    optimizer = optimised(sharded)
    idle_loss(sharded(pack(IDLE), {"logps", "entropy", "values"})).backward()
    assert not optimizer.gradient.any()
    parts = [[GROUPS[0]], [GROUPS[1]]]
    assert list(in_step(sharded, parts)) == parts
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda most, op: most.fill_(4))
    assert list(in_step(sharded, parts)) == [*parts, IDLE, IDLE]
    assert list(in_step(build(), parts)) == parts


def run(out: Path, name: str, data: Path, **training: Any) -> list[Any]:
    """A job for `shards`: offline with odd batches that leave one process idle, or online."""
    common = {"model": MODEL, "out": str(out), "eval_items": 3, "threads": 1, **training}
    if name == "dpo":
        return [name, {"batch_size": 5, "lr": 1e-3}, {**common, "data": str(data), "max_tokens": 60, "max_updates": 4}]
    options = {"rounds": 2, "prompts_per_round": 3, "group_size": 4, "max_new_tokens": 6, "lr": 1e-3, "batch_size": 2}
    return [name, options, {**common, "task": TASK, "eval_samples": 2, "eval_max_new_tokens": 6}]


def assert_close(path: Path, expected: Path, exactly: bool = False) -> None:
    tolerance = {"atol": 0, "rtol": 0} if exactly else {"atol": 1e-5, "rtol": 0}
    ours, theirs = (load_file(p / "policy" / "model.safetensors") for p in (path, expected))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, **tolerance, msg=f"{path}: {name}")
    for row, other in zip(RunDir.open(path).metrics(), RunDir.open(expected).metrics(), strict=True):
        row, other = ({k: v for k, v in r.items() if not k.startswith("time/")} for r in (row, other))
        assert row == (other if exactly else pytest.approx(other, abs=1e-4, rel=1e-4)), path


@pytest.mark.slow
def test_two_processes_equal_one_and_runs_move_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "preferences.jsonl"
    pairs = [{"prompt": f"{a}+{a} is ", "chosen": f"{a + a}", "rejected": f"{a * a + 1} or so"} for a in range(30)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    job = lambda out, name, stop_at: [*run(tmp_path / out, name, data), stop_at]  # noqa: E731
    for name in ("dpo", "grpo"):
        shards.begin(*job(f"{name}-one", name, 0))
    shards.begin(*job("dpo-from-one", "dpo", 2))
    jobs = [
        job("dpo-two", "dpo", 0),
        job("dpo-resumed", "dpo", 2),
        job("grpo-resumed", "grpo", 3),
        job("dpo-from-one", "dpo", 0),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
        "GUERDON_CACHE": str(tmp_path / "cache-of-two"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "fsdp2.yaml")),
        *("--num_processes", "2", "--main_process_port", str(20_000 + os.getpid() % 20_000)),
        *(shards.__file__, json.dumps(jobs)),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_close(tmp_path / "dpo-two", tmp_path / "dpo-one")
    assert_close(tmp_path / "dpo-resumed", tmp_path / "dpo-two", exactly=True)
    assert_close(tmp_path / "grpo-resumed", tmp_path / "grpo-one")
    assert_close(tmp_path / "dpo-from-one", tmp_path / "dpo-one")
    resume(tmp_path / "grpo-resumed-stopped")
    assert_close(tmp_path / "grpo-resumed-stopped", tmp_path / "grpo-one")


@pytest.mark.parametrize(("name", "value"), [("version", "1"), ("offload_params", "true")])
def test_fsdp_options_that_would_be_ignored_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv(f"FSDP_{name.upper()}", value)
    with pytest.raises(ConfigError, match=rf"fsdp_{name}: {value}.*fsdp_{name}: {FSDP[name]}.*fsdp2\.yaml"):
        Distribution.start()


@pytest.mark.parametrize(("name", "processes"), [("fsdp2", 8), ("fsdp2-2-machines", 16)])
def test_accelerate_reads_the_recipes(name: str, processes: int) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(RECIPES / f"{name}.yaml"))
    assert (config.num_processes, config.distributed_type, config.mixed_precision) == (processes, "FSDP", "no")
    asked = {key.removeprefix("fsdp_"): str(value).lower() for key, value in config.fsdp_config.items()}
    assert asked == FSDP
