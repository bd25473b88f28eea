from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guerdon.errors import ConfigError
from guerdon.training.distributed import Distribution
from training import two_processes

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "accelerate"


def test_one_process_is_by_itself():
    code = (
        "import sys; from guerdon.training.distributed import Distribution; d = Distribution.start(); "
        "assert (d.rank, d.world, d.is_main) == (0, 1, True); sys.exit('accelerate' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
    alone = Distribution()
    assert alone.shard([3, 1, 2], size=float) == [3, 1, 2]
    assert alone.gather_objects([1, 2]) == [1, 2]
    assert alone.any(True) and not alone.any(False)
    assert alone.reduce_metrics({"a": 6.0, "b": 2.0, "c": 0.0}, {"a": 3, "c": 0}) == {"a": 2.0, "b": 2.0}


@pytest.mark.parametrize("world", [2, 3, 8])
def test_shards_are_a_balanced_partition(world):
    sizes = torch.randint(1, 100, (37,), generator=torch.Generator().manual_seed(0)).tolist()
    items = list(enumerate(sizes))
    shards = [Distribution(rank, world).shard(items, size=lambda item: item[1]) for rank in range(world)]
    assert sorted(item for shard in shards for item in shard) == items
    assert all(shard == sorted(shard) for shard in shards)
    loads = [sum(size for _, size in shard) for shard in shards]
    assert max(loads) < 1.1 * sum(sizes) / world


def test_two_processes_equal_one(tmp_path):
    out = tmp_path / "found.safetensors"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "cpu-2.yaml")]
    port = ["--main_process_port", str(20_000 + os.getpid() % 20_000)]
    command = [*launch, *port, str(Path(two_processes.__file__)), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two, one = load_file(out), two_processes.gradients(Distribution())
    assert two.pop("gathered").tolist() == [0, 2, 1, 2]
    assert two.keys() == one.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=1e-6)
    assert one["gradient.2"].abs().sum() > 0


def test_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"DeepSpeed.*recipes/accelerate/fsdp2\.yaml"):
        Distribution.start()
    assert (RECIPES / "fsdp2.yaml").exists()


@pytest.mark.parametrize(
    ("name", "processes", "kind"),
    [("cpu-2", 2, "MULTI_GPU"), ("ddp", 8, "MULTI_GPU"), ("ddp-2-machines", 16, "MULTI_GPU")],
)
def test_accelerate_reads_the_recipes(name, processes, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(RECIPES / f"{name}.yaml"))
    assert (config.num_processes, config.distributed_type) == (processes, kind)
    assert config.mixed_precision == "no"
